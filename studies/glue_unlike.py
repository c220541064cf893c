"""Experts of two architectures: predictions mixed by GLUE's search, then distilled into one network.

Five ResNet-20 and five ViT experts of the same shards cannot be averaged. Their answers on the target's training images
are mixed with weights that SPSA learns there, chosen by validation loss, and a ResNet-20 that starts at the shared base
is distilled from the mixture on the same images.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

NETS = ("resnet20", "vit8")
SEARCH: dict[str, Any] = {"steps": 150, "rate": 0.1, "mu": 0.1}
DISTILLATION: dict[str, Any] = {"steps": 80, "batch": 128, "rate": 1e-3, "label_weight": 1.0}


def run_unlike(setting: Mapping[str, Any]) -> dict[str, Any]:
    """Mix, distil and measure; accuracies are on the target's test images."""
    import torch

    from consilience.mixing.distill import Distillation, answers_of, distill_targets, mixture
    from consilience.mixing.fine_tune import evaluate, fine_tune
    from suites.vision.experts import Setting, experiment

    made = {
        net: experiment(Setting(data=setting["data"], net=net, delta=setting["delta"], seed=setting["seed"]))
        for net in NETS
    }
    names = list(made[NETS[0]].experts)
    owner = [NETS[number % len(NETS)] for number in range(len(names))]
    experts = [made[net].network(made[net].experts[name]) for net, name in zip(owner, names, strict=True)]
    target = made[NETS[0]].target
    answers = {part: answers_of(experts, getattr(target, part)[0]).double() for part in ("train", "validation", "test")}
    found = {kind: _weights(answers, target, kind, setting["seed"]) for kind in ("logits", "probabilities")}
    uniform = np.full(len(experts), 1 / len(experts))
    alone = [_accuracy(one, target.validation[1]) for one in answers["validation"]]
    best = np.eye(len(experts))[int(np.argmax(alone))]
    mixed = {
        "best single expert (validation)": _accuracy(mixture(answers["test"], best), target.test[1]),
        "equal weights of probabilities": _accuracy(mixture(answers["test"], uniform, "probabilities"), target.test[1]),
        "equal weights of logits": _accuracy(mixture(answers["test"], uniform), target.test[1]),
        "SPSA on probabilities": _accuracy(mixture(answers["test"], found["probabilities"], "probabilities"),
                                           target.test[1]),
        "SPSA on logits": _accuracy(mixture(answers["test"], found["logits"]), target.test[1]),
    }  # fmt: skip
    own = made[NETS[0]]
    inputs, labels = target.train
    chosen = mixture(answers["train"], found["logits"]).float()
    student = own.network()
    torch.manual_seed(setting["seed"])
    distill_targets(student, inputs, chosen, Distillation(**DISTILLATION, seed=setting["seed"]), labels=labels)
    epochs = max(1, DISTILLATION["steps"] * DISTILLATION["batch"] // len(labels))
    plain = fine_tune(own.network(), own.base, target.train, target.test, epochs=epochs, seed=setting["seed"])
    mixed["a ResNet-20 distilled from SPSA on logits"] = evaluate(student, target.test).accuracy
    mixed["a ResNet-20 fine-tuned on the labels alone"] = plain.accuracy[-1]
    return {"unlike": mixed, "alpha": {kind: np.round(value, 4).tolist() for kind, value in found.items()}}


def _weights(answers: Mapping[str, Any], target: Any, kind: Any, seed: int) -> Any:
    """Learn weights on the training answers, and keep the best by validation loss."""
    from consilience.mixing.distill import learn_weights
    from consilience.optimizers.settings import Descent, SpsaSettings

    settings = Descent("sgd", SEARCH["rate"], SEARCH["steps"], spsa=SpsaSettings(mu=SEARCH["mu"], normalise=True))
    return learn_weights(
        answers["train"],
        target.train[1],
        kind=kind,
        held_out=(answers["validation"], target.validation[1]),
        optimizer="spsa",
        settings=settings,
        batch=128,
        seed=seed,
    )


def _accuracy(predictions: Any, labels: Any) -> float:
    return float((predictions.argmax(-1) == labels).double().mean())
