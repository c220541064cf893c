"""The files beside a model's weights that say how it is used."""

import copy
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any, cast

from consilience.checkpoints.json_files import read_object
from consilience.errors import InputError
from consilience.experts.model import Model
from consilience.experts.vocabulary import (
    Vocabulary,
    chat_templates,
    has_template,
    has_tokenizer,
    read_vocabulary,
    tokenizer_digest,
)

SPECIAL_IDS = (
    "bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "decoder_start_token_id", "forced_bos_token_id",
    "forced_eos_token_id",
)  # fmt: skip
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
#: Keys that name classes or other files.
_NO_PROCESSING = (
    "processor_class", "image_processor_type", "feature_extractor_type", "auto_map", "use_fast", "tokenizer",
)  # fmt: skip


class ModelFiles:
    """The files beside a model's weights, read when they are asked for."""

    def __init__(self, model: Model) -> None:
        self.name = model.name
        whole = model.checkpoint.folder if model.checkpoint is not None else None
        own = model.adapter.path if model.adapter is not None else None
        #: Where config.json and what goes with it lie; an adapter has its base's.
        self.config_folder: Path | None = whole
        self._config = model.checkpoint.config if model.checkpoint is not None else None
        #: Where the tokenizer lies: an adapter's own goes before that of the model it is on.
        self.tokenizer_folder: Path | None = _first([own, whole], has_tokenizer)
        self.template_folder: Path | None = _first([own, whole], has_template) or self.tokenizer_folder

    def _json(self, name: str) -> dict[str, Any]:
        path = None if self.config_folder is None else self.config_folder / name
        try:
            return read_object(path) if path is not None and path.is_file() else {}
        except InputError:
            return {}  # of no use to compare; whoever needs the file says what is wrong with it

    @cached_property
    def config(self) -> dict[str, Any]:
        """``config.json``, at the vocabulary size that an adapter on the model has given it."""
        return self._config if self._config is not None else self._json("config.json")

    @cached_property
    def generation(self) -> dict[str, Any]:
        """``generation_config.json``."""
        return self._json("generation_config.json")

    @cached_property
    def vocabulary(self) -> Vocabulary | None:
        """The tokenizer."""
        return None if self.tokenizer_folder is None else read_vocabulary(self.tokenizer_folder)

    def with_configs(self, config: dict[str, Any], generation: dict[str, Any]) -> "ModelFiles":
        """Return the same files with another config.json and generation_config.json."""
        found = copy.copy(self)
        found.config, found.generation = config, generation
        return found

    def same_tokenizer(self, other: "ModelFiles") -> bool:
        """Whether two models' tokenizer files are the same to the byte, so that they need not be read."""
        return self._tokenizer == other._tokenizer

    @property
    def tokenizer_digest(self) -> tuple[tuple[str, str], ...]:
        """Names and contents of the tokenizer's files."""
        return self._tokenizer

    @cached_property
    def _tokenizer(self) -> tuple[tuple[str, str], ...]:
        return () if self.tokenizer_folder is None else tokenizer_digest(self.tokenizer_folder)

    @cached_property
    def templates(self) -> dict[str, str] | None:
        """Chat templates by name; None where there is no tokenizer that could have one."""
        return None if self.template_folder is None else chat_templates(self.template_folder)

    @cached_property
    def processor(self) -> dict[str, Any]:
        """What is done to images and sound before the model sees them."""
        found: dict[str, Any] = {}
        for name in PROCESSOR_FILES:
            for key, value in self._json(name).items():
                nested = key in ("image_processor", "feature_extractor", "video_processor") and isinstance(value, dict)
                found |= cast(dict[str, Any], value) if nested else {key: value}
        return {key: value for key, value in found.items() if key not in _NO_PROCESSING}


def _first(folders: list[Path | None], holds: Callable[[Path], bool]) -> Path | None:
    return next((folder for folder in folders if folder is not None and folder.is_dir() and holds(folder)), None)


def special_ids(files: ModelFiles) -> dict[str, list[int]]:
    """Return the ids of special tokens, as generation takes them: from its own config, else from the model's."""
    found: dict[str, list[int]] = {}
    text = files.config.get("text_config")
    for source in (text if isinstance(text, dict) else {}, files.config, files.generation):
        for key in SPECIAL_IDS:
            value: Any = cast(dict[str, Any], source).get(key)
            if value is not None:
                found[key] = cast(list[int], value) if isinstance(value, list) else [value]
    return found
