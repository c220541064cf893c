"""One account of a run from what its files say: first come, contradictions kept, the rest inferred where it follows."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from consilience.stability.logs.curve import Curve, Series, join
from consilience.stability.logs.facts import Fact, same
from consilience.stability.logs.lengths import COVERED, Length, logged_length, peak_length, scheduled_length
from consilience.stability.logs.reading import Reading

#: Steps, batch, rows and epochs that disagree by more than this share contradict each other.
_AGREE = 0.1
#: A highest logged rate is at most so many times a stated peak.
_ABOVE = 1.01
#: Fewer logged learning rates than this do not show a schedule.
_FEW = 3


@dataclass(frozen=True, slots=True)
class Conflict:
    """Two values of one field that contradict each other; ``kept`` is the one that counts."""

    field: str
    kept: Fact
    other: Fact


@dataclass(frozen=True, slots=True, eq=False)
class Said:
    """What a run's files say together: facts by field, contradictions, the curve, and the training length."""

    facts: Mapping[str, Fact]
    conflicts: tuple[Conflict, ...]
    curve: Curve
    length: Length | None


def combine(readings: Sequence[Reading]) -> Said:
    """Return what files say together; the first value of a field counts, and others must agree with it.

    From steps * batch_size = rows * epochs, the one that is missing is inferred; H comes from the log where it has the
    learning rates, else from the schedule, else it is at most steps * peak.
    """
    facts: dict[str, Fact] = {}
    conflicts: list[Conflict] = []
    for reading in readings:
        for name, fact in reading.facts.items():
            kept = facts.setdefault(name, fact)
            if not same(kept.value, fact.value):
                conflicts.append(Conflict(name, kept, fact))
    curve = join([reading.curve for reading in readings])
    conflicts += _from_curve(facts, curve)
    _infer(facts)
    conflicts += _contradictions(facts)
    length = _length(facts, curve)
    if length is not None:
        facts["length"] = Fact(length.value, length.source)
    return Said(facts, tuple(conflicts), curve, length)


