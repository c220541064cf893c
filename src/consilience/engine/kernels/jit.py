"""How kernels are compiled: once per signature, cached on disk, without the GIL.

Strict IEEE arithmetic (no reassociation, no contraction) so that a kernel gives the same bytes on every machine;
``reporting`` kernels, whose results are only shown to people, may reassociate sums.
"""

from collections.abc import Callable
from typing import Any, TypeVar, cast

from numba import njit

F = TypeVar("F", bound=Callable[..., Any])


def kernel(function: F) -> F:
    """Compile ``function`` for the hot path."""
    return cast(F, njit(function, nogil=True, cache=True, error_model="numpy"))


def inlined(function: F) -> F:
    """Compile ``function`` for use inside kernels."""
    return cast(F, njit(function, nogil=True, cache=True, error_model="numpy", inline="always"))


def reporting(function: F) -> F:
    """Compile ``function`` allowing sums to be reassociated."""
    return cast(F, njit(function, nogil=True, cache=True, error_model="numpy", fastmath={"reassoc", "nsz"}))
