"""A tokenizer read from its files, without a tokenizer library: which id stands for which token, and how text is cut.

In the order in which loaders prefer them: ``tokenizer.json``, ``vocab.json``, ``vocab.txt``, SentencePiece models;
added tokens are in ``tokenizer.json``, ``tokenizer_config.json`` (``added_tokens_decoder``) and ``added_tokens.json``.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from consilience.checkpoints.json_files import read_object
from consilience.errors import InputError

#: Larger files are no tokenizer's.
_LARGEST = 256 << 20
_NAMES = frozenset([
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "vocab.txt", "merges.txt", "emoji.json", "target_vocab.json", "source.spm", "target.spm",
])  # fmt: skip
_SUFFIXES = (".model", ".tiktoken")
#: Where chat templates lie, besides the key of ``tokenizer_config.json``.
TEMPLATES = ("chat_template.jinja", "chat_template.json", "additional_chat_templates")
#: Names that makers give to rows that no text uses: padding to a round size, or room for tokens that tuning adds.
_UNUSED = re.compile(
    r"[<\[>]\W*(extra(?!_id)|reserved|unused|place.?holder|dummy|fake|pad|empty|special|control)\w*?[\W_]*(no\W*)?"
    r"\d+\W*[>\]<]",
    re.IGNORECASE,
)
#: Tokens with a role, by their key in ``tokenizer_config.json``.
ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer as its files tell it.

    Attributes:
        kind: the file that the tokens were read from, "" where none could be.
        tokens: token by id.
        added: ids of added tokens.
        cutting: digest of what else decides how text is cut (merges, normaliser, scores, ...); "" if not known.
        roles: token by its role, such as ``eos_token``, and switches such as ``add_bos_token``.
    """

    kind: str
    tokens: dict[int, str]
    added: frozenset[int]
    cutting: str
    roles: dict[str, Any]

    def id_of(self, token: str) -> int | None:
        """Return a token's id."""
        return next((number for number, other in self.tokens.items() if other == token), None)


def is_tokenizer_file(name: str) -> bool:
    """Whether a file of a model's folder belongs to its tokenizer (chat templates aside)."""
    return name in _NAMES or name.endswith(_SUFFIXES) or name.startswith("tokenization_")


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds a tokenizer of its own, and not only settings of one."""
    settings = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
    return any(is_tokenizer_file(path.name) and path.name not in settings for path in _listed(folder))


def has_template(folder: Path) -> bool:
    """Whether a folder holds a chat template."""
    return bool(chat_templates(folder))


def _listed(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if path.is_file())
    except OSError:
        return []


def is_unused(token: str) -> bool:
    """Whether a token's name says that its row is room for tokens to come, such as ``<|reserved_special_token_5|>``."""
    return len(token) <= 64 and _UNUSED.fullmatch(token) is not None


def tokenizer_digest(folder: Path) -> tuple[tuple[str, str], ...]:
    """Return the names and contents of a folder's tokenizer files: most experts have their base's, byte for byte."""
    return tuple((path.name, _digest(path)) for path in _listed(folder) if is_tokenizer_file(path.name))


