"""AdaMerging: coefficients that make predictions on unlabelled rows confident."""

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, Literal

from consilience.coefficients import Coefficients, Trimmed
from consilience.errors import InputError
from consilience.learned.data import Data
from consilience.learned.loop import EarlyStopping, Loop
from consilience.learned.settings import Compute, Exclude, Learning, Positions, Responses, ResponseTokens, Samples
from consilience.methods.signature import Default, PerExpert, Range, learned_method
from consilience.objectives.entropy import Entropy
from consilience.objectives.objective import Objective
from consilience.optimizers.parameterisation import SpaceSettings
from consilience.optimizers.settings import CmaSettings, Descent, SpsaSettings

if TYPE_CHECKING:
    from consilience.learned.run import Run


@dataclass(frozen=True, kw_only=True)
class AdaMerging:
    """AdaMerging's parameters, as AdaMerging++ has them too."""

    alphabar: Annotated[PerExpert, Default(0.3), "start: the Task Arithmetic coefficient"]
    granularity: Annotated[Literal["task", "layer"], "one coefficient per expert, or per expert and tensor"] = "layer"
    exclude: Exclude = ("vision",)
    clamp: Annotated[bool, "keep coefficients in [0, 1], as the official code; false: FusionBench"] = True
    beta: Annotated[PerExpert, Default(1.0), Range(0), "weight of the entropy on an expert's rows"]
    positions: Positions = "all"
    samples: Samples = 0
    responses: Responses = "given"
    response_tokens: ResponseTokens = 64
    optimizer: Annotated[Literal["adam", "adamw", "sgd", "spsa", "cma"], "what moves the coefficients"] = "adam"
    learning_rate: Annotated[float, Range(0), "step size, in alpha"] = 1e-3
    schedule: Annotated[Literal["constant", "linear", "cosine", "restarts"], "how the learning rate falls"] = "constant"
    spsa: SpsaSettings = field(default_factory=SpsaSettings)
    cma: CmaSettings = field(default_factory=CmaSettings)
    steps: Annotated[int, Range(0), "optimizer steps"] = 500
    batch: Annotated[int, Range(0), "rows of each expert per step; 0: all"] = 16
    stopping: EarlyStopping = field(default_factory=EarlyStopping)
    compute: Compute = field(default_factory=Compute)

    def learning(self, experts: int) -> Learning:
        """Return what is minimised and how: alignment's machinery without teachers."""
        return Learning(
            space=SpaceSettings(coefficients="box" if self.clamp else "real"),
            objective=Objective(beta=self.beta, terms=(Entropy(1.0),)),
            data=Data(
                positions=self.positions,
                samples=self.samples,
                responses=self.responses,
                response_tokens=self.response_tokens,
            ),
            optimizer=self.optimizer,
            descent=Descent(learning_rate=self.learning_rate, schedule=self.schedule, spsa=self.spsa, cma=self.cma),
            # Rows are taken from the experts in turn.
            loop=Loop(batch=self.batch * experts, steps=self.steps, stopping=self.stopping),
            compute=self.compute,
        )


@learned_method(
    source="AdaMerging, arXiv:2310.02575 (ICLR 2024)",
    data="calibration: unlabelled rows of every expert's task",
)
def adamerging(run: "Run", *, settings: AdaMerging) -> Coefficients:
    """Learn the coefficients at which the merge is surest of its predictions on everybody's unlabelled rows.

    theta^l = theta_0^l + sum_k lambda_k^l tau_k^l
    minimise  sum_k beta_k E_{x in D_k} H(softmax(z(x))),   H(p) = -sum_v p_v log p_v

    For a language model every compared position is a prediction of its own; an expert's mean is over positions. There
    are no teachers: the experts are run only to compare the result. Known disagreements: the paper learns on the test
    inputs; the official code takes two batches of 16 per task and step (its loop breaks one late) and clamps as it
    blends, so that a coefficient that has left [0, 1] gets no gradient any more, where here it is put back on the
    boundary.
    """
    return learn_entropy(run, settings)


def learn_entropy(run: "Run", settings: AdaMerging, trimmed: Trimmed | None = None) -> Coefficients:
    """Learn coefficients of task vectors that are first ``trimmed``.

    Raises:
        InputError: ``alphabar`` lies outside [0, 1] but coefficients are clamped.
    """
    from consilience.learned.learning import learn_coefficients
    from consilience.learned.run import groups_of

    if settings.clamp and not all(0 <= value <= 1 for value in settings.alphabar):
        raise InputError("alphabar: lies outside [0, 1], where clamp=true keeps coefficients; set clamp=false")
    grouping = {"task": "global", "layer": "tensor"}[settings.granularity]
    start = replace(groups_of(run, grouping, settings.exclude, settings.alphabar), trimmed=trimmed)
    return learn_coefficients(run, start, settings.learning(len(run.experts)))
