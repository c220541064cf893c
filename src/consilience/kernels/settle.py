"""Everything that is asked of one block of the output's bytes, in one call: fingerprint, overflow, cost of rounding."""

from typing import Any

import numpy as np

from consilience.checkpoints.dtypes import DType
from consilience.checkpoints.values import count_nonfinite, from_bf16, widen
from consilience.jit import kernel
from consilience.kernels.encode import rounding_cost
from consilience.kernels.fingerprint import mix, mix_words


@kernel
def _audit(rounded: Any, exact: Any, base: Any, words: Any, start: int, largest: Any) -> Any:
    low, high = mix_words(words, start)
    bad = count_nonfinite(rounded, largest)
    error, change = rounding_cost(exact, rounded, base)
    return low, high, bad, error, change


@kernel
def _bf16(raw: Any, rounded: Any, exact: Any, base: Any, words: Any, start: int, largest: Any) -> Any:
    from_bf16(raw, rounded)
    return _audit(rounded, exact, base, words, start, largest)


@kernel
def _plain(raw: Any, rounded: Any, exact: Any, base: Any, words: Any, start: int, largest: Any) -> Any:
    widen(raw, rounded)
    return _audit(rounded, exact, base, words, start, largest)


def audit(
    raw: Any, dtype: DType, scratch: Any, exact: Any, base: Any, start: int, largest: Any
) -> tuple[int, int, int, float, float]:
    """Look at the output bytes ``raw`` of ``dtype``, which begin at byte ``start`` of the tensor.

    Returns:
        The two fingerprint sums, how many values are NaN or Inf, and sum (rounded - exact)^2 and sum (exact - base)^2
        (an empty ``base`` counts as zeros).
    """
    whole = raw.size & ~7
    words, first = raw[:whole].view(np.uint64), start >> 3
    if dtype.name == "BF16":
        found = _bf16(raw.view(np.uint16), scratch, exact, base, words, first, largest)
    elif dtype.name == "F16":
        np.copyto(scratch, raw.view(np.float16))
        found = _audit(scratch, exact, base, words, first, largest)
    else:
        kind = np.float32 if dtype.name == "F32" else np.float64
        found = _plain(raw.view(kind), scratch, exact, base, words, first, largest)
    low, high, bad, error, change = found
    low, high = int(low), int(high)
    if whole != raw.size:
        more = mix(raw[whole:], start + whole)
        low, high = low + more[0], high + more[1]
    return low, high, int(bad), float(error), float(change)
