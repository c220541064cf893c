"""A merge of LoRA experts written as one PEFT adapter instead of a full model.

    delta = sum_k w_k s_k B_k A_k

``cat`` is exact for methods that are weighted sums: A = [A_1; ...; A_K], B = [w_1 s_1 B_1, ..., w_K s_K B_K], the
weights given or found from inner products, which factors have too: <B_i A_i, B_j A_j> = <B_i^T B_j, A_i A_j^T>.
``svd`` keeps the best rank-r part of each tensor's merged update and reports the energy it discards. For weighted sums
it goes through the r x r core of two QR factorisations and never forms the product; other methods (TIES, DARE, ...)
merge the dense update first. (sum A)(sum B) never stands in for sum AB.
"""

import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from consilience.checkpoints.adapter import LoraPair
from consilience.checkpoints.checkpoint import same_bytes
from consilience.checkpoints.dtypes import DTYPES, DType
from consilience.engine.adapter_files import CONFIG, WEIGHTS, factor_names, lora_config, write_tensors
from consilience.engine.card import licences, render_card
from consilience.engine.chosen_files import adapter_files
from consilience.engine.differences import by_level
from consilience.engine.effect import effect_notes
from consilience.engine.lineage import checkpoint_fingerprints, model_fingerprint, versions
from consilience.engine.load_check import LoadCheck, check_adapter_output
from consilience.engine.low_rank import Array, LowRank, sketch, truncate
from consilience.engine.memory import MemorySink
from consilience.engine.merge import check_learned, merge_workdir, recipe_text, recipe_value
from consilience.engine.output import check_space, write_chosen
from consilience.engine.plan import Plan, TensorPlan
from consilience.engine.stream import Streamer
from consilience.engine.unchanged import check_still
from consilience.errors import InputError, option
from consilience.experts.expert_set import Opened
from consilience.experts.model import Model
from consilience.methods.program import Elementwise, Over, Sums
from consilience.methods.weighted_sum import low_rank_weights
from consilience.numbers import is_count
from consilience.progress import NullProgress, Progress
from consilience.workdir import OURS, Workdir, digest_of, write_json

Kind = Literal["cat", "svd"]


@dataclass(frozen=True)
class AdapterSummary:
    """What was written: modules, largest rank, and the share of the update's squared norm that truncation discarded.

    ``warnings`` and ``loader`` are as a merge's (``Summary``).
    """

    out: str
    modules: int
    rank: int
    discarded: float
    notes: tuple[str, ...]
    warnings: tuple[str, ...] = ()
    loader: str = ""

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> "AdapterSummary":
        """Return the summary that plain values were taken of."""
        plain: dict[str, Any] = {**value, "notes": tuple(value["notes"]), "warnings": tuple(value.get("warnings", ()))}
        return cls(**plain)


@dataclass(frozen=True)
class _Factors:
    target: str
    a: Array
    b: Array
    kept: float
    total: float
    embedding: bool


def check_low_rank(plan: Plan, kind: Kind) -> None:
    """Refuse what an adapter cannot express.

    Raises:
        InputError: there is no base, or an expert is more than LoRA pairs on it.
    """
    if plan.base is None:
        raise InputError(f"{option('as_adapter', kind)}: needs the base the adapters stand on; name a base_model")
    tokens = plan.alignment.tokens
    if tokens is not None and tokens.changes:
        raise InputError(
            f"{plan.where}: tokenizer: {tokens.choice.label} gives the merge another vocabulary than its base's, which "
            f"an adapter on that base cannot have; leave {option('as_adapter', kind)} or tokenizer out"
        )
    for expert in plan.experts:
        # PEFT saves an adapted embedding's own weight beside its factors: the base's, that is.
        whole = (
            [] if expert.adapter is None else [n for n in expert.adapter.whole if not _is_base(plan.base, expert, n)]
        )
        if expert.checkpoint is not None or expert.adapter is None or whole:
            why = f" (it holds {whole[0]!r} whole, unlike the base's)" if whole else ""
            raise InputError(
                f"{expert.reference}: is not a plain LoRA adapter{why}, so the merge is not one; leave "
                f"{option('as_adapter', kind)} out"
            )
        for name in expert.adapter.tokens:
            raise InputError(
                f"{expert.reference}: trains rows of {name!r} alone, which a merged adapter has no place for; leave "
                f"{option('as_adapter', kind)} out"
            )
        if expert.adapter.assembled:
            raise InputError(
                f"{expert.reference}: adapts all experts of a layer at once (target_parameters), which is merged into "
                f"a model only; leave {option('as_adapter', kind)} out"
            )
        for name in expert.adapter.pairs:
            if name.endswith("in_proj_weight"):
                raise InputError(
                    f"{expert.reference}: adapts {name!r} of an nn.MultiheadAttention, which PEFT loads from no file "
                    f"but its own; leave {option('as_adapter', kind)} out"
                )
    _check_base_stays(plan, kind)


