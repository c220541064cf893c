"""A base and its experts, opened and checked against each other from headers: what every reader of experts starts from.

Nothing is planned: a merge decides what is done with the stacks, extraction and the doctor only read them.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Protocol

from consilience.checkpoints.open import TORCH_SUFFIXES
from consilience.checkpoints.packed import packing
from consilience.errors import InputError
from consilience.experts.align import Alignment, align
from consilience.experts.conv1d import orient
from consilience.experts.embeddings import with_own_size, with_trained_rows
from consilience.experts.flattened import unflatten
from consilience.experts.fused_experts import in_form_of, place_parameters
from consilience.experts.model import Model, open_model
from consilience.experts.names import follow_base
from consilience.experts.quantised import in_floats, packed_target
from consilience.experts.routers import spelled_out
from consilience.experts.stack import Stack
from consilience.name_filter import any_filter

#: Names without ending of files of weights that are called alike in every folder.
_USUAL_FILES = ("model", "pytorch_model", "adapter_model", "adapters", "pytorch_lora_weights")
Numbered = tuple[Model | None, list[tuple[Model, int]]]


class Opened(Protocol):
    """Models that were opened and aligned: an ``ExpertSet``, or a merge's plan."""

    @property
    def base(self) -> Model | None:
        """The base, if there is one."""
        ...

    @property
    def experts(self) -> tuple[Model, ...]:
        """The experts."""
        ...

    @property
    def alignment(self) -> Alignment:
        """How their tensors meet."""
        ...

    @property
    def models(self) -> list[Model]:
        """The base and the experts, each once."""
        ...


@dataclass(frozen=True, eq=False)
class ExpertSet:
    """Experts on their base.

    Attributes:
        base: the model that the experts were tuned from.
        experts: in the order in which they were named.
        alignment: how their tensors meet.
        private: tensors of the base that are not compared.
    """

    base: Model
    experts: tuple[Model, ...]
    alignment: Alignment
    private: frozenset[str] = frozenset()

    @property
    def models(self) -> list[Model]:
        """The base and the experts, each once."""
        return [self.base, *(expert for expert in self.experts if expert is not self.base)]

    @cached_property
    def stacks(self) -> tuple[Stack, ...]:
        """The experts' task vectors of every tensor of the base, in its order; one that none changes has no rows."""
        return tuple(self._stack(name) for name in self.alignment.tensors)

    def _stack(self, name: str) -> Stack:
        alignment = self.alignment
        info, target = alignment.tensors[name], alignment.ties.get(name, name)
        base = alignment.source(alignment.donor, target)
        compared = info.dtype.mergeable and name not in self.private and name not in alignment.packed.parts
        rows = tuple(alignment.source(expert, target) for expert in self.experts) if compared else ()
        if all(row.untouched for row in rows):
            rows = ()
        widest = max((s.dense.dtype.bits for s in (base, *rows) if s.dense is not None), default=0)
        names = tuple(expert.name for expert in self.experts) if rows else ()
        return Stack(name, info.shape, base, rows, names, widest > 32 or (bool(rows) and info.dtype.bits > 16))

    @property
    def identity(self) -> list[object]:
        """What tells these models from others, and from themselves once they have changed."""
        return [model.identity() for model in self.models]

    def close(self) -> None:
        """Release the files."""
        for model in self.models:
            model.close()


def open_experts(
    base: str,
    experts: Mapping[str, str],
    private: Iterable[str] = (),
    *,
    where: str = "experts",
    root: Path | None = None,
) -> ExpertSet:
    """Open a base and its experts by name.

    Raises:
        InputError: a model cannot be read, or does not fit the base.
    """
    names = expert_names([(path, name) for name, path in experts.items()], where)
    opened = [open_model(name, path, root) for name, path in zip(names, experts.values(), strict=True)]
    on, numbered = comparable(open_model("base", base, root, base=True), [(model, k) for k, model in enumerate(opened)])
    assert on is not None
    models = [model for model, _ in numbered]
    private = spelled_out(private, on.checkpoint.tensors if on.checkpoint is not None else {})
    alignment = align(on, models, private)
    kept = any_filter(private, f"{where}: private")
    apart = frozenset(name for name in alignment.tensors if kept(name) or name in alignment.heads.tensors)
    return ExpertSet(on, tuple(models), alignment, apart)


