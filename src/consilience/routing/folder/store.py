"""A routed model on disk: a folder that names its base and holds its experts, each in a folder of its own.

    OUT/consilience/routing.json                  base, settings, experts in order, how instructions are made
    OUT/consilience/experts/NAME/                 the adapter, as PEFT reads it
    OUT/consilience/experts/NAME/vectors.safetensors      KIND/MODULE -> [in]: gates, directions, mean activations
    OUT/consilience/instructions-HASH.safetensors      embeddings [K, E], and what the embedder keeps

The base is not copied: it is found by its path, or by its reference. Whether it is the one that was built on is judged
by its config, the sizes of its weight files and blocks of them.
Files of one expert never change because another comes or goes; what changes is ``routing.json``, in one step.
"""

import hashlib
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from consilience.checkpoints.files import check_link, copy_file
from consilience.checkpoints.json_files import read_object
from consilience.checkpoints.mapped import mapped
from consilience.checkpoints.open import WEIGHT_SUFFIXES, open_checkpoint
from consilience.checkpoints.reference import resolve
from consilience.errors import InputError, nearest, option
from consilience.routing.expert import Expert, read_factors, read_tensor
from consilience.routing.settings import Settings
from consilience.workdir import OURS, json_text, write_file

FORMAT = 1
ROUTING, EXPERTS, VECTORS = "routing.json", "experts", "vectors.safetensors"
#: Of each weight file of a base so many blocks of so many bytes are compared, which takes milliseconds.
_BLOCKS, _BLOCK = 32, 1 << 14
_TENSORS = re.compile(r"instructions-[0-9a-f]{16}\.safetensors")
_ADAPTER = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin", "README.md")
#: What an expert's folder has of ours.
EXPERT_FILES = (*_ADAPTER, VECTORS)
_KEYS = ("format", "base", "settings", "experts", "instructions", "tensors", "records")


@dataclass(frozen=True)
class Base:
    """What a routed model stands on: ``path`` when it was built, the ``reference`` that was given, and what it holds.

    ``files`` has the bytes of every weight file, ``config`` a hash of ``config.json``, ``sampled`` one of parts of the
    weight files, by which most other fine-tunes of the same size are told. Models of before it was kept have none.
    """

    path: str
    reference: str
    files: dict[str, int]
    config: str
    sampled: str = ""

    @classmethod
    def of(cls, folder: Path, reference: str) -> "Base":
        """Describe a base folder."""
        weights = [path for path in sorted(folder.iterdir()) if _weights(path)]
        sizes = {path.name: path.stat().st_size for path in weights}
        return cls(str(folder.absolute()), reference, sizes, _digest(folder / "config.json"), _sample(weights))


def _weights(path: Path) -> bool:
    return path.is_file() and path.name.endswith(WEIGHT_SUFFIXES)


def _sample(paths: Sequence[Path]) -> str:
    """Return a hash of blocks at even distances in files, the first and the last among them."""
    found = hashlib.sha256()
    for path in paths:
        size = path.stat().st_size
        with path.open("rb") as file:
            for part in range(_BLOCKS):
                file.seek(max(0, size - _BLOCK) * part // (_BLOCKS - 1))
                found.update(file.read(_BLOCK))
    return found.hexdigest()


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@dataclass(frozen=True)
class Description:
    """What ``routing.json`` says.

    ``instructions`` are the global router's own values, ``tensors`` is the file of its tensors, ``records`` say how the
    model was built.
    """

    base: Base
    settings: Settings
    experts: tuple[str, ...]
    instructions: dict[str, Any] | None = None
    tensors: str | None = None
    records: dict[str, Any] = field(default_factory=dict[str, Any])

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "format": FORMAT,
            "base": vars(self.base),
            "settings": self.settings.to_dict(),
            "experts": list(self.experts),
            "instructions": self.instructions,
            "tensors": self.tensors,
            "records": self.records,
        }


def own_files(description: Description) -> set[str]:
    """Return the names, relative to the folder, of what a routed model is made of."""
    files = {f"{OURS}/{EXPERTS}/{expert}/{name}" for expert in description.experts for name in EXPERT_FILES}
    return files | {f"{OURS}/{ROUTING}", f"{OURS}/{description.tensors}"}


def is_routed(folder: Path) -> bool:
    """Whether a folder holds a routed model."""
    return (folder / OURS / ROUTING).is_file()


