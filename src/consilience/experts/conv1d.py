"""Which layers of a base store their weight [in, out], as transformers' ``Conv1D`` does, rather than [out, in].

A LoRA update B A is transposed for such a layer. PEFT writes one ``fan_in_fan_out`` for a whole adapter, and sets it
anew at every layer by the layer's class, so that what is saved speaks of the last layer alone. Here each layer is
decided for itself:

1. A weight that is not square fits one way only.
2. A square one of an architecture of transformers by its class, which the table below has.
3. Of any other architecture by layers of the same name: where a weight that is not square has a bias, the bias has the
   size of the outputs; then by the flag, where no layer contradicts it.
"""

import math
from dataclasses import replace
from functools import cache
from importlib.resources import files
from typing import Any, cast

from consilience.checkpoints.adapter import Adapter, LoraPair
from consilience.checkpoints.checkpoint import Checkpoint
from consilience.errors import InputError

_GPT2 = frozenset({"c_attn", "c_fc", "c_proj", "q_attn"})
_CLVP = frozenset({"c_fc", "c_proj"})
#: Names of the modules that are a ``Conv1D``, by the ``model_type`` of their config.
CONV1D = {
    "gpt2": _GPT2,
    "openai-gpt": _GPT2,
    "imagegpt": _GPT2,
    "decision_transformer": _GPT2,
    "clvp": _CLVP,
    "clvp_decoder": _CLVP,
}


@cache
def model_types() -> frozenset[str]:
    """Return every ``model_type`` of transformers."""
    return frozenset((files("consilience.experts") / "model_types.txt").read_text(encoding="utf-8").split())


def is_conv1d(config: dict[str, Any] | None, module: str) -> bool | None:
    """Return whether a module of a model with this ``config.json`` is a ``Conv1D``; None: not known to transformers.

    Parts of a composite model (a BERT encoder and a GPT-2 decoder) have configs of their own.
    """
    config = config or {}
    own = config.get(module.split(".", 1)[0])
    if isinstance(own, dict) and "model_type" in own:
        return is_conv1d(cast(dict[str, Any], own), module)
    parts = [config, *(part for part in config.values() if isinstance(part, dict) and "model_type" in part)]
    types = {str(cast(dict[str, Any], part).get("model_type")) for part in parts}
    if "auto_map" in config or not types <= model_types():
        return None
    return any(module.rsplit(".", 1)[-1] in CONV1D.get(kind, ()) for kind in types)


def orient(adapter: Adapter, base: Checkpoint) -> Adapter:
    """Return the adapter with every update turned the way its target in ``base`` is stored.

    Raises:
        InputError: a square weight of an unknown architecture may be stored either way.
    """
    pairs = {name: _oriented(adapter, pair, base) for name, pair in adapter.pairs.items()}
    return replace(adapter, pairs=pairs)


def _oriented(adapter: Adapter, pair: LoraPair, base: Checkpoint) -> LoraPair:
    target = base.tensors.get(pair.target)
    if pair.embedding or target is None or len(target.shape) < 2:
        return pair
    flat = (target.shape[0], math.prod(target.shape[1:]))
    fitting = [turned for turned in (False, True) if replace(pair, transposed=turned).delta_shape == flat]
    if len(target.shape) > 2 or not fitting:  # a convolution; what fits no way is refused by whoever checks shapes
        return replace(pair, transposed=pair.swapped)
    if len(fitting) == 1:
        return replace(pair, transposed=fitting[0])
    return replace(pair, transposed=_square_is_conv1d(adapter, pair, base) != pair.swapped)


def _square_is_conv1d(adapter: Adapter, pair: LoraPair, base: Checkpoint) -> bool:
    module = pair.target.removesuffix(".weight")
    known = is_conv1d(base.config, module)
    if known is not None:
        return known
    by_name = _evidence(adapter, base)
    alike = by_name.get(module.rsplit(".", 1)[-1], set[bool]())
    if len(alike) == 1:
        return next(iter(alike))
    said, others = bool(adapter.config.get("fan_in_fan_out")), set[bool]().union(*by_name.values())
    if others == {said} or (not others and not said):
        return said
    raise InputError(
        f"{adapter.path}: {module}: its weight is square and its architecture unknown, and fan_in_fan_out in "
        f"adapter_config.json ({str(said).lower()}) is one word for all layers: whether this one is a Linear or a "
        "Conv1D is not in the files; merge the adapter into its base with PEFT and pass the model"
    )


def _evidence(adapter: Adapter, base: Checkpoint) -> dict[str, set[bool]]:
    """Return, by last part of the name, whether layers whose weight is not square store it [in, out]."""
    found: dict[str, set[bool]] = {}

    def add(weight: str, turned: bool) -> None:
        found.setdefault(weight.removesuffix(".weight").rsplit(".", 1)[-1], set()).add(turned)

    for name, tensor in base.tensors.items():
        bias = base.tensors.get(f"{name.removesuffix('.weight')}.bias") if name.endswith(".weight") else None
        if bias is None or len(tensor.shape) != 2 or tensor.shape[0] == tensor.shape[1]:
            continue
        if bias.shape in ((tensor.shape[0],), (tensor.shape[1],)):
            add(name, bias.shape == (tensor.shape[1],))
    for name, pair in adapter.pairs.items():
        target = base.tensors.get(name)
        if target is not None and not pair.embedding and len(target.shape) == 2 and target.shape[0] != target.shape[1]:
            add(name, ((pair.b.shape[0], math.prod(pair.a.shape[1:])) != target.shape) != pair.swapped)
    return found