def _from_curve(facts: dict[str, Fact], curve: Curve) -> list[Conflict]:
    """Add what the log says best: the last step, the highest rate, the last losses and noise scales."""
    found: list[Conflict] = []
    fact = _last_step(facts, curve)
    if fact is not None and facts.setdefault("steps", fact).value < fact.value:
        found.append(Conflict("steps", facts["steps"], fact))
    rates = curve.series.get("learning_rate")
    if rates is not None and rates.values.max() > 0:
        fact = Fact(float(rates.values.max()), f"{rates.source}: highest logged rate")
        if facts.setdefault("learning_rate", fact).value * _ABOVE < fact.value:
            found.append(Conflict("learning_rate", facts["learning_rate"], fact))
    for column, name in (("loss", "final_loss"), ("noise_scale", "noise_scale")):
        if column in curve.series:
            series = curve.series[column]
            recent = series.values[-max(1, len(series) // 10) :]
            facts[name] = Fact(float(recent.mean()), f"{series.source}: mean of the last tenth of the log")
    return found


def _last_step(facts: Mapping[str, Fact], curve: Curve) -> Fact | None:
    """Return the steps that the log shows; the planned ones where the log's next entry would have come later."""
    ends = [(series.last_step, series) for series in curve.series.values()]
    if not ends or not (last := max(end for end, _ in ends)):
        return None
    series = next(series for end, series in ends if end == last)
    gap = series.steps[-1] - series.steps[-2] if len(series) > 1 else 0
    if "planned_steps" in facts and last < facts["planned_steps"].value < last + gap:
        return facts["planned_steps"]
    return Fact(last, f"{series.source}: last logged step")


def _infer(facts: dict[str, Fact]) -> None:
    """Add what follows from other fields, each with what it follows from."""
    known = {name: fact.value for name, fact in facts.items()}
    if "epochs" not in known and "planned_steps" not in known and "planned_epochs" in known:
        facts["epochs"] = facts["planned_epochs"]
    _product(facts, "batch_size", ("batch_per_device", "devices", "accumulation"))
    if "warmup_steps" not in known or (known["warmup_steps"] == 0 and known.get("warmup_ratio")):
        steps = facts.get("planned_steps", facts.get("steps"))
        if "warmup_ratio" in facts and steps is not None:
            facts["warmup_steps"] = Fact(known["warmup_ratio"] * steps.value, facts["warmup_ratio"].source)
    _quotient(facts, "rows", ("steps", "batch_size"), "epochs")
    _quotient(facts, "steps", ("rows", "epochs"), "batch_size")
    _quotient(facts, "epochs", ("steps", "batch_size"), "rows")
    _quotient(facts, "batch_size", ("rows", "epochs"), "steps")
    if "steps" not in facts and "planned_steps" in facts:
        facts["steps"] = facts["planned_steps"]
        _quotient(facts, "epochs", ("steps", "batch_size"), "rows")


def _product(facts: dict[str, Fact], field: str, factors: Sequence[str]) -> None:
    if field not in facts and all(name in facts for name in factors):
        value = math.prod(facts[name].value for name in factors)
        facts[field] = Fact(value, "; ".join(facts[name].source for name in factors))


def _quotient(facts: dict[str, Fact], field: str, factors: Sequence[str], divisor: str) -> None:
    """Add a field as the product of two others over a third, as steps * batch_size = rows * epochs."""
    if field in facts or not all(name in facts and facts[name].value > 0 for name in (*factors, divisor)):
        return
    value = math.prod(facts[name].value for name in factors) / facts[divisor].value
    whole = field != "epochs"
    source = f"follows from {', '.join((*factors, divisor))}"
    if not whole or value >= 0.5:
        facts[field] = Fact(max(1, round(value)) if whole else value, source)


def _contradictions(facts: dict[str, Fact]) -> list[Conflict]:
    """Return what cannot all be true: factors and batch, and the epochs that steps, batch and rows make."""
    found: list[Conflict] = []
    factors = ("batch_per_device", "devices", "accumulation")
    if "batch_size" in facts and all(name in facts for name in factors):
        made = math.prod(facts[name].value for name in factors)
        if made != facts["batch_size"].value:
            found.append(Conflict("batch_size", facts["batch_size"], Fact(made, "follows from " + ", ".join(factors))))
    if all(name in facts and facts[name].value > 0 for name in ("steps", "batch_size", "rows", "epochs")):
        made = facts["steps"].value * facts["batch_size"].value / facts["rows"].value
        if not math.isclose(made, facts["epochs"].value, rel_tol=_AGREE):
            found.append(Conflict("epochs", facts["epochs"], Fact(made, "follows from steps, batch_size, rows")))
    return found


def _length(facts: Mapping[str, Fact], curve: Curve) -> Length | None:
    """Return H: as given, logged, from the schedule, from a sparse log, or at most, in this order."""
    if "length" in facts:
        return Length(facts["length"].value, None, "given", facts["length"].source)
    if "steps" not in facts:
        return None
    steps, rates = facts["steps"].value, _within(curve.series.get("learning_rate"), facts["steps"].value)
    if rates is not None and rates.steps[-1] >= COVERED * steps and len(rates) >= min(steps, _FEW):
        return logged_length(rates, steps)
    if "learning_rate" not in facts:
        return None
    peak = facts["learning_rate"]
    scheduled = _scheduled(facts, peak.value, steps)
    if scheduled is None and rates is not None and len(rates) >= _FEW:
        return logged_length(rates, steps)
    return scheduled or peak_length(peak.value, steps, peak.source)


def _within(rates: Series | None, steps: int) -> Series | None:
    return rates if rates is not None and rates.steps[0] <= steps else None


def _scheduled(facts: Mapping[str, Fact], peak: float, steps: int) -> Length | None:
    if "schedule" not in facts:
        return None
    given = {name: fact.value for name, fact in facts.items()}
    floor = given.get("least_share", given.get("least_rate", 0.0) / peak if peak else 0.0)
    return scheduled_length(
        given["schedule"], peak, steps, facts["schedule"].source, planned=max(steps, given.get("planned_steps", 0)),
        warmup=float(given.get("warmup_steps", 0.0)), floor=min(1.0, float(floor)),
    )  # fmt: skip
