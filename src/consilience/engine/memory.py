"""Merging state dicts in memory, with the same plan, kernels and bytes as a merge of files."""

import logging
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from consilience.engine.effect import effect_notes
from consilience.engine.plan import Plan, TensorPlan, make_plan
from consilience.engine.stream import Streamer, check_copies, integer_notes
from consilience.experts.state_dict import StateDict, from_state_dict, to_like
from consilience.progress import Progress


class MemorySink:
    """Output bytes in arrays."""

    def __init__(self, plan: Plan) -> None:
        self.arrays = {t.name: np.empty(t.nbytes, np.uint8) for t in plan.tensors}

    def write(self, tensor: TensorPlan, start: int, data: Any) -> None:
        """Copy ``data`` to byte ``start`` of the tensor."""
        self.arrays[tensor.name][start : start + data.size] = data


def merge_in_memory(
    plan: Plan,
    like: StateDict,
    threads: int | None = None,
    progress: Progress | None = None,
    noted: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Run a plan over state dicts and return the merged one, in the same library and on the devices of ``like``.

    ``noted`` is told what a merge of files notes in its summary; without it that is logged.
    """
    check_copies(plan)
    sink = MemorySink(plan)
    records = Streamer(plan, sink, threads=threads, progress=progress).run()
    for note in [*plan.alignment.notes, *plan.notes, *integer_notes(plan), *effect_notes(plan, records)]:
        (noted or logging.getLogger("consilience").warning)(note)
    return {t.name: to_like(sink.arrays[t.name], t.out_dtype, t.shape, like[t.name]) for t in plan.tensors}


def merge_arrays(rows: Mapping[str, Any], method: str, parameters: Mapping[str, Any]) -> Any:
    """Merge matrices of one shape and type as task vectors on a base of zeros, for methods within methods.

    Args:
        rows: numpy arrays by the experts' names.
        method: a method's name.
        parameters: its parameters.
    """
    from consilience.api import build_recipe

    zeros = np.zeros_like(next(iter(rows.values())))
    recipe = build_recipe(method, "base", {name: f"expert {name}" for name in rows}, dict(parameters))
    opened = [(from_state_dict(name, {"w": values}), i) for i, (name, values) in enumerate(rows.items())]
    plan = make_plan(recipe, where=method, models=(from_state_dict("base", {"w": zeros}), opened))
    sink = MemorySink(plan)
    Streamer(plan, sink, threads=1).run()
    return to_like(sink.arrays["w"], plan.tensors[0].out_dtype, zeros.shape, zeros)
