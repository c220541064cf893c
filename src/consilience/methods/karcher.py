"""Karcher mean: the mean on the sphere, which minimises the squared angles to the models."""

import math
from typing import Annotated

import numpy as np

from consilience.methods.program import Elementwise, Floats, Over, Sums
from consilience.methods.signature import Default, Range, TensorSpec, elementwise
from consilience.methods.vector_sum import cosines, lengths, summed
from consilience.methods.weighted_sum import weighted


def karcher_mean(cosine: Floats, max_iter: int, tol: float) -> Floats:
    """Return the coefficients [K] of unit vectors whose combination is their Karcher mean.

    The iteration never leaves the vectors' span, so it works on coefficients alone: u = sum_k b_k u_k has inner
    products C b with the vectors and the squared length b^T C b, where C [K, K] are their cosines.
    """
    count = len(cosine)

    def inner(b: Floats) -> Floats:
        return (cosine * b).sum(1)

    def length(b: Floats) -> float:
        return math.sqrt(max(0.0, float((b * inner(b)).sum())))

    mean = np.full(count, 1.0 / count)
    mean = mean / length(mean) if length(mean) >= tol else np.eye(count)[0]
    for _ in range(max_iter):
        tangent = np.zeros(count)
        for k, dot in enumerate(np.clip(inner(mean), -1.0, 1.0).tolist()):
            angle = math.acos(dot)
            if angle >= tol:
                tangent += angle / math.sin(angle) / count * (np.eye(count)[k] - dot * mean)
        step = length(tangent)
        if not step >= tol:
            break
        mean = math.cos(step) * mean + math.sin(step) / step * tangent
        mean /= length(mean)
    return mean


@elementwise(source="mergekit's karcher; Karcher 1977, Riemannian center of mass", base="optional", counts_base=True)
def karcher(
    tensor: TensorSpec,
    *,
    max_iter: Annotated[int, Default(10), Range(0), "largest number of iterations"],
    tol: Annotated[float, Default(1e-5), Range(0), "angle, and step, from which on directions differ"],
) -> Elementwise:
    """Take the models' mean direction on the sphere, at the mean of their norms, tensor by tensor.

    theta = (mean_k ||theta_k||) u,   u = argmin over unit vectors of sum_k angle(u, theta_k)^2
    u <- exp_u(mean_k log_u(theta_k / ||theta_k||)), from the normalised mean on

    A base is one of the models. Tensors of zeros have no direction and count for the mean of the norms alone.

    Known disagreements: mergekit takes tensors with a norm of at most ``tol`` for zeros, and returns zeros where all
    are; here magnitudes do not matter.
    """
    count = len(tensor.experts)
    if count == 1:
        return Elementwise("weights", weighted((1.0,)))

    def finish(sums: Sums) -> Elementwise:
        norms, weights = lengths(sums), np.zeros(count)
        (valid,) = np.nonzero(norms)
        if valid.size:
            mean = karcher_mean(cosines(sums)[np.ix_(valid, valid)], max_iter, tol)
            with np.errstate(
                over="ignore", invalid="ignore"
            ):  # a model 1e308 times as long as another: what overflows is refused
                weights[valid] = mean * (float(norms.mean()) / norms[valid])
        return Elementwise("weights", summed(weights, Over(), tensor.shape))

    return Elementwise("weights", weighted((1.0 / count,) * count), needs="gram", finish=finish)
