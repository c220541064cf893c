"""Does what the merge doctor says of experts before a merge agree with what the merge then does?

Experts on eight small image tasks are trained under many settings and merged. Of every merge the doctor is asked for
its figures, first from checkpoints alone, then with the logs, then with probes on validation rows, and what the merge
does is measured on test rows, which the doctor never sees. Every figure is the library's own.
"""

import sys
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import numpy as np
import torch

from consilience.doctor.candidates import candidates, tried
from consilience.doctor.evidence.probe import Probe, probe
from consilience.doctor.evidence.training import Training, compare
from consilience.doctor.findings import from_probe
from consilience.doctor.findings.from_training import bound_facts, trained
from consilience.doctor.probing import saturation
from consilience.doctor.theory.bound import Maybe, noise_variance, spread_bound, total
from consilience.doctor.theory.geometry import Geometry, Vector
from consilience.doctor.theory.saturation import expected_member_losses
from studies.cells import Study
from studies.doctor_experts import Expert, Score, Suite, Tuning, World, expert, world
from studies.doctor_tables import page

Setting = dict[str, Any]
SUITE = Suite()
SEEDS = (0, 1, 2)
#: Sizes of merges.
SIZES = (2, 3, 4, 6, 8)
BATCH, ROWS = 32, 400
RATES, STEPS = (0.0125, 0.025, 0.05, 0.1, 0.2), (50, 100, 200, 400)

#: Learning rate times steps.
CORE = tuple(Tuning("sgd", rate, steps, BATCH, ROWS) for rate in RATES for steps in STEPS)
#: A longer one, and others of two lengths: in batches, in rows.
MORE = (
    Tuning("sgd", 0.05, 800, BATCH, ROWS),
    *(Tuning("sgd", 0.05, steps, batch, ROWS) for batch in (8, 64) for steps in (100, 400)),
    *(Tuning("sgd", 0.05, steps, BATCH, rows) for rows in (50, 150) for steps in (100, 400)),
)
ADAM = tuple(Tuning("adam", rate, steps, BATCH, ROWS) for rate in (3e-4, 1e-3) for steps in (100, 400))

#: Mean lengths of unequal sets, and how their eight lengths compare with the mean; each sums to 8.
MEANS = (5.0, 10.0)
UNEQUAL = (
    (2, 1, 1, 1, 1, 1, 0.5, 0.5),
    (2, 2, 1, 1, 0.5, 0.5, 0.5, 0.5),
    (2, 2, 2, 0.5, 0.5, 0.5, 0.25, 0.25),
    (4, 1, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5),
    (4, 2, 0.5, 0.5, 0.25, 0.25, 0.25, 0.25),
)
#: Sets of experts a cell of advice, and the sizes they are drawn from.
ADVISED, ADVICE_SIZES = 10, (4, 6, 8)
#: Settings whose saturation is measured, and random subsets a size.
SATURATED = (Tuning("sgd", 0.05, 50, BATCH, ROWS), Tuning("sgd", 0.05, 200, BATCH, ROWS),
             Tuning("sgd", 0.1, 400, BATCH, ROWS))  # fmt: skip
SUBSETS = 6
#: What the tables call a candidate, by its kind.
KINDS = {"given": "average", "average": "average", "scale": "one scale", "weights": "best weights",
         "subset": "some left out"}  # fmt: skip


def _cells() -> list[tuple[str, Setting]]:
    cells: list[tuple[str, Setting]] = []
    for seed in SEEDS:
        common: Setting = {"suite": asdict(SUITE) | {"sources": list(SUITE.sources)}, "seed": seed}
        for tuning in (*CORE, *MORE, *ADAM):
            cells.append((f"equal-{tuning.name}-{seed}", {"kind": "equal", "tuning": asdict(tuning)} | common))
        cells.append((f"unequal-{seed}", {"kind": "unequal"} | common))
        cells.append((f"advice-{seed}", {"kind": "advice", "sets": ADVISED} | common))
        for tuning in SATURATED:
            cells.append((f"saturation-{tuning.name}-{seed}",
                          {"kind": "saturation", "tuning": asdict(tuning), "subsets": SUBSETS} | common))  # fmt: skip
    return cells


def run(setting: Setting) -> Mapping[str, Any]:
    """Train what is missing, ask the doctor, and measure."""
    with _one_thread():
        suite = Suite(**setting["suite"] | {"sources": tuple(setting["suite"]["sources"])})
        made = world(suite, setting["seed"])
        return {"tasks": list(suite.tasks)} | RUNS[setting["kind"]](made, setting)


