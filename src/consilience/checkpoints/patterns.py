"""PEFT's ``rank_pattern`` and ``alpha_pattern``: a stranger's regular expressions, matched within a time limit.

A key applies to a module whose name it matches at the end, from a dot on, or is (``get_pattern_key`` in
``peft/utils/other.py``, v0.21). An expression can take exponential time, and Python's matcher cannot be stopped from
within: whatever could take more than quadratic time runs in a process of its own.
"""

import json
import re
import subprocess
import sys
from collections.abc import Iterable, Sequence

from consilience.errors import InputError

#: Seconds that all patterns of a config may take on all modules.
SECONDS = 5.0
_LONGEST_NAME = 512
_MATCHER = """
import json, re, sys
keys, modules = json.load(sys.stdin)
json.dump([[bool(re.match(rf"(.*\\.)?({key})$", module)) for key in keys] for module in modules], sys.stdout)
"""


def matching_keys(
    keys: Sequence[str], modules: Iterable[str], where: str, seconds: float | None = None
) -> dict[str, list[str]]:
    """Return, for every module, the keys that apply to it, in the config's order.

    Args:
        keys: regular expressions.
        modules: names as PEFT sees them.
        where: what errors call the place of the keys.
        seconds: time limit for expressions that are not simple; None: ``SECONDS``.

    Raises:
        InputError: a key is not a regular expression, or takes too long.
    """
    modules = list(modules)
    for key in keys:
        try:
            re.compile(rf"(.*\.)?({key})$")
        except (re.error, RecursionError, OverflowError) as error:
            raise InputError(
                f"{where}: pattern {key!r} is not a regular expression ({error}); restore the config"
            ) from None
    if all(map(_is_simple, keys)) and all(len(module) <= _LONGEST_NAME for module in modules):
        found = [[re.match(rf"(.*\.)?({key})$", module) is not None for key in keys] for module in modules]
    else:
        found = _matched_apart(keys, modules, where, SECONDS if seconds is None else seconds)
    return {
        module: [key for key, hit in zip(keys, hits, strict=True) if hit or key == module]
        for module, hits in zip(modules, found, strict=True)
    }


def _is_simple(key: str) -> bool:
    """Whether matching a key is at most quadratic: one repetition beside the one before it, and none of a group."""
    return not re.search(r"\)\s*[*+?{]|\\[1-9]|\(\?", key) and len(re.findall(r"[*+{]", key)) <= 1


def _matched_apart(keys: Sequence[str], modules: list[str], where: str, seconds: float) -> list[list[bool]]:
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", _MATCHER],
            input=json.dumps([list(keys), modules]),
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        shown = max(keys, key=len)
        raise InputError(
            f"{where}: patterns such as {shown!r} take more than {seconds:g} s to match; write the modules' names out"
        ) from None
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise InputError(f"{where}: patterns cannot be matched ({last}); restore the config")
    return json.loads(done.stdout)
