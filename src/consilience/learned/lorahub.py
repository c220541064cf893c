"""LoraHub: coefficients of LoRA experts for a new task, searched without gradients on a few labelled rows."""

from typing import TYPE_CHECKING, Annotated, Literal

from consilience.coefficients import Coefficients
from consilience.errors import InputError
from consilience.learned.data import Data
from consilience.learned.loop import EarlyStopping, Loop
from consilience.learned.settings import Compute, Exclude, Learning, Samples, Score, Tokens
from consilience.methods.signature import Default, PerExpert, Range, learned_method
from consilience.objectives.objective import Objective
from consilience.objectives.target import Target
from consilience.optimizers.anchor import AnchorSettings
from consilience.optimizers.settings import CmaSettings, Descent

if TYPE_CHECKING:
    from consilience.learned.run import Run


@learned_method(
    source="LoraHub, Huang et al. 2023, arXiv:2307.13269; code read: microsoft/mttl",
    data="target: a few labelled rows of a new task",
)
def lorahub(
    run: "Run",
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
    cma: CmaSettings,
    precision: Annotated[Literal["float32", "mixed", "bfloat16", "float64"], Default("mixed"), "as for expert_merging"],
    batch_tokens: Tokens,
) -> Coefficients:
    """Search the coefficients of experts that make a new task's few labelled rows likely.

    theta = theta_0 + sum_k w_k tau_k,    w in [-bound, bound]^K
    minimise   - log p(response | prompt), or the share ranked wrongly,  + penalty * mean_k |w_k - alphabar_k|

    Known disagreement: the paper multiplies factors apart, (sum_k w_k A_k)(sum_k w_k B_k), which has cross terms
    between experts; here every expert's own product is weighted, so that full experts fit too.
    """
    from consilience.learned.learning import learn_coefficients
    from consilience.learned.ranking import check_score
    from consilience.learned.run import groups_of

    learning = Learning(
        anchor=AnchorSettings(gamma=penalty),
        objective=Objective(terms=(Target(1.0),), total="mean"),
        data=Data(positions="response", samples=samples),
        optimizer=optimizer,
        descent=Descent(cma=cma, bounds=(-bound, bound)),
        # Losses of different rows cannot be ranked: every evaluation sees all of them.
        loop=Loop(batch=0, steps=steps, stopping=EarlyStopping(patience=1)),
        compute=Compute(precision=precision, batch_tokens=batch_tokens),
        score=score,
    )
    check_score(run, learning)
    if not all(abs(value) <= bound for value in alphabar):
        raise InputError(f"alphabar: the search starts outside [-{bound:g}, {bound:g}]; raise bound, or start inside")
    return learn_coefficients(run, groups_of(run, granularity, exclude, alphabar), learning)
