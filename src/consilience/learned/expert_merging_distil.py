"""Expert Merging with a low-rank correction distilled from the experts on the same answers: merge + distil."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from consilience.coefficients import Coefficients
from consilience.learned.expert_merging import PRESETS, ExpertMerging, Preset
from consilience.learned.settings import Start
from consilience.methods.signature import Range, learned_method

if TYPE_CHECKING:
    from consilience.learned.run import Run


@dataclass(frozen=True, kw_only=True)
class CorrectionSettings:
    """How the correction is learned."""

    correction_rank: Annotated[int, Range(1), "directions of each expert's update that are moved"] = 8
    correction_rate: Annotated[float, Range(0), "step size of the correction (AdamW), after a warm-up"] = 4e-4
    correction_decay: Annotated[float, Range(0), "weight decay of the correction"] = 0.0
    correction_ridge: Annotated[
        float, Range(0), "ridge of the regression that the correction starts from; 0: it starts at 0"
    ] = 0.01


@learned_method(
    source="Consilience; Expert Merging's loss (arXiv:2509.25712) on a low-rank correction of the merge",
    data="calibration: 5 to 10 unlabelled rows per expert",
    presets=PRESETS,
    changed={
        "alphabar": {"default": 0.4},
        "learning_rate": {"default": 0.01},
        "steps": {"default": 280, "help": "optimizer steps, of coefficients and correction together"},
        "written_prompts": {"default": 128},
    },
)
def expert_merging_distil(
    run: "Run", *, preset: Preset, start: Start, learning: ExpertMerging, correction: CorrectionSettings
) -> Coefficients:
    """Learn coefficients per tensor and, together with them, a low-rank correction of the merge by the same loss.

    theta^l = theta_0^l + sum_k alpha_k^l tau_k^l + dL R_0 + L_0 dR,   L_0, R_0: the experts' own directions
    minimise over alpha, dL and dR:  sum_k beta_k L^(k),   from the dR at which each layer's outputs are nearest to the
    experts' own on their rows: RegMean on task vectors, drawn to Task Arithmetic (``learned/regression.py``)

    The correction is trained, not merged: it is a PEFT adapter beside the coefficients (``consilience/correction`` in
    the output), one more expert of coefficient 1, and the output is an ordinary checkpoint.
    """
    from consilience.learned.distil import learn_distilled
    from consilience.learned.learning import start_of

    return learn_distilled(run, start_of(run, start), learning, correction)
