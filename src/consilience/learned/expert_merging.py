"""Expert Merging: coefficients per tensor from a handful of unlabelled samples per expert."""

from typing import Annotated, Any, Literal

from consilience.coefficients import Coefficients
from consilience.learned.settings import (
    Answers,
    AnswerTemperature,
    Checkpoint,
    Directions,
    Exclude,
    Grouping,
    Holdout,
    Mu,
    Patience,
    Population,
    Precision,
    ResponseTokens,
    Samples,
    Sigma,
    Tokens,
    WrittenPrompts,
)
from consilience.methods.signature import Default, PerExpert, Range, learned_method

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


@learned_method(
    source="Expert Merging, arXiv:2509.25712 (ICLR 2026)",
    data="calibration: 5 to 10 unlabelled rows per expert",
    presets=PRESETS,
)
def expert_merging(
    run: Any,
    *,
    preset: Annotated[
        Literal["default", "paper", "internvl2.5", "qwen2-vl", "mistral", "official-code"],
        Default("default"),
        "values for the parameters that are left out",
    ],
    alphabar: Annotated[PerExpert, Default(0.3), "anchor and start: the Task Arithmetic coefficient"],
    grouping: Grouping,
    exclude: Exclude,
    coefficients: Annotated[
        Literal["real", "sigmoid", "softplus", "softmax", "affine", "box"],
        Default("real"),
        "set that coefficients are from; softmax and affine sum to 1 over experts",
    ],
    gamma: Annotated[float, Default(0.0), Range(0), "weight of the L1 anchor"],
    reg_norm: Annotated[
        Literal["paper", "code"], Default("paper"), "the anchor's norm: mean over all, or that times experts"
    ],
    beta: Annotated[PerExpert, Default(1.0), Range(0), "weight of an expert's loss"],
    logit_weight: Annotated[float, Default(1.0), Range(0), "weight of the logits' divergence from the expert"],
    temperature: Annotated[float, Default(1.0), Range(1e-3), "temperature of the logits' divergence"],
    divergence: Annotated[Literal["kl", "cross_entropy"], Default("kl"), "the logits' loss; same gradient"],
    hidden_weight: Annotated[float, Default(0.0), Range(0), "weight of the hidden states' distance from the expert"],
    hidden_layers: Annotated[tuple[str, ...], Default(("middle",)), "blocks to align, counted from 1; or middle"],
    hidden_distance: Annotated[
        Literal["variance", "l2", "mse"],
        Default("variance"),
        "squared difference: over the expert's variance, summed or averaged over channels",
    ],
    entropy_weight: Annotated[float, Default(0.0), Range(0), "weight of the prediction entropy (AdaMerging's)"],
    target_weight: Annotated[float, Default(0.0), Range(0), "weight of the supervised loss on given responses"],
    mean: Annotated[
        Literal["tokens", "samples"], Default("tokens"), "average an expert's loss over tokens, or within samples first"
    ],
    total: Annotated[Literal["sum", "mean"], Default("sum"), "sum the experts' losses, or average over samples"],
    positions: Annotated[
        Literal["all", "response"], Default("response"), "compare where a response is predicted, or all tokens"
    ],
    samples: Samples,
    responses: Annotated[
        Literal["given", "none", "generate"],
        Default("generate"),
        "responses in the rows: let the expert generate its own, use those given, or ignore them",
    ],
    answers: Answers,
    answer_temperature: AnswerTemperature,
    written_prompts: WrittenPrompts,
    response_tokens: ResponseTokens,
    optimizer: Annotated[
        Literal["adam", "adamw", "sgd", "spsa", "cma"], Default("adam"), "what moves the coefficients"
    ],
    learning_rate: Annotated[float, Default(0.2), Range(0), "step size, in alpha (in logits for sigmoid)"],
    weight_decay: Annotated[float, Default(0.0), Range(0), "decay towards zero of what the optimizer moves"],
    schedule: Annotated[
        Literal["constant", "linear", "cosine", "restarts"], Default("cosine"), "how the learning rate falls"
    ],
    clip: Annotated[float, Default(0.0), Range(0), "greatest norm of the gradient; 0: no bound"],
    mu: Mu,
    directions: Directions,
    sigma: Sigma,
    population: Population,
    batch: Annotated[int, Default(8), Range(0), "samples per step, taken in turn from the experts; 0: all"],
    steps: Annotated[int, Default(40), Range(0), "optimizer steps"],
    holdout: Holdout,
    patience: Patience,
    precision: Precision,
    checkpoint: Checkpoint,
    batch_tokens: Tokens,
) -> Coefficients:
    """Learn one coefficient per expert and tensor so that the merge behaves like each expert on that expert's inputs.

    theta^l = theta_0^l + sum_k alpha_k^l tau_k^l
    minimise  sum_k beta_k ( w_h L_hidden^(k) + w_z L_logit^(k) ) + gamma / (K L) sum_{k,l} |alpha_k^l - alphabar_k|

    Nobody's labels are needed: each expert is the teacher on its own calibration rows, and L is taken over
    the answers that it gives to their prompts, sampled ``answers`` times: where the merge will be used. Preset
    ``paper`` has the published objective (the rows as they are, every token, hidden states, an anchor).
    """
    values = locals()
    from consilience.learned.align import AlignmentSettings, learn_alignment

    settings = AlignmentSettings.of(values)
    return learn_alignment(run, settings.start(run), settings)
