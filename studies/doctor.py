"""Does what the merge doctor says of experts before a merge agree with what the merge then does?

Experts on eight small image tasks are trained under many settings and merged. Of every merge the doctor is asked for
its figures, first from checkpoints alone, then with the logs, then with probes on validation rows, and what the merge
does is measured on test rows, which the doctor never sees. Every figure is the library's own.
"""

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import numpy as np

from studies.cells import Study
from studies.doctor_experts import Expert, Suite, Tuning, World, expert, world
from studies.doctor_tables import page

Setting = dict[str, Any]
SUITE = Suite()
SEEDS = (0, 1, 2)
#: Sizes of merges.
SIZES = (2, 3, 4, 6, 8)
BATCH, ROWS = 32, 400
RATES, STEPS = (0.0125, 0.025, 0.05, 0.1), (50, 100, 200, 400)

#: Learning rate times steps.
CORE = tuple(Tuning("sgd", rate, steps, BATCH, ROWS) for rate in RATES for steps in STEPS)
#: Where more training harms, and others of two lengths: in batches, in rows.
MORE = (
    Tuning("sgd", 0.2, 100, BATCH, ROWS),
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
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


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
    from studies.doctor_measures import Asked, alone, does

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
    from studies.doctor_measures import Asked, test_losses

    asked = Asked(made, experts)
    advice, followed = asked.advice()
    ways = {
        name: {"weights": list(weights), "predicted": float(asked.measured.predicted(np.array(weights)).mean()),
               "losses": test_losses(made, experts, weights)}
        for name, weights in advice.items()
    }  # fmt: skip
    return {
        "members": [one.task for one in experts], "tunings": [one.tuning.name for one in experts],
        "lengths": [one.tuning.length for one in experts], "followed": followed, "ways": ways,
    }  # fmt: skip


# More experts.


def run_saturation(made: World, setting: Setting) -> Setting:
    """Predict the mean loss of all tasks for merges of k experts, and measure some of each size."""
    from studies.doctor_measures import Asked, losses_of, test_losses

    experts = _experts(made, [Tuning(**setting["tuning"])] * len(made.tasks), setting["seed"])
    count = len(experts)
    predicted = Asked(made, experts).saturates()
    generator = np.random.default_rng([setting["seed"], 5])
    measured: list[Setting] = []
    for size in range(1, count + 1):
        for members in _some_subsets(count, size, setting["subsets"], generator):
            weights = [1 / size if k in members else 0.0 for k in range(count)]
            probed = losses_of(made, experts, weights, "validation")
            measured.append({"members": list(members), "losses": test_losses(made, experts, weights),
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
