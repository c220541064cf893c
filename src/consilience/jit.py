"""How kernels are compiled: once per signature, cached on disk where a folder can be written, without the GIL.

Strict IEEE arithmetic (no reassociation, no contraction) so that a kernel gives the same bytes on every machine;
``reporting`` kernels, whose results are only shown to people, may reassociate sums.
"""

import contextlib
import hashlib
import inspect
import os
import types
from collections.abc import Callable, Generator
from functools import cache
from typing import Any, TypeVar, cast

from numba import njit
from numba.core import event

from consilience.progress import Progress

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


@cache
def _specialised(template: Callable[..., Any], parts: tuple[tuple[str, Any], ...]) -> Any:
    facts = [(name, part.py_func, inspect.getfile(part.py_func)) for name, part in parts]
    known = [
        (name, f.__module__, f.__qualname__, f.__code__.co_code.hex(), os.stat(p).st_mtime_ns) for name, f, p in facts
    ]
    digest = hashlib.blake2b(repr(known).encode(), digest_size=8).hexdigest()
    name = "_".join([template.__name__, *(f.__name__.strip("_") for _, f, _ in facts), digest])
    function = types.FunctionType(template.__code__, template.__globals__ | dict(parts), name)
    function.__qualname__ = name  # what a compiled function is kept under on disk
    return _compiled(function)


def specialised(template: Callable[..., Any], **parts: Any) -> Any:
    """Compile a plain function with kernels in place of globals of these names; kept on disk as kernels are.

    Raises:
        TypeError: a part is no kernel.
    """
    for name, part in parts.items():
        if not hasattr(part, "py_func"):
            raise TypeError(f"{name.strip('_')}: {part!r} is not compiled; decorate it with consilience.methods.kernel")
    return _specialised(template, tuple(parts.items()))


@contextlib.contextmanager
def compilation_shown(progress: Progress) -> Generator[None]:
    """Say within that kernels are compiled, while they are: the first job on a machine takes seconds longer."""
    with event.install_listener("numba:compile", _Compilation(progress)):
        yield


class _Compilation(event.Listener):
    """Tells of compilations; one kernel's begins and ends within another's, never at the same time."""

    def __init__(self, progress: Progress) -> None:
        self.progress, self.depth = progress, 0

    def on_start(self, event: Any) -> None:
        if self.depth == 0:
            self.progress.advance(0, "compiling kernels (once on this machine)")
        self.depth += 1

    def on_end(self, event: Any) -> None:
        self.depth -= 1
        if self.depth == 0:
            self.progress.advance(0)


def _compiled(function: F, **options: Any) -> F:
    options |= {"nogil": True, "error_model": "numpy"}
    try:
        return cast(F, njit(function, cache=True, **options))
    except RuntimeError:  # neither beside the sources nor in the user's home can a cache be kept
        return cast(F, njit(function, **options))
