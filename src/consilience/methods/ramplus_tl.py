"""Reinforced Agent Merging Plus: as RAM, with what one expert changed amplified where it shares much, per tensor."""

from typing import Annotated

from consilience.methods.program import Arithmetic, Elementwise, Sums, Tally
from consilience.methods.ram import Epsilon, overlap_mean, overlaps
from consilience.methods.signature import Default, Range, TensorSpec, elementwise


@elementwise(source="Reinforced Agent Merging 2026, arXiv:2601.13572")
def ramplus_tl(
    tensor: TensorSpec,
    *,
    r: Annotated[float, Default(0.1), "how much a ratio of 1 of shared to unique entries amplifies the unique ones"],
    alpha: Annotated[float, Default(0.2), Range(0), "largest ratio that counts"],
    epsilon: Epsilon,
    lambda_: Annotated[float, Default(1.0), "multiplier of the merged task vector"],
) -> Elementwise:
    """Average an element that several experts changed; multiply one that expert k alone changed by g_k.

    g_k = 1 + r min(alpha, shared_k / unique_k), counts of the tensor's elements that k changed with and without others
    theta = theta_0 + lambda (g_k tau_k if C = {k}, else sum_{k in C} tau_k / |C|),   C = {k: |tau_k| > epsilon}

    As mergekit's ``ramplus_tl`` (tensor-local: the ratio is of each tensor), which has no lambda.
    """
    rows = len(tensor.experts)

    def finish(sums: Sums) -> Elementwise:
        assert sums.tally is not None
        shared, unique = sums.tally[:rows].tolist(), sums.tally[rows:].tolist()
        ratio = [s / max(u, epsilon or 1e-300) if s else 0.0 for s, u in zip(shared, unique, strict=True)]
        gain = tuple(1.0 + r * min(alpha, one) for one in ratio)
        return Elementwise("task_vectors", Arithmetic(overlap_mean, gain, (epsilon,)), scale=lambda_)

    merge = Arithmetic(overlap_mean, (1.0,) * rows, (epsilon,))
    tally = Tally(overlaps, 2 * rows, (epsilon,))
    return Elementwise("task_vectors", merge, scale=lambda_, needs="tally", finish=finish, tally=tally)
