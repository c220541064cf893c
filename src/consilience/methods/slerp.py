"""Spherical interpolation between two models."""

import math
from typing import Annotated

import numpy as np

from consilience.methods.program import Elementwise, Over, Sums
from consilience.methods.signature import Default, Range, TensorSpec, elementwise
from consilience.methods.vector_sum import cosines, summed
from consilience.methods.weighted_sum import weighted

#: Directions closer than this are interpolated linearly; mergekit's threshold.
COLLINEAR = 0.9995


def interpolation(t: float, cosine: float) -> tuple[float, float]:
    """Return the multipliers of two end points whose angle has this cosine."""
    if not abs(cosine) <= COLLINEAR:  # NaN, which --allow-nonfinite lets through, included
        return 1.0 - t, t
    angle = math.acos(cosine)
    return math.sin((1.0 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)


@elementwise(source="Shoemake 1985, Animating rotation with quaternion curves", experts=(2, 2), counts_base=True)
def slerp(
    tensor: TensorSpec,
    *,
    t: Annotated[float, Default(0.5), Range(0, 1), "0 gives the base, 1 the other model"],
) -> Elementwise:
    """Interpolate on the sphere between the base and one other model, tensor by tensor.

    theta = sin((1-t) a)/sin(a) theta_0 + sin(t a)/sin(a) theta_1,   a = angle between the flattened tensors

    Linear interpolation where |cos a| > 0.9995 (nearly always, for fine-tunes of one base), and where a tensor is zero.
    The multipliers act on the unnormalised weights, as in mergekit; sums are accumulated in float64, and angles do not
    depend on the tensors' magnitudes.
    """

    def finish(sums: Sums) -> Elementwise:
        found = cosines(sums)
        weights = interpolation(t, float(found[0, 1]) if found[0, 0] and found[1, 1] else 1.0)
        return Elementwise("weights", summed(np.array(weights), Over(), tensor.shape))

    return Elementwise("weights", weighted((1.0 - t, t)), needs="gram", finish=finish)