def _digest(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest() if path.stat().st_size <= _LARGEST else ""
    except OSError:
        return ""


def _read(path: Path) -> dict[str, Any]:
    """Return a JSON object, or nothing where there is none to be read: a broken side file stops no merge."""
    try:
        return read_object(path, _LARGEST) if path.is_file() else {}
    except InputError:
        return {}


def _dicts(value: Any) -> dict[str, Any]:
    return cast(dict[str, Any], value) if isinstance(value, dict) else {}


def _text(token: Any) -> Any:
    """Return a special token's text: it is written plain or as an object with ``content``."""
    return cast(dict[str, Any], token).get("content") if isinstance(token, dict) else token


def read_vocabulary(folder: Path) -> Vocabulary | None:
    """Return a folder's tokenizer; None where it holds none. What cannot be parsed is known by its bytes alone."""
    if not has_tokenizer(folder):
        return None
    settings = _read(folder / "tokenizer_config.json")
    roles = {role: _text(settings[role]) for role in ROLES if _text(settings.get(role)) is not None}
    roles |= {key: settings[key] for key in ("add_bos_token", "add_eos_token", "do_lower_case") if key in settings}
    kind, tokens, cutting = next(filter(lambda found: found[1], _readings(folder)), ("", {}, ""))
    added = _added(folder, settings)
    bytes_of = "".join(digest for _, digest in tokenizer_digest(folder))
    return Vocabulary(kind, tokens | added if tokens else {}, frozenset(added), cutting or bytes_of, roles)


def _readings(folder: Path) -> Iterator[tuple[str, dict[int, str], str]]:
    """Yield (file, token by id, digest of how text is cut) of every file that may hold the tokens, best first."""
    readers: list[tuple[str, Callable[[Path], tuple[dict[int, str], str]]]] = [
        ("tokenizer.json", _from_tokenizer_json), ("vocab.json", _from_vocab_json), ("vocab.txt", _from_lines),
        *((path.name, _from_sentencepiece) for path in _listed(folder) if path.suffix in (".model", ".spm")),
        *((path.name, _from_tiktoken) for path in _listed(folder) if path.suffix == ".tiktoken"),
    ]  # fmt: skip
    for name, reader in readers:
        if (folder / name).is_file():
            try:
                tokens, cutting = reader(folder / name)
            except (OSError, ValueError, IndexError, TypeError):
                continue
            yield ("sentencepiece" if reader is _from_sentencepiece else name), tokens, cutting


def _added(folder: Path, settings: dict[str, Any]) -> dict[int, str]:
    decoder = _dicts(settings.get("added_tokens_decoder"))
    found = {int(number): _text(token) for number, token in decoder.items() if number.isdecimal()}
    found |= {number: token for token, number in _read(folder / "added_tokens.json").items() if type(number) is int}
    listed: Any = _read(folder / "tokenizer.json").get("added_tokens")
    for token in map(_dicts, cast(list[Any], listed) if isinstance(listed, list) else []):
        if type(token.get("id")) is int:
            found[token["id"]] = token.get("content")
    return {number: token for number, token in found.items() if isinstance(token, str)}


def _of(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def _from_tokenizer_json(path: Path) -> tuple[dict[int, str], str]:
    document = _read(path)
    model = _dicts(document.get("model"))
    vocabulary: Any = model.get("vocab")
    rules = {
        key: value for key, value in model.items() if key not in ("vocab", "merges") and value not in (None, False)
    }
    rules |= {key: document.get(key) for key in ("normalizer", "pre_tokenizer", "post_processor")}
    # Merges were "a b" before they were ["a", "b"].
    merges: list[Any] = [m if isinstance(m, str) else " ".join(m) for m in cast(list[Any], model.get("merges") or [])]
    if isinstance(vocabulary, dict):
        tokens = {number: token for token, number in cast(dict[str, Any], vocabulary).items() if type(number) is int}
        return tokens, _of([rules, merges])
    if isinstance(vocabulary, list):  # Unigram's [token, score]
        entries = cast(list[list[Any]], vocabulary)
        return {number: str(entry[0]) for number, entry in enumerate(entries)}, _of([rules, [e[1] for e in entries]])
    return {}, ""


def _from_vocab_json(path: Path) -> tuple[dict[int, str], str]:
    tokens = {number: token for token, number in _read(path).items() if type(number) is int}
    merges = path.with_name("merges.txt")
    lines = merges.read_text(encoding="utf-8").splitlines() if merges.is_file() else []
    return tokens, _of([line for line in lines if line and not line.startswith("#version")])


def _from_lines(path: Path) -> tuple[dict[int, str], str]:
    return dict(enumerate(path.read_text(encoding="utf-8").splitlines())), _of("wordpiece")


def _from_tiktoken(path: Path) -> tuple[dict[int, str], str]:
    """Read lines of a token in base64 and its rank."""
    lines = (line.split() for line in path.read_text(encoding="ascii").splitlines() if line)
    return {int(rank): token for token, rank in lines}, _of("ranks")


def _from_sentencepiece(path: Path) -> tuple[dict[int, str], str]:
    """Read the pieces of a SentencePiece model: field 1 of the message, of which field 1 is the text."""
    data = path.read_bytes() if path.stat().st_size <= _LARGEST else b""
    pieces: list[str] = []
    for field, value in _fields(data):
        if field == 1 and isinstance(value, bytes):
            pieces.append(next((v.decode() for f, v in _fields(value) if f == 1 and isinstance(v, bytes)), ""))
    return dict(enumerate(pieces)), hashlib.sha256(data).hexdigest()


def _fields(data: bytes) -> Iterator[tuple[int, bytes | int]]:
    """Yield (number, value) of a protobuf message's fields."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        field, wire = key >> 3, key & 7
        if wire == 0:
            value, at = _varint(data, at)
            yield field, value
            continue
        size, at = _varint(data, at) if wire == 2 else ({1: 8, 5: 4}[wire] if wire in (1, 5) else -1, at)
        if size < 0 or at + size > len(data):
            raise ValueError("not a SentencePiece model")
        yield field, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value, shift, at = value | (byte & 127) << shift, shift + 7, at + 1
        if byte < 128:
            return value, at
        if shift > 63:
            raise ValueError("not a SentencePiece model")


def chat_templates(folder: Path) -> dict[str, str]:
    """Return a folder's chat templates by name, "default" for one without a name, as loaders choose them."""
    found: dict[str, str] = {}
    for source in ("tokenizer_config.json", "chat_template.json"):
        value = _read(folder / source).get("chat_template")
        if isinstance(value, str):
            found["default"] = value
        for entry in map(_dicts, cast(list[Any], value) if isinstance(value, list) else []):
            found[str(entry.get("name"))] = str(entry.get("template"))
        found |= {str(name): str(text) for name, text in _dicts(value).items()}
    alone = folder / "chat_template.jinja"
    more = _listed(folder / "additional_chat_templates") if (folder / "additional_chat_templates").is_dir() else []
    for path in ([alone] if alone.is_file() else []) + [path for path in more if path.suffix == ".jinja"]:
        try:
            text = path.read_text(encoding="utf-8", errors="replace") if path.stat().st_size <= _LARGEST else ""
        except OSError:
            continue
        found["default" if path is alone else path.stem] = text
    return {name: text.strip() for name, text in found.items() if text.strip()}
