"""What counts as a number among plain values of files and arguments."""

import sys
from typing import Any


def is_number(value: Any) -> bool:
    """Whether ``value`` is a finite number that a float can hold: no truth value, and no int beyond the largest."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
