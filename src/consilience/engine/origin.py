"""Where a model comes from: its hub ids, and whether an adapter was trained on the base that it is put on."""

import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, cast

from consilience.checkpoints.checkpoint import Checkpoint, TensorInfo, raw
from consilience.checkpoints.files import exists, regular_size
from consilience.checkpoints.json_files import read_object
from consilience.checkpoints.open import open_checkpoint
from consilience.errors import InputError
from consilience.experts.model import Model
from consilience.recipe.yaml_file import parse_yaml

#: ``owner/name`` as the hub allows it; a Trainer's ``folder/checkpoint-500`` looks the same and is none.
_REPOSITORY = re.compile(r"\w[\w.-]*(?<![.-])/(?!checkpoint-\d+$)\w[\w.-]*(?<![.-])", re.ASCII)
#: Endings that hub names have for the same weights in another storage.
_STORAGE = re.compile(r"(-(unsloth|bnb|[48]bit|int[48]|nf4|gptq|awq|fp8|bf16|fp16))+$", re.IGNORECASE)
#: Owners whose repositories are copies of others', by the same names: Unsloth's adapters name them as their base.
_COPIES = ("unsloth/",)
#: Elements that are compared at the beginning, in the middle and at the end of every tensor.
_SAMPLE = 4096

#: How an adapter's base and the base that it is put on compare; "unknown" where nothing tells.
Comparison = Literal["same", "other", "unknown"]


def front_matter(readme: Path) -> dict[str, Any]:
    """Return the YAML front matter of a card, or nothing if there is none that can be read."""
    try:
        regular_size(readme)
        with open(readme, encoding="utf-8") as file:
            text = file.read(1 << 16)
    except (InputError, OSError, UnicodeDecodeError):
        return {}
    if not text.startswith("---\n") or "\n---" not in text[4:]:
        return {}
    try:
        value = parse_yaml(text[4 : text.index("\n---", 4)], str(readme))
    except InputError:
        return {}
    return cast(dict[str, Any], value) if isinstance(value, dict) else {}


def hub_ids(model: Model) -> list[str]:
    """Return the hub ids that a model comes from, as far as they are known.

    What was fetched from the hub has its own id. A local folder has the ids it states as its origin: its config
    (``_name_or_path``), else its card (``model_name``, else ``base_model``). Folder names and paths are no ids.
    """
    return list(dict.fromkeys(name for part in parts_of(model) for name in _ids(part)))


def parts_of(model: Model) -> list[Path]:
    """Return where a model lies: its checkpoint, its adapter, or the one and then the other."""
    checkpoint = [model.checkpoint.path or Path(model.reference)] if model.checkpoint else []
    return checkpoint + ([model.adapter.path] if model.adapter else [])


def fetched_id(path: Path) -> str | None:
    """Return the hub id of what lies in the hub's cache, or is linked from there."""
    return _cached(path.absolute()) or _cached(path.resolve())


def _cached(path: Path) -> str | None:
    """Return the hub id that a path of the form ``models--owner--name/snapshots/revision`` holds."""
    for folder, inside in pairwise(path.parts):
        if folder.startswith("models--") and inside in ("snapshots", "blobs"):
            return folder.removeprefix("models--").replace("--", "/")
    return None


def _ids(part: Path) -> list[str]:
    known = fetched_id(part)
    if known is not None or not part.is_dir():
        return [known] if known is not None else []
    try:
        config = read_object(part / "config.json")
    except InputError:
        config = {}
    card = front_matter(part / "README.md")
    for value in (config.get("_name_or_path"), card.get("model_name"), card.get("base_model")):
        stated = [_stated(name, part) for name in (cast(list[Any], value) if isinstance(value, list) else [value])]
        if any(stated):
            return [name for name in stated if name is not None]
    return []


def _stated(name: object, folder: Path) -> str | None:
    """Return the hub id that ``name``, said by the model in ``folder``, stands for; None if it is no id."""
    if not isinstance(name, str):
        return None
    if not _REPOSITORY.fullmatch(name) or ".." in name or "--" in name:
        return _cached(Path(name))
    # owner/name may as well be a relative path: from here, or from where the model was saved.
    nearby = (Path(), *(folder / name).absolute().parents)
    return None if any(exists(top / name) for top in nearby) else name


