"""A plan in words: what a dry run prints."""

import re
from dataclasses import asdict, dataclass
from typing import Any, cast

from consilience.engine.differences import by_level
from consilience.engine.output import tie_notes
from consilience.engine.plan import SEGMENT, Plan, TensorPlan
from consilience.experts.block import LARGEST_BLOCK, block_size
from consilience.experts.model import Model
from consilience.methods.program import Elementwise, Matrix, Program, Top

#: What one core did on the machine the defaults were measured on; a dry run's time is an estimate from these.
READ_RATE, WRITE_RATE, VALUE_RATE = 3.0e9, 0.8e9, 4.0e8
#: Anonymous memory of the interpreter with numpy, numba and compiled kernels loaded.
FIXED_MEMORY = 170_000_000


@dataclass(frozen=True)
class Cost:
    """Bytes read and written, estimated anonymous memory (bytes) and time (s)."""

    read: int
    written: int
    memory: int
    seconds: float


def estimate(plan: Plan, threads: int) -> Cost:
    """Estimate a plan's cost for a number of workers."""
    read = sum(t.bytes_read for t in plan.tensors)
    values = sum(t.numel * t.passes * (len(t.rows) + 1) for t in plan.tensors)
    widest = max((_scratch(t) for t in plan.tensors), default=0)
    seconds = 1.0 + (read / READ_RATE + values / VALUE_RATE / 4) / threads + plan.layout.size / WRITE_RATE
    return Cost(read, plan.layout.size, FIXED_MEMORY + threads * widest + len(plan.tensors) * 2500, seconds)