def _check_base_stays(plan: Plan, kind: Kind) -> None:
    """Refuse what would multiply the base itself.

    Raises:
        InputError: weights that do not sum to 1 multiply models, not task vectors.
    """
    for tensor in plan.tensors:
        program = tensor.program
        weights = low_rank_weights(program) if program is not None and program.space == "weights" else None
        if weights is not None and abs(sum(weights) - 1) > 1e-9:
            raise InputError(
                f"{option('as_adapter', kind)}: method {plan.method.name!r} multiplies tensor {tensor.name!r} of the "
                f"base by {sum(weights):g}, which an adapter cannot do; let weights sum to 1, or leave the option out"
            )


def _is_base(base: Model, expert: Model, name: str) -> bool:
    """Whether a tensor that an adapter holds whole is the base's own."""
    ours, theirs = base.stored(base.ties.get(name, name)), expert.stored(name)
    return ours is not None and theirs is not None and same_bytes(ours, theirs)


def check_adapter(plan: Plan, kind: str | None, rank: int | None) -> Kind | None:
    """Return the form of adapter that was asked for (None: a model), refusing what no adapter can hold.

    Raises:
        InputError: the form is unknown, needs or has no use for a rank, or cannot express the merge.
    """
    if kind is None:
        if rank is not None:
            raise InputError(f"{option('rank', str(rank))}: only goes with {option('as_adapter', 'svd')}")
        return None
    if not plan.merges:
        raise InputError(f"{option('as_adapter', kind)}: a mixture of experts is a model, no adapter; leave it out")
    if kind not in ("cat", "svd"):
        raise InputError(f"{option('as_adapter', repr(kind))}: choose cat (exact) or svd (with a rank)")
    if (kind == "svd") != (rank is not None):
        raise InputError(f"{option('rank', 'R')}: goes with {option('as_adapter', 'svd')}, which needs it")
    if rank is not None and not is_count(rank):
        raise InputError(f"{option('rank', repr(rank))}: must be a whole number of at least 1")
    if kind == "cat" and plan.method.name == "expert_merging_pp":
        raise InputError(
            f"{option('as_adapter', 'cat')}: chunks of a tensor have coefficients of their own, which factors cannot "
            f"hold; use svd with {option('rank', 'R')}"
        )
    if plan.stacking is not None or plan.stages:
        form = "slices or modules" if plan.stacking is not None else "stages"
        raise InputError(
            f"{plan.where}: {option('as_adapter', kind)}: {form} make models that no adapter stands on; leave it out"
        )
    check_low_rank(plan, kind)
    if plan.recipe.config is not None:
        raise InputError(f"{plan.where}: config: an adapter has no config.json of its own; leave the key out")
    return kind


def factor_weights(tensor: TensorPlan) -> tuple[float, ...] | None:
    """Return the experts' multipliers if the merge is a weighted sum of their task vectors and no more."""
    program = tensor.program
    found = isinstance(program, Elementwise) and program.needs == "gram" and program.over == Over()
    if isinstance(program, Elementwise) and found and program.space == "task_vectors" and tensor.stack.low_rank:
        assert program.finish is not None
        program = program.finish(Sums(gram=_gram(tensor), exponents=(0,) * len(tensor.rows)))
    return low_rank_weights(program)


def _gram(tensor: TensorPlan) -> Array:
    """Return the inner products [K, K] of low-rank task vectors from their factors."""
    gram, factors = np.zeros((len(tensor.rows),) * 2), replace(tensor.stack, wide=True).factors()
    for i, one in enumerate(factors):
        for other in factors[: i + 1]:
            product = ((one.left.T @ other.left) * (one.right @ other.right.T)).sum() * one.scale * other.scale
            gram[one.row, other.row] = gram[other.row, one.row] = product
    return gram


def stacked(tensor: TensorPlan, weights: tuple[float, ...]) -> tuple[Array, Array]:
    """Return (left [rows, R], right [R, columns]) of a weighted sum: all experts' factors side by side, in float64."""
    lefts: list[Array] = []
    rights: list[Array] = []
    for row, left, right, scale in replace(tensor.stack, wide=True).factors():
        lefts.append(left * (weights[row] * scale))
        rights.append(right)
    return np.concatenate(lefts, 1), np.concatenate(rights, 0)