def compare_base(expert: Model, base: Model) -> tuple[Comparison, str]:
    """Compare the base that an adapter names with the one it is put on, and return what it names ("" if nothing).

    A folder that is still there is compared by fingerprint: that of its lineage, else samples of every tensor. Names
    of the hub are compared with the base's own; paths that are not here tell nothing, whatever their last part.
    """
    if expert.adapter is None:
        return "unknown", ""
    if expert.checkpoint is not None:  # it stands on a model of its own
        base = replace(expert, adapter=None)
    named = expert.adapter.config.get("base_model_name_or_path")
    if not isinstance(named, str) or not named:
        return "unknown", ""
    folder = _local(named, expert.adapter.path)
    if folder is not None and base.folder is not None:
        return _compare_folders(folder, base), named
    theirs, known = _stated(named, expert.adapter.path), _own_ids(base)
    if "/" not in named and named.lower() in {name.lower().rpartition("/")[2] for name in known}:
        return "same", named  # the hub's oldest models go by a name without an owner
    if theirs is None or not known:
        return "unknown", named
    plain, own_plain = _STORAGE.sub("", theirs.lower()), {_STORAGE.sub("", name.lower()) for name in known}
    if plain not in own_plain:
        copies = {name.rpartition("/")[2] for name in (plain, *own_plain) if name.startswith(_COPIES)}
        alike = copies and plain.rpartition("/")[2] in {name.rpartition("/")[2] for name in own_plain}
        return ("unknown" if alike else "other"), named
    revision, own = expert.adapter.config.get("revision"), _revision(base)
    return ("other" if own and _differ(revision, own) else "same"), named + (f"@{revision}" if revision else "")


def _own_ids(base: Model) -> list[str]:
    """Return the hub ids of a base's own weights: a card's ``base_model`` would be that of its parent."""
    if base.folder is None:
        return []
    known = fetched_id(base.folder)
    if known is not None:
        return [known]
    try:
        config = read_object(base.folder / "config.json")
    except InputError:
        return []
    stated = _stated(config.get("_name_or_path"), base.folder)
    return [] if stated is None else [stated]


def _revision(base: Model) -> str | None:
    """Return the commit of a base in the hub's cache."""
    for place in (base.folder.absolute(), base.folder.resolve()) if base.folder is not None else ():
        if place.parent.name == "snapshots":
            return place.name
    return None


def _differ(revision: object, commit: str) -> bool:
    """Whether a revision is another commit; a branch's or tag's name does not say which it was."""
    return (
        isinstance(revision, str)
        and re.fullmatch(r"[0-9a-f]{7,40}", revision) is not None
        and (not commit.startswith(revision))
    )


def _local(named: str, adapter: Path) -> Path | None:
    """Return the folder that an adapter's base is in, if it is on this machine."""
    if named.startswith("~") or "\0" in named:
        return None
    places = (Path(named), adapter.parent / named) if not Path(named).is_absolute() else (Path(named),)
    return next((place for place in places if exists(place) and place.is_dir()), None)


def _compare_folders(folder: Path, base: Model) -> Comparison:
    assert base.folder is not None
    if folder.resolve() == base.folder.resolve():
        return "same"
    fingerprints = [_lineage_fingerprint(place) for place in (folder, base.folder)]
    if all(fingerprints):
        return "same" if fingerprints[0] == fingerprints[1] else "other"
    if base.checkpoint is None or not any(folder.glob("*.safetensors")):
        return "unknown"  # weights of other formats would have to be loaded whole
    try:
        theirs = open_checkpoint(folder)
    except InputError:
        return "unknown"
    try:
        return _compare_weights(theirs, base.checkpoint)
    finally:
        theirs.storage.close()


def _lineage_fingerprint(folder: Path) -> str | None:
    try:
        found: Any = read_object(folder / "consilience" / "lineage.json").get("output")
    except InputError:
        return None
    value = cast(dict[str, Any], found).get("fingerprint") if isinstance(found, dict) else None
    return value if isinstance(value, str) else None


def _compare_weights(one: Checkpoint, other: Checkpoint) -> Comparison:
    """Compare samples of the tensors that both hold in the same form."""
    shared = [name for name in one.tensors if name in other.tensors]
    if any(one.tensors[name].shape != other.tensors[name].shape for name in shared):
        return "other"
    alike = [name for name in shared if one.tensors[name].dtype == other.tensors[name].dtype]
    if not alike:
        return "unknown"
    try:
        equal = all(_sampled(one, one.tensors[name]) == _sampled(other, other.tensors[name]) for name in alike)
    except InputError:
        return "unknown"
    return "same" if equal else "other"


def _sampled(checkpoint: Checkpoint, tensor: TensorInfo) -> bytes:
    size = min(_SAMPLE, tensor.numel)
    starts = sorted({0, (tensor.numel - size) // 2, tensor.numel - size})
    return b"".join(raw(checkpoint.storage, tensor, start, start + size).tobytes() for start in starts)
