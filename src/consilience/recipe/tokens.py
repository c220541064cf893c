"""A recipe's ``tokenizer``: whose vocabulary the output has, and where the rows of single tokens come from.

A name (``union``, ``base`` or a model's), or mergekit's mapping ``{source, tokens, pad_to_multiple_of}``.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from consilience.errors import nearest

UNION, BASE = "union", "base"
#: Largest multiple that rows are padded to: more would be no padding.
_LARGEST = 1 << 16


@dataclass(frozen=True)
class TokenSource:
    """Where a token's row comes from where a model has none, and everywhere if it is forced.

    Attributes:
        kind: "model" (the model's own row of the token), "model_token" (its row of another token), "zero", or "default"
            (what holds for tokens that are not named).
        model: its name or reference, "" for the last two.
        token: the other token.
        token_id: the other token's id.
        force: whether models that have the token take that row, too.
    """

    kind: str
    model: str = ""
    token: str | None = None
    token_id: int | None = None
    force: bool = False

    def written(self) -> dict[str, Any]:
        """Return it as a recipe has it."""
        inner: Any = self.model
        if self.kind == "zero":
            inner = {"kind": "zero"}
        elif self.kind == "model_token":
            other = {"token": self.token} if self.token is not None else {"token_id": self.token_id}
            inner = {"kind": "model_token", "model": self.model} | other
        return ({} if self.kind == "default" else {"source": inner}) | ({"force": True} if self.force else {})


@dataclass(frozen=True)
class TokenizerChoice:
    """mergekit's long form of ``tokenizer``.

    Attributes:
        source: union, base, or a model's name or reference.
        tokens: where the rows of single tokens come from; those that the tokenizer lacks are added to it.
        pad_to_multiple_of: the output has the smallest multiple of it as rows that holds all tokens.
    """

    source: str = UNION
    tokens: Mapping[str, TokenSource] = field(default_factory=dict[str, TokenSource])
    pad_to_multiple_of: int | None = None

    def written(self) -> dict[str, Any]:
        """Return it as a recipe has it."""
        padded = {} if self.pad_to_multiple_of is None else {"pad_to_multiple_of": self.pad_to_multiple_of}
        tokens = {"tokens": {token: source.written() for token, source in self.tokens.items()}} if self.tokens else {}
        return {"source": self.source} | tokens | padded


def read_choice(value: Any) -> "str | TokenizerChoice | None":
    """Return a recipe's ``tokenizer``: a name where that says it all.

    Raises:
        ValueError: what is wrong with it, to follow its key.
    """
    if isinstance(value, TokenizerChoice) or value is None:
        return value
    if isinstance(value, str) and value:
        return value
    if not isinstance(value, dict):
        raise ValueError("must be union, base, a model's name, or a mapping of source, tokens and pad_to_multiple_of")
    entry = cast(dict[Any, Any], value)
    _check_keys(entry, ("source", "tokens", "pad_to_multiple_of"), "")
    source = entry.get("source", UNION)
    if not isinstance(source, str) or not source:
        raise ValueError("source must be union, base or a model's name")
    listed: Any = {} if entry.get("tokens") is None else entry["tokens"]
    if not isinstance(listed, dict):
        raise ValueError("tokens must be a mapping; write it as token: {source: MODEL}")
    tokens = {_token(token): _source(token, each) for token, each in cast(dict[Any, Any], listed).items()}
    multiple: Any = entry.get("pad_to_multiple_of")
    if multiple is not None and (not isinstance(multiple, int) or not 1 <= multiple <= _LARGEST or multiple is True):
        raise ValueError(f"pad_to_multiple_of must be a whole number from 1 to {_LARGEST}, such as 64")
    return TokenizerChoice(source, tokens, multiple) if tokens or multiple is not None else source


def written_choice(value: "str | TokenizerChoice | None") -> Any:
    """Return it as plain values, the way a recipe has it."""
    return value.written() if isinstance(value, TokenizerChoice) else value


def _check_keys(entry: Mapping[Any, Any], known: tuple[str, ...], place: str) -> None:
    for key in entry:
        if key not in known:
            hint = nearest(str(key), list(known)) or f"; use one of {', '.join(known)}"
            raise ValueError(f"{place}has an unknown key {key!r}{hint}")


def _token(token: Any) -> str:
    if not isinstance(token, str) or not token:
        raise ValueError(f"tokens: {token!r} is no text; quote the token")
    return token


def _source(token: str, value: Any) -> TokenSource:
    place = f"tokens: {token!r} "
    if not isinstance(value, dict):
        raise ValueError(f"{place}must be a mapping; write it as {{source: MODEL}} or {{source: {{kind: zero}}}}")
    entry = cast(dict[Any, Any], value)
    _check_keys(entry, ("source", "force"), place)
    force: Any = entry.get("force", False)
    if not isinstance(force, bool):
        raise ValueError(f"{place}has force: {force!r}; write true or false")
    source: Any = entry.get("source")
    if source is None and force:
        raise ValueError(f"{place}is forced without a source; name a model, or {{kind: zero}}")
    if source is None:
        return TokenSource("default")
    if isinstance(source, str) and source:
        return TokenSource("model", source, force=force)
    if not isinstance(source, dict):
        raise ValueError(f"{place}has a source that is neither a model's name nor a mapping with a kind")
    inner = cast(dict[Any, Any], source)
    _check_keys(inner, ("kind", "model", "token", "token_id"), f"{place}source ")
    kind: Any = inner.get("kind")
    if kind == "zero" and len(inner) == 1:
        return TokenSource("zero", force=force)
    if kind != "model_token":
        raise ValueError(
            f"{place}source has kind {kind!r}; it is zero (alone), or model_token with a model and a token"
        )
    model, other, number = inner.get("model"), inner.get("token"), inner.get("token_id")
    if not isinstance(model, str) or not model:
        raise ValueError(f"{place}source names no model; add model: NAME")
    if (other is None) == (number is None):
        raise ValueError(f"{place}source needs either a token or a token_id")
    if other is not None and not isinstance(other, str):
        raise ValueError(f"{place}source has a token that is no text; quote it, or write token_id: NUMBER")
    if number is not None and (not isinstance(number, int) or isinstance(number, bool) or number < 0):
        raise ValueError(f"{place}source has token_id {number!r}, which is no whole number from 0")
    return TokenSource("model_token", model, other, number, force)
