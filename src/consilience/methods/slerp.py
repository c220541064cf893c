"""Spherical interpolation between two models."""

import math
from typing import Annotated

from consilience.methods.program import Elementwise, Sums
from consilience.methods.signature import Default, Range, TensorSpec, elementwise
from consilience.methods.weighted_sum import weighted

#: Directions closer than this are interpolated linearly; mergekit's threshold.
COLLINEAR = 0.9995


def interpolation(t: float, gram: "tuple[float, float, float]") -> tuple[float, float]:
    """Return the multipliers of the two end points for <a,a>, <a,b>, <b,b> = ``gram``."""
    aa, ab, bb = gram
    cosine = ab / (math.sqrt(aa) * math.sqrt(bb)) if aa > 0 and bb > 0 else 1.0
    if not abs(cosine) <= COLLINEAR:  # NaN, which --allow-nonfinite lets through, included
        return 1.0 - t, t
    angle = math.acos(max(-1.0, min(1.0, cosine)))
    return math.sin((1.0 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)


@elementwise(source="Shoemake 1985, Animating rotation with quaternion curves", experts=(2, 2), counts_base=True)
def slerp(
    tensor: TensorSpec,
    *,
    t: Annotated[float, Default(0.5), Range(0, 1), "0 gives the base, 1 the other model"],
) -> Elementwise:
    """Interpolate on the sphere between the base and one other model, tensor by tensor.

    theta = sin((1-t) a)/sin(a) theta_0 + sin(t a)/sin(a) theta_1,   a = angle between the flattened tensors

    Linear interpolation where |cos a| > 0.9995 (nearly always, for fine-tunes of one base). The multipliers act on the
    unnormalised weights, as in mergekit; sums are accumulated in float64.
    """
    del tensor

    def finish(sums: Sums) -> Elementwise:
        assert sums.gram is not None
        gram = (float(sums.gram[0, 0]), float(sums.gram[0, 1]), float(sums.gram[1, 1]))
        return Elementwise("weights", weighted(interpolation(t, gram)))

    return Elementwise("weights", weighted((1.0 - t, t)), needs="gram", finish=finish)
