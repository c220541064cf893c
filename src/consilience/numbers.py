"""What counts as a number among plain values of files and arguments."""

import operator
import sys
from typing import Any

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
