"""How far apart a run's experts are: one pass over what is stored, which the run keeps."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from consilience.coefficients import Group
from consilience.coefficients.spectrum import Spectrum
from consilience.learned.run import Run
from consilience.student.bank import Bank
from consilience.workdir import write_file

Matrices = npt.NDArray[np.float64]


def spectrum(run: Run, groups: Sequence[Group]) -> Spectrum:
    """Return the spectrum of a run's experts, over the tensors of the groups, which coefficients multiply.

    A run that keeps a state keeps the inner products with it, and going on from there reads no weight again.

    Args:
        run: the run.
        groups: of one coefficient per expert each.

    Raises:
        InputError: a stored value is NaN or Inf.
    """
    path, size = _path(run, groups), 1 + len(run.experts)
    gram = _kept(path, (len(groups), size, size))
    if gram is None:
        run.progress.phase("distances between the experts")
        bank = Bank(run.plan, groups, threads=run.machine.threads)
        try:
            by_tensor = bank.gram()
        finally:
            bank.close()
        gram = np.stack([sum((by_tensor[name] for name, _ in group.tensors), np.zeros(())) for group in groups])
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_file(path, json.dumps(gram.tolist()).encode())
    return Spectrum.of_task_vectors(gram)


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


def _kept(path: Path | None, shape: tuple[int, ...]) -> Matrices | None:
    """Return what an earlier run found; None: nothing, or nothing that can be read."""
    if path is None or not path.is_file():
        return None
    try:
        gram = np.asarray(json.loads(path.read_text(encoding="utf-8")), np.float64)
    except (ValueError, TypeError):
        return None
    return gram if gram.shape == shape else None
