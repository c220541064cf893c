"""What trimming methods share: a band of ranks, and rescaling what is left so that L1 norms are as before."""

from dataclasses import replace
from typing import Annotated, Any, Literal

import numpy as np

from consilience.jit import kernel
from consilience.methods.program import Elementwise, Ranks, Step, Sums
from consilience.methods.signature import Default, PerExpert

#: Of methods that trim, which neither of their papers rescales.
RescaleL1 = Annotated[
    Literal["l1", True, False], Default(False), "l1 or true: mergekit's, which restores each task vector's L1 norm"
]
#: Norms below this are left alone, as in mergekit.
SMALLEST = 1e-7


@kernel
def _scale_rows(rows: Any, start: int, keys: Any, factors: Any) -> None:
    for k in range(rows.shape[0]):
        row, factor = rows[k], rows.dtype.type(factors[k])
        for i in range(row.size):
            row[i] *= factor


def band(size: int, density: PerExpert, gamma: PerExpert) -> Ranks | None:
    """Return the ranks that are left of ``size`` entries below the ``gamma`` largest; None: all of them."""
    kept = [int(share * size) for share in density]
    first = tuple(min(int(top * size), size - count) for top, count in zip(gamma, kept, strict=True))
    last = tuple(top + count for top, count in zip(first, kept, strict=True))
    return Ranks(last, density, first) if any(first) or min(last) < size else None


def l1_ratios(sums: Sums) -> tuple[float, ...]:
    """Return each row's L1 norm before over that after; 1 where one of them is as good as 0."""
    assert sums.l1 is not None
    assert sums.l1_stepped is not None
    pairs = zip(sums.l1, sums.l1_stepped, strict=True)
    return tuple(float(before / after) if min(before, after) >= SMALLEST else 1.0 for before, after in pairs)


def rescaled(program: Elementwise, rescale: Literal["l1"] | bool) -> Elementwise:
    """Return a program that multiplies what its ranks leave of each row, if asked to, and before anything else."""
    if not rescale or program.keep is None:
        return program

    def finish(sums: Sums) -> Elementwise:
        return replace(program, step=Step(_scale_rows, (np.array(l1_ratios(sums)),)))

    return replace(program, needs="l1", finish=finish)