def dense_update(plan: Plan, tensor: TensorPlan, threads: int | None) -> Array:
    """Return the merged update of one tensor, [rows, columns], by running its program in float64."""
    alone = replace(tensor, index=0, out_dtype=DTYPES["F64"], wide=True)
    small = replace(plan, tensors=(alone,))
    sink = MemorySink(small)
    Streamer(small, sink, threads=threads).run()
    merged = sink.arrays[tensor.name].view(np.float64)
    base = alone.stack.loader(check=False).base(0, tensor.numel, None)
    return (merged - base).reshape(tensor.shape[0], -1)


def _adapted_as(plan: Plan, tensor: TensorPlan) -> dict[str, LoraPair]:
    """Return a pair of the experts by every name under which they adapt a tensor: two where it is tied."""
    donor, written = plan.alignment.donor, {one.name for one in plan.tensors}
    aliases = [alias for alias, name in donor.ties.items() if name == tensor.name and alias not in written]
    pairs: dict[str, LoraPair] = {tensor.name: next(s.pair for s in tensor.rows if s.pair is not None)}
    for name in (tensor.name, *aliases):
        for adapter in (expert.adapter for expert in plan.experts if expert.adapter is not None):
            if name in adapter.pairs:
                pairs[name] = adapter.pairs[name]
    return pairs


def _factors(plan: Plan, tensor: TensorPlan, kind: Kind, rank: int, threads: int | None) -> list[_Factors]:
    weights = factor_weights(tensor)
    if weights is not None:
        left, right = stacked(tensor, weights)
        found = truncate(left, right, rank) if kind == "svd" else LowRank(left, right, 1.0, 1.0)
    elif kind == "cat":
        raise InputError(
            f"{option('as_adapter', 'cat')}: method {plan.method.name!r} is not a weighted sum of the adapters; use "
            f"svd with {option('rank', 'R')}"
        )
    else:
        found = sketch(dense_update(plan, tensor, threads), rank)
    out: list[_Factors] = []
    for name, pair in _adapted_as(plan, tensor).items():
        a, b = (found.b.T, found.a.T) if pair.transposed != pair.swapped else (found.a, found.b)
        if len(tensor.shape) > 2:  # a convolution: A has its kernel, B one of size 1
            a = a.reshape(len(a), *tensor.shape[1:])
            b = b.reshape(*b.shape, *(1 for _ in tensor.shape[2:]))
        out.append(_Factors(name, a, b, found.kept, found.total, pair.embedding))
    return out


def _write_weights(plan: Plan, path: Path, found: list[_Factors], dtype: DType) -> None:
    tensors: list[tuple[str, Array, DType]] = []
    for f in found:
        names = factor_names(called(plan, f.target).removesuffix(".weight"), f.embedding)
        tensors += [(name, values, dtype) for name, values in zip(names, (f.a, f.b), strict=True)]
    write_tensors(path, tensors)


def called(plan: Opened, target: str) -> str:
    """Return what adapters of PEFT's form themselves call a tensor of the base; others have names of other programs."""
    adapters = (expert.adapter for expert in plan.experts)
    own = (adapter for adapter in adapters if adapter is not None and "peft_type" in adapter.config)
    return next((adapter.names[target] for adapter in own if target in adapter.names), target)


def adapter_config(plan: Plan, ranks: dict[str, int]) -> dict[str, Any]:
    """Return the merged adapter's PEFT config: the experts' own where they agree, ``alpha = r`` so that scale = 1."""
    adapters = [e.adapter for e in plan.experts if e.adapter is not None]
    configs = [adapter.config for adapter in adapters]
    named = [c.get("base_model_name_or_path") for c in configs]
    names = dict.fromkeys([*(tensor.name for tensor in plan.tensors), *plan.alignment.donor.named])
    weights = [called(plan, name).removesuffix(".weight") for name in names if name.endswith(".weight")]
    return lora_config(
        {called(plan, f"{module}.weight").removesuffix(".weight"): rank for module, rank in ranks.items()},
        weights,
        base=named[0] if len(set(named)) == 1 else plan.recipe.base_model,
        task_type=configs[0].get("task_type"),
        fan_in_fan_out=any(p.transposed != (p.embedding or p.swapped) for a in adapters for p in a.pairs.values()),
    )


