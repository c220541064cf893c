"""Task vectors of full models without their files' rounding, which has directions of its own.

    tau_k + e_k = round(theta_0 + tau_k) - theta_0,   |e_k| <= eps / 2 |theta|
    ||e_k||_2 ~ eps rms(theta_0) (m^.5 + n^.5) / 3.5

A merged adapter has low rank but for e_k. Whatever divides by singular values, or counts them, would make as much of
e_k's as of the expert's own. Files of 16 bits are taken as they are: steps of their size are what training moved.
"""

import math

import numpy as np

from consilience.experts.stack import Stack
from consilience.methods.program import Floats

#: The rounding's largest singular value is taken to be this part of eps rms(theta_0) (m^.5 + n^.5): 1.7 times its size.
MARGIN = 0.5


def rounding(stack: Stack) -> list[float]:
    """Return, for each row, the size that singular values of its rounding may have; 0 where there is none."""
    bits = [row.dense.dtype.bits if row.dense is not None else 0 for row in stack.rows]
    if max(bits, default=0) < 32:
        return [0.0] * len(bits)
    squares = sum(float(np.square(base, dtype=np.float64).sum()) for _, _, base in stack.own(None, check=False))
    height = stack.numel / max(1, stack.columns)
    size = MARGIN * math.sqrt(squares / max(1, stack.numel)) * (math.sqrt(height) + math.sqrt(stack.columns))
    eps = {32: float(np.finfo(np.float32).eps), 64: float(np.finfo(np.float64).eps)}
    return [size * eps.get(one, 0.0) for one in bits]


def total(floors: list[float]) -> float:
    """Return the size of the rounding of all rows together, side by side or summed."""
    return math.hypot(*floors)


def unrounded(stack: Stack) -> list[Floats]:
    """Return the task vectors in float64, without directions that are no more than rounding.

    Such are left out of each, and then of the columns and of the rows of all together, as the experts may share theirs.
    What has none is returned bit for bit.
    """
    vectors, floors = list(stack.whole().astype(np.float64)), rounding(stack)
    for k, floor in enumerate(floors):
        wide = len(vectors[k]) <= vectors[k].shape[1]
        basis = _above(vectors[k] @ vectors[k].T if wide else vectors[k].T @ vectors[k], floor)
        if basis is not None:
            vectors[k] = basis @ (basis.T @ vectors[k]) if wide else (vectors[k] @ basis) @ basis.T
    left = _above(sum((one @ one.T for one in vectors), np.zeros((len(vectors[0]),) * 2)), total(floors))
    if left is not None:
        vectors = [left @ (left.T @ one) for one in vectors]
    size = vectors[0].shape[1]
    right = _above(sum((one.T @ one for one in vectors), np.zeros((size, size))), total(floors))
    return vectors if right is None else [(one @ right) @ right.T for one in vectors]


def _above(gram: Floats, floor: float) -> Floats | None:
    """Return the eigenvectors of eigenvalues above floor^2; None where all are, which a factorisation shows sooner."""
    if not floor:
        return None
    try:
        np.linalg.cholesky(gram - floor**2 * np.eye(len(gram)))
    except np.linalg.LinAlgError:
        values, vectors = np.linalg.eigh(gram)
        return vectors[:, values > floor**2]
    return None
