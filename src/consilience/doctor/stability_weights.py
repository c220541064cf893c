"""Merge weights that the quadratic model of the doctor's probes calls best."""

import time
from typing import Annotated, Any

import numpy as np

from consilience.coefficients import Coefficients
from consilience.learned.settings import Precision, Samples, Tokens
from consilience.methods.signature import Default, PerExpert, Range, learned_method


@learned_method(
    source="Consilience; derived in docs/theory-of-merging.md",
    data="probe: 50 to 500 labelled rows per expert; logs, if there are any",
)
def stability_weights(
    run: Any,
    *,
    alphabar: Annotated[PerExpert, Default(0.3), "weights of the merge towards which curvatures are measured"],
    importance: Annotated[PerExpert, Default(1.0), Range(0), "what an expert's task counts"],
    stability: Annotated[float, Default(1.0), Range(0), "weight of the price of instability, where logs tell it"],
    bound: Annotated[float, Default(1.0), Range(1e-3), "largest weight; the least is 0"],
    samples: Samples,
    precision: Precision,
    batch_tokens: Tokens,
) -> Coefficients:
    """Find one weight an expert that makes the quadratic model's mean loss least.

    J(p) = sum_k w_k [<g_k, d_k> + c_k ||d_k||^2 / 2] + 1/2 sum_k r_k p_k^2,    d_k = sum_j p_j tau_j - tau_k
    (cbar G + diag r) p = G (w o c) - S^T w,     cbar = sum_k w_k c_k,   r_k = stability w_k L eps_k^2

    within 0 <= p_k <= bound, as the model is not to be trusted far from the experts. w is ``importance`` divided by its
    sum. Gradients S and curvatures c come of a scan of each expert's loss on its probe rows, on the way from the expert
    to the merge with weights ``alphabar``. eps_k is Lemma 1's leading term, and L the largest curvature; r is 0 unless
    logs tell it of every expert, and all were trained by SGD, which the lemma is about.
    """
    from consilience.doctor.applied import best_weights, case_of
    from consilience.doctor.evidence.landscape import RecipeLandscape
    from consilience.doctor.evidence.probe import probe
    from consilience.learned.compare import compared
    from consilience.student.bank import Bank

    begun = time.perf_counter()
    case = case_of(run)
    landscape = RecipeLandscape(
        case,
        rows=samples,
        device=run.machine.device,
        threads=run.machine.threads,
        trust_remote_code=run.machine.trust_remote_code,
        precision=precision,
        tokens=batch_tokens,
    )
    try:
        bank: Bank = landscape.shop.bank
        gram = np.sum(list(bank.gram().values()), 0)[1:, 1:]
        measured = probe(landscape, gram, np.asarray(alphabar, np.float64), run.progress)
        weights, found = best_weights(case, measured, np.asarray(importance, np.float64), stability, bound)
        facts = landscape.facts(run.plan.learning, time.perf_counter() - begun) | compared(
            landscape.shop, weights[:, None]
        )
    finally:
        landscape.close()
    return landscape.start.with_alpha(weights[:, None], **facts, **found)
