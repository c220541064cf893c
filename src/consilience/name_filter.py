"""Patterns of tensor names: the one way in which recipes and parameters choose tensors.

``re:REGEX`` is searched in the name; a pattern with ``*`` or ``?`` is a glob of the whole name; other text is a part of
the name.
"""

import fnmatch
import re
from collections.abc import Callable, Iterable

from consilience.errors import InputError

Test = Callable[[str], bool]


def name_filter(pattern: str | None, where: str) -> Test:
    """Return whether a name matches a pattern; None matches all.

    Raises:
        InputError: the pattern is empty or not a regular expression; ``where`` names its place.
    """
    if pattern is None or pattern == "*":
        return lambda name: True
    if pattern in ("", "re:"):
        raise InputError(f"{where}: a pattern of tensor names is empty; write * to mean all of them")
    if pattern.startswith("re:"):
        try:
            compiled = re.compile(pattern[3:])
        except (re.error, OverflowError, RecursionError) as error:
            raise InputError(f"{where}: {pattern!r} is not a regular expression ({error}); correct it") from None
        return lambda name: compiled.search(name) is not None
    if any(c in pattern for c in "*?"):
        return lambda name: fnmatch.fnmatchcase(name, pattern)
    return lambda name: pattern in name


def any_filter(patterns: Iterable[str], where: str) -> Test:
    """Return whether a name matches any of several patterns.

    Raises:
        InputError: one is empty or not a regular expression.
    """
    tests = [name_filter(pattern, where) for pattern in patterns]
    if not tests:
        return lambda name: False
    return lambda name: any(test(name) for test in tests)