def read_description(folder: Path) -> Description:
    """Read ``routing.json``.

    Raises:
        InputError: there is none, or it is not what this version writes.
    """
    path = folder / OURS / ROUTING
    if not path.is_file():
        raise InputError(f"{folder}: holds no {OURS}/{ROUTING}; give a folder that 'consilience route build' made")
    value = read_object(path)
    if value.get("format") != FORMAT:
        raise InputError(f"{path}: format {value.get('format')!r} is not {FORMAT}; build it again with this version")
    for key in value:
        if key not in _KEYS:
            raise InputError(f"{path}: unknown key {key!r}{nearest(key, _KEYS)}; restore the file")
    base, experts, settings = (value.get(key) for key in ("base", "experts", "settings"))
    if not _is_base(base) or not _are_names(experts) or not isinstance(settings, dict):
        raise InputError(f"{path}: base, experts or settings are missing or not what they should be; restore the file")
    known = Settings.from_plain(cast(dict[str, Any], settings), str(path))
    records, instructions, tensors = (value.get(key) for key in ("records", "instructions", "tensors"))
    _check_instructions(instructions, cast(list[str], experts), path)
    if not _are_records(records):
        raise InputError(f"{path}: records are not what they should be; restore the file")
    named = isinstance(tensors, str) and _TENSORS.fullmatch(tensors) is not None
    if (instructions is None) != (tensors is None) or not (tensors is None or named):
        raise InputError(f"{path}: tensors {tensors!r} is not the name of a file of instructions; restore the file")
    names = tuple(cast(list[str], experts))
    return Description(Base(**cast(dict[str, Any], base)), known, names, instructions, tensors, records or {})


def _check_instructions(value: Any, experts: Sequence[str], path: Path) -> None:
    if value is None:
        return
    told: Any = cast(dict[str, Any], value).get("experts") if isinstance(value, dict) else None
    if not isinstance(told, list) or not all(isinstance(one, dict) for one in cast(list[Any], told)):
        raise InputError(f"{path}: instructions are not what they should be; restore the file")
    if [one.get("name") for one in cast(list[dict[str, Any]], told)] != experts:
        raise InputError(f"{path}: instructions are not about the same experts as the rest; restore the file")


def _are_records(value: Any) -> bool:
    """Whether these are records, as those of gates: by expert, what they were trained with."""
    if value is None:
        return True
    gates: Any = cast(dict[str, Any], value).get("gates", {}) if isinstance(value, dict) else None
    if not isinstance(gates, dict):
        return False
    return all(isinstance(one, dict) and "settings" in one for one in cast(dict[str, Any], gates).values())


def _is_base(value: Any) -> bool:
    texts = ("path", "reference", "config", "sampled")
    return (
        isinstance(value, dict)
        and sorted({**cast(dict[str, Any], value), "sampled": ""}) == sorted((*texts, "files"))
        and all(isinstance(cast(dict[str, Any], value).get(key, ""), str) for key in texts)
        and isinstance(value["files"], dict)
    )


def _are_names(value: Any) -> bool:
    """Whether these are names of experts, none of which leads out of the folder."""
    return (
        isinstance(value, list)
        and bool(cast(list[Any], value))
        and all(is_name(name) for name in cast(list[Any], value))
        and len(set(cast(list[Any], value))) == len(cast(list[Any], value))
    )


def is_name(value: Any) -> bool:
    """Whether a value is an expert's name that may stand for a folder: printable, of at most 200 bytes."""
    if not isinstance(value, str) or value != value.strip() or not value.isprintable():
        return False
    return 0 < len(value.encode()) <= 200 and not any(c in "/\\." for c in value)


def find_base(described: Base, folder: Path, given: str | None = None) -> Path:
    """Return the folder of the base that a routed model in ``folder`` stands on; ``given`` is the user's own word.

    Raises:
        InputError: it is not found, or is another model.
    """
    if given is not None:
        place = resolve(given).model
    elif Path(described.path).is_dir():
        place = Path(described.path)
    else:
        beside = folder.absolute().parent / Path(described.path).name
        place = beside if beside.is_dir() else _referenced(described, folder)
    if not (place / "config.json").is_file():
        raise InputError(f"{place}: holds no config.json; name the base with {option('base', 'PATH')}")
    other = Base.of(place, described.reference)
    same = described.sampled in ("", other.sampled)
    if other.files != described.files or other.config != described.config or not same:
        raise InputError(
            f"{place}: is not the base that {folder} was built on (its files differ); name that base with "
            f"{option('base', 'PATH')}"
        )
    return place


