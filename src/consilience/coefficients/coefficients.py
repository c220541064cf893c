"""The Coefficients file: what multiplies each task vector, learned once and applied by the streaming merge.

    theta[l, chunk] = theta_0[l, chunk] + sum_k alpha[k, index(l, chunk)] * tau_k[l, chunk]

``coefficients.safetensors`` holds ``alpha`` [experts, coefficients] in float64; ``coefficients.json`` beside it says
which tensors each index belongs to and how the values were found. Tensors in no group keep the base's value.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from os.path import exists, isdir, isfile  # False, where pathlib raises, for a name that no file can have
from pathlib import Path
from typing import Annotated, Any, cast

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, Strict, ValidationError

from consilience.checkpoints.dtypes import DTYPES
from consilience.checkpoints.files import path_of
from consilience.checkpoints.json_files import read_object
from consilience.checkpoints.open import open_checkpoint
from consilience.checkpoints.safetensors_file import encode_header, read_header
from consilience.coefficients.groups import Group, Piece, pieces_of
from consilience.errors import InputError, nearest_tensor

Alpha = npt.NDArray[np.float64]
FORMAT = 1
WEIGHTS, PAPERS = "coefficients.safetensors", "coefficients.json"


@dataclass(frozen=True)
class Trimmed:
    """Task vectors are trimmed to their largest entries over the model before they are multiplied (AdaMerging++).

    ``elect`` also drops the entries whose sign is not that of the sum over experts, as TIES does.
    """

    density: float
    elect: bool


@dataclass(frozen=True, eq=False)
class Coefficients:
    """``alpha`` [K, N] float64 of K experts; ``facts`` is free-form JSON about how it was found."""

    experts: tuple[str, ...]
    groups: tuple[Group, ...]
    alpha: Alpha
    trimmed: Trimmed | None = None
    facts: dict[str, Any] = field(default_factory=dict[str, Any])

    def __post_init__(self) -> None:
        shape = len(self.experts), sum(group.chunks for group in self.groups)
        if self.alpha.shape != shape:
            raise ValueError(f"alpha has shape {self.alpha.shape}, but the experts and groups need {shape}")

    @cached_property
    def pieces(self) -> dict[str, tuple[Piece, ...]]:
        """Return every grouped tensor's pieces by its name."""
        return {name: pieces for group in self.groups for name, pieces in pieces_of(group).items()}

    @property
    def count(self) -> int:
        """Number of coefficients per expert."""
        return int(self.alpha.shape[1])

    @cached_property
    def learned(self) -> npt.NDArray[np.bool_]:
        """Whether each of the N coefficients is learned."""
        mask = np.zeros(self.count, bool)
        for group in self.groups:
            mask[group.first : group.first + group.chunks] = group.learned
        return mask

    def of(self, tensor: str) -> Alpha:
        """Return [K, number of the tensor's pieces]."""
        return self.alpha[:, [piece.index for piece in self.pieces[tensor]]]

    def with_alpha(self, alpha: Any, **facts: Any) -> "Coefficients":
        """Return the same groups with other values."""
        values = np.asarray(alpha, np.float64)
        if values.shape != self.alpha.shape:
            raise ValueError(f"alpha has shape {values.shape}, not {self.alpha.shape}")
        return replace(self, alpha=values.copy(), facts=self.facts | facts)


def constant(experts: Sequence[str], groups: Sequence[Group], values: Sequence[float], **facts: Any) -> Coefficients:
    """Return coefficients that are ``values[k]`` everywhere: Task Arithmetic."""
    count = sum(group.chunks for group in groups)
    alpha = np.repeat(np.asarray(values, np.float64)[:, None], count, axis=1)
    return Coefficients(tuple(experts), tuple(groups), alpha, facts=dict(facts))


