"""The two ways a run can end badly, and the exit status each one maps to.

Every message is one line that names the file, the tensor or key, and the mend.
"""

#: Longer messages lose their middle: a name inside a stranger's file may be megabytes long.
_LONGEST = 1200


def printable(text: str) -> str:
    """Return ``text`` with control characters escaped.

    Names of tensors, keys and files come from strangers and must not write escape sequences to a terminal.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def one_line(message: str) -> str:
    """Return ``message`` as one printable line: spaces collapsed, control characters escaped, a long middle cut out."""
    if len(message) > _LONGEST:
        message = f"{message[: _LONGEST * 2 // 3]} ... {message[-_LONGEST // 3 :]}"
    return printable(" ".join(message.split()))


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


def nearest(word: str, known: "list[str] | tuple[str, ...]") -> str:
    """Return ``; did you mean 'x'?`` for the known word nearest to ``word``, or an empty string."""
    import difflib

    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""
