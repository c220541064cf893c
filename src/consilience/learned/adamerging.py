"""AdaMerging: coefficients that make predictions on unlabelled rows confident."""

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
    Positions,
    Precision,
    Responses,
    ResponseTokens,
    Samples,
    Sigma,
    Tokens,
)
from consilience.methods.signature import Default, PerExpert, Range, learned_method


@learned_method(
    source="AdaMerging, arXiv:2310.02575 (ICLR 2024)",
    data="calibration: unlabelled rows of every expert's task",
)
def adamerging(
    run: Any,
    *,
    alphabar: Annotated[PerExpert, Default(0.3), "start: the Task Arithmetic coefficient"],
    granularity: Annotated[
        Literal["task", "layer"], Default("layer"), "one coefficient per expert, or per expert and tensor"
    ],
    exclude: Exclude,
    clamp: Annotated[bool, Default(True), "keep coefficients in [0, 1], as the official code; false: FusionBench"],
    beta: Annotated[PerExpert, Default(1.0), Range(0), "weight of the entropy on an expert's rows"],
    positions: Positions,
    samples: Samples,
    responses: Responses,
    response_tokens: ResponseTokens,
    optimizer: Annotated[
        Literal["adam", "adamw", "sgd", "spsa", "cma"], Default("adam"), "what moves the coefficients"
    ],
    learning_rate: Annotated[float, Default(1e-3), Range(0), "step size, in alpha"],
    schedule: Annotated[
        Literal["constant", "linear", "cosine", "restarts"], Default("constant"), "how the learning rate falls"
    ],
    mu: Mu,
    directions: Directions,
    sigma: Sigma,
    population: Population,
    steps: Annotated[int, Default(500), Range(0), "optimizer steps"],
    batch: Annotated[int, Default(16), Range(0), "rows of each expert per step; 0: all"],
    holdout: Holdout,
    patience: Patience,
    precision: Precision,
    checkpoint: Checkpoint,
    batch_tokens: Tokens,
) -> Coefficients:
    """Learn the coefficients at which the merge is surest of its predictions on everybody's unlabelled rows.

    theta^l = theta_0^l + sum_k lambda_k^l tau_k^l
    minimise  sum_k beta_k E_{x in D_k} H(softmax(z(x))),   H(p) = -sum_v p_v log p_v

    For a language model every compared position is a prediction of its own; an expert's mean is over positions. There
    are no teachers: the experts are run only to compare the result. Known disagreements: the paper learns on the test
    inputs; the official code takes two batches of 16 per task and step (its loop breaks one late) and clamps as it
    blends, so that a coefficient that has left [0, 1] gets no gradient any more, where here it is put back on the
    boundary.
    """
    values = {key: value for key, value in locals().items() if key != "run"}
    from consilience.learned.entropy import learn_entropy

    return learn_entropy(run, values)
