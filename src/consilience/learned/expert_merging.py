"""Expert Merging: coefficients per tensor from a handful of unlabelled samples per expert."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal

from consilience.coefficients import Coefficients
from consilience.learned.data import Data
from consilience.learned.settings import Learning, ResponseTokens, Samples, Start
from consilience.methods.signature import Default, Range, learned_method
from consilience.optimizers.parameterisation import SpaceSettings
from consilience.optimizers.settings import Descent
from consilience.student.calibration import Positions

if TYPE_CHECKING:
    from consilience.learned.run import Run

#: The paper's objective: logits and the middle block's states at every token of the rows as they are, with an anchor.
#: The optimizer, which it does not state, is the one that suited this objective on the language suite.
_PAPER: dict[str, Any] = {
    "gamma": 0.8, "hidden_weight": 1.0, "positions": "all", "responses": "given", "answers": 1,
    "answer_temperature": 0.0, "learning_rate": 0.08, "steps": 40,
}  # fmt: skip
#: Values of parameters that a recipe leaves out, by the name of its preset. Each is named after what it is known for;
#: what a source does not state stays at our default.
PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "paper": _PAPER,
    "internvl2.5": _PAPER | {"gamma": 5.0, "alphabar": 0.1, "exclude": ("official",)},
    "qwen2-vl": _PAPER | {"exclude": ("official",)},
    "mistral": _PAPER | {"exclude": ("official",)},
    "official-code": _PAPER | {
        "alphabar": 0.1, "gamma": 5.0, "reg_norm": "code", "coefficients": "sigmoid", "exclude": ("official",),
        "divergence": "cross_entropy", "hidden_weight": 0.0, "hidden_distance": "mse", "mean": "samples",
        "total": "mean", "optimizer": "adamw", "learning_rate": 0.5, "weight_decay": 1e-5, "schedule": "restarts",
        "clip": 1.0, "batch": 8, "steps": 7, "samples": 5,
    },
}  # fmt: skip


Preset = Annotated[
    Literal["default", "paper", "internvl2.5", "qwen2-vl", "mistral", "official-code"],
    Default("default"),
    "values for the parameters that are left out",
]


@dataclass(frozen=True, kw_only=True)
class AnswersOfExperts(Data):
    """Rows whose answers the experts generate, unless told otherwise."""

    positions: Annotated[Positions, "compare where a response is predicted, or all tokens"] = "response"
    samples: Samples = 0
    responses: Annotated[
        Literal["given", "none", "generate"],
        "responses in the rows: let the expert generate its own, use those given, or ignore them",
    ] = "generate"
    answers: Annotated[
        int, Range(1), "generate: answers that an expert gives to a prompt; one more is kept to judge by"
    ] = 4
    answer_temperature: Annotated[float, Range(0), "generate: temperature at which answers are sampled; 0: greedy"] = (
        1.0
    )
    written_prompts: Annotated[
        int, Range(0), "generate: further prompts that the base writes in the manner of an expert's rows"
    ] = 0
    own_prompts: Annotated[
        int, Range(0), "generate: prompts that each expert writes itself, in place of a file of rows; 0: files are read"
    ] = 0
    response_tokens: ResponseTokens = 64


@dataclass(frozen=True, kw_only=True)
class Steps(Descent):
    """Steps of Adam on the coefficients, or of another rule."""

    learning_rate: Annotated[float, Range(0), "step size, in alpha (in logits for sigmoid)"] = 0.2
    weight_decay: Annotated[float, Range(0), "decay towards zero of what the optimizer moves"] = 0.0
    schedule: Annotated[Literal["constant", "linear", "cosine", "restarts"], "how the learning rate falls"] = "cosine"
    clip: Annotated[float, Range(0), "greatest norm of the gradient; 0: no bound"] = 0.0


@dataclass(frozen=True, kw_only=True)
class ExpertMerging(Learning):
    """Expert Merging's parameters but for its start, as its successors have them too."""

    space: SpaceSettings = field(default_factory=SpaceSettings)
    data: AnswersOfExperts = field(default_factory=AnswersOfExperts)
    optimizer: Annotated[Literal["adam", "adamw", "sgd", "spsa", "cma"], "what moves the coefficients"] = "adam"
    descent: Steps = field(default_factory=Steps)


@learned_method(
    source="Expert Merging, arXiv:2509.25712 (ICLR 2026)",
    data="calibration: 5 to 10 unlabelled rows per expert",
    presets=PRESETS,
)
def expert_merging(run: "Run", *, preset: Preset, start: Start, learning: ExpertMerging) -> Coefficients:
    """Learn one coefficient per expert and tensor so that the merge behaves like each expert on that expert's inputs.

    theta^l = theta_0^l + sum_k alpha_k^l tau_k^l
    minimise  sum_k beta_k ( w_h L_hidden^(k) + w_z L_logit^(k) ) + gamma / (K L) sum_{k,l} |alpha_k^l - alphabar_k|

    Nobody's labels are needed: each expert is the teacher on its own calibration rows, and L is taken over
    the answers that it gives to their prompts, sampled ``answers`` times: where the merge will be used. Preset
    ``paper`` has the published objective (the rows as they are, every token, hidden states, an anchor).
    """
    from consilience.learned.learning import learn_coefficients, start_of

    return learn_coefficients(run, start_of(run, start), learning)
