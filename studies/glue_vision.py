"""GLUE on images: ten experts on class-skewed shards, mixed for a target by every method, then fine-tuned.

One cell is one data set, network, concentration and seed: it trains (or finds) the experts, computes every method's
weights from the target's training and validation rows alone, and reports test accuracy before and after the same
fine-tuning. What the paper does not say (step sizes, steps, sizes of everything, fine-tuning) is ours.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from studies.cells import Cell, Study, Tables
from studies.glue_unlike import run_unlike

NETS = ("resnet20", "mobilenet_v2", "vit8")
DELTAS = (0.1, 0.5, 1.0)
SEEDS = (0, 1, 2)
#: How the mixtures are searched for; chosen on validation rows in cells whose id begins with "tried".
SEARCH: dict[str, Any] = {"steps": 150, "learning_rate": 0.1, "mu": 0.1, "normalise": True, "schedule": "cosine"}
#: Off the simplex what moves are weights, a tenth of the logits' scale.
AFFINE: dict[str, Any] = {"learning_rate": 0.01, "mu": 0.02}
BATCH = 128
#: Minibatches that running statistics are estimated from: one pass over the target's training images.
RECALIBRATION = 8
#: The same for every starting point, not tuned.
FINE_TUNING: dict[str, dict[str, Any]] = {
    "resnet20": {"epochs": 5, "learning_rate": 0.01, "optimizer": "sgd"},
    "mobilenet_v2": {"epochs": 5, "learning_rate": 0.01, "optimizer": "sgd"},
    "vit8": {"epochs": 5, "learning_rate": 3e-4, "optimizer": "adamw", "weight_decay": 0.05},
}
#: Methods in the order of the tables, and what they are called there.
METHODS = {
    "glue": "GLUE (SPSA, simplex)",
    "glue-affine": "SPSA, affine",
    "full-gradient": "full gradient, simplex",
    "uniform": "uniform",
    "data-size": "data size",
    "best-single": "best single expert (validation loss)",
    "logme": "LogME's choice",
    "h-score": "H-score's choice",
    "leep": "LEEP's choice",
    "greedy-soup": "greedy soup",
    "random": "random simplex point",
    "base": "shared base, no experts",
    "ensemble": "ensemble of all (K models)",
}


def _cells() -> list[tuple[str, dict[str, Any]]]:
    def cell(net: str, delta: float, seed: int, data: str = "fashion-mnist") -> tuple[str, dict[str, Any]]:
        setting = {"kind": "skewed", "data": data, "net": net, "delta": delta, "seed": seed}
        return f"{data}-{net}-delta{delta:g}-{seed}", setting

    tried = [
        (f"tried-mu{mu:g}-rate{rate:g}", {"kind": "tried", "data": "fashion-mnist", "net": "resnet20", "delta": 0.1,
                                          "seed": 100, "mu": mu, "learning_rate": rate})
        for mu, rate in ((0.1, 0.1), (0.1, 0.3), (0.1, 0.03), (0.03, 0.1), (0.3, 0.1))
    ]  # fmt: skip
    main = [cell(net, delta, seed) for seed in SEEDS for net in NETS for delta in DELTAS]
    halves = [
        (f"halves-{data}-{seed}", {"kind": "halves", "data": data, "net": "resnet20", "seed": seed})
        for data in ("mnist", "fashion-mnist")
        for seed in SEEDS
    ]
    others = [cell(net, 0.1, 0, data) for data in ("mnist", "coloured-digits") for net in NETS]
    unlike = [
        (f"unlike-fashion-mnist-{seed}", {"kind": "unlike", "data": "fashion-mnist", "delta": 0.1, "seed": seed})
        for seed in SEEDS
    ]
    return [*tried, *main, *halves, *others, *unlike]


def _experiment(setting: Mapping[str, Any]) -> Any:
    from suites.vision.experts import Setting, experiment

    common = Setting(data=setting["data"], net=setting["net"], seed=setting["seed"])
    if setting["kind"] == "halves":
        return experiment(replace(common, experiment="halves", experts=2))
    return experiment(replace(common, delta=setting["delta"]))


def run(setting: dict[str, Any]) -> dict[str, Any]:
    """Mix the experts by every method and fine-tune every mixture; or, for a tried setting, search once."""
    import torch

    from consilience.mixing.bank import ExpertBank
    from consilience.mixing.problem import TargetLoss
    from consilience.mixing.target import Target, Tensors, measure_of

    if setting["kind"] == "unlike":
        return run_unlike(setting)
    made = _experiment(setting)
    # Convolutions on a CPU are up to a third faster with weights in this order.
    module = made.network().to(memory_format=torch.channels_last)
    bank = ExpertBank.of(made.experts, module)
    target = Target(Tensors(*made.target.train), Tensors(*made.target.validation), measure_of("cross_entropy"), BATCH)
    loss = TargetLoss(bank, module, target, seed=setting["seed"], bn="recalibrate", recalibration=RECALIBRATION)
    if setting["kind"] == "tried":
        changes = {key: setting[key] for key in ("mu", "learning_rate")}
        found = _searched(bank, loss, "simplex", "spsa", setting["seed"], changes)
        return {"validation": found.validation, "alpha": found.alpha[:, 0].tolist(), "seconds": found.seconds}
    return _compared(made, module, bank, loss, setting)


def _searched(
    bank: Any, loss: Any, space: Any, optimizer: str, seed: int, changes: Mapping[str, Any] | None = None
) -> Any:
    from consilience.mixing.mix import Search, mix_bank

    values = SEARCH | dict(changes or {})
    steps, rate = values.pop("steps"), values.pop("learning_rate")
    if optimizer != "spsa":
        values = {"schedule": values["schedule"]}
    search = Search(space, optimizer, steps, rate, seed=seed, every=10, patience=5, settings=values)
    return mix_bank(bank, loss, search)


def _compared(made: Any, module: Any, bank: Any, loss: Any, setting: Mapping[str, Any]) -> dict[str, Any]:
    from consilience.mixing import baselines

    searched = {
        "glue": _searched(bank, loss, "simplex", "spsa", setting["seed"]),
        "glue-affine": _searched(bank, loss, "affine", "spsa", setting["seed"], AFFINE),
        # The plain gradient has no running scale: Adam's is its equivalent of the normalised step.
        "full-gradient": _searched(bank, loss, "simplex", "adam", setting["seed"]),
    }
    weights = {name: found.alpha[:, 0] for name, found in searched.items()} | _fixed(made, module, bank, loss, setting)
    result: dict[str, Any] = {
        "experts": {name: card["target_test_accuracy"] for name, card in made.cards.items()},
        "sigma_max": [bank.spectrum().sigma_max, bank.spectrum().sigma_max_centred],
        "methods": {},
    }
    # Methods often choose the same expert: what the same weights lead to is measured once.
    measured: dict[tuple[float, ...], dict[str, Any]] = {}
    for name, alpha in weights.items():
        key = tuple(alpha.tolist())
        if key not in measured:
            measured[key] = _tuned(made, module, loss.state(bank.table(alpha)), setting)
        result["methods"][name] = {"alpha": np.round(alpha, 5).tolist()} | measured[key]
    result["methods"]["base"] = _tuned(made, module, made.base, setting)
    every = baselines.ensemble(bank, module, made.target.test)
    result["methods"]["ensemble"] = {"before": every.accuracy, "before_loss": every.loss}
    for name, found in searched.items():
        result["methods"][name] |= {
            "steps": len(found.history.terms), "best_step": found.step, "entropy": _finite(found.entropy),
            "distance": found.distance, "left_hull": found.left_hull, "seconds": found.seconds,
            "forwards": found.counts.forwards, "backwards": found.counts.backwards,
            "validation": found.validation,
        }  # fmt: skip
    return result


def _tuned(made: Any, module: Any, state: Any, setting: Mapping[str, Any]) -> dict[str, Any]:
    """Measure a state on the test images before and after fine-tuning."""
    from consilience.mixing.fine_tune import evaluate, fine_tune

    before = evaluate(module, made.target.test, state)
    tuned = fine_tune(module, state, made.target.train, seed=setting["seed"], **FINE_TUNING[setting["net"]])
    after = evaluate(module, made.target.test, tuned.state)
    return {"before": before.accuracy, "before_loss": before.loss, "after": after.accuracy, "after_loss": after.loss}


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None


def _fixed(made: Any, module: Any, bank: Any, loss: Any, setting: Mapping[str, Any]) -> dict[str, Any]:
    """Return the weights of the methods that search nothing."""
    from consilience.mixing import baselines
    from consilience.mixing.proxies import proxy_scores

    inputs, labels = made.target.train
    states = list(made.experts.values())
    alone = [-loss.validate(bank.table(row)) for row in np.eye(len(states))]
    chosen = {
        "logme": baselines.best_single(proxy_scores(module, states, inputs, labels, "logme")),
        "h-score": baselines.best_single(proxy_scores(module, states, inputs, labels, "h_score")),
        "leep": baselines.best_single(proxy_scores(module, states, inputs, labels, "leep")),
    }
    return {
        "uniform": baselines.uniform(len(states)),
        "data-size": baselines.data_size(list(made.shard_sizes.values())),
        "best-single": baselines.best_single(alone),
        **chosen,
        "greedy-soup": baselines.greedy_soup(loss),
        "random": baselines.random_simplex(len(states), setting["seed"]),
    }


def tables(cells: Sequence[Cell]) -> Tables:
    """Build the page."""
    from studies.glue_vision_tables import page

    return page(cells)


STUDY = Study("glue_vision", _cells(), run, tables)
