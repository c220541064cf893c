"""Learning on a labelled target: alignment's machinery with the target's score for teachers (glue, lorahub)."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from consilience.coefficients import Coefficients
from consilience.errors import InputError
from consilience.learned.align import AlignmentSettings, learn_alignment
from consilience.learned.ranking import check_score
from consilience.learned.run import Run
from consilience.learned.spectrum import spectrum

#: What ``expert_merging`` has and a target's loss alone does without.
_WITHOUT: dict[str, Any] = {
    "preset": "default", "gamma": 0.0, "reg_norm": "paper", "beta": (), "logit_weight": 0.0, "temperature": 1.0,
    "divergence": "kl", "hidden_weight": 0.0, "hidden_layers": (), "hidden_distance": "mse", "entropy_weight": 0.0,
    "target_weight": 1.0, "mean": "tokens", "total": "mean", "weight_decay": 0.0, "clip": 0.0, "responses": "given",
    "response_tokens": 0,
}  # fmt: skip
_KINDS = {"simplex": "softmax", "affine": "affine", "task_vector": "real"}


def learn_mixture(run: Run, values: Mapping[str, Any]) -> Coefficients:
    """Learn the weights that ``glue`` asks for.

    Args:
        run: the run.
        values: the parameters of ``glue``.

    Raises:
        InputError: no start weight is above 0, or on the simplex one is not, or see ``check_score``.
    """
    check_score(run, values)
    weights = np.asarray(values["alphabar"], np.float64)
    if not weights.sum() > 0 or (values["space"] == "simplex" and not weights.all()):
        raise InputError("alphabar: start weights must be above 0; leave it out to start at the mean of the experts")
    start = tuple((weights / weights.sum()).tolist())
    settings = AlignmentSettings.of(
        {
            **_WITHOUT,
            **values,
            "alphabar": start,
            "grouping": values["granularity"],
            "coefficients": _KINDS[values["space"]],
            "perturb": {"logits": "w", "weights": "alpha"}[values["perturb"]],
            "estimate_rule": "sgd",
        }
    )
    found = learn_alignment(run, settings.start(run), settings, parameters=values)
    total = found.alpha.sum(0)
    facts = {"sum": [float(total.min()), float(total.max())], **spectrum(run, found.groups)}
    return replace(found, facts=found.facts | facts)


def learn_search(run: Run, values: Mapping[str, Any]) -> Coefficients:
    """Search the coefficients that ``lorahub`` asks for.

    Raises:
        InputError: ``alphabar`` lies outside the bounds, or see ``check_score``.
    """
    check_score(run, values)
    bound = float(values["bound"])
    if not all(abs(value) <= bound for value in values["alphabar"]):
        raise InputError(f"alphabar: the search starts outside [-{bound:g}, {bound:g}]; raise bound, or start inside")
    settings = AlignmentSettings.of(
        {
            **_WITHOUT,
            **values,
            "gamma": values["penalty"],
            "grouping": values["granularity"],
            "coefficients": "real",
            "bounds": (-bound, bound),
            # Losses of different rows cannot be ranked: every evaluation sees all of them.
            "batch": 0,
            "positions": "response",
            "learning_rate": 0.0,
            "schedule": "constant",
            "mu": 0.05,
            "directions": 1,
            "holdout": 0.0,
            "patience": 1,
            "checkpoint": False,
        }
    )
    return learn_alignment(run, settings.start(run), settings, parameters=values)
