"""How kernels are compiled: once per signature, cached on disk where a folder can be written, without the GIL.

Strict IEEE arithmetic (no reassociation, no contraction) so that a kernel gives the same bytes on every machine;
``reporting`` kernels, whose results are only shown to people, may reassociate sums.
"""

import contextlib
import hashlib
import importlib
import inspect
import sys
import threading
import types
from collections.abc import Callable, Generator
from pathlib import Path
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


def skip_blas() -> None:
    """Keep numba from importing scipy.linalg in a process of our own: 0.2 s, before any kernel can run.

    numba.np.arraymath looks for a BLAS once, when it is loaded; told that there is none, it compiles the inner product
    of np.correlate as a loop, and all else as ever. ``np.dot`` looks for itself.
    """
    asked, modules = "scipy.linalg.cython_blas", cast(dict[str, Any], sys.modules)
    if "numba.np.arraymath" in modules or asked in modules:
        return
    modules[asked] = None
    try:
        importlib.import_module("numba.np.arraymath")
    finally:
        del modules[asked]


_made: dict[tuple[Any, ...], Any] = {}
_making = threading.Lock()


def specialised(template: Callable[..., Any], **parts: Any) -> Any:
    """Compile a plain function with kernels in place of globals of these names; kept on disk as kernels are.

    It is kept under a name that changes with the parts and with every kernel of the package, all of which may be
    compiled into it: the cache itself looks at the template's own file only.

    Raises:
        TypeError: a part is no kernel.
    """
    for name, part in parts.items():
        if not hasattr(part, "py_func"):
            raise TypeError(f"{name.strip('_')}: {part!r} is not compiled; decorate it with consilience.methods.kernel")
    with _making:  # two that are made at once would both be compiled
        key = (template, *parts.items())
        if key not in _made:
            _made[key] = _compiled(_bound(template, parts))
        return _made[key]


def _bound(template: Callable[..., Any], parts: dict[str, Any]) -> Any:
    own = [(name, part.py_func, Path(inspect.getfile(part.py_func))) for name, part in parts.items()]
    kernels = sorted(Path(inspect.getfile(template)).parent.glob("*.py"))
    facts = [(name, f.__module__, f.__qualname__, f.__code__.co_code.hex()) for name, f, _ in own]
    stamps = [path.stat().st_mtime_ns for path in (*kernels, *(path for *_, path in own))]
    digest = hashlib.blake2b(repr((facts, stamps)).encode(), digest_size=8).hexdigest()
    name = "_".join([template.__name__, *(f.__name__.strip("_") for _, f, _ in own), digest])
    function = types.FunctionType(template.__code__, template.__globals__ | parts, name)
    function.__qualname__ = name  # what a compiled function is kept under on disk
    return function


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
