"""Methods within methods: another one merges coordinates or whole task vectors, by its own code."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from consilience.methods.program import Floats
from consilience.methods.registry import load

#: Methods that draw no random numbers and take nothing but task vectors.
Inner = Literal[
    "task_arithmetic", "ties", "breadcrumbs", "tsv_m", "iso_c", "iso_cts", "wudi", "wudi_v2", "swudi_a", "actmat",
    "tact",
]  # fmt: skip


def merged(rows: Sequence[Floats], names: Sequence[str], method: str, parameters: Mapping[str, Any]) -> Floats:
    """Return what a method makes of matrices as task vectors, in their own type; ``lambda`` is 1.

    Args:
        rows: [m, n] each, float32 or float64.
        names: the experts'.
        method: one of ``Inner``.
        parameters: those that the method has are its own, the others are left out.
    """
    from consilience.engine.memory import merge_arrays

    own = load(method).parameters
    taken = {name: value for name, value in parameters.items() if name in own}
    return merge_arrays(dict(zip(names, map(np.ascontiguousarray, rows), strict=True)), method, taken)
