"""Statistics of a model on rows, as files: what some merges need of data, without the data.

    gram    G [n, n] = mean over tokens of x x^T       of what a linear layer is given
            g [n]    = mean over tokens of x^2         of what a norm's scale multiplies: a diagonal layer's diagonal
    mean    m [n]    = mean over tokens of x
    fisher  F        = mean over rows of (d log p(y | x) / d theta)^2, for every element of a tensor

A folder holds ``statistics.json``, which says of which model and rows they are, and safetensors files with tensors
``KIND/NAME`` in float32, NAME being the weight's. Layers that are given the same share one matrix (``alias``). Folders
of one model are joined by their counts of tokens and rows.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import numpy.typing as npt

from consilience.checkpoints.checkpoint import Checkpoint, raw
from consilience.checkpoints.json_files import parse_object
from consilience.checkpoints.open import open_checkpoint, safe_name
from consilience.errors import InputError
from consilience.experts.model import Model
from consilience.workdir import digest_of, workdir, write_json

Kind = Literal["gram", "mean", "fisher"]
KINDS: tuple[Kind, ...] = ("gram", "mean", "fisher")
Fisher = Literal["sampled", "empirical", "exact"]
FACTS = "statistics.json"
VERSION = 1
#: Elements at each end of a tensor that tell one model from another of its shapes.
_MARKED = 32


@dataclass(frozen=True)
class Facts:
    """Of what statistics are.

    ``model`` is how it was named and ``mark`` what its files are known by; ``rows`` and ``tokens`` are counts, ``data``
    hashes of what was read; ``fisher`` is the kind of Fisher information, and ``norm`` its Frobenius norm over all
    tensors; ``alias`` maps ``KIND/NAME`` to the tensor that holds the same.
    """

    model: str
    mark: str
    kinds: tuple[str, ...]
    rows: int
    tokens: int
    data: tuple[str, ...]
    fisher: str | None = None
    seed: int = 0
    norm: float = 0.0
    alias: Mapping[str, str] = field(default_factory=dict[str, str])


@dataclass(frozen=True)
class Statistics:
    """An opened folder."""

    path: Path
    facts: Facts
    files: tuple[Checkpoint, ...]

    def has(self, kind: Kind, name: str, shape: tuple[int, ...]) -> bool:
        """Whether there are statistics of a kind for a weight of this shape.

        Raises:
            InputError: there are, for another shape.
        """
        key = self._stored(kind, name)
        file = self._file(key)
        if file is None:
            return False
        square = kind == "gram" and len(shape) > 1
        held, due = file.tensors[key].shape, shape if kind == "fisher" else shape[-1:] * (2 if square else 1)
        if held != due:
            raise InputError(
                f"{self.path}: its {kind} of {name!r} has shape {list(held)}, and the tensor, {list(shape)}, needs "
                f"{list(due)}; make the statistics of this model"
            )
        return True

    def names(self, kind: Kind) -> list[str]:
        """Return the weights that have statistics of a kind."""
        held = [key for file in self.files for key in file.tensors] + list(self.facts.alias)
        return sorted(key.partition("/")[2] for key in held if key.startswith(f"{kind}/"))

    def read(self, kind: Kind, name: str) -> npt.NDArray[np.float32]:
        """Return what is held for a weight, in its shape.

        Raises:
            InputError: there is none, or it holds NaN or Inf.
        """
        key = self._stored(kind, name)
        file = self._file(key)
        if file is None:
            raise InputError(f"{self.path}: holds no {kind} of {name!r}")
        values = file.read(key).view("<f4").reshape(file.tensors[key].shape)
        if not np.isfinite(values).all():
            raise InputError(f"{self.path}: its {kind} of {name!r} holds NaN or Inf; make the statistics again")
        return values

    def _stored(self, kind: str, name: str) -> str:
        return self.facts.alias.get(f"{kind}/{name}", f"{kind}/{name}")

    def _file(self, key: str) -> Checkpoint | None:
        return next((file for file in self.files if key in file.tensors), None)

    def identity(self) -> list[Any]:
        """Return what decides the values: files, their sizes and times of change."""
        return [[entry.path, entry.size, entry.modified] for file in self.files for entry in file.storage.stamps()]

    def close(self) -> None:
        """Release the files."""
        for file in self.files:
            file.storage.close()


def mark_of(model: Model) -> str:
    """Return what tells a model from others of its shapes: names, types, and both ends of every tensor.

    Of an adapter it is the adapter's, whatever it stands on.
    """
    checkpoint = model.adapter.checkpoint if model.adapter is not None else model.checkpoint
    assert checkpoint is not None
    state = blake2b(digest_size=16)
    for name, info in sorted(checkpoint.tensors.items()):
        state.update(f"{name} {info.dtype.name} {info.shape}".encode())
        for start in (0, max(0, info.numel - _MARKED)):
            state.update(raw(checkpoint.storage, info, start, min(info.numel, start + _MARKED)).tobytes())
    return state.hexdigest()


def open_statistics(path: str | Path) -> Statistics:
    """Open a folder of statistics.

    Raises:
        InputError: it is none, or damaged.
    """
    folder = Path(path)
    place = folder / FACTS
    if not place.is_file():
        raise InputError(f"{folder}: is no folder of statistics ({FACTS} is not in it); make one: consilience stats")
    said = parse_object(place.read_bytes(), str(place))
    if said.get("version") != VERSION:
        raise InputError(f"{place}: is of version {said.get('version')!r}, and this reads {VERSION}; make it again")
    try:
        facts = Facts(
            model=str(said["model"]), mark=str(said["mark"]), kinds=tuple(map(str, said["kinds"])),
            rows=int(said["rows"]), tokens=int(said["tokens"]), data=tuple(map(str, said["data"])),
            fisher=said["fisher"], seed=int(said["seed"]), norm=float(said["norm"]),
            alias={str(k): str(v) for k, v in said["alias"].items()},
        )  # fmt: skip
        names = [safe_name(name, str(place)) for name in said["files"]]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{place}: is damaged ({error}); make the statistics again") from None
    if facts.rows < 1 or facts.tokens < 1:
        raise InputError(f"{place}: is damaged (of no rows, or of no tokens); make the statistics again")
    files = tuple(open_checkpoint(folder / name) for name in names)
    for file, name in zip(files, names, strict=True):
        odd = next((key for key, info in file.tensors.items() if info.dtype.name != "F32"), None)
        if odd is not None:
            raise InputError(f"{folder / name}: tensor {odd!r} is not float32; make the statistics again")
    return Statistics(folder, facts, files)


class Writer:
    """Writes statistics into an empty folder, file by file, and last what they are of."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.names: list[str] = []

    def add(self, tensors: Mapping[str, npt.NDArray[np.float32]]) -> None:
        """Write one more file."""
        from safetensors.numpy import save_file

        if not tensors:
            return
        name = f"statistics-{len(self.names) + 1:05d}.safetensors"
        save_file({key: np.ascontiguousarray(value, np.float32) for key, value in tensors.items()}, self.folder / name)
        self.names.append(name)

    def finish(self, facts: Facts) -> None:
        """Write what they are of."""
        write_json(self.folder / FACTS, {"version": VERSION, **asdict(facts), "files": self.names})
        for name in self.names:  # safetensors lets nobody else read what it writes
            (self.folder / name).chmod((self.folder / FACTS).stat().st_mode)