@contextmanager
def _one_thread() -> Generator[None]:
    """Compute on one core: networks as small as these are no faster on two."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# What the doctor is asked, and what experts and merges do.


class NetLandscape:
    """Losses of experts' tasks on validation rows, by merge weights."""

    def __init__(self, made: World, experts: Sequence[Expert]) -> None:
        self.made = made
        self.tasks = [one.task for one in experts]
        self.stack = torch.stack([one.tau for one in experts])

    def theta(self, alpha: Vector | Sequence[float]) -> torch.Tensor:
        """Return theta_0 + sum_j alpha_j tau_j."""
        return self.made.theta + torch.as_tensor(np.asarray(alpha), dtype=torch.float32) @ self.stack

    def rows(self, task: int) -> Sequence[int]:
        """Return the numbers of a task's rows."""
        return range(len(self.made.tasks[self.tasks[task]].validation))

    def loss(self, task: int, alpha: Vector) -> float:
        """Return a task's mean loss, in nats."""
        number = self.tasks[task]
        return self.made.score(self.theta(alpha), number, self.made.tasks[number].validation).loss

    def slope(self, task: int, alpha: Vector, rows: Sequence[int]) -> tuple[float, Vector]:
        """Return the mean loss of some rows, and its derivatives by alpha."""
        number = self.tasks[task]
        loss, gradient = self.made.gradient(self.theta(alpha), number, self.made.tasks[number].validation.take(rows))
        return loss, (self.stack.double() @ gradient.double()).numpy()


def geometry_of(made: World, experts: Sequence[Expert]) -> Geometry:
    """Return the inner products of task vectors and the base."""
    stack, base = torch.stack([one.tau for one in experts]).double(), made.theta.double()
    return Geometry((stack @ stack.T).numpy(), (stack @ base).numpy(), float(base @ base))


class Asked:
    """The doctor on a set of experts that are averaged."""

    def __init__(self, made: World, experts: Sequence[Expert]) -> None:
        self.experts = experts
        self.names = tuple(made.tasks[one.task].name for one in experts)
        self.p = np.full(len(experts), 1 / len(experts))
        self.geometry = geometry_of(made, experts)
        self.landscape = NetLandscape(made, experts)
        self.measured: Probe = probe(self.landscape, self.geometry.gram, self.p)

    def says(self) -> dict[str, dict[str, Any]]:
        """Return the figures of each kind of evidence, by name."""
        return {"checkpoints": self._checkpoints(), "logs": self._logs(), "probes": self._probes()}

    def _checkpoints(self) -> dict[str, Any]:
        geometry = self.geometry
        between = geometry.cosines[~np.eye(geometry.count, dtype=bool)]
        return {
            "norms": float(geometry.norms.sum()), "displacement": geometry.displacement(self.p),
            "moves": geometry.moves(self.p).tolist(), "cosine": float(between.mean()),
            "sigma_max": geometry.sigma_max, "sigma_max_centred": geometry.sigma_max_centred,
            "common": geometry.common,
        }  # fmt: skip

    def _logs(self) -> dict[str, Maybe]:
        """Return the mean length and the parts of the bound on V that logs tell; H of SGD alone."""
        said = [logged(one.training) for one in self.experts]
        lengths = [one["length"] for one in said]
        parts = spread_bound(
            self.p.tolist(),
            lengths=lengths,
            gradient=float(np.mean([one["first_gradient"] or 0.0 for one in said])),
            squares=[one["squares"] for one in said],
            variances=[one["variance"] for one in said],
            batches=[one.training.batch_size for one in self.experts],
        )
        whole = total(lengths)
        return {"length": None if whole is None else whole / len(lengths), "unequal": parts.part("unequal"),
                "noise": parts.part("noise")}  # fmt: skip

    def _probes(self) -> dict[str, Any]:
        facts = bound_facts([one.training for one in self.experts], self.geometry, self.p, self.measured)
        assert facts is not None
        return {
            "quadratic": float(self.measured.predicted(self.p).mean()), "measured": float(self.measured.merged.mean()),
            "causes": {name: _finite(value) for name, value in facts.displacement.items()},
            "risk": {name: _finite(value) for name, value in facts.risk.items()},
        }  # fmt: skip

    def predicts(self, members: Sequence[int]) -> Vector:
        """Return the predicted losses of the members' tasks in their average, from the probes of the whole set."""
        p = np.zeros(len(self.p))
        p[list(members)] = 1 / len(members)
        return self.measured.predicted(p)[list(members)]

    def advice(self) -> tuple[dict[str, tuple[float, ...]], str]:
        """Return weights by the kind of advice, and the kind that the doctor gives."""
        found = tried(self.names, self.measured, candidates(self.names, self.measured), self.landscape)
        ways = {"average": tuple(self.p.tolist())}
        for one in found:
            ways.setdefault(KINDS[one.kind], one.weights)
        (lengths,) = compare([one.training for one in self.experts]).lengths
        scales = [1.0 if scale is None else scale for scale in lengths.scales]
        ways["equal lengths"] = tuple((self.p * scales).tolist())
        told = any(one.kind == "better-weights" for one in from_probe.findings(self.names, self.measured, found))
        return ways, KINDS[found[0].kind] if told else "average"

    def saturates(self) -> dict[str, list[float]]:
        """Return the predicted mean losses of all tasks, and of those that are merged, for k = 1 ... K."""
        every, _ = saturation(self.measured)
        one = self.measured
        members = [
            float(expected_member_losses(k, one.gram, one.own, one.slopes, one.curvatures).mean())
            for k in range(1, len(self.p) + 1)
        ]
        return {"all": list(every), "members": members}


