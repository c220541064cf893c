"""Is what was learned any better? A run compares itself with the base and with Task Arithmetic at its best strength.

All are measured by ``KL(expert || merge)`` on rows that nothing was learned from: those held out, or one further answer
of every expert to each of its prompts. Task Arithmetic's strength is chosen on the very rows that it is compared on, so
that the comparison leans to its side.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from consilience.coefficients.coefficients import Alpha
from consilience.learned.run import Workshop
from consilience.objectives.objective import Objective

#: Strengths of Task Arithmetic that are tried.
STRENGTHS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0)
#: Most rows of one expert.
ROWS = 5


def compared(shop: Workshop, alpha: Alpha, correct: Callable[[bool], None] | None = None) -> dict[str, Any]:
    """Return the divergences of the base, of Task Arithmetic and of the coefficients found, mean over experts in nats.

        KL = 1/K sum_k  mean over the tokens of expert k's rows of  KL( softmax(z_k) || softmax(z) )

    Args:
        shop: with ``judge`` rows and teachers.
        alpha: [K, N], what was found.
        correct: turns what was learned beside the coefficients off and on.

    Returns:
        {"compared": {"rows", "on", "base", "task_arithmetic", "strength", "learned", "better"}}.
    """
    chosen = _chosen(shop)
    problem = shop.problem(Objective(logit=1.0))
    experts = len({shop.samples[i].expert for i in chosen})
    shop.run.progress.phase("comparing", len(STRENGTHS) + 2, "models")

    def divergence(at: Alpha) -> float:
        terms, _ = problem.evaluate(at, chosen, gradient=False)
        shop.run.progress.advance(1)
        return terms["logit"] / experts

    turn = correct or (lambda on: None)
    turn(False)
    base = divergence(np.zeros_like(alpha))
    tried = {strength: divergence(np.full_like(alpha, strength)) for strength in STRENGTHS}
    strength = min(tried, key=lambda key: tried[key])
    turn(True)
    found = divergence(alpha)
    return {
        "compared": {
            "on": "rows held out" if shop.hold else "further answers",
            "rows": len(chosen),
            "base": base,
            "task_arithmetic": tried[strength],
            "strength": strength,
            "learned": found,
            "better": found < min(base, tried[strength]),
        }
    }


def _chosen(shop: Workshop) -> list[int]:
    """Return every expert's first rows to judge by."""
    own: dict[int, list[int]] = {}
    for i in shop.judge:
        own.setdefault(shop.samples[i].expert, []).append(i)
    return [i for held in own.values() for i in held[:ROWS]]
