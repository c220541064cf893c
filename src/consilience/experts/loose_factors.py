"""Factors of adapters where they cannot be merged: among a model's own tensors, or without a base.

The mean of As and the mean of Bs is not the mean of updates BA, so neither is ever averaged for itself.
"""

from collections.abc import Callable, Iterable

from consilience.checkpoints.checkpoint import Checkpoint
from consilience.checkpoints.lora_names import first_factor, is_lora
from consilience.errors import InputError
from consilience.experts.model import Model


def refuse_factors(model: Model, checkpoint: Checkpoint, private: Callable[[str], bool]) -> None:
    """Refuse a model that holds an adapter's factors, unless they are private.

    Raises:
        InputError: names the first factor.
    """
    factor = first_factor(name for name in checkpoint.tensors if not private(name))
    if factor is None:
        return
    where = f"{model.reference}: tensor {factor!r} is a factor of an adapter"
    if is_lora(checkpoint.tensors):
        raise InputError(
            f"{where}, which is no model by itself; save it as an adapter, with its config, and give its path"
        )
    raise InputError(
        f"{where} beside whole weights, and factors cannot be merged apart; fold it in with PEFT and pass "
        "the model, or name it under 'private:'"
    )


def needs_base(model: Model, experts: Iterable[Model]) -> str:
    """Return what is wrong where an adapter has no base to stand on, and a command that works."""
    named = " ".join(f"-e {expert.name}={expert.reference}" for expert in experts if expert.adapter is not None)
    return (
        f"{model.reference}: is an adapter, and an adapter needs its base; name one as base_model, or for one adapter "
        f"out of these: consilience merge BASE OUT {named} --method linear --as-adapter cat"
    )
