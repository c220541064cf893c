"""How far apart the experts are in what their coefficients multiply: the constant of GLUE's Proposition 1.

    sigma_max = sqrt(lambda_max(Theta^T Theta)),    Theta = [theta_1 ... theta_K],    Theta_c = Theta (I - 11^T / K)

Both come from the inner products of theta_0, tau_1 ... tau_K, one pass over what is stored: theta_k = theta_0 + tau_k,
and theta_0 is no part of Theta_c. Where every group of tensors has coefficients of its own the matrix that they
multiply is block-diagonal, and its largest singular value is the largest of the groups'.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import numpy as np
import numpy.typing as npt

from consilience.coefficients import Group
from consilience.coefficients.gram import largest_singular_value
from consilience.learned.run import Run
from consilience.student.bank import Bank
from consilience.workdir import write_file

Matrix = npt.NDArray[np.float64]
_KEYS: tuple[str, ...] = ("sigma_max", "sigma_max_centred")


def spectrum(run: Run, groups: Sequence[Group]) -> dict[str, float]:
    """Return ``sigma_max`` of the experts' matrix and ``sigma_max_centred``, of the experts less their mean.

    Covered are the tensors of the groups, which coefficients multiply. A run that keeps a state keeps them with it, and
    going on from there reads no weight again.

    Args:
        run: the run.
        groups: of one coefficient per expert each.

    Raises:
        InputError: a stored value is NaN or Inf.
    """
    path = _path(run, groups)
    kept = _kept(path)
    if kept is not None:
        return kept
    run.progress.phase("distances between the experts")
    bank = Bank(run.plan, groups, threads=run.machine.threads)
    try:
        by_tensor = bank.gram()
    finally:
        bank.close()
    grams = [sum((by_tensor[name] for name, _ in group.tensors), np.zeros(())) for group in groups]
    found = dict(zip(_KEYS, (max(_sides(gram)[side] for gram in grams) for side in (0, 1)), strict=True))
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, json.dumps(found).encode())
    return found


def _sides(gram: Matrix) -> tuple[float, float]:
    """Return both singular values from the inner products [1 + K, 1 + K] of theta_0 and the task vectors."""
    count = len(gram) - 1
    experts = np.hstack([np.ones((count, 1)), np.eye(count)])
    apart = np.hstack([np.zeros((count, 1)), np.eye(count) - 1.0 / count])
    return largest_singular_value(experts @ gram @ experts.T), largest_singular_value(apart @ gram @ apart.T)


def _path(run: Run, groups: Sequence[Group]) -> Path | None:
    if run.folder is None:
        return None
    facts = [
        [model.identity() for model in run.plan.models],
        [run.plan.scales(k) for k in range(len(run.experts))],
        [group.tensors for group in groups],
    ]
    digest = hashlib.blake2b(json.dumps(facts).encode(), digest_size=12).hexdigest()
    return run.folder / f"spectrum-{digest}.json"


def _kept(path: Path | None) -> dict[str, float] | None:
    """Return what an earlier run found; None: nothing, or nothing that can be read."""
    if path is None or not path.is_file():
        return None
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return None
    values = cast(dict[str, object], held) if isinstance(held, dict) else {}
    found = {key: value for key in _KEYS if isinstance(value := values.get(key), float)}
    return found if len(found) == len(_KEYS) else None