def expand(source: Coefficients, groups: Sequence[Group]) -> Coefficients:
    """Return ``source`` on other ``groups``: each new coefficient is the old one's mean over the elements it covers.

    Cutting a group into chunks keeps every element's coefficient to the bit, so the merged tensors stay what they were.

    Raises:
        ValueError: the groups do not hold the same tensors.
    """
    sizes = {name: numel for group in source.groups for name, numel in group.tensors}
    count = sum(group.chunks for group in groups)
    total, weight = np.zeros((len(source.experts), count)), np.zeros(count)
    low, high = np.full_like(total, np.inf), np.full_like(total, -np.inf)
    for group in groups:
        for name, numel in group.tensors:
            if sizes.pop(name, None) != numel:
                raise ValueError(f"tensor {name!r} of {numel} elements has no coefficients to start from")
        for name, pieces in pieces_of(group).items():
            for piece in pieces:
                at = piece.index
                for old in source.pieces[name]:
                    shared = min(piece.stop, old.stop) - max(piece.start, old.start)
                    if shared > 0:
                        values = source.alpha[:, old.index]
                        total[:, at] += shared * values
                        weight[at] += shared
                        low[:, at] = np.minimum(low[:, at], values)
                        high[:, at] = np.maximum(high[:, at], values)
    if sizes:
        raise ValueError(f"tensor {next(iter(sizes))!r} is in no new group")
    # The mean of equal values may round to a neighbour of theirs: n * a / n is not always a.
    alpha = np.clip(total / weight, low, high)
    return Coefficients(source.experts, tuple(groups), alpha, source.trimmed, dict(source.facts))


