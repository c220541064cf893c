"""Advice for people about to fine-tune an expert that is to be merged.

    H = sum_t eta_t,    epochs = b T / n,    temperature = eta / b
    eps^2 ~ 4 eta^2 (T^2 / n^2 + T / (b n)) (||grad||^2 + sigma^2)

The bound (``docs/theory-of-merging.md``) says in which direction each setting moves which term; where others'
trainings are known, their median length is what to aim at. Directions are those of the bound, for SGD; they are no
measured facts.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median

from consilience.doctor.evidence.training import UNEQUAL, Training, compare
from consilience.doctor.theory.bound import Maybe, constant_power, stability_leading
from consilience.errors import InputError

#: Passes over the data from which on the bound's T^2 / n^2 is the larger part.
_MANY_EPOCHS = 3.0


@dataclass(frozen=True)
class Planned:
    """A training that is planned.

    Raises:
        InputError: a value is out of its range.
    """

    learning_rate: float
    steps: int
    batch_size: int
    rows: int
    optimizer: str = "adamw"

    def __post_init__(self) -> None:
        for name in ("learning_rate", "steps", "batch_size", "rows"):
            if not getattr(self, name) > 0:
                raise InputError(f"{name} = {getattr(self, name)!r}: give a number above 0")

    @property
    def length(self) -> float:
        """H of a constant rate; a schedule that falls to 0 has about half of it."""
        return self.learning_rate * self.steps

    @property
    def epochs(self) -> float:
        """Passes over the data."""
        return self.batch_size * self.steps / self.rows

    @property
    def temperature(self) -> float:
        """Learning rate over batch: how noisy the training ends."""
        return self.learning_rate / self.batch_size

    @property
    def stability(self) -> float:
        """The leading term of Lemma 1 for a gradient of norm 1: for comparing settings of one task alone."""
        power = constant_power(self.learning_rate, self.steps, 1.0, 0.0)
        found = stability_leading(steps=self.steps, rows=self.rows, batch=self.batch_size, power=power)
        assert found is not None
        return found


@dataclass(frozen=True)
class Change:
    """A change of a plan, and what it does to its terms, as factors: below 1 is less."""

    what: str
    why: str
    length: float
    stability: float
    temperature: float
    plan: Planned


@dataclass(frozen=True)
class Advice:
    """What to think about before training.

    Attributes:
        plan: what was planned.
        target: the median length of the others, if it is known and can be compared.
        compared: how many others it is of.
        said: what the plan's figures say, in sentences.
        changes: changes of it, those that matter most first.
    """

    plan: Planned
    target: Maybe
    compared: int
    said: tuple[str, ...]
    changes: tuple[Change, ...]


def advise(plan: Planned, others: Sequence[Training] = ()) -> Advice:
    """Return advice on a plan, beside how the experts that it will be merged with were trained."""
    lengths = _lengths(plan, others)
    target = median(lengths) if lengths else None
    return Advice(
        plan, target, len(lengths), tuple(_said(plan, target, len(lengths), others)), tuple(_changes(plan, target))
    )


def _lengths(plan: Planned, others: Sequence[Training]) -> list[float]:
    """Return the lengths of those that were trained by the same optimizer, of either kind of training."""
    found = compare(others).lengths if others else ()
    family = _family(plan)
    return [value for group in found if group.optimizer == family for value in group.values]


def _family(plan: Planned) -> str | None:
    return Training("plan", optimizer=plan.optimizer).family


def _said(plan: Planned, target: Maybe, count: int, others: Sequence[Training]) -> list[str]:
    said = [
        f"training length H = {plan.length:.3g} (constant rate), {plan.epochs:.2g} passes over {plan.rows} rows",
    ]
    if target is not None:
        times = plan.length / target
        said.append(
            f"the median of {count} other(s) trained by the same optimizer is H = {target:.3g}: this one would be "
            + ("about as long" if 1 / UNEQUAL <= times <= UNEQUAL else f"{times:.2g} times as long")
        )
    known = [value for one in others if one.family == _family(plan) and (value := one.temperature) is not None]
    if known:
        times = plan.temperature / median(known)
        said.append(
            f"learning rate over batch = {plan.temperature:.3g}, {times:.2g} times the others' median: the higher it "
            "is, the more noise ends in the expert, and the worse experts merged in the project's study"
        )
    if plan.epochs > _MANY_EPOCHS:
        said.append(
            f"beyond about {_MANY_EPOCHS:g} passes instability grows with the square of the passes: more rows, or "
            "fewer steps"
        )
    return said


def _changes(plan: Planned, target: Maybe) -> list[Change]:
    """Return changes; those that equalise lengths come first, if lengths are unequal."""
    found: list[Change] = []
    if target is not None and not 1 / UNEQUAL <= plan.length / target <= UNEQUAL:
        rate = plan.learning_rate * target / plan.length
        steps = max(1, round(plan.steps * target / plan.length))
        why = (
            "as long a training as the others': the bound's displacement from unequal lengths goes (in the project's "
            "study equal lengths did not merge better)"
        )
        found.append(_change(plan, replace(plan, learning_rate=rate), f"learning rate {rate:.2g}", why))
        found.append(_change(plan, replace(plan, steps=steps), f"{steps} steps", why))
    half, slow = max(1, plan.steps // 2), plan.learning_rate / 2
    wide, more = 2 * plan.batch_size, 2 * plan.rows
    short = "half the length: displacement and instability fall, the expert itself learns less"
    found.append(_change(plan, replace(plan, steps=half), f"{half} steps", short))
    found.append(_change(plan, replace(plan, learning_rate=slow), f"learning rate {slow:.2g}", f"{short}; less noise"))
    noise = "less gradient noise at the same length; twice the passes over the data"
    found.append(_change(plan, replace(plan, batch_size=wide), f"batches of {wide}", noise))
    found.append(_change(plan, replace(plan, rows=more), f"{more} rows", "instability falls, nothing else changes"))
    return found


def _change(plan: Planned, changed: Planned, what: str, why: str) -> Change:
    return Change(what, why, changed.length / plan.length, changed.stability / plan.stability,
                  changed.temperature / plan.temperature, changed)  # fmt: skip