def join(parts: Sequence[Path | str], out: Path | str, *, force: bool = False) -> None:
    """Join statistics of one model on several sets of rows, as if they had been read together.

    Raises:
        InputError: they are of different models or kinds, or some rows were counted in two of them.
    """
    opened = [open_statistics(part) for part in parts]
    try:
        _check_alike(opened)
        facts = [one.facts for one in opened]
        digest = digest_of({"join": [asdict(one) for one in facts]})
        with workdir(Path(out), digest, force=force, inputs=map(Path, parts)) as work:
            if work.delivered is None:
                _join(opened, Writer(work.new_result()))
                work.deliver({})
    finally:
        for one in opened:
            one.close()


def _join(parts: Sequence[Statistics], writer: Writer) -> None:
    squares = 0.0
    for file in parts[0].files:
        held = {key: _joined(parts, key) for key in file.tensors}
        squares += sum(_square(value) for key, value in held.items() if _kind(key) == "fisher")
        writer.add(held)
    data = tuple(digest for one in parts for digest in one.facts.data)
    rows, tokens = (sum(getattr(one.facts, key) for one in parts) for key in ("rows", "tokens"))
    writer.finish(replace(parts[0].facts, rows=rows, tokens=tokens, data=data, norm=squares**0.5))


def _square(values: npt.NDArray[Any]) -> float:
    return float(np.square(values, dtype=np.float64).sum())


def _kind(key: str) -> Kind:
    return cast(Kind, key.partition("/")[0])


def _joined(parts: Iterable[Statistics], key: str) -> npt.NDArray[np.float32]:
    """Return the mean of one tensor, by rows for Fisher information and by tokens for the others."""
    kind, _, name = key.partition("/")
    counts = [part.facts.rows if kind == "fisher" else part.facts.tokens for part in parts]
    total: Any = 0.0
    for part, count in zip(parts, counts, strict=True):
        total = total + part.read(_kind(key), name).astype(np.float64) * (count / sum(counts))
    return total.astype(np.float32)


def _check_alike(parts: Sequence[Statistics]) -> None:
    first = parts[0]
    for other in parts[1:]:
        if other.facts.mark != first.facts.mark:
            raise InputError(f"{other.path}: is of another model ({other.facts.model}) than {first.path}")
        if (other.facts.kinds, other.facts.fisher) != (first.facts.kinds, first.facts.fisher):
            raise InputError(f"{other.path}: holds {_what(other)}, and {first.path} {_what(first)}; make both alike")
        if set(other.facts.alias.items()) != set(first.facts.alias.items()) or _keys(other) != _keys(first):
            raise InputError(f"{other.path}: holds other tensors than {first.path}; make both alike")
    seen: dict[str, Path] = {}
    for part in parts:
        for digest in part.facts.data:
            if digest in seen:
                raise InputError(f"{part.path}: was made of the same rows as {seen[digest]}; they would count twice")
            seen[digest] = part.path


def _keys(part: Statistics) -> list[str]:
    return sorted(key for file in part.files for key in file.tensors)


def _what(part: Statistics) -> str:
    return json.dumps([*part.facts.kinds, *([part.facts.fisher] if part.facts.fisher else [])])


def check_of(statistics: Statistics, model: Model, kind: Kind) -> None:
    """Refuse statistics of another model, or without a kind.

    Raises:
        InputError: see above.
    """
    if kind not in statistics.facts.kinds:
        raise InputError(
            f"{statistics.path}: holds {', '.join(statistics.facts.kinds)}, and no {kind}; make it: consilience stats "
            f"--kind {kind}"
        )
    if statistics.facts.mark != mark_of(model):
        raise InputError(
            f"{statistics.path}: is of {statistics.facts.model}, which is not {model.name} ({model.reference}) or was "
            "changed since; make the statistics of this model"
        )


def read_all(parts: Sequence[Statistics], kind: Kind, name: str) -> Iterator[npt.NDArray[np.float32]]:
    """Yield every expert's statistics of a weight, one in memory at a time."""
    for part in parts:
        yield part.read(kind, name)
