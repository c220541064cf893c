"""A full fine-tune as a LoRA adapter: the best low-rank part of every linear layer's task vector.

    tau = theta_k - theta_0 ~ B A,    energy kept = ||B A||^2 / ||tau||^2 = sum_{i <= r} s_i^2 / sum_i s_i^2

So a model whose weights were all trained joins a routed model, or a merge of adapters, as any adapter does. What LoRA
does not hold (embeddings, the output layer, norms, biases) is left out, and how much of the update that is, is said.
"""

import math
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from consilience import __version__
from consilience.checkpoints.dtypes import ALIASES, DTYPES, DType
from consilience.checkpoints.json_files import read_object
from consilience.checkpoints.safetensors_file import read_header
from consilience.engine.adapter_files import CONFIG, WEIGHTS, factor_names, gather, lora_config, write_tensors
from consilience.engine.card import label, licences, origin
from consilience.engine.lineage import versions
from consilience.engine.low_rank import factorise
from consilience.engine.origin import hub_ids
from consilience.engine.stream import check_copies
from consilience.engine.unchanged import check_still
from consilience.errors import InputError, nearest
from consilience.experts.expert_set import ExpertSet, open_experts
from consilience.experts.stack import Stack
from consilience.progress import Progress, ProgressOption, open_progress
from consilience.routing.conversion.linear import Layout, layout
from consilience.tasks.load import check_folder, require_transformers
from consilience.workdir import check_out, digest_of, workdir, write_json

RECORD = "extraction.json"


@dataclass(frozen=True, slots=True)
class Layer:
    """One linear layer: its tensor, its module, and what of ||tau||^2 = ``total`` factors of rank ``rank`` keep."""

    tensor: str
    module: str
    rank: int
    kept: float
    total: float

    @property
    def energy(self) -> float:
        """The share that is kept."""
        return self.kept / self.total


@dataclass(frozen=True, slots=True)
class Rest:
    """A changed tensor that is not in the adapter, its kind, and its ||tau||^2."""

    tensor: str
    kind: str
    total: float


@dataclass(frozen=True)
class Extraction:
    """What was extracted and what was left out."""

    base: str
    expert: str
    layers: tuple[Layer, ...]
    rest: tuple[Rest, ...]

    @property
    def energy(self) -> float:
        """The share of the linear layers' ||tau||^2 that is kept."""
        return math.fsum(layer.kept for layer in self.layers) / math.fsum(layer.total for layer in self.layers)

    @property
    def left_out(self) -> dict[str, float]:
        """The share of the whole ||tau||^2 that lies in each kind of tensor without factors, the largest first."""
        whole = math.fsum(one.total for one in (*self.layers, *self.rest))
        kinds = dict.fromkeys(one.kind for one in self.rest)
        shares = {kind: math.fsum(one.total for one in self.rest if one.kind == kind) / whole for kind in kinds}
        return dict(sorted(shares.items(), key=lambda item: -item[1]))

    def __str__(self) -> str:
        ranks = [layer.rank for layer in self.layers]
        of = f"rank {ranks[0]}" if len(set(ranks)) == 1 else f"ranks {min(ranks)} to {max(ranks)}"
        text = f"{len(self.layers)} linear layers, {of}, {self.energy:.1%} of their update's energy kept"
        if not self.rest:
            return text
        kinds = ", ".join(f"{kind} {share:.1%}" for kind, share in self.left_out.items())
        return f"{text}; left out, of the whole update: {kinds}"

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "format": 1,
            "base": self.base,
            "expert": self.expert,
            "energy": self.energy,
            "left_out": self.left_out,
            "layers": [asdict(layer) | {"energy": layer.energy} for layer in self.layers],
            "rest": [asdict(one) for one in self.rest],
            "versions": versions(),
        }


def read_extraction(folder: Path) -> Extraction:
    """Read what ``extract`` wrote beside its adapter."""
    value = read_object(folder / RECORD)
    layers = [{key: one[key] for key in Layer.__dataclass_fields__} for one in value["layers"]]
    rest = tuple(Rest(**one) for one in value["rest"])
    return Extraction(value["base"], value["expert"], tuple(Layer(**one) for one in layers), rest)


@dataclass(frozen=True, slots=True)
class _Wanted:
    rank: int | None
    energy: float | None
    dtype: str | None

    def __post_init__(self) -> None:
        if self.rank is None and self.energy is None:
            raise InputError("rank, energy: neither is given; give the rank of every layer, or the energy to keep")
        if self.rank is not None and self.rank < 1:
            raise InputError(f"rank: {self.rank} must be at least 1")
        if self.energy is not None and not 0 < self.energy <= 1:
            raise InputError(f"energy: {self.energy} must lie in (0, 1]; it is the share to keep")
        if self.dtype is not None and self.dtype not in ALIASES:
            raise InputError(
                f"dtype: {self.dtype!r} is not one of {', '.join(ALIASES)}{nearest(self.dtype, [*ALIASES])}"
            )


