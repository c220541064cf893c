"""What the doctor measured, applied: the best weights of the quadratic model, and what they are made of."""

from typing import TYPE_CHECKING, Any

import numpy as np

from consilience.doctor.evidence.case import Case
from consilience.doctor.evidence.logs.folder import holds_log
from consilience.doctor.evidence.probe import Probe
from consilience.doctor.evidence.training import Training, read_training
from consilience.doctor.findings.from_training import power
from consilience.doctor.theory.bound import stability_leading
from consilience.doctor.theory.geometry import Vector
from consilience.doctor.theory.weights import bounded_weights, stability_penalties
from consilience.errors import InputError

if TYPE_CHECKING:
    from consilience.learned.run import Run


def case_of(run: "Run") -> Case:
    """Return the case of a learned method's run."""
    entries = tuple(entry for entry in run.plan.recipe.models if entry.model != run.plan.recipe.base_model)
    return Case(run.plan, entries, (), run.where, run.root)


def trainings_of(case: Case) -> list[Training]:
    """Return how the experts were trained: what the recipe names, then what lies in the expert's own folder.

    Raises:
        InputError: a log that the recipe names cannot be read.
    """
    from consilience.engine.plan import resolve_file

    found: list[Training] = []
    for name, expert, entry in zip(case.names, case.plan.experts, case.entries, strict=True):
        named = None if entry.data is None else entry.data.logs
        own = expert.folder if expert.folder is not None and expert.folder.is_dir() else None
        sources = [] if named is None else [str(resolve_file(named, case.root))]
        found.append(read_training(sources + ([str(own)] if own is not None and holds_log(own) else []), name))
    return found


def best_weights(
    case: Case, measured: Probe, importance: Vector, stability: float, bound: float
) -> tuple[Vector, dict[str, Any]]:
    """Return the weights [K], and what they rest on, for the record.

    Raises:
        InputError: no task counts, or the losses bend downwards on the whole, so that the model has no minimum.
    """
    if not importance.sum() > 0:
        raise InputError("importance: no task counts; give one of them a value above 0")
    w = importance / importance.sum()
    prices = _prices(trainings_of(case), measured, w, stability) if stability else None
    if not float(w @ measured.curvatures) > 0:
        raise InputError(
            "stability_weights: on the way to the merge losses bend downwards on the whole, so that the quadratic "
            "model has no best weights; use another method, or more probe rows"
        )
    weights = bounded_weights(
        measured.gram, high=bound, w=w, curvatures=measured.curvatures, slopes=measured.slopes, penalties=prices
    )
    found: dict[str, Any] = {
        "curvatures": measured.curvatures.tolist(),
        "prices": None if prices is None else prices.tolist(),
        "losses": {
            "own": measured.own.tolist(),
            "base": measured.base.tolist(),
            "at_alphabar": measured.merged.tolist(),
            "predicted": measured.predicted(weights).tolist(),
        },
    }
    return np.asarray(weights, np.float64), found


def _prices(trainings: list[Training], measured: Probe, w: Vector, stability: float) -> Vector | None:
    """Return r [K], or None where the lemma does not apply to all experts, or logs do not tell its terms."""
    smooth = float(measured.curvatures.max())
    moves = [
        stability_leading(steps=one.steps, rows=one.rows, batch=one.batch_size, power=power(one)) for one in trainings
    ]
    known = [move for one, move in zip(trainings, moves, strict=True) if one.family == "sgd" and move is not None]
    if len(known) < len(trainings) or smooth <= 0:
        return None
    return stability * stability_penalties(w, smooth, known)
