"""SVC: another method, whose singular values are then calibrated by how much of each expert they hold."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import numpy as np

from consilience.experts.stack import Stack
from consilience.methods.closed_form import back, task_matrices
from consilience.methods.inner import Inner, merged
from consilience.methods.program import Floats, Measured
from consilience.methods.signature import Default, Others, Range, matrix
from consilience.methods.svd import leading

#: The largest expert is called suppressed where its share in the result is below 1 and this part of the others' mean.
SUPPRESSED = 0.7


def _notes(names: Sequence[str], sums: Floats, parameters: Mapping[str, Any]) -> list[str]:
    """Say that the largest expert is suppressed, from squared norms and inner products with the result [K, 2]."""
    norms, products = np.sqrt(sums[:, 0]), sums[:, 1]
    moved = [k for k in range(len(names)) if norms[k] > 0]
    if len(moved) < 2:
        return []
    largest, smallest = max(moved, key=lambda k: norms[k]), min(moved, key=lambda k: norms[k])
    shares = products / np.maximum(sums[:, 0], 1e-300)
    others = float(np.mean([shares[k] for k in moved if k != largest]))
    if shares[largest] >= min(1.0, SUPPRESSED * others):
        return []
    return [
        f"svc, alpha={parameters['alpha']:g}: holds {shares[largest]:.2f} of {names[largest]}, whose task vector is "
        f"{norms[largest] / norms[smallest]:.2g} times as long as that of {names[smallest]}, and {others:.2f} of the "
        "others; it suppresses the largest of unlike experts"
    ]


@matrix(source="SVC 2026, ICML, arXiv:2602.05536", copies=9, notes=_notes)
def svc(
    stack: Stack,
    *,
    lambda_: Annotated[float, Default(1.0), "multiplier of the calibrated task vector"],
    inner: Annotated[Inner, Default("task_arithmetic"), "the method whose result is calibrated"],
    density: Annotated[float, Default(0.2), Range(0, 1), "share of each task vector that survives the inner trim"],
    alpha: Annotated[float, Default(0.1), Range(1e-6), "least share that a singular value is divided by"],
    others: Others,
) -> Measured:
    """Divide each singular value of a merged task vector by the share of the experts that it holds.

    D = M(tau_1 ... tau_K) = sum_r s_r u_r v_r^T;   a_r = u_r^T D,  a_rk = u_r^T tau_k
    s_rk = <a_r, a_rk> / ||a_rk||^2,   eta_r = mean_k max(s_rk, alpha)
    theta = theta_0 + lambda sum_r (s_r / eta_r) u_r v_r^T

    Directions that experts share are counted once per expert by a sum, and are cut; the multiplier of M does not matter
    while all s_rk stay above alpha. **Where norms differ it suppresses the largest expert**: rows that belong to one
    expert alone are divided by the mean of s_rk, the others' being alpha at least. The summary says where the largest
    expert's share in the result, <tau, tau_k> / ||tau_k||^2, is below 1 and below 0.7 of the others' mean.

    Known disagreements: alpha is 1 / K in the code's script (1 on TSV-M), 0.1 in its README and in FusionBench; before
    March 2026 the code divided only where all s_rk were positive.
    """
    del lambda_, others  # the engine's
    vectors, q = task_matrices(stack)
    found = merged(vectors, stack.row_names, inner, {"density": density})
    u, s, v = leading(found, None, min(found.shape))
    held = s[:, None] * v  # a_r
    shares = np.zeros_like(s)
    for vector in vectors:
        own = u.T @ vector
        shares += np.maximum((held * own).sum(1) / np.maximum(np.square(own).sum(1), 1e-12), alpha)
    calibrated = (u * (s * len(vectors) / shares)) @ v
    sizes = [(np.square(vector).sum(), (vector * calibrated).sum()) for vector in vectors]
    return Measured(back(calibrated, q), np.array(sizes))
