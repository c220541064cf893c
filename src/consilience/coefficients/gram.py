"""What a Gram matrix says of the matrix that coefficients multiply: its largest singular value."""

import numpy as np
import numpy.typing as npt


def largest_singular_value(gram: npt.NDArray[np.float64]) -> float:
    """Return ``sigma_max(Theta) = sqrt(lambda_max(G))`` from ``G = Theta^T Theta``.

    An eigenvalue that rounding has made negative counts as 0.

    Args:
        gram: G [K, K], in the square of the columns' unit.
    """
    return float(np.sqrt(max(0.0, float(np.linalg.eigvalsh(gram)[-1]))))