def logged(training: Training) -> dict[str, Maybe]:
    """Return what an expert's log says of it; lengths and stability of SGD alone."""
    (facts,) = trained([training])
    sgd = training.length if training.family == "sgd" else None
    norms = training.curve.series["grad_norm"].values
    return {
        "length": None if sgd is None else sgd.value,
        "squares": None if sgd is None else sgd.squares,
        "first_gradient": float(norms[: max(1, len(norms) // 10)].mean()),
        "final_gradient": training.final_gradient,
        "final_loss": facts.final_loss,
        "variance": noise_variance(training.noise_scale, training.gradient, training.batch_size),
        "stability": facts.stability,
    }


def _finite(value: Maybe) -> Maybe:
    """Return a number that JSON can hold: the largest there is instead of an infinite one."""
    return None if value is None else min(value, sys.float_info.max)


def alone(made: World, one: Expert) -> Setting:
    """Return an expert's figures on its own task."""
    task, theta = made.tasks[one.task], made.theta + one.tau
    seen = task.train.take(range(one.tuning.rows))
    return {
        "task": one.task, "tuning": one.tuning.name, "norm": float(one.tau.norm()), "logs": logged(one.training),
        "base": _shown(made.score(made.theta, one.task, task.test)), "train": _shown(made.score(theta, one.task, seen)),
        "test": _shown(made.score(theta, one.task, task.test)),
    }  # fmt: skip


def does(made: World, experts: Sequence[Expert], members: Sequence[int]) -> Setting:
    """Return test losses and accuracies of the members' tasks in their average, and the other tasks' mean loss."""
    theta = NetLandscape(made, [experts[k] for k in members]).theta(np.full(len(members), 1 / len(members)))
    found = [made.score(theta, one.task, made.tasks[one.task].test) for one in experts]
    others = [found[k].loss for k in range(len(experts)) if k not in members]
    return {
        "losses": [round(found[k].loss, 5) for k in members],
        "accuracies": [round(found[k].accuracy, 5) for k in members],
        "others": round(float(np.mean(others)), 5) if others else None,
    }


def losses_of(made: World, experts: Sequence[Expert], weights: Sequence[float], purpose: str) -> list[float]:
    """Return the losses of the experts' tasks in a merge, on the rows of one purpose."""
    theta = NetLandscape(made, experts).theta(weights)
    scores = [made.score(theta, one.task, getattr(made.tasks[one.task], purpose)) for one in experts]
    return [round(score.loss, 5) for score in scores]


def _shown(score: Score) -> dict[str, float]:
    return {"loss": round(score.loss, 5), "accuracy": round(score.accuracy, 5)}


# Experts of one setting, and of unequal lengths.


def run_equal(made: World, setting: Setting) -> Setting:
    """Merge experts of one setting, in subsets that hold every task as often."""
    experts = _experts(made, [Tuning(**setting["tuning"])] * len(made.tasks), setting["seed"])
    return {"sets": [examined(made, experts, subsets(len(experts)))]}


def run_unequal(made: World, setting: Setting) -> Setting:
    """Merge sets of all tasks' experts whose lengths differ and have a given mean."""
    generator = np.random.default_rng([setting["seed"], 3])
    found: list[Setting] = []
    for mean in MEANS:
        for pattern in UNEQUAL:
            lengths = mean * generator.permutation(np.resize(pattern, len(made.tasks)))
            tunings = [_of_length(length, generator) for length in lengths]
            experts = _experts(made, tunings, setting["seed"])
            every = tuple(range(len(experts)))
            found.append(examined(made, experts, [every]) | {"mean_length": mean})
    return {"sets": found}


def _of_length(length: float, generator: np.random.Generator) -> Tuning:
    """Return a setting of the core of a given length."""
    fitting = [tuning for tuning in CORE if np.isclose(tuning.length, length)]
    return fitting[int(generator.integers(len(fitting)))]


def subsets(count: int) -> list[tuple[int, ...]]:
    """Return the merges of a cell: of each size, runs of a ring of the tasks, which hold every task as often."""
    found: list[tuple[int, ...]] = []
    for size in (size for size in SIZES if size <= count):
        ring = np.random.default_rng(size).permutation(count).tolist()
        starts = [0] if size == count else range(0, count, 1 if size % 2 else 2)
        found += [tuple(sorted(ring[(start + i) % count] for i in range(size))) for start in starts]
    return found


def _experts(made: World, tunings: Sequence[Tuning], seed: int) -> list[Expert]:
    return [expert(made, task, tuning, seed) for task, tuning in enumerate(tunings)]


def examined(made: World, experts: Sequence[Expert], merges: Sequence[Sequence[int]]) -> Setting:
    """Return every expert's figures, and every merge's: what the doctor says, and what the merge does."""
    every = Asked(made, experts)
    found: list[Setting] = []
    for members in merges:
        asked = every if len(members) == len(experts) else Asked(made, [experts[k] for k in members])
        said = asked.says()
        if len(merges) > 1:
            said["probes"]["quadratic_of_all"] = float(np.mean(every.predicts(members)))
        found.append({"members": list(members), "said": said} | does(made, experts, members))
    return {"experts": [alone(made, one) for one in experts], "merges": found}


# Following advice.


def run_advice(made: World, setting: Setting) -> Setting:
    """Draw sets of experts from all settings of SGD, and measure what follows from the doctor's advice."""
    generator = np.random.default_rng([setting["seed"], 4])
    found: list[Setting] = []
    for _ in range(setting["sets"]):
        size = min(int(generator.choice(ADVICE_SIZES)), len(made.tasks))
        tasks = sorted(generator.permutation(len(made.tasks))[:size].tolist())
        drawn = generator.integers(0, len(CORE + MORE), size).tolist()
        experts = [
            expert(made, task, (*CORE, *MORE)[number], setting["seed"])
            for task, number in zip(tasks, drawn, strict=True)
        ]
        found.append(advised(made, experts))
    return {"advice": found}


def advised(made: World, experts: Sequence[Expert]) -> Setting:
    """Return the test losses of the plain average and of every kind of advice, by its name."""
    asked = Asked(made, experts)
    advice, followed = asked.advice()
    ways = {
        name: {"weights": list(weights), "predicted": float(asked.measured.predicted(np.array(weights)).mean()),
               "losses": losses_of(made, experts, weights, "test")}
        for name, weights in advice.items()
    }  # fmt: skip
    return {
        "members": [one.task for one in experts], "tunings": [one.tuning.name for one in experts],
        "lengths": [one.tuning.length for one in experts], "followed": followed, "ways": ways,
    }  # fmt: skip


# More experts.


def run_saturation(made: World, setting: Setting) -> Setting:
    """Predict the mean loss of all tasks for merges of k experts, and measure some of each size."""
    experts = _experts(made, [Tuning(**setting["tuning"])] * len(made.tasks), setting["seed"])
    count = len(experts)
    predicted = Asked(made, experts).saturates()
    generator = np.random.default_rng([setting["seed"], 5])
    measured: list[Setting] = []
    for size in range(1, count + 1):
        for members in _some_subsets(count, size, setting["subsets"], generator):
            weights = [1 / size if k in members else 0.0 for k in range(count)]
            probed = losses_of(made, experts, weights, "validation")
            measured.append({"members": list(members), "losses": losses_of(made, experts, weights, "test"),
                             "validation": float(np.mean(probed))})  # fmt: skip
    return {"predicted": predicted, "measured": measured}


def _some_subsets(count: int, size: int, wanted: int, generator: np.random.Generator) -> list[tuple[int, ...]]:
    """Return random subsets of a size: single experts all, of others at most ``wanted``, and no one twice."""
    if size == 1:
        return [(k,) for k in range(count)]
    drawn = [tuple(sorted(generator.permutation(count)[:size].tolist())) for _ in range(wanted)]
    return list(dict.fromkeys(drawn))


RUNS = {"equal": run_equal, "unequal": run_unequal, "advice": run_advice, "saturation": run_saturation}

STUDY = Study("doctor", _cells(), run, page)
