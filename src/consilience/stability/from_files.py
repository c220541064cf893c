"""Findings from the files beside the weights: tokenizers, chat templates, other bases, earlier merges."""

import hashlib
from pathlib import Path
from typing import Any

from consilience.checkpoints.json_files import read_object
from consilience.errors import ConsilienceError
from consilience.experts.model import Model
from consilience.stability.findings import Finding

#: Files that say that a model is a merge.
MERGED = ("consilience/lineage.json", "mergekit_config.yml", "mergekit_moe_config.yml")
_LARGEST = 64 << 20


def findings(base: Model, experts: tuple[Model, ...]) -> list[Finding]:
    """Return what the files of the base and of experts with files of their own show."""
    found: list[Finding] = []
    for expert in experts:
        if expert.folder is None:
            continue
        found += _merged(expert)
        if base.folder is not None:
            found += [*_tokenizer(expert, base.folder), *_other_base(expert, base)]
    return found


def _merged(expert: Model) -> list[Finding]:
    assert expert.folder is not None
    name = next((name for name in MERGED if (expert.folder / name).is_file()), None)
    if name is None:
        return []
    return [Finding(
        "warning", "already-merged", (expert.name,), f"{expert.name} is a merge itself ({name} is there)",
        "merge its parts instead, each with a weight of its own",
        "what is merged twice is shrunk twice, and its experts count by how often they occur", "likely",
    )]  # fmt: skip


def _tokenizer(expert: Model, base: Path) -> list[Finding]:
    """Adapters often come without a tokenizer; where one is there, it should be the base's."""
    assert expert.folder is not None
    found: list[Finding] = []
    own, its = _digest(expert.folder / "tokenizer.json"), _digest(base / "tokenizer.json")
    if own is not None and its is not None and own != its:
        found.append(Finding("warning", "tokenizer", (expert.name,),
                             f"{expert.name}'s tokenizer.json is not the base's",
                             "compare the two vocabularies; tokens that were added to one are noise in the others",
                             confidence="likely"))  # fmt: skip
    own, its = _template(expert.folder), _template(base)
    if own is not None and its is not None and own != its:
        found.append(Finding("warning", "chat-template", (expert.name,),
                             f"{expert.name} was given another chat template than the base",
                             "choose one for the merge, and expect the others' experts to answer less well under it",
                             confidence="likely"))  # fmt: skip
    return found


def _digest(path: Path) -> str | None:
    """Return a digest of a file of a sensible size."""
    try:
        if not path.is_file() or path.stat().st_size > _LARGEST:
            return None
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return None


def _template(folder: Path) -> str | None:
    """Return a chat template's text."""
    own = folder / "chat_template.jinja"
    try:
        if own.is_file() and own.stat().st_size <= _LARGEST:
            return own.read_text(encoding="utf-8", errors="replace").strip()
        found = _config(folder / "tokenizer_config.json").get("chat_template")
    except OSError:
        return None
    return found.strip() if isinstance(found, str) else None


def _config(path: Path) -> dict[str, Any]:
    try:
        return read_object(path) if path.is_file() else {}
    except ConsilienceError:
        return {}


def _other_base(expert: Model, base: Model) -> list[Finding]:
    """An adapter names the base that it was trained on; paths differ by machine, so only the last part is compared."""
    if expert.adapter is None:
        return []
    said = _config(expert.adapter.path / "adapter_config.json").get("base_model_name_or_path")
    known = _config(base.folder / "config.json").get("_name_or_path") if base.folder else None
    if not isinstance(said, str) or not said:
        return []
    names = {_last(name) for name in (base.reference, known) if isinstance(name, str) and name}
    if not names or _last(said) in names:
        return []
    return [Finding("note", "base-name", (expert.name,),
                    f"{expert.name} says that it was trained on {said}, and the base is {base.reference}",
                    "check that the two are the same weights", confidence="possible")]  # fmt: skip


def _last(name: str) -> str:
    return name.rstrip("/").rsplit("/", 1)[-1].lower()
