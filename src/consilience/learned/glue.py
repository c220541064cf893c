"""GLUE: convex weights of experts, learned on a small labelled target with forward passes only."""

from typing import Annotated, Any, Literal

from consilience.coefficients import Coefficients
from consilience.learned.settings import (
    Checkpoint,
    Directions,
    Exclude,
    Holdout,
    Mu,
    Patience,
    Population,
    Samples,
    Score,
    Sigma,
    Tokens,
)
from consilience.methods.signature import Default, PerExpert, Range, learned_method


@learned_method(
    source="GLUE, arXiv:2512.22467; no code is public, and the paper's text that could be had gives no step sizes",
    data="target: labelled rows to learn from, and others to stop by",
)
def glue(
    run: Any,
    *,
    alphabar: Annotated[PerExpert, Default(1.0), Range(0), "start, divided by the sum over experts (paper: uniform)"],
    granularity: Annotated[
        Literal["global", "block", "tensor"], Default("global"), "one weight per expert, or one per block or tensor"
    ],
    space: Annotated[
        Literal["simplex", "affine", "task_vector"],
        Default("simplex"),
        "convex weights (the paper); weights of any sign that sum to 1; or free coefficients of task vectors",
    ],
    exclude: Exclude,
    score: Score,
    positions: Annotated[
        Literal["all", "response"], Default("response"), "positions that go through the head; labelled ones count"
    ],
    samples: Samples,
    optimizer: Annotated[
        Literal["spsa", "cma", "adam", "adamw", "sgd"],
        Default("spsa"),
        "spsa, cma: forward passes only; the others follow the full gradient",
    ],
    learning_rate: Annotated[
        float,
        Default(0.1),
        Range(0),
        "step size: in logits on the simplex, else in weights",
    ],
    schedule: Annotated[
        Literal["constant", "linear", "cosine", "restarts"], Default("constant"), "how the learning rate falls"
    ],
    mu: Mu,
    tune_mu: Annotated[bool, Default(False), "spsa: choose mu by the noise of the loss before the first step"],
    directions: Directions,
    most_directions: Annotated[
        int, Default(0), Range(0), "spsa: average more directions, up to these, while noisy; 0: no"
    ],
    law: Annotated[
        Literal["rademacher", "gaussian", "sphere", "coordinate", "orthogonal"],
        Default("rademacher"),
        "spsa: directions",
    ],
    perturb: Annotated[
        Literal["logits", "weights"],
        Default("logits"),
        "spsa: what the two points differ in; weights make the step exponentiated gradient",
    ],
    normalise: Annotated[bool, Default(True), "spsa: divide slopes by their running root mean square"],
    sigma: Sigma,
    population: Population,
    batch: Annotated[int, Default(16), Range(0), "target rows of a step, the same for all its evaluations; 0: all"],
    steps: Annotated[int, Default(60), Range(0), "most optimizer steps"],
    holdout: Holdout,
    patience: Patience,
    precision: Annotated[
        Literal["float32", "mixed", "float64"],
        Default("float32"),
        "float32; mixed: bfloat16 products, which may drown the difference of two evaluations",
    ],
    checkpoint: Checkpoint,
    batch_tokens: Tokens,
) -> Coefficients:
    """Learn the mixture of experts from which fine-tuning on a target starts best, without a backward pass.

    theta(alpha) = theta_0 + sum_k alpha_k tau_k  ( = sum_k alpha_k theta_k where the alpha_k sum to 1)
    minimise over alpha = softmax(beta)  - log p(response | prompt) on the target's rows, or the share ranked wrongly

    Two evaluations of the same rows, at beta + mu u and beta - mu u, give the step's slope along a random u. Known
    disagreement: the paper perturbs alpha in one place and updates beta in another; ``perturb`` has both readings. Its
    one direction a step is known; mu, learning rate, steps and batch are not, and the defaults are ours.
    """
    values = {key: value for key, value in locals().items() if key != "run"}
    from consilience.learned.mixture import learn_mixture

    return learn_mixture(run, values)
