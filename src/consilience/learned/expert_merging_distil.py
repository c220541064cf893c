"""Expert Merging with a low-rank correction distilled from the experts on the same answers: merge + distil."""

from typing import Annotated, Any

from consilience.coefficients import Coefficients
from consilience.learned.expert_merging import expert_merging
from consilience.methods.signature import Default, PerExpert, Range, learned_method


@learned_method(
    source="Consilience; Expert Merging's loss (arXiv:2509.25712) on a low-rank correction of the merge",
    data="calibration: 5 to 10 unlabelled rows per expert",
    extends=expert_merging,
)
def expert_merging_distil(
    run: Any,
    *,
    alphabar: Annotated[PerExpert, Default(0.4), "anchor and start: the Task Arithmetic coefficient"],
    learning_rate: Annotated[float, Default(0.01), Range(0), "step size, in alpha (in logits for sigmoid)"],
    steps: Annotated[int, Default(200), Range(0), "optimizer steps, of coefficients and correction together"],
    correction_rank: Annotated[int, Default(8), Range(1), "directions of each expert's update that are moved"],
    correction_rate: Annotated[float, Default(4e-4), Range(0), "step size of the correction (AdamW), after a warm-up"],
    correction_decay: Annotated[float, Default(0.0), Range(0), "weight decay of the correction"],
    correction_ridge: Annotated[
        float, Default(0.01), Range(0), "ridge of the regression that the correction starts from; 0: it starts at 0"
    ],
    written_prompts: Annotated[
        int, Default(128), Range(0), "generate: further prompts that the base writes in the manner of an expert's rows"
    ],
    **rest: Any,
) -> Coefficients:
    """Learn coefficients per tensor and, together with them, a low-rank correction of the merge by the same loss.

    theta^l = theta_0^l + sum_k alpha_k^l tau_k^l + dL R_0 + L_0 dR,   L_0, R_0: the experts' own directions
    minimise over alpha, dL and dR:  sum_k beta_k L^(k),   from the dR at which each layer's outputs are nearest to the
    experts' own on their rows: RegMean on task vectors, drawn to Task Arithmetic (``learned/regression.py``)

    The correction is trained, not merged: it is a PEFT adapter beside the coefficients (``consilience/correction`` in
    the output), one more expert of coefficient 1, and the output is an ordinary checkpoint.
    """
    from consilience.learned.align import AlignmentSettings
    from consilience.learned.distil import CorrectionSettings, learn_distilled

    own = {
        "correction_rank": correction_rank,
        "correction_rate": correction_rate,
        "correction_decay": correction_decay,
        "correction_ridge": correction_ridge,
    }
    values = {
        **rest,
        "alphabar": alphabar,
        "learning_rate": learning_rate,
        "steps": steps,
        "written_prompts": written_prompts,
    }
    wanted = CorrectionSettings(correction_rank, correction_rate, correction_decay, correction_ridge)
    return learn_distilled(run, AlignmentSettings.of(values), wanted, {**values, **own})
