"""A plan in words: what a dry run prints."""

from dataclasses import dataclass
from typing import Any

from consilience.engine.differences import by_level
from consilience.engine.output import tie_notes
from consilience.engine.plan import SEGMENT, Plan, TensorPlan
from consilience.experts.block import LARGEST_BLOCK, block_size
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


def describe(plan: Plan, threads: int) -> list[str]:
    """Return the lines of a dry run."""
    cost = estimate(plan, threads)
    merged = sum(t.program is not None for t in plan.tensors)
    lines = [f"method   {plan.method.name}: {plan.method.summary}"]
    if plan.base is not None:
        lines.append(f"base     {plan.base.reference}")
    for expert in plan.experts:
        kind = f"LoRA, {len(expert.adapter.pairs)} pairs" if expert.adapter else "full weights"
        lines.append(f"expert   {expert.name}: {expert.reference} ({kind})")
    notes = [*plan.alignment.notes, *tie_notes(plan), *plan.notes, *by_level(plan.differences, "note")]
    lines += [f"warning  {text}" for text in by_level(plan.differences, "warning")]
    lines += [f"note     {note}" for note in notes]
    lines += [f"private  {name}: {', '.join(tensors)}" for name, tensors in plan.alignment.private.items()]
    lines.append(f"tensors  {len(plan.tensors)}: {merged} merged, {len(plan.tensors) - merged} copied")
    lines += [f"  {describe_tensor(tensor, plan.alignment.owner(tensor.name))}" for tensor in plan.tensors]
    lines += [f"file     {file.name}  {file.size / 1e6:.1f} MB" for file in plan.layout.files]
    lines.append(
        f"cost     read {cost.read / 1e9:.2f} GB, write {cost.written / 1e9:.2f} GB, about {cost.memory / 1e6:.0f} MB "
        f"of memory, about {cost.seconds:.0f} s with {threads} threads"
    )
    return lines
