"""A tokenizer's ids, added tokens and ``tokenizer.json``: read from its files, or converted where they are others.

Files of plain text and JSON are read as they are. What SentencePiece and tiktoken files mean by an id is known by their
classes alone, so transformers converts them, in the process that opens models (``engine/loader.py``).
"""

import tempfile
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

from consilience.checkpoints.json_files import read_object
from consilience.errors import InputError
from consilience.experts.token_map import Ids
from consilience.experts.vocabulary import Vocabulary, read_vocabulary

_JSON, _SETTINGS = "tokenizer.json", "tokenizer_config.json"
#: Files whose ids are written out, or counted by lines.
_PLAIN = (_JSON, "vocab.json", "vocab.txt")
#: A tokenizer's file is no larger.
_LARGEST = 256 << 20
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


def without_tokenizer(reference: str) -> str:
    """Return what is wrong where a tokenizer is needed and there is none."""
    return f"{reference} has no tokenizer, and tokens are aligned by it; add its tokenizer files"


class TokenizerFiles:
    """One tokenizer; ``reference`` is the model's whose folder holds it."""

    def __init__(self, folder: Path, reference: str) -> None:
        self.folder, self.reference = folder, reference
        self._converted: tuple[dict[str, Any], dict[str, Any]] | None = None

    @cached_property
    def _vocabulary(self) -> Vocabulary:
        found = read_vocabulary(self.folder)
        if found is not None and found.kind in _PLAIN:
            return found
        return Vocabulary("", {}, frozenset(), "", {})

    @cached_property
    def ids(self) -> Ids:
        """Id by token.

        Raises:
            InputError: the files cannot be read.
        """
        if self._vocabulary.kind:
            return {token: number for number, token in self._vocabulary.tokens.items()}
        return _ids(self.document)

    @cached_property
    def document(self) -> dict[str, Any]:
        """``tokenizer.json``.

        Raises:
            InputError: there is none, and transformers cannot make it.
        """
        path = self.folder / _JSON
        return read_object(path, _LARGEST) if path.is_file() else self._conversion[0]

    @cached_property
    def settings(self) -> dict[str, Any]:
        """``tokenizer_config.json``; that of the converted tokenizer where it was converted."""
        if not (self.folder / _JSON).is_file() and self._converted is not None:
            return self._converted[1]
        path = self.folder / _SETTINGS
        return read_object(path) if path.is_file() else {}

    @cached_property
    def added(self) -> dict[str, dict[str, Any]]:
        """How each added token is looked for in text, by token."""
        path = self.folder / _SETTINGS
        decoder: Any = (read_object(path) if path.is_file() else {}).get("added_tokens_decoder")
        listed: list[Any] = list(cast(dict[str, Any], decoder).values()) if isinstance(decoder, dict) else []
        if (self.folder / _JSON).is_file() or not self._vocabulary.kind:
            more: Any = self.document.get("added_tokens")
            listed += cast(list[Any], more) if isinstance(more, list) else []
        found = {entry["content"]: _flags(entry) for entry in listed if isinstance(entry, dict) and "content" in entry}
        tokens = (self._vocabulary.tokens.get(number, "") for number in self._vocabulary.added)
        return {token: _flags({}) for token in tokens if token} | found

    @property
    def _conversion(self) -> tuple[dict[str, Any], dict[str, Any]]:
        if self._converted is None:
            self._converted = _converted(self.folder, self.reference)
        return self._converted


def _flags(entry: dict[str, Any]) -> dict[str, bool]:
    special = entry.get("special") is True
    defaults = {"normalized": not special, "special": special}
    return {key: bool(entry.get(key, defaults.get(key, False))) for key in _FLAGS}


def _ids(document: dict[str, Any]) -> dict[str, int]:
    """Return id by token of a ``tokenizer.json``."""
    model = cast(dict[str, Any], document.get("model") or {})
    vocabulary: Any = model.get("vocab")
    found: dict[str, int] = {}
    if isinstance(vocabulary, dict):
        found = {token: n for token, n in cast(dict[str, Any], vocabulary).items() if type(n) is int}
    elif isinstance(vocabulary, list):
        found = {str(entry[0]): number for number, entry in enumerate(cast(list[list[Any]], vocabulary))}
    added = cast(list[dict[str, Any]], document.get("added_tokens") or [])
    return found | {str(entry["content"]): int(entry["id"]) for entry in added}


def _converted(folder: Path, reference: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return ``tokenizer.json`` and ``tokenizer_config.json`` as transformers makes them of other files.

    Raises:
        InputError: transformers is not there, or cannot make them.
    """
    from consilience.engine.load_check import LOADER

    if find_spec("transformers") is None:
        raise InputError(
            f"{folder}: holds a tokenizer without tokenizer.json, whose ids transformers has to read; "
            "pip install 'consilience[hf]'"
        )
    with tempfile.TemporaryDirectory(prefix="consilience-tokenizer-") as made:
        try:
            error = LOADER.ask({"convert": str(folder.resolve()), "to": made}).get("error", "")
        except (OSError, ValueError) as failure:
            error = f"no answer ({failure})"
        path = Path(made)
        if error or not (path / _JSON).is_file():
            raise InputError(
                f"{reference}: its tokenizer has no tokenizer.json, and transformers makes none of it "
                f"({error or 'it has no fast form'}); save it with a fast tokenizer's save_pretrained"
            )
        settings = read_object(path / _SETTINGS) if (path / _SETTINGS).is_file() else {}
        return read_object(path / _JSON, _LARGEST), settings
