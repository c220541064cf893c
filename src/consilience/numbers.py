"""What counts as a number among plain values of files and arguments."""

import math
import operator
import sys
from collections.abc import Mapping
from typing import Any, cast

from consilience.errors import InputError


def is_number(value: Any) -> bool:
    """Whether ``value`` is a finite number that a float can hold: no truth value, and no int beyond the largest."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def is_count(value: Any, least: int = 1) -> bool:
    """Whether ``value`` is a whole number of Python's or another library's, of at least ``least``."""
    return hasattr(value, "__index__") and not isinstance(value, bool) and operator.index(value) >= least


def check_threads(threads: Any) -> None:
    """Check a number of threads; None leaves it to the machine.

    Raises:
        InputError: it is no whole number of at least 1.
    """
    if threads is not None and not is_count(threads):
        raise InputError(f"threads: {threads!r} must be a whole number of at least 1; leave it out to use all cores")


def finite(value: Any) -> Any:
    """Return plain values with None for NaN and Inf, which JSON does not have, and lists for tuples."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(each) for key, each in cast(Mapping[Any, Any], value).items()}
    if isinstance(value, list | tuple):
        return [finite(each) for each in cast("list[Any]", value)]
    return value
