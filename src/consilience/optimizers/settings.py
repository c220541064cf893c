"""Settings of the optimizers, in the units of what moves (w); each says which of them it reads.

Fields with a range and a text are parameters of the learned methods; a method shows others by restating them.
"""

from dataclasses import dataclass, fields, replace
from typing import Annotated, Any, Literal

from consilience.methods.signature import Range
from consilience.optimizers.directions import Law

OptimizerName = Literal["adam", "adamw", "sgd", "spsa", "cma", "ngopt"]
Rule = Literal["adam", "adamw", "sgd"]
Schedule = Literal["constant", "linear", "cosine", "restarts", "spall"]
#: Optimizers that follow the loss's own gradient.
GRADIENT: tuple[OptimizerName, ...] = ("adam", "adamw", "sgd")


@dataclass(frozen=True, kw_only=True)
class SpsaSettings:
    """How SPSA estimates a gradient.

    Args:
        mu: half the distance between its two points. The error in the direction falls with mu^2 and that from rounding
            in the loss grows as 1/mu; 0.05 is a sixth of the usual start, and far above what bf16 rounds away. Under
            the schedule spall it falls as mu / (t + 1)^0.101.
        directions: directions that it averages over in a step, two evaluations each (GLUE uses one).
        law: of the directions; see ``directions``.
        perturb: what they are added to: w, or the coefficients themselves; see ``spsa``.
        zero_sum: whether they sum to 0 over experts.
        normalise: divide slopes by their running root mean square: under sgd the learning rate is then the change of w
            in a step, whatever the loss is measured in.
        tune_mu: choose mu before the first step, beginning with ``mu``; see ``spsa``.
        mu_range: least and greatest mu that tuning may choose.
        most_directions: take up to so many where the estimates are mostly noise (0: always ``directions``).
    """

    mu: Annotated[float, Range(1e-6), "spsa: half the distance between its two points"] = 0.05
    directions: Annotated[int, Range(1), "spsa: directions averaged in a step, two evaluations each"] = 1
    law: Law = "rademacher"
    perturb: Literal["w", "alpha"] = "w"
    zero_sum: bool = False
    normalise: bool = False
    tune_mu: bool = False
    mu_range: tuple[float, float] = (1e-3, 0.5)
    most_directions: int = 0


@dataclass(frozen=True, kw_only=True)
class CmaSettings:
    """CMA-ES: the standard deviation of the first generation, and the evaluations of each (0: 4 + 3 log n)."""

    sigma: Annotated[float, Range(1e-6), "cma: standard deviation of the first generation"] = 0.1
    population: Annotated[int, Range(0), "cma: evaluations in a generation; 0: by the number of coefficients"] = 0


@dataclass(frozen=True)
class Descent:
    """How any optimizer moves w.

    Args:
        rule: what turns a gradient into a step.
        learning_rate: the size of steps.
        steps: number of steps that the schedule is laid over.
        weight_decay: decay of w towards zero: part of the gradient for adam and sgd, decoupled for adamw.
        schedule: see ``rate_at``.
        clip: greatest norm of the gradient (0: no bound).
        betas: Adam's two averages.
        eps: what Adam adds to its denominator.
        spsa: see there.
        cma: see there.
        bounds: where NGOpt and CMA-ES may search w (None: anywhere; CMA-ES under the map "box": [0, 1]).
    """

    rule: Rule = "adam"
    learning_rate: float = 0.02
    steps: int = 50
    weight_decay: float = 0.0
    schedule: Schedule = "cosine"
    clip: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    spsa: SpsaSettings = SpsaSettings()
    cma: CmaSettings = CmaSettings()
    bounds: tuple[float, float] | None = None


#: Where the settings of one optimizer lie in ``Descent``.
_PARTS = {f.name: part for part, kind in (("spsa", SpsaSettings), ("cma", CmaSettings)) for f in fields(kind)}
#: Names that ``adjust`` knows.
NAMES = frozenset({f.name for f in fields(Descent)} - set(_PARTS.values()) | set(_PARTS))


def adjust(descent: Descent, **values: Any) -> Descent:
    """Return settings with some changed, all of them by name: ``mu`` is that of ``spsa``, ``sigma`` that of ``cma``."""
    own = {name: value for name, value in values.items() if name not in _PARTS}
    for part in ("spsa", "cma"):
        inner = {name: value for name, value in values.items() if _PARTS.get(name) == part}
        own[part] = replace(getattr(descent, part), **inner)
    return replace(descent, **own)
