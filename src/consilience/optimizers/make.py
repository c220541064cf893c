"""Every optimizer by name: any of them moves any coefficients under any objective."""

from dataclasses import replace

from consilience.errors import InputError
from consilience.optimizers.anchor import Anchor
from consilience.optimizers.gradient import Gradient, Optimizer
from consilience.optimizers.parameterisation import Parameterisation
from consilience.optimizers.settings import Descent


def make_optimizer(
    name: str, settings: Descent, parameterisation: Parameterisation, anchor: Anchor, seed: int
) -> Optimizer:
    """Return an optimizer: adam, adamw and sgd follow the gradient; spsa, cma and ngopt only evaluate the loss.

    ``seed`` is that of the random directions; what spsa does with its estimate is ``settings.rule``.

    Raises:
        InputError: no such optimizer, or a package it needs is missing.
    """
    if name in ("adam", "adamw", "sgd"):
        return Gradient(replace(settings, rule=name), parameterisation, anchor)
    if name == "spsa":
        from consilience.optimizers.spsa import make_spsa

        return make_spsa(settings, parameterisation, anchor, seed)
    if name == "cma":
        from consilience.optimizers.cma_es import CmaEs

        return CmaEs(settings, parameterisation, anchor, seed)
    if name == "ngopt":
        from consilience.optimizers.ng_opt import NgOpt

        return NgOpt(settings, parameterisation, anchor, seed)
    raise InputError(f"optimizer {name!r} is unknown (known: adam, adamw, sgd, spsa, cma, ngopt)")