def _scratch(tensor: TensorPlan) -> int:
    rows = len(tensor.rows)
    together = max(tensor.unit, _columns(tensor.program))
    block = max(block_size(rows, tensor.wide), together) * (rows + 8) * (8 if tensor.wide else 4)
    ranking = rows * SEGMENT // 4 if tensor.ranks is not None else SEGMENT // 4 if _scores(tensor.program) else 0
    if isinstance(tensor.program, Matrix):
        ranking = int(tensor.program.copies * rows * tensor.numel * (8 if tensor.wide else 4))
    if isinstance(tensor.program, Elementwise) and tensor.program.needs == "gram":
        ranking = 30 * rows * rows * (tensor.numel // max(1, tensor.program.over.length(tensor.shape)))
    factors = max((s.pair.a.numel + s.pair.b.numel for s in tensor.rows if s.pair), default=0) * 8
    return block + ranking + factors + LARGEST_BLOCK * 8


def _scores(program: Program | None) -> bool:
    """Whether scores are ranked, now or after a first look."""
    later = isinstance(program, Elementwise) and program.stages > 1
    return later or (isinstance(program, Elementwise) and isinstance(program.keep, Top))


def _columns(program: Program | None) -> int:
    """Return how many elements the rows have that a method looks at as a whole."""
    by_row = program.by_row if isinstance(program, Elementwise) else None
    return 0 if by_row is None else by_row.columns


def _values(parameters: dict[str, Any], names: tuple[str, ...]) -> str:
    shown: list[str] = []
    for key, value in parameters.items():
        if key in ("int8_mask", "rescale") and value is False:
            continue
        key = key.rstrip("_")
        if isinstance(value, tuple):
            same = len(set(value)) == 1
            text = f"{value[0]:g}" if same else " ".join(f"{n}:{v:g}" for n, v in zip(names, value, strict=False))
        else:
            text = f"{value:g}" if isinstance(value, float) else str(value).lower()
        shown.append(f"{key}={text}")
    return ", ".join(shown)


def describe_tensor(tensor: TensorPlan, owner: str) -> str:
    """Return one line: name, shape, types, what is done with which values; ``owner``'s are copied."""
    shape = "x".join(map(str, tensor.shape)) or "scalar"
    source = tensor.base.dense.dtype.name if tensor.base.dense else "-"
    dtype = tensor.out_dtype.name if source == tensor.out_dtype.name else f"{source}->{tensor.out_dtype.name}"
    action = _values(tensor.parameters, tensor.row_names) if tensor.program is not None else f"copy from {owner}"
    return f"{tensor.name}  {shape}  {dtype}  {action}"


def _origin(tensor: TensorPlan, owner: str) -> str:
    """Return where a tensor comes from in each model that calls it otherwise, and in whichever stands alone."""
    pairs = [*zip(tensor.row_names, tensor.rows, strict=True)] or [(owner, tensor.base)]
    stored = [f"{name} {source.dense.name}" for name, source in pairs if source.dense is not None]
    return f"  <- {', '.join(stored)}" if stored else ""


def counted(plan: Plan) -> str:
    """Say how many tensors the output has, and how many of them are merged."""
    merged = sum(t.program is not None for t in plan.tensors)
    return f"{len(plan.tensors)}" + (f": {merged} merged, {len(plan.tensors) - merged} copied" if plan.merges else "")


def natural(name: str) -> tuple[Any, ...]:
    """Return a key that sorts names as people count: ``layers.2`` before ``layers.10``."""
    parts = re.split(r"(\d+)", name)
    return tuple(int(part) if index % 2 else part for index, part in enumerate(parts))


def notes_of(plan: Plan) -> list[str]:
    """Return all that is to be said of a plan before it is carried out."""
    return [*plan.alignment.notes, *tie_notes(plan), *plan.notes, *by_level(plan.differences, "note")]


def summary_lines(plan: Plan, threads: int) -> list[str]:
    """Return what a dry run says of the whole, the stages' first: models, method, tensors, files, cost, notes."""
    stages = plan.stages.items()
    lines = [line for name, stage in stages for line in (f"stage    {name}", *summary_lines(stage, threads))]
    return [*lines, *(["output"] if lines else []), *_summary_lines(plan, threads)]


def _summary_lines(plan: Plan, threads: int) -> list[str]:
    cost = estimate(plan, threads)
    lines = [f"method   {plan.method.name}: {plan.method.summary}"]
    if plan.base is not None:
        lines.append(f"base     {plan.base.reference}")
    for expert in plan.experts:
        lines.append(f"expert   {expert.name}: {expert.reference} ({_kind(expert)})")
    lines += [f"slice    {one.text}" for one in plan.stacking.slices] if plan.stacking is not None else []
    parameters = sum(t.numel for t in plan.tensors)
    lines.append(f"tensors  {counted(plan)}; {parameters / 1e6:.1f} M parameters")
    files = plan.layout.files
    if len(files) > 4:
        lines.append(f"files    {len(files)}: {files[0].name} ... {files[-1].name}, {plan.layout.size / 1e6:.1f} MB")
    else:
        lines += [f"file     {file.name}  {file.size / 1e6:.1f} MB" for file in files]
    lines.append(
        f"cost     read {cost.read / 1e9:.2f} GB, write {cost.written / 1e9:.2f} GB, about {cost.memory / 1e6:.0f} MB "
        f"of memory, about {cost.seconds:.0f} s with {threads} threads"
    )
    lines += [f"warning  {text}" for text in by_level(plan.differences, "warning")]
    lines += [f"note     {note}" for note in notes_of(plan)]
    lines += [f"private  {name}: {', '.join(tensors)}" for name, tensors in plan.alignment.private.items()]
    return lines


def _kind(expert: Model) -> str:
    return f"LoRA, {len(expert.adapter.pairs)} pairs" if expert.adapter else "full weights"


def tensor_lines(plan: Plan) -> list[str]:
    """Return a line for each tensor, in the order of layers."""
    tensors = sorted(plan.tensors, key=lambda tensor: natural(tensor.name))
    pairs = [(tensor, plan.alignment.owner(tensor.name)) for tensor in tensors]
    sources = [_origin(tensor, owner) if plan.stacking is not None else "" for tensor, owner in pairs]
    return [f"  {describe_tensor(*pair)}{source}" for pair, source in zip(pairs, sources, strict=True)]


def plan_facts(plan: Plan, threads: int) -> dict[str, Any]:
    """Return what there is to say of a plan as plain values, tensors apart."""
    cost = estimate(plan, threads)
    return {
        "method": plan.method.name,
        "base": plan.base.reference if plan.base is not None else None,
        "experts": [expert.name for expert in plan.experts],
        "tensors": len(plan.tensors),
        "merged": sum(t.program is not None for t in plan.tensors),
        "parameters": sum(t.numel for t in plan.tensors),
        "bytes_read": cost.read,
        "bytes_written": cost.written,
        "memory": cost.memory,
        "seconds": cost.seconds,
        "threads": threads,
        "overrides": [asdict(one) for one in plan.recipe.overrides],
        "warnings": by_level(plan.differences, "warning"),
        "notes": notes_of(plan),
        "differences": [asdict(one) for one in plan.differences],
    }


def tensor_facts(plan: Plan) -> list[dict[str, Any]]:
    """Return what is done with each tensor as plain values, in the order of layers."""
    return [
        {
            "name": tensor.name,
            "shape": list(tensor.shape),
            "dtype": tensor.base.dense.dtype.name if tensor.base.dense else None,
            "out_dtype": tensor.out_dtype.name,
            "merged": tensor.program is not None,
            "parameters": {key.rstrip("_"): _by_expert(value, tensor) for key, value in tensor.parameters.items()}
            if tensor.program is not None
            else {},
        }
        for tensor in sorted(plan.tensors, key=lambda tensor: natural(tensor.name))
    ]


def _by_expert(value: Any, tensor: TensorPlan) -> Any:
    if isinstance(value, tuple):
        values = cast(tuple[Any, ...], value)
        return (
            dict(zip(tensor.row_names, values, strict=True)) if len(values) == len(tensor.row_names) else list(values)
        )
    return value
