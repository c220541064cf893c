"""LoraHub: coefficients of LoRA experts for a new task, searched without gradients on a few labelled rows."""

from typing import Annotated, Any, Literal

from consilience.coefficients import Coefficients
from consilience.learned.settings import Exclude, Population, Samples, Score, Sigma, Tokens
from consilience.methods.signature import Default, PerExpert, Range, learned_method


@learned_method(
    source="LoraHub, Huang et al. 2023, arXiv:2307.13269; code read: microsoft/mttl",
    data="target: a few labelled rows of a new task",
)
def lorahub(
    run: Any,
    *,
    alphabar: Annotated[PerExpert, Default(0.0), "where the search starts, and where the penalty pulls to"],
    bound: Annotated[float, Default(1.5), Range(1e-3), "largest coefficient, of either sign"],
    penalty: Annotated[float, Default(0.05), Range(0), "weight of the mean |w - alphabar|"],
    granularity: Annotated[
        Literal["global", "block", "tensor"], Default("global"), "one coefficient per expert (the paper), or finer"
    ],
    exclude: Exclude,
    score: Score,
    samples: Samples,
    optimizer: Annotated[Literal["ngopt", "cma"], Default("ngopt"), "ngopt: nevergrad's (the paper); cma: CMA-ES"],
    steps: Annotated[int, Default(40), Range(0), "evaluations (ngopt), or generations (cma)"],
    sigma: Sigma,
    population: Population,
    precision: Annotated[Literal["float32", "mixed", "bfloat16", "float64"], Default("mixed"), "as for expert_merging"],
    batch_tokens: Tokens,
) -> Coefficients:
    """Search the coefficients of experts that make a new task's few labelled rows likely.

    theta = theta_0 + sum_k w_k tau_k,    w in [-bound, bound]^K
    minimise   - log p(response | prompt), or the share ranked wrongly,  + penalty * mean_k |w_k - alphabar_k|

    Known disagreement: the paper multiplies factors apart, (sum_k w_k A_k)(sum_k w_k B_k), which has cross terms
    between experts; here every expert's own product is weighted, so that full experts fit too.
    """
    values = {key: value for key, value in locals().items() if key != "run"}
    from consilience.learned.mixture import learn_search

    return learn_search(run, values)