def write_adapter(
    plan: Plan,
    out: Path,
    kind: Kind,
    rank: int = 0,
    *,
    force: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
) -> AdapterSummary:
    """Write the merge of LoRA experts as a PEFT adapter folder.

    Args:
        plan: a merge whose experts are all LoRA adapters.
        out: the folder to write.
        kind: ``cat`` (exact, rank = sum of the experts') or ``svd`` (truncated to ``rank``).
        rank: rank of ``svd``.
        force: replace a non-empty ``out``.
        threads: workers for methods that merge dense updates.
        progress: told of every tensor.

    Raises:
        InputError: an expert is not a plain adapter, or the method is not a weighted sum and ``cat`` was asked for.
        MachineError: the disk is full or failed.
    """
    check_learned(plan)
    check_low_rank(plan, kind)
    with merge_workdir(plan, out, force=force, digest=adapter_digest(plan, kind, rank), folder=True) as work:
        return adapter_in(plan, work, kind, rank, threads=threads, progress=progress)


def adapter_digest(plan: Plan, kind: Kind, rank: int) -> str:
    """Return what identifies the work of writing a plan as an adapter."""
    return digest_of([plan.digest, kind, rank])


def adapter_in(
    plan: Plan,
    work: Workdir,
    kind: Kind,
    rank: int,
    *,
    threads: int | None = None,
    progress: Progress | None = None,
    check: LoadCheck | None = None,
) -> AdapterSummary:
    """Write the adapter in a folder that is held, and deliver it; see ``write_adapter``."""
    if work.delivered is not None:
        summary = AdapterSummary.from_dict(work.delivered)
        return replace(summary, notes=(*summary.notes, *work.notes))
    found: list[_Factors] = []
    progress = progress or NullProgress()
    adapted = [t for t in plan.tensors if t.program is not None and any(source.pair for source in t.rows)]
    if not adapted:
        raise InputError(f"{plan.where}: no tensor is merged, so there is no adapter to write; look at 'private'")
    progress.phase(f"merging ({plan.method.name})", len(adapted), "tensors")
    for tensor in adapted:
        found += _factors(plan, tensor, kind, rank, threads)
        progress.advance()
    ranks = {f.target.removesuffix(".weight"): f.a.shape[0] for f in found}
    work.needs = sum(f.a.size + f.b.size for f in found) * DTYPES[plan.recipe.output_dtype or "F32"].itemsize
    check_space(work.out, work.needs)
    result = work.new_result()
    _write_weights(plan, result / WEIGHTS, found, DTYPES[plan.recipe.output_dtype or "F32"])
    write_json(result / CONFIG, adapter_config(plan, ranks))
    notes = [
        *plan.alignment.notes,
        *plan.notes,
        *by_level(plan.differences, "note"),
        *licences(plan)[1],
        *effect_notes(plan, {}),
    ]
    if not any(f.a.any() and f.b.any() for f in found):
        notes.append("the result changes nothing: every factor is 0; look at weights, densities and lora_alpha")
    loader = check_adapter_output(plan, result, check or LoadCheck(), progress)
    _write_papers(result, plan, work.out.name, kind, notes, loader)
    check_still(plan)
    kept, total = math.fsum(f.kept for f in found), math.fsum(f.total for f in found)
    discarded = max(0.0, 1.0 - kept / total) if kind == "svd" and total else 0.0
    warnings = tuple(by_level(plan.differences, "warning"))
    summary = AdapterSummary(str(work.out), len(found), max(ranks.values()), discarded, tuple(notes), warnings, loader)
    work.deliver(asdict(summary))
    return replace(summary, notes=(*summary.notes, *work.notes))


def _write_papers(result: Path, plan: Plan, title: str, kind: Kind, notes: list[str], loader: str) -> None:
    from consilience.checkpoints.adapter import open_adapter

    own = checkpoint_fingerprints(open_adapter(result).checkpoint)
    whole = model_fingerprint(own)
    text = recipe_text(plan)
    models = [
        {
            "name": m.name,
            "reference": m.reference,
            "fingerprint": model_fingerprint(checkpoint_fingerprints(m.adapter.checkpoint)),
        }
        for m in plan.experts
        if m.adapter is not None
    ]
    document = {"format": 1, "method": plan.method.name, "kind": f"adapter ({kind})", "seed": plan.recipe.seed}
    document |= {
        "versions": versions(),
        "models": models,
        "output": {"fingerprint": whole, "tensors": own},
        "recipe": recipe_value(plan),
        "defaults": plan.defaults,
        "differences": [asdict(one) for one in plan.differences],
        "loader": loader,
        "notes": notes,
    }
    if plan.recipe.overrides:
        document["overrides"] = [asdict(one) for one in plan.recipe.overrides]
    write_chosen(result, adapter_files(plan))
    (result / OURS).mkdir()
    write_json(result / OURS / "lineage.json", document)
    (result / OURS / "recipe.yaml").write_text(text, encoding="utf-8")
    (result / "README.md").write_text(render_card(plan, title, whole, text, notes, peft=True), encoding="utf-8")