def _referenced(described: Base, folder: Path) -> Path:
    try:
        return resolve(described.reference, folder).model
    except InputError:
        raise InputError(
            f"{folder}: its base {described.path} is not there any more; name where it is with {option('base', 'PATH')}"
        ) from None


def expert_folder(folder: Path, name: str) -> Path:
    """Return the folder of an expert."""
    return folder / OURS / EXPERTS / name


def check_adapter(adapter: Path) -> None:
    """Refuse an adapter with a file that cannot be copied.

    Raises:
        InputError: names the file.
    """
    for file in _ADAPTER:
        if (adapter / file).is_file() and not file.endswith(WEIGHT_SUFFIXES):
            check_link(adapter / file)


def write_expert(folder: Path, name: str, adapter: Path, vectors: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Copy an adapter into a routed model's folder, and write its vectors beside it."""
    place = expert_folder(folder, name)
    place.mkdir(parents=True, exist_ok=True)
    for file in _ADAPTER:
        if (adapter / file).is_file():
            # Weights may be links to wherever the user keeps them.
            copy = shutil.copyfile if file.endswith(WEIGHT_SUFFIXES) else copy_file
            copy(adapter / file, place / file)
    write_vectors(place, vectors)


def write_vectors(place: Path, vectors: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Write an expert's vectors, whole or not at all."""
    from safetensors.torch import save

    values = {f"{kind}/{module}": v.contiguous() for kind, own in vectors.items() for module, v in own.items()}
    write_file(place / VECTORS, save(values))


def read_expert(folder: Path, name: str) -> Expert:
    """Read an expert's factors and vectors.

    Raises:
        InputError: its folder is missing or malformed.
    """
    place = expert_folder(folder, name)
    if not place.is_dir():
        raise InputError(f"{place}: is missing; restore it, or build the routed model again")
    return Expert(name, read_factors(place), read_vectors(place))


def read_vectors(place: Path) -> dict[str, dict[str, Tensor]]:
    """Return an expert's vectors by kind and module, as pages of their file: only one kind is in use at a time.

    Raises:
        InputError: the file is missing, or holds something else.
    """
    path = place / VECTORS
    if not path.is_file():
        raise InputError(f"{path}: is missing; restore it, or build the routed model again")
    checkpoint = open_checkpoint(path)
    found: dict[str, dict[str, Tensor]] = {}
    try:
        for name, tensor in checkpoint.tensors.items():
            kind, slash, module = name.partition("/")
            if not slash or len(tensor.shape) != 1 or not tensor.dtype.mergeable:
                raise InputError(f"{path}: tensor {name!r} is not a vector of a module; restore the file")
            found.setdefault(kind, {})[module] = mapped(checkpoint.storage, tensor)
    finally:
        checkpoint.storage.close()
    return found


def write_description(folder: Path, description: Description) -> None:
    """Write ``routing.json``, whole or not at all."""
    place = folder / OURS / ROUTING
    place.parent.mkdir(parents=True, exist_ok=True)
    write_file(place, json_text(description.to_dict()))


def write_instructions(folder: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write what the global router keeps in tensors, and return the file's name, which its content decides."""
    from safetensors.torch import save

    data = save({name: value.contiguous() for name, value in tensors.items()})
    name = _name_of(data)
    place = folder / OURS / name
    place.parent.mkdir(parents=True, exist_ok=True)
    write_file(place, data)
    return name


def _name_of(data: bytes) -> str:
    return f"instructions-{hashlib.sha256(data).hexdigest()[:16]}.safetensors"


def read_instructions(folder: Path, name: str) -> dict[str, Tensor]:
    """Read what the global router keeps in tensors.

    Raises:
        InputError: the file is missing, or is not what was written under its name.
    """
    path = folder / OURS / name
    if not path.is_file():
        raise InputError(f"{path}: is missing; restore it, or build the routed model again")
    if _name_of(path.read_bytes()) != name:
        raise InputError(f"{path}: has changed since it was written; restore it, or build the routed model again")
    checkpoint = open_checkpoint(path)
    try:
        return {name: read_tensor(checkpoint, tensor) for name, tensor in checkpoint.tensors.items()}
    finally:
        checkpoint.storage.close()


def names_of(experts: Sequence[Expert]) -> tuple[str, ...]:
    """Return the experts' names."""
    return tuple(expert.name for expert in experts)
