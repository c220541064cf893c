"""The stack's rows to one. The number of rows is a compile-time constant (``len(weights)``)."""

from typing import Any

import numpy as np

from consilience.jit import kernel


@kernel
def weighted_sum(stack: Any, weights: Any, out: Any) -> None:
    """``out = sum_k weights[k] * stack[k]``, summed in row order."""
    for i in range(out.size):
        total = stack.dtype.type(0)
        for k in range(len(weights)):
            total += weights[k] * stack[k, i]
        out[i] = total


@kernel
def signed_sum(stack: Any, weights: Any, mean: bool, out: Any) -> None:
    """TIES' sign election and disjoint merge; see ``consilience.methods.program.SignedSum``.

    ``weights`` are float64. The election sums in float64, so that task vectors that cancel are seen to cancel; a
    float32 sum would leave a residue whose sign is noise.
    """
    zero = stack.dtype.type(0)
    one = stack.dtype.type(1)
    for i in range(out.size):
        total = 0.0
        for k in range(len(weights)):
            total += weights[k] * np.float64(stack[k, i])
        positive = total >= 0.0
        agreeing = zero
        divisor = zero
        for k in range(len(weights)):
            x = stack.dtype.type(weights[k]) * stack[k, i]
            agrees = x > zero if positive else x < zero
            agreeing += x if agrees else zero
            divisor += stack.dtype.type(weights[k]) if agrees else zero
        divisor = divisor if mean and abs(divisor) >= 1e-8 else one
        out[i] = agreeing / divisor


@kernel
def elect(stack: Any) -> None:
    """Zero the entries of ``stack`` [K, n] whose sign is not that of their column's sum; 0 counts as +, in float64."""
    zero = stack.dtype.type(0)
    for i in range(stack.shape[1]):
        total = 0.0
        for k in range(stack.shape[0]):
            total += np.float64(stack[k, i])
        for k in range(stack.shape[0]):
            agrees = stack[k, i] > zero if total >= 0.0 else stack[k, i] < zero
            if not agrees:
                stack[k, i] = zero
