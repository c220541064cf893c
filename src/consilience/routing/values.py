"""Frozen dataclasses of settings, read from plain values with one-line errors."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any, Self, TypeVar, cast

from consilience.errors import InputError, nearest
from consilience.numbers import is_number

T = TypeVar("T")


def read_settings(kind: type[T], value: Any, where: str) -> T:
    """Return settings from a mapping, or from a word, which stands for ``{"kind": word}``.

    Raises:
        InputError: names ``where``, the key that is unknown or wrong, and the nearest known one.
    """
    if isinstance(value, str):
        value = {"kind": value}
    if not isinstance(value, Mapping):
        raise InputError(f"{where}: must be a mapping, not a {type(value).__name__}; write it as key: value")
    given = cast(Mapping[str, Any], value)
    known = [field.name for field in fields(cast(Any, kind))]
    for key in given:
        if key not in known:
            raise InputError(f"{where}: unknown key {key!r}{nearest(str(key), known) or '; use ' + ', '.join(known)}")
    try:
        return kind(**given)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None


class PlainValues:
    """What a frozen dataclass of settings is as plain values."""

    __slots__ = ()

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(cast(Any, self))

    @classmethod
    def from_plain(cls, value: Any, where: str) -> Self:
        """Return settings from a mapping, or from the kind alone where there are kinds.

        Raises:
            InputError: a key is unknown, or a value is out of its range.
        """
        return read_settings(cls, value, where)


def check_choice(key: str, value: Any, known: Sequence[str]) -> None:
    """Raise ``InputError`` unless a value is one of the known words."""
    if value not in known:
        raise InputError(f"{key}: {value!r} is not one of {', '.join(known)}{nearest(str(value), list(known))}")


def check_whole(key: str, value: Any, least: int) -> None:
    """Raise ``InputError`` unless a value is a whole number of at least ``least``."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise InputError(f"{key}: {value!r} must be a whole number of at least {least}")


def check_above(key: str, value: Any, bound: float) -> None:
    """Raise ``InputError`` unless a value is a finite number above ``bound``."""
    if not is_number(value) or value <= bound:
        raise InputError(f"{key}: {value!r} must be a number above {bound:g}")


def check_text(key: str, value: Any) -> None:
    """Raise ``InputError`` unless a value is text."""
    if not isinstance(value, str):
        raise InputError(f"{key}: {value!r} must be text; quote it")
