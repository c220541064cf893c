"""Coefficients in closed form: least squares on what every module puts out, without backpropagation."""

import time
from typing import TYPE_CHECKING, Annotated

import numpy as np

from consilience.coefficients import Coefficients
from consilience.learned.data import Data
from consilience.learned.settings import Exclude, Grouping, Precision, Responses, ResponseTokens, Samples, Tokens
from consilience.methods.signature import Default, PerExpert, Range, learned_method

if TYPE_CHECKING:
    from consilience.learned.run import Run


@learned_method(
    source="Consilience; RegMean's objective (Jin et al. 2023, arXiv:2212.09849) over coefficients instead of weights",
    data="calibration: a few unlabelled rows per expert",
)
def least_squares(
    run: "Run",
    *,
    alphabar: Annotated[PerExpert, Default(0.3), "anchor, and the value where there are no data"],
    grouping: Grouping,
    exclude: Exclude,
    beta: Annotated[PerExpert, Default(1.0), Range(0), "weight of an expert's outputs"],
    ridge: Annotated[float, Default(0.01), Range(0), "pull to the anchor, as a share of the data's weight"],
    samples: Samples,
    responses: Responses,
    response_tokens: ResponseTokens,
    precision: Precision,
    batch_tokens: Tokens,
) -> Coefficients:
    """Find the coefficients with which every module puts out what each expert's own puts out on its own inputs.

    minimise over alpha  sum_k beta_k / n_k || X_k (sum_j alpha_j tau_j - tau_k)^T ||_F^2

    per group of tensors, where X_k [n_k, in] are the inputs that a module sees in expert k's own model on expert k's
    calibration rows. The normal equations are K x K:

    A_ij = sum_k beta_k / n_k < X_k tau_i^T, X_k tau_j^T >,   b_i = sum_k beta_k / n_k < X_k tau_i^T, X_k tau_k^T >
    (A + ridge diag A) (alpha - alphabar) = b - A alphabar

    A group of several tensors sums A and b over them. Only matrices that multiply activations (Linear, Conv1D,
    Embedding) have data; norms, biases and fused 3-D experts keep ``alphabar``. Known disagreement: the drift of a
    merged model's own activations from X_k is left out, as in RegMean, where RegMean++ follows it.
    """
    from consilience.learned.compare import compared
    from consilience.learned.facts import facts_of
    from consilience.learned.gram import collect_grams
    from consilience.learned.quadratic import Quadratic
    from consilience.learned.run import groups_of, open_workshop

    begun = time.perf_counter()
    start = groups_of(run, grouping, exclude, alphabar)
    data = Data(samples=samples, responses=responses, response_tokens=response_tokens, tokens=batch_tokens)
    shop = open_workshop(run, start, data, teachers=False, precision=precision)
    alpha, anchor = start.alpha.copy(), np.asarray(alphabar, np.float64)
    loss = {"base": 0.0, "alphabar": 0.0, "solution": 0.0}
    silent: list[str] = []
    try:
        grams = collect_grams(shop, {k for k, weight in enumerate(beta) if weight > 0})
        for group in start.groups:
            held = [grams[name] for name, _ in group.tensors if name in grams]
            problem = Quadratic.of(held, beta)
            silent += [] if held else [group.name]
            found = problem.minimum(anchor, ridge)
            alpha[:, group.first] = found
            for place, point in (("base", 0 * anchor), ("alphabar", anchor), ("solution", found)):
                loss[place] += problem.value(point)
        beside = compared(shop, alpha)
    finally:
        shop.close()
    facts = facts_of(run, shop, run.plan.learning, data, time.perf_counter() - begun) | beside
    return start.with_alpha(alpha, **facts, loss=loss, at_alphabar=silent)
