"""Adapters whose modules' names have ``_`` for dots, as kohya's and LyCORIS' files do: which of the base's is which."""

import re
from collections.abc import Mapping
from dataclasses import replace

from consilience.checkpoints.adapter import Adapter
from consilience.checkpoints.checkpoint import TensorInfo
from consilience.errors import InputError

#: What stands before a flattened name: which network of a pipeline it is of.
_NETWORK = re.compile(r"^(?P<network>(?:lora|lycoris)_(?:unet|te\d?|text_encoder(?:_\d)?|transformer|prior)?)_?")


def unflatten(adapter: Adapter, tensors: Mapping[str, TensorInfo]) -> Adapter:
    """Return the adapter with flattened targets called as the base's files call them.

    A name means the tensor whose own name is the same without its dots, less what either has before it.

    Raises:
        InputError: a flattened name means no tensor of the base, or several.
    """
    flattened = [name for name in adapter.pairs if "." not in name.removesuffix(".weight") and _NETWORK.match(name)]
    flattened = [name for name in flattened if name not in tensors]
    if not flattened:
        return adapter
    modules = {name.removesuffix(".weight").replace(".", "_"): name for name in tensors if name.endswith(".weight")}
    renames = {name: _meant(adapter, name, modules, tensors) for name in flattened}
    twice = next((new for new in renames.values() if list(renames.values()).count(new) > 1), None)
    if twice is not None:
        both = [name.removesuffix(".weight") for name, new in renames.items() if new == twice]
        raise InputError(f"{adapter.path}: {both[0]} and {both[1]} both mean {twice!r} of the base; give its own base")
    pairs = {renames.get(n, n): replace(pair, target=renames.get(n, n)) for n, pair in adapter.pairs.items()}
    return replace(adapter, pairs=pairs)


def _meant(adapter: Adapter, name: str, modules: Mapping[str, str], tensors: Mapping[str, TensorInfo]) -> str:
    module, pair = name.removesuffix(".weight"), adapter.pairs[name]
    rest = _NETWORK.sub("", module)
    fitting = {flat: full for flat, full in modules.items() if pair.fits(tensors[full].shape)}
    if rest in fitting:
        return fitting[rest]
    found = [full for flat, full in fitting.items() if flat.endswith(f"_{rest}")]
    if not found:  # the adapter was trained on a model with more around it
        inner = [flat for flat in fitting if rest.endswith(f"_{flat}") and flat.count("_") >= 2]
        found = [fitting[flat] for flat in sorted(inner, key=len)[-1:]]
    if len(found) == 1:
        return found[0]
    if found:
        raise InputError(
            f"{adapter.path}: {module} may mean {found[0]!r} or {found[1]!r} of the base; give the part it was trained "
            "on"
        )
    network = _NETWORK.match(name)
    assert network is not None
    others = sum(other.startswith(f"{network['network']}_") for other in adapter.pairs)
    raise InputError(
        f"{adapter.path}: {module}: the base has no such layer of that shape ({others} of {len(adapter.pairs)} modules "
        f"are {network['network']}'s); an adapter of several networks is merged into each by a file of its own "
        "modules, and names of another program's layout need its converter first"
    )
