"""How kernels are compiled: once per signature, cached on disk where a folder can be written, without the GIL.

Strict IEEE arithmetic (no reassociation, no contraction) so that a kernel gives the same bytes on every machine;
``reporting`` kernels, whose results are only shown to people, may reassociate sums.
"""

from collections.abc import Callable
from typing import Any, TypeVar, cast

from numba import njit

F = TypeVar("F", bound=Callable[..., Any])


def kernel(function: F) -> F:
    """Compile ``function`` for the hot path."""
    return _compiled(function)


def inlined(function: F) -> F:
    """Compile ``function`` for use inside kernels."""
    return _compiled(function, inline="always")


def reporting(function: F) -> F:
    """Compile ``function`` allowing sums to be reassociated."""
    return _compiled(function, fastmath={"reassoc", "nsz"})


def _compiled(function: F, **options: Any) -> F:
    options |= {"nogil": True, "error_model": "numpy"}
    try:
        return cast(F, njit(function, cache=True, **options))
    except RuntimeError:  # neither beside the sources nor in the user's home can a cache be kept
        return cast(F, njit(function, **options))
