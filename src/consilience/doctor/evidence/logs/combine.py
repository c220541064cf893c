"""One account of a run from what its files say: first come, contradictions kept, the rest inferred where it follows."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from consilience.doctor.evidence.logs.curve import Curve, Series, join
from consilience.doctor.evidence.logs.facts import Fact, fold, same
from consilience.doctor.evidence.logs.lengths import (
    COVERED,
    Length,
    Schedule,
    fitted_peak,
    logged_length,
    peak_length,
    scheduled_length,
)
from consilience.doctor.evidence.logs.reading import Reading

#: Steps, batch, rows and epochs that disagree by more than this share contradict each other.
_AGREE = 0.1
#: A peak that follows from schedule and log agrees with the stated one within this share.
_SAME_PEAK = 0.03
#: A highest logged rate is at most so many times a stated peak.
_ABOVE = 1.01
#: What a polynomial ends at in transformers, where nothing is said.
_POLYNOMIAL_END = 1e-7
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

    From steps * batch_size = rows * epochs, the one that is missing is inferred. H comes from the log where it has
    every step's learning rate, else from the schedule if the log agrees with it, else from the log, and is at most
    steps * peak where only the peak is known. A peak that no file states follows from the schedule and the logged
    rates, or is the highest of them where every step's is there: a log of some steps may not have it.
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
    conflicts += _peak(facts, curve)
    conflicts += _contradictions(facts)
    length = _length(facts, curve)
    if length is not None:
        facts["length"] = Fact(length.value, length.source)
    return Said(facts, tuple(conflicts), curve, length)


def _from_curve(facts: dict[str, Fact], curve: Curve) -> list[Conflict]:
    """Add what the log says best: the last step, the last losses and noise scales."""
    found: list[Conflict] = []
    fact = _last_step(facts, curve)
    if fact is not None and facts.setdefault("steps", fact).value < fact.value:
        found.append(Conflict("steps", facts["steps"], fact))
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
            facts["warmup_steps"] = Fact(math.ceil(known["warmup_ratio"] * steps.value), facts["warmup_ratio"].source)
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


def _peak(facts: dict[str, Fact], curve: Curve) -> list[Conflict]:
    """Add the peak if it follows from the log; return whether the log has been above the one that was stated."""
    rates = curve.series.get("learning_rate")
    if rates is None or not rates.values.max() > 0:
        return []
    highest = Fact(float(rates.values.max()), f"{rates.source}: highest logged rate")
    facts["highest_rate"] = highest
    schedule = _schedule(facts)
    fitted = None if schedule is None else fitted_peak(schedule, rates)
    stated = facts.get("learning_rate")
    follows = highest
    if fitted is not None:
        follows = Fact(fitted, f"follows from {rates.source} and {facts['schedule'].source}")
    if stated is not None:
        over = stated.value * _ABOVE < highest.value
        off = fitted is not None and not math.isclose(stated.value, fitted, rel_tol=_SAME_PEAK)
        return [Conflict("learning_rate", stated, highest if over else follows)] if over or off else []
    if fitted is not None:
        facts["learning_rate"] = follows
    elif "steps" in facts and len(rates) >= facts["steps"].value:
        facts["learning_rate"] = highest
    return []


def _length(facts: Mapping[str, Fact], curve: Curve) -> Length | None:
    """Return H: as given, logged, from the schedule, from a sparse log, or at most, in this order."""
    if "length" in facts:
        return Length(facts["length"].value, None, "given", facts["length"].source)
    if "steps" not in facts:
        return None
    steps, rates = facts["steps"].value, _within(curve.series.get("learning_rate"), facts["steps"].value)
    if rates is not None and len(rates) >= steps:
        return logged_length(rates, steps)
    schedule, peak = _schedule(facts), facts.get("learning_rate")
    scheduled = None
    if schedule is not None and peak is not None:
        scheduled = scheduled_length(schedule, peak.value, steps, facts["schedule"].source)
        fitted = None if rates is None else fitted_peak(schedule, rates)
        agrees = rates is None or (fitted is not None and math.isclose(fitted, peak.value, rel_tol=_SAME_PEAK))
        if scheduled is not None and agrees:
            return scheduled
    covers = rates is not None and len(rates) >= _FEW and rates.steps[-1] >= COVERED * steps
    if rates is not None and (covers or (scheduled is None and len(rates) >= _FEW)):
        return logged_length(rates, steps)
    return scheduled or (None if peak is None else peak_length(peak.value, steps, peak.source))


def _within(rates: Series | None, steps: int) -> Series | None:
    return rates if rates is not None and rates.steps[0] <= steps else None


def _schedule(facts: Mapping[str, Fact]) -> Schedule | None:
    """Return the schedule that the facts name."""
    if "schedule" not in facts or "steps" not in facts:
        return None
    given = {name: fact.value for name, fact in facts.items()}
    peak = given.get("learning_rate", 0.0)
    least = given.get("least_rate", _POLYNOMIAL_END if fold(given["schedule"]) == "polynomial" else 0.0)
    floor = given.get("least_share", least / peak if peak else 0.0)
    return Schedule(
        given["schedule"], max(given["steps"], given.get("planned_steps", 0)),
        warmup=float(given.get("warmup_steps", 0.0)), floor=min(1.0, float(floor)), cycles=given.get("cycles"),
        power=float(given.get("decay_power", 1.0)), timescale=given.get("timescale"),
    )  # fmt: skip
