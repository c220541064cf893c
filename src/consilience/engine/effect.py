"""Whether a merge did anything: a result that is the base, and experts that add nothing, are said."""

import math
from collections.abc import Iterable, Mapping

import numpy as np

from consilience.checkpoints.checkpoint import raw
from consilience.engine.plan import Plan, TensorPlan
from consilience.engine.selection import Piece
from consilience.engine.worker import Record
from consilience.errors import option
from consilience.experts.model import Model
from consilience.methods.program import Elementwise
from consilience.methods.weighted_sum import PiecewiseSum


def effect_notes(plan: Plan, records: Mapping[Piece, Record]) -> list[str]:
    """Return a line for a result that is the base's, or for every expert that adds nothing to it."""
    merged = [tensor for tensor in plan.tensors if tensor.program is not None]
    if not plan.merges or (plan.base is None and len(plan.experts) == 1):
        return []  # copies are what was asked for
    if not merged and plan.stacking is not None:
        return []  # layers as they are, in another order
    if not merged:
        why = "'private' leaves none to merge" if plan.recipe.private else "no expert changes any"
        return [f"the result is the base, byte for byte: no tensor is merged ({why})"]
    pieces: dict[int, list[Record]] = {}
    for record in records.values():
        pieces.setdefault(record.tensor, []).append(record)
    notes = [
        f"{expert.name}: has no part in the result ({why})" for expert in plan.experts if (why := _idle(plan, expert))
    ]
    if (
        plan.stacking is None
        and records
        and all(_is_base(plan, tensor, pieces.get(tensor.index, [])) for tensor in merged)
    ):
        lost = any(record.rounding[1] for record in records.values()) and not plan.stochastic
        lost = lost and all(t.program.space == "task_vectors" for t in merged if t.program)
        small = (
            f"all updates are below half a unit of its dtype; choose a wider one, or {option('stochastic_rounding')}"
        )
        why = small if lost else "nothing of the experts is in it; look at weights, densities and lora_alpha"
        notes.append(f"the result is the base: {why}")
    return notes + _measured(plan, records) + _copies(plan, merged, pieces)


def _measured(plan: Plan, records: Mapping[Piece, Record]) -> list[str]:
    """Return what the method says of its measures, summed over all tensors."""
    measured = {record.tensor: np.array(record.measured) for record in records.values() if record.measured}
    if plan.method.notes is None or not measured:
        return []
    first = plan.tensors[min(measured)]
    return plan.method.notes(first.row_names, np.sum(list(measured.values()), 0), first.parameters)


def _is_base(plan: Plan, tensor: TensorPlan, records: Iterable[Record]) -> bool:
    """Whether a merged tensor has the base's bytes, or in another dtype its values."""
    assert tensor.program is not None
    info, donor = tensor.base.dense, plan.alignment.donor.name
    if info is not None and info.plain is tensor.out_dtype and tensor.base.pair is None:
        rows = [0, *(number + 1 for number, name in enumerate(tensor.row_names) if name == donor)]
        if all(any(record.output == record.inputs[row] for row in rows) for record in records):
            return True
    change = math.fsum(record.rounding[1] for record in records)
    return tensor.program.space == "task_vectors" and change == 0.0


def _copies(plan: Plan, merged: list[TensorPlan], pieces: Mapping[int, list[Record]]) -> list[str]:
    """Name the experts whose tensors are all the base's, byte for byte."""
    notes: list[str] = []
    for expert in plan.experts:
        same: list[bool] = []
        for tensor in merged:
            for number, (name, row) in enumerate(zip(tensor.row_names, tensor.rows, strict=True)):
                info = tensor.base.dense
                if name == expert.name and row.dense is not None and info is not None:
                    alike = row.pair is None and row.dense.plain is info.plain and tensor.reads_base
                    same += [alike and r.inputs[number + 1] == r.inputs[0] for r in pieces.get(tensor.index, [])]
        if same and all(same):
            notes.append(f"{expert.name}: is the base, byte for byte, and adds nothing")
    return notes


def _idle(plan: Plan, expert: Model) -> str:
    """Return why an expert has no part in the result whatever its weights are; empty if it may have one."""
    weights: list[float] = []
    densities: list[float] = []
    for tensor in plan.tensors:
        if tensor.program is None or expert.name not in tensor.row_names:
            continue
        number = tensor.row_names.index(expert.name)
        program = tensor.program
        combined = program.weights
        pieces = isinstance(program, Elementwise) and isinstance(program.merge, PiecewiseSum)
        fixed = program.needs != "gram" and not pieces
        weights.append(combined[number] if fixed and number < len(combined) else 1.0)
        density = tensor.parameters.get("density") if program.masks else None
        densities.append(density[number] if isinstance(density, tuple) else 1.0)
    if weights and not any(weights):
        return "its weight is 0"
    if densities and not any(densities):
        return "its density is 0"
    if expert.checkpoint is None and expert.adapter is not None and not expert.adapter.whole:
        pairs = expert.adapter.pairs.values()
        if all(pair.scale == 0 for pair in pairs):
            return "its adapter's scale is 0: lora_alpha"
        storage = expert.adapter.checkpoint.storage
        if not any(all(np.any(raw(storage, side, 0, side.numel)) for side in (pair.a, pair.b)) for pair in pairs):
            return "its adapter's factors are 0: it was never trained"
    return ""
