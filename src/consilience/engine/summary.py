"""What a run did, in numbers: sizes, time, and how much of each task vector the output's dtype swallowed."""

import math
from dataclasses import asdict, dataclass
from typing import Any

from consilience.engine.plan import Plan
from consilience.engine.stream import Piece
from consilience.engine.worker import Record


@dataclass(frozen=True)
class ExpertLoss:
    """How much of one (weighted) task vector lies below one unit in the last place of the output's dtype.

    ``entries``: share of its non-zero entries; ``mass``: share of its L1 norm.
    """

    name: str
    entries: float
    mass: float


@dataclass(frozen=True)
class Summary:
    """The result of a merge, as numbers.

    ``warnings`` are differences of experts from the base that change what the model computes. ``loader`` says which
    library was shown to open the output, or why none was. ``extra_passes`` counts the passes that rankings took beyond
    the planned ones, since a sample had misled them.
    ``rounding`` is ||rounded - exact|| / ||exact - base|| (or / ||exact|| for averages of weights), nan when unknown.
    """

    out: str
    method: str
    tensors: int
    merged: int
    parameters: int
    bytes_written: int
    bytes_read: int
    seconds: float
    resumed_segments: int
    below_unit: tuple[ExpertLoss, ...]
    rounding: float
    rounding_of: str
    fingerprint: str
    notes: tuple[str, ...]
    warnings: tuple[str, ...] = ()
    loader: str = ""
    extra_passes: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> "Summary":
        """Return the summary that ``to_dict`` was taken of."""
        plain: dict[str, Any] = {**value, "notes": tuple(value["notes"]), "warnings": tuple(value.get("warnings", ()))}
        plain["below_unit"] = tuple(ExpertLoss(**loss) for loss in value["below_unit"])
        return cls(**plain)


def below_unit(plan: Plan, records: dict[Piece, Record]) -> tuple[ExpertLoss, ...]:
    """Add the records' counts up per expert."""
    totals: dict[str, list[float]] = {}
    for record in records.values():
        tensor = plan.tensors[record.tensor]
        for name, counts in zip(tensor.row_names, record.below, strict=False):
            totals[name] = [a + b for a, b in zip(totals.get(name, [0.0] * 4), counts, strict=True)]
    return tuple(
        ExpertLoss(name, t[1] / t[0] if t[0] else 0.0, t[3] / t[2] if t[2] else 0.0)
        for name, t in totals.items()
        if any(t)
    )


def rounding(plan: Plan, records: dict[Piece, Record]) -> tuple[float, str]:
    """Return the relative rounding error over all merged tensors, and what it is relative to."""
    merged = [r for r in records.values() if plan.tensors[r.tensor].program is not None]
    error, change = (math.fsum(r.rounding[i] for r in merged) for i in (0, 1))
    spaces = {p.space for t in plan.tensors if (p := t.program) is not None}
    of = "the merged task vector" if spaces == {"task_vectors"} else "the merged weights"
    return (math.sqrt(error / change) if change > 0 else math.nan), of
