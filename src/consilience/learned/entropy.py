"""Learning by prediction entropy, as AdaMerging and AdaMerging++ share it: alignment's machinery without teachers."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from consilience.coefficients import Coefficients
from consilience.coefficients.coefficients import Trimmed
from consilience.errors import InputError
from consilience.learned.align import AlignmentSettings, learn_alignment
from consilience.learned.run import Run

#: What ``expert_merging`` has and entropy alone does without.
_WITHOUT: dict[str, Any] = {
    "preset": "default", "gamma": 0.0, "reg_norm": "paper", "logit_weight": 0.0, "temperature": 1.0,
    "divergence": "kl", "hidden_weight": 0.0, "hidden_layers": (), "hidden_distance": "mse", "entropy_weight": 1.0,
    "target_weight": 0.0, "mean": "tokens", "total": "sum", "weight_decay": 0.0, "clip": 0.0,
}  # fmt: skip


def learn_entropy(run: Run, values: Mapping[str, Any], trimmed: Trimmed | None = None) -> Coefficients:
    """Learn the coefficients that ``adamerging`` asks for, on task vectors that are first ``trimmed``.

    Args:
        run: the run.
        values: the parameters of ``adamerging``.
        trimmed: what is done to task vectors before they are multiplied.

    Raises:
        InputError: ``alphabar`` lies outside [0, 1] but coefficients are clamped.
    """
    if values["clamp"] and not all(0 <= value <= 1 for value in values["alphabar"]):
        raise InputError("alphabar: lies outside [0, 1], where clamp=true keeps coefficients; set clamp=false")
    settings = AlignmentSettings.of(
        {
            **_WITHOUT,
            **values,
            "grouping": {"task": "global", "layer": "tensor"}[values["granularity"]],
            "coefficients": "box" if values["clamp"] else "real",
            "batch": values["batch"] * len(run.experts),  # rows are taken from the experts in turn
        }
    )
    start = replace(settings.start(run), trimmed=trimmed)
    extra = {} if trimmed is None else {"density": trimmed.density, "elect": trimmed.elect}
    return learn_alignment(run, start, settings, parameters={**values, **extra})