def extract(
    base: Path | str,
    expert: Path | str,
    out: Path | str,
    *,
    rank: int | None = None,
    energy: float | None = None,
    dtype: str | None = None,
    force: bool = False,
    progress: ProgressOption = False,
    trust_remote_code: bool = False,
) -> Extraction:
    """Write the low-rank part of a fine-tuned model's update as a PEFT adapter with alpha = r.

    Models are read a tensor at a time; neither is ever in memory. An interrupted run goes on where it stopped.

    Args:
        base: the model the expert was tuned from: a Hugging Face folder or a hub reference.
        expert: the fine-tuned model: the same.
        out: the folder to write; ``extraction.json`` in it has every layer's rank and energy.
        rank: the largest rank of a layer; None: as ``energy`` asks.
        energy: the share of every layer's ||tau||^2 to keep, in (0, 1], so far as ``rank`` allows; None: every layer
            has rank ``rank``.
        dtype: of the factors: float32, bfloat16, ...; None: the base's own.
        force: replace what stands at ``out``.
        progress: True for a bar (or lines) on standard error, a function called with (tensors done, tensors in all),
            or a ``Progress``.
        trust_remote_code: run ``.py`` files that come with the base.

    Raises:
        InputError: the models do not fit together, no linear layer differs, or a setting is out of its range; nothing
            is left behind.
        MachineError: the disk is full or failed; the same call continues.
    """
    wanted, out = _Wanted(rank, energy, dtype), Path(out)
    require_transformers("extraction")
    if str(base) == str(expert):
        raise InputError(f"{expert}: is the base itself; name the model that was tuned from it")
    opened = open_experts(str(base), {"expert": str(expert)})
    try:
        folders = [_base_folder(opened), opened.experts[0].folder]
        inputs = [folder for folder in folders if folder is not None]
        check_out(out, force=force, inputs=inputs)
        check_copies(opened)
        known = layout(
            _base_folder(opened), {s.name: s.shape for s in opened.stacks}, trust_remote_code=trust_remote_code
        )
        facts = {"version": __version__, "inputs": opened.identity, **asdict(wanted)}
        with open_progress(progress) as shown, workdir(out, digest_of(facts), force=force, inputs=inputs) as work:
            if work.delivered is not None:
                return read_extraction(out)
            layers = work.path / "layers"
            layers.mkdir(exist_ok=True)
            found = _factorised(opened, known, wanted, layers, shown)
            _write(work.new_result(), out.name, opened, known, found, layers)
            check_still(opened)
            work.deliver({})
        return found
    finally:
        opened.close()


def _base_folder(opened: ExpertSet) -> Path:
    folder = opened.base.folder
    if folder is None:
        raise InputError(f"{opened.base.reference}: is a lone file; give the base's folder, with its config.json")
    check_folder(folder)
    return folder


def _factorised(opened: ExpertSet, known: Layout, wanted: _Wanted, work: Path, progress: Progress) -> Extraction:
    """Leave a file of factors in ``work`` for every linear layer that changed, and measure the other tensors."""
    layers: list[Layer] = []
    rest: list[Rest] = []
    changed = [stack for stack in opened.stacks if stack.rows and stack.name not in opened.alignment.ties]
    progress.phase("extracting", len(changed), "tensors")
    for stack in changed:
        if stack.name in known.linear:
            part = _part(work, opened, stack.name)
            if not part.is_file():
                stored = opened.alignment.tensors[stack.name].dtype
                dtype = stored if wanted.dtype is None else DTYPES[ALIASES[wanted.dtype]]
                _factorise(stack, known.linear[stack.name], wanted, dtype, part)
            if part.is_file():
                layers.append(_layer(stack.name, known.linear[stack.name], part))
        else:
            total = float(replace(stack, wide=True).gram()[0, 0])
            rest += [Rest(stack.name, known.kinds[stack.name], total)] if total else []
        progress.advance()
    base, expert = opened.base.reference, opened.experts[0].reference
    if not layers:
        raise InputError(f"{expert}: no linear layer differs from {base}, so there is nothing to extract")
    return Extraction(base, expert, tuple(layers), tuple(rest))


def _part(work: Path, opened: ExpertSet, tensor: str) -> Path:
    return work / f"{list(opened.alignment.tensors).index(tensor):05d}.safetensors"


def _factorise(stack: Stack, module: str, wanted: _Wanted, dtype: DType, part: Path) -> None:
    """Write the factors of a layer, unless it is unchanged."""
    delta = replace(stack, wide=True).whole()[0]
    if not delta.any():
        return
    found = factorise(delta, wanted.rank, wanted.energy)
    a, b = factor_names(module)
    unfinished = part.with_suffix(".new")
    write_tensors(
        unfinished, [(a, found.a, dtype), (b, found.b, dtype)], kept=repr(found.kept), total=repr(found.total)
    )
    os.replace(unfinished, part)


def _layer(tensor: str, module: str, part: Path) -> Layer:
    entries, facts = read_header(part)
    rank = entries[factor_names(module)[0]].shape[0]
    return Layer(tensor, module, rank, float(facts["kept"]), float(facts["total"]))


def _write(result: Path, title: str, opened: ExpertSet, known: Layout, found: Extraction, work: Path) -> None:
    gather([_part(work, opened, layer.tensor) for layer in found.layers], result / WEIGHTS)
    ranks = {layer.module: layer.rank for layer in found.layers}
    config = lora_config(ranks, known.modules, base=found.base, task_type=known.task_type)
    write_json(result / CONFIG, config)
    write_json(result / RECORD, found.to_dict())
    (result / "README.md").write_text(_card(title, opened, found), encoding="utf-8")


def _card(title: str, opened: ExpertSet, found: Extraction) -> str:
    agreed, warnings = licences(opened)
    matter = origin(hub_ids(opened.base), "adapter") | {"library_name": "peft", "tags": ["lora", "consilience"]}
    matter |= {"license": agreed} if agreed else {"license": "other"} if warnings else {}
    lines = ["---", yaml.safe_dump(matter, sort_keys=False, allow_unicode=True).strip(), "---", "", f"# {title}", ""]
    lines += [f"The low-rank part of the update of {label(opened.experts[0])}: {found}.", ""]
    lines += [f"**Warning:** {warning}." for warning in warnings]
    return "\n".join([*lines, f"Every layer's rank and energy are in `{RECORD}`.", ""])