class _Closed(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


_Count = Annotated[int, Field(ge=1, lt=1 << 60)]


class _GroupEntry(_Closed):
    name: str
    #: JSON has no tuples: a list of the right length stands for one.
    tensors: list[Annotated[tuple[str, Annotated[_Count, Strict()]], Strict(False)]] = Field(min_length=1)
    chunks: _Count
    learned: bool = True


class _TrimmedEntry(_Closed):
    density: Annotated[float, Field(gt=0, le=1)]
    elect: bool


class _Document(_Closed):
    format: int
    experts: list[str] = Field(min_length=1)
    trimmed: _TrimmedEntry | None = None
    groups: list[_GroupEntry]
    facts: dict[str, Any] = {}


def _pair(path: Path) -> tuple[Path, Path]:
    """Return the two files of a coefficients file named by either of them, their folder, or an output folder."""
    if isdir(path):
        inner = path / "consilience"
        folder = inner if exists(inner / WEIGHTS) and not exists(path / WEIGHTS) else path
        return folder / WEIGHTS, folder / PAPERS
    if path.suffix == ".json":
        return path.with_suffix(".safetensors"), path
    return path, path.with_suffix(".json")


def save_coefficients(path: Path | str, coefficients: Coefficients) -> None:
    """Write ``path`` (a .safetensors or .json file, or a folder) and the file beside it; neither, if either fails.

    Raises:
        InputError: a coefficient is NaN or Inf.
    """
    path = Path(path)
    if path.suffix not in (".safetensors", ".json"):
        path.mkdir(parents=True, exist_ok=True)
    weights, papers = _pair(path)
    if not np.isfinite(coefficients.alpha).all():
        raise InputError(f"{weights}: the coefficients hold NaN or Inf: learning diverged; lower its step size")
    header, _ = encode_header([("alpha", DTYPES["F64"], coefficients.alpha.shape)], {"format": "consilience"})
    data = header + np.ascontiguousarray(coefficients.alpha, "<f8").tobytes()
    document: dict[str, Any] = {
        "format": FORMAT,
        "experts": list(coefficients.experts),
        "groups": [
            {"name": g.name, "tensors": [list(t) for t in g.tensors], "chunks": g.chunks, "learned": g.learned}
            for g in coefficients.groups
        ],
        "facts": coefficients.facts,
    }
    if coefficients.trimmed is not None:
        document["trimmed"] = {"density": coefficients.trimmed.density, "elect": coefficients.trimmed.elect}
    text = json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    weights.parent.mkdir(parents=True, exist_ok=True)
    parts = [(file, file.with_name(file.name + ".partial")) for file in (weights, papers)]
    try:
        for (_, partial), content in zip(parts, (data, text.encode("utf-8")), strict=True):
            partial.write_bytes(content)
        for file, partial in parts:
            partial.replace(file)
    finally:
        for _, partial in parts:
            partial.unlink(missing_ok=True)


def is_coefficients(path: Path | str) -> bool:
    """Whether a path names a coefficients file (or the folder that holds one).

    A file counts by its name, which holds "coefficients", or by its only tensor's name, "alpha".
    """
    path = Path(path)
    if isdir(path):
        return isfile(path / WEIGHTS) and isfile(path / PAPERS)
    weights, papers = _pair(path)
    if weights.suffix != ".safetensors" or not isfile(weights) or not isfile(papers):
        return False
    try:
        return "coefficients" in weights.stem or set(read_header(weights)[0]) == {"alpha"}
    except InputError:  # not a safetensors file, whatever its name says
        return False


def load_coefficients(path: Path | str) -> Coefficients:
    """Read a coefficients file.

    Raises:
        InputError: a file is missing or malformed; the message names the key.
    """
    weights, papers = _pair(path_of(path, "coefficients"))
    for file in (weights, papers):
        if not exists(file):
            raise InputError(f"{file}: no such file; a coefficients file is {WEIGHTS} and {PAPERS} side by side")
    try:
        document = _Document.model_validate(read_object(papers))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        raise InputError(f"{papers}: {place}: {first['msg']}; restore the file") from None
    try:
        json.dumps(document.facts, allow_nan=False)
    except ValueError:
        raise InputError(f"{papers}: facts hold a number that is not finite; restore the file") from None
    if document.format != FORMAT:
        raise InputError(f"{papers}: format {document.format} is not {FORMAT}; update consilience")
    alpha = _read_alpha(weights)
    groups: list[Group] = []
    first = 0
    _refuse_twice(papers, "expert", document.experts)
    _refuse_twice(papers, "group", (entry.name for entry in document.groups))
    _refuse_twice(papers, "tensor", (name for entry in document.groups for name, _ in entry.tensors))
    for entry in document.groups:
        held = tuple((name, numel) for name, numel in entry.tensors)
        group = Group(entry.name, held, entry.chunks, first, entry.learned)
        if group.chunks > group.numel:
            raise InputError(f"{papers}: group {group.name!r} has more chunks than elements; restore the file")
        groups.append(group)
        first += entry.chunks
    if alpha.shape != (len(document.experts), first):
        raise InputError(
            f"{weights}: tensor 'alpha' has shape {list(alpha.shape)} but {papers.name} describes "
            f"[{len(document.experts)}, {first}]; restore both files"
        )
    trimmed = Trimmed(document.trimmed.density, document.trimmed.elect) if document.trimmed else None
    return Coefficients(tuple(document.experts), tuple(groups), alpha, trimmed, document.facts)


def _refuse_twice(file: Path, kind: str, names: Iterable[str]) -> None:
    seen = set[str]()
    for name in names:
        if name in seen:
            raise InputError(f"{file}: names {kind} {name!r} twice; restore the file")
        seen.add(name)


def _read_alpha(path: Path) -> Alpha:
    checkpoint = open_checkpoint(path)
    try:
        info = checkpoint.tensors.get("alpha")
        if info is None or info.dtype.name != "F64" or len(info.shape) != 2 or len(checkpoint.tensors) != 1:
            raise InputError(f"{path}: must hold one tensor, 'alpha' [experts, coefficients] in float64; restore it")
        alpha = cast(Alpha, checkpoint.read("alpha").view("<f8").astype(np.float64).reshape(info.shape))
    finally:
        checkpoint.storage.close()
    if not np.isfinite(alpha).all():
        raise InputError(f"{path}: tensor 'alpha' holds NaN or Inf; learn the coefficients again")
    return alpha


def fit(
    coefficients: Coefficients, experts: Sequence[str], tensors: Mapping[str, int], where: str, *, frozen: Any = ()
) -> Coefficients:
    """Return the coefficients with rows in the order of ``experts``, checked against the models they are applied to.

    Args:
        coefficients: as learned or loaded.
        experts: names of the experts of this merge, each once.
        tensors: number of elements of every tensor of the base.
        where: how errors name the coefficients.
        frozen: names of tensors that may not be merged (private ones).

    Raises:
        InputError: an expert has no coefficients or the other way round, or a tensor is missing or has another size.
    """
    if len(set(experts)) < len(experts):
        raise InputError(f"{where}: an expert is named twice in this merge; choose another name")
    if set(experts) != set(coefficients.experts):
        other = sorted(set(experts) ^ set(coefficients.experts))[0]
        side = "has no coefficients there" if other in experts else "is not an expert of this merge"
        raise InputError(
            f"{where}: {other!r} {side}; name the experts {', '.join(coefficients.experts)} (-e NAME=PATH)"
        )
    for group in coefficients.groups:
        for name, numel in group.tensors:
            if name not in tensors:
                raise InputError(f"{where}: tensor {name!r} is not in the base{nearest_tensor(name, tensors)}")
            if tensors[name] != numel:
                raise InputError(
                    f"{where}: tensor {name!r} has {tensors[name]} elements in the base but {numel} there; the "
                    "coefficients belong to another architecture"
                )
            if name in frozen:
                raise InputError(f"{where}: tensor {name!r} is private here but has coefficients; drop one of the two")
    order = [coefficients.experts.index(name) for name in experts]
    return replace(coefficients, experts=tuple(experts), alpha=coefficients.alpha[order])
