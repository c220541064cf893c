"""Merge methods: one file each, a typed function whose signature is its schema.

What a method of one's own needs is here: see docs/methods/own.md.
"""

from consilience.jit import kernel
from consilience.methods.program import (
    Arithmetic,
    Elementwise,
    Measured,
    Merge,
    Over,
    Quantiles,
    Ranks,
    RowStep,
    RowTally,
    Score,
    Step,
    Sums,
    Table,
    Tally,
    Top,
    Update,
)
from consilience.methods.registry import load, names
from consilience.methods.signature import (
    Default,
    Method,
    Others,
    Parameter,
    PerExpert,
    Range,
    TensorSpec,
    elementwise,
    matrix,
)
from consilience.methods.weighted_sum import weighted

__all__ = [
    "Arithmetic",
    "Default",
    "Elementwise",
    "Measured",
    "Merge",
    "Method",
    "Others",
    "Over",
    "Parameter",
    "PerExpert",
    "Quantiles",
    "Range",
    "Ranks",
    "RowStep",
    "RowTally",
    "Score",
    "Step",
    "Sums",
    "Table",
    "Tally",
    "TensorSpec",
    "Top",
    "Update",
    "elementwise",
    "kernel",
    "load",
    "matrix",
    "names",
    "weighted",
]
