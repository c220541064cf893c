"""The two ways a run can end badly, and the exit status each one maps to.

Every message is one line that names the file, the tensor or key, and the mend.
"""

import contextlib
import re
from collections.abc import Generator, Iterable, Sequence

#: What stands between a scheme and a host: a user's name and password, or a token.
_SECRET = re.compile(r"(?<=://)[^/\s'\"]*@")
#: Longer messages lose their middle: a name inside a stranger's file may be megabytes long.
_LONGEST = 1200


def printable(text: str) -> str:
    """Return ``text`` with control characters escaped.

    Names of tensors, keys and files come from strangers and must not write escape sequences to a terminal.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def one_line(message: str) -> str:
    """Return ``message`` as one printable line without passwords.

    Spaces are collapsed, control characters escaped, a long middle cut out, what a URL has before its ``@`` hidden.
    """
    message = _SECRET.sub("***@", message)
    if len(message) > _LONGEST:
        message = f"{message[: _LONGEST * 2 // 3]} ... {message[-_LONGEST // 3 :]}"
    return printable(" ".join(message.split()))


_spoken_to = "Python"


@contextlib.contextmanager
def command_line() -> Generator[None]:
    """Let messages name options as the command line has them, as long as one is run."""
    global _spoken_to  # of the process, as its arguments are; workers' threads must see it too
    before, _spoken_to = _spoken_to, "command line"
    try:
        yield
    finally:
        _spoken_to = before


def option(name: str, value: str = "") -> str:
    """Return how a user gives an option: ``--dry-run`` on the command line, ``dry_run=True`` in Python."""
    if _spoken_to == "command line":
        return f"--{name.replace('_', '-')}" + (f" {value}" if value else "")
    return f"{name}={value or 'True'}"


#: Packages that not every installation has, and the extra that brings each.
_EXTRAS = {
    "torch": "hf", "transformers": "hf", "peft": "hf", "accelerate": "hf", "PIL": "hf", "gguf": "gguf",
    "matplotlib": "report", "cma": "evolve", "nevergrad": "evolve", "scipy": "mixing", "tensorboard": "tensorboard",
}  # fmt: skip


def missing_extra(error: ImportError, purpose: str) -> "InputError | None":
    """Return the error of a package that an extra brings, which ``purpose`` needs; None: it is no such package."""
    package = (error.name or "").partition(".")[0]
    if package not in _EXTRAS:
        return None
    return InputError(f"{purpose} needs {package}; install it with: pip install 'consilience[{_EXTRAS[package]}]'")


class ConsilienceError(Exception):
    """Base of the errors that reach a user as one line without a traceback."""

    exit_status: int = 1

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


class InputError(ConsilienceError):
    """The user's input is wrong: nothing is left behind (exit status 2)."""

    exit_status = 2


class MachineError(ConsilienceError):
    """The machine failed (disk full, network, killed child): a rerun continues (exit status 1)."""

    exit_status = 1


def nearest(word: str, known: Sequence[str], *, cutoff: float = 0.6) -> str:
    """Return ``; did you mean 'x'?`` for the known word nearest to ``word``, or an empty string.

    Capitals do not count. ``cutoff`` is the least share of characters that must agree; the word itself is none.
    """
    import difflib

    by_lower = {other.lower(): other for other in known if other != word}
    close = difflib.get_close_matches(str(word).lower(), by_lower, n=1, cutoff=cutoff)
    return f"; did you mean {by_lower[close[0]]!r}?" if close else ""


def nearest_tensor(name: str, known: Iterable[str]) -> str:
    """As ``nearest``, of names of tensors or modules: never one of another layer."""
    numbers = re.findall(r"\d+", name)
    return nearest(name, [other for other in known if re.findall(r"\d+", other) == numbers])
