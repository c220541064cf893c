"""Every optimizer by name: any of them moves any coefficients under any objective."""

from typing import Any

from consilience.errors import InputError
from consilience.optimizers.anchor import Anchor
from consilience.optimizers.gradient import Descent, Gradient, Optimizer
from consilience.optimizers.parameterisation import Parameterisation


def make_optimizer(
    name: str, settings: Descent, parameterisation: Parameterisation, anchor: Anchor, seed: int
) -> Optimizer:
    """Return an optimizer: adam, adamw and sgd follow the gradient; spsa and cma only evaluate the loss.

    Raises:
        InputError: no such optimizer, or a package it needs is missing.
    """
    if name in ("adam", "adamw", "sgd"):
        return Gradient(settings, parameterisation, anchor)
    if name == "spsa":
        from consilience.optimizers.spsa import make_spsa

        return make_spsa(settings, parameterisation, anchor, seed)
    if name == "cma":
        from consilience.optimizers.cma_es import CmaEs

        return CmaEs(settings, parameterisation, anchor, seed)
    known: Any = "adam, adamw, sgd, spsa, cma"
    raise InputError(f"optimizer {name!r} is unknown (known: {known})")