def _parts(reference: str) -> list[str]:
    """Return a reference's parts, less its file's name if all are called so, as a name may hold them."""
    path = Path(reference.rstrip("/") or "/")
    if path.name in ("", ".."):
        path = Path(os.path.abspath(path))  # not resolved: a link's own name is the one that was given
    if path.suffix in (".safetensors", *TORCH_SUFFIXES):
        path = path.parent if path.stem in _USUAL_FILES and path.parent.name else path.with_suffix("")
    parts = [part for part in path.parts if part not in ("..", path.anchor)] or ["expert"]
    parts[-1] = parts[-1].split("@")[0]
    return [part.replace(".", "-").replace("=", "-") for part in parts]


def _last_parts(references: Sequence[str], taken: set[str]) -> list[str]:
    """Name each reference by its last part, preceded by as many parents as tell it from the others."""
    parts = [_parts(reference) for reference in references]
    depths = [1] * len(parts)
    while True:
        names = ["-".join(each[-depth:]) for each, depth in zip(parts, depths, strict=True)]
        others: dict[str, set[tuple[str, ...]]] = {}
        for name, each in zip(names, parts, strict=True):
            others.setdefault(name, set()).add(tuple(each))
        deeper = [
            depth + ((len(others[name]) > 1 or name in taken) and depth < len(each))
            for name, each, depth in zip(names, parts, depths, strict=True)
        ]
        if deeper == depths:
            return names
        depths = deeper


def expert_names(references: Sequence[tuple[str, str | None]], where: str) -> list[str]:
    """Name each model: as the recipe does, else by the last part of its reference; refuse duplicates the user chose.

    Two references that end alike are told apart by their parents (``a-checkpoint-100``, ``b-checkpoint-100``), and one
    that is given twice by a number.
    """
    taken = {"base"}  # the name of the base itself, in messages and in the lineage
    for _, name in references:
        if name == "base":
            raise InputError(f"{where}: model name 'base' is that of the base itself; choose another")
        if name is not None and name in taken:
            raise InputError(f"{where}: model name {name!r} is used twice; choose another")
        if name is not None and (not name or any(c in name for c in "/\\\0.=")):
            raise InputError(f"{where}: model name {name!r} is empty, or holds '/', '\\', '.' or '='; choose another")
        taken |= {name} if name is not None else set()
    stems = iter(_last_parts([reference for reference, name in references if name is None], taken))
    out: list[str] = []
    for _, name in references:
        if name is None:
            stem = next(stems)
            name, number = stem, 2
            while name in taken:
                name, number = f"{stem}-{number}", number + 1
            taken.add(name)
        out.append(name)
    return out


def comparable(base: Model | None, numbered: list[tuple[Model, int]]) -> Numbered:
    """Return the models with tensors of one set of names, in values where something is to be merged.

    Quantised weights that can be read as floats are, unless all that comes is adapters on other layers: then they are
    copied as they are.
    """
    numbered = [(_on_base(model, base), number) for model, number in numbered]
    if base is not None and all(model.checkpoint is None for model, _ in numbered):
        base, adapters = _named_alike(base, numbered)
        assert base is not None
        packed = packing(base.checkpoint)
        if not any(packed_target(model, base, packed) for model, _ in adapters):
            return base, adapters
    return _named_alike(base and in_floats(base), [(in_floats(model), number) for model, number in numbered])


def _on_base(model: Model, base: Model | None) -> Model:
    """Return a model written BASE+ADAPTER, if it stands on the base's own files, as the adapter: it stays factored."""
    whole = model.checkpoint
    if base is None or base.checkpoint is None or base.adapter is not None or whole is None or model.adapter is None:
        return model
    files = [[entry[1:] for entry in one.storage.stamps()] for one in (whole, base.checkpoint)]  # whatever their path
    return replace(model, checkpoint=None) if files[0] and files[0] == files[1] else model


def _named_alike(base: Model | None, numbered: list[tuple[Model, int]]) -> Numbered:
    """Let all models call tensors what the base's files call them, and turn adapters' updates as these store them."""
    first = base or numbered[0][0]
    if first.checkpoint is None:
        return base, numbered
    donor = replace(first.checkpoint, tensors=first.named)

    def followed(model: Model) -> Model:
        if model.adapter is not None:
            model = replace(model, adapter=unflatten(model.adapter, donor.tensors))
        model = follow_base(in_form_of(model, donor), donor)
        if model.adapter is not None:
            model = replace(model, adapter=place_parameters(orient(model.adapter, donor), donor))
        return with_own_size(model)

    base, numbered = base and followed(base), [(followed(model), number) for model, number in numbered]
    base = base and with_trained_rows(base, base)
    first = base or numbered[0][0]
    return base, [(with_trained_rows(model, first), number) for model, number in numbered]
