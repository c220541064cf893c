"""What multiplies each task vector: groups of tensors, chunks, and the Coefficients file."""

from consilience.coefficients.coefficients import (
    Coefficients,
    Trimmed,
    constant,
    expand,
    fit,
    is_coefficients,
    load_coefficients,
    save_coefficients,
)
from consilience.coefficients.groups import Group, Piece, boundaries, make_groups, pieces_of

__all__ = [
    "Coefficients",
    "Group",
    "Piece",
    "Trimmed",
    "boundaries",
    "constant",
    "expand",
    "fit",
    "is_coefficients",
    "load_coefficients",
    "make_groups",
    "pieces_of",
    "save_coefficients",
]
