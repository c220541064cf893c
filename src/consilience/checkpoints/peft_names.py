"""What the names in a PEFT file say: ``base_model.model.X.lora_A.default.weight`` is factor A of module X.

PEFT writes a module that it trained as a whole up to three times: ``X.weight``, ``X.modules_to_save.weight`` (equal to
it) and ``X.original_module.weight`` (the base's). Adapted layers are wrapped (``base_layer``, ``token_adapter``), and a
state dict of a user's own making has the adapter's name in the middle. Training wrappers add parts of theirs.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from consilience.checkpoints.checkpoint import TensorInfo
from consilience.checkpoints.lora_names import FactorName, factor_name, first_factor, other_kind
from consilience.errors import InputError

#: Parts of a name that training wrappers add, wherever they stand.
WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module)\.")
#: What PEFT and DDP put before every name.
_BEFORE = re.compile(r"^(base_model\.model\.|module\.)+")
_ROWS = re.compile(r"^(?P<module>.+?)(\.token_adapter)?\.trainable_tokens_delta(\.[^.]+)?$")

Sides = dict[tuple[str, bool], dict[str, TensorInfo]]


def unwrapped(name: str) -> str:
    """Return a tensor's or module's name without what PEFT, ``torch.compile``, DDP and FSDP put into it.

    That is the name PEFT saw when it looked up the module in its patterns.
    """
    return _BEFORE.sub("", WRAPPERS.sub("", name))


@dataclass(frozen=True)
class PeftTensors:
    """An adapter's tensors: factors by (module, whether an embedding) and side; by target, whole values and rows."""

    sides: Sides = field(default_factory=dict[tuple[str, bool], dict[str, TensorInfo]])
    whole: dict[str, TensorInfo] = field(default_factory=dict[str, TensorInfo])
    rows: dict[str, TensorInfo] = field(default_factory=dict[str, TensorInfo])


def sort_tensors(tensors: dict[str, TensorInfo], where: str) -> PeftTensors:
    """Return what each tensor of an adapter's file is for.

    Raises:
        InputError: a name is no LoRA parameter of a known kind, or two speak of the same weight.
    """
    found, copies = PeftTensors(), dict[str, TensorInfo]()
    factors = {name: factor_name(unwrapped(name)) for name in tensors}
    modules = {factor.module for factor in factors.values() if factor is not None and factor.part != "alpha"}
    adapters = _adapters(factors.values())
    for name, tensor in tensors.items():
        plain, factor = unwrapped(name), factors[name]
        rows = _ROWS.match(plain)
        if other_kind(name) or (factor is None and (first_factor([plain]) or ".lora_" in plain)):
            raise _unknown(name, where)
        if factor is not None and factor.module in modules:
            key = (_module(factor.module), factor.embedding)
            _put(found.sides.setdefault(key, {}), factor.part, tensor, where)
        elif rows is not None:
            _put(found.rows, f"{_bare(rows['module'])}.weight", tensor, where)
        elif ".modules_to_save." in plain:
            _put(copies, _bare(_saved(plain, adapters)), tensor, where)
        elif ".original_module." not in plain:  # that is the base's, which PEFT left there
            _put(found.whole, _bare(plain), tensor, where)
    for target, tensor in copies.items():
        found.whole.setdefault(target, tensor)
    return found


def _unknown(name: str, where: str) -> InputError:
    advice = "merge the adapter into its base with PEFT, or whatever trained it, and pass the model"
    kind = other_kind(name)
    if kind is not None:
        return InputError(
            f"{where}: tensor {name!r} makes this a {kind} adapter, which is no plain LoRA and not supported; {advice}"
        )
    return InputError(f"{where}: tensor {name!r} is not a LoRA factor this version knows; {advice}")


def _put(place: dict[str, TensorInfo], key: str, tensor: TensorInfo, where: str) -> None:
    if key in place:
        raise InputError(
            f"{where}: tensors {place[key].name!r} and {tensor.name!r} speak of the same weight; save one adapter a "
            "folder"
        )
    place[key] = tensor


def _adapters(factors: Iterable[FactorName | None]) -> set[str]:
    """Return what adapters may be called in a file; ``save_pretrained`` leaves the name out."""
    return {"default", *(factor.adapter for factor in factors if factor is not None and factor.adapter)}


def _saved(name: str, adapters: set[str]) -> str:
    """Return X.weight for ``X.modules_to_save.weight`` and for ``X.modules_to_save.NAME.weight``."""
    module, _, rest = name.partition(".modules_to_save.")
    first, _, inner = rest.partition(".")
    return f"{module}.{inner if inner and first in adapters else rest}"


def trained_whole(config: Mapping[str, Any], name: str) -> bool:
    """Whether a tensor is of a module that a PEFT config says was trained as a whole, rather than saved beside it."""
    modules = config.get("modules_to_save")
    keys = cast(list[Any], modules) if isinstance(modules, list) else []
    return any(f".{name.rpartition('.')[0]}".endswith(f".{key}") for key in keys)


def _bare(name: str) -> str:
    """Return a name without the layers that PEFT wraps around the base's."""
    return name.replace(".token_adapter.", ".").replace(".base_layer.", ".")


def _module(name: str) -> str:
    """Return a module's bare name; wrappers at its end stay: they tell apart the parameters that PEFT adapts on one."""
    module = re.sub(r"(\.base_layer)+$", "", name)
    return _bare(module) + name[len(module) :]


def as_saved(names: Iterable[str]) -> dict[str, str]:
    """Return each name of an adapter's file as ``save_pretrained`` would have written it, without second spellings."""
    names = list(names)
    factors = {name: factor_name(unwrapped(name)) for name in names}
    adapters = _adapters(factors.values())
    found: dict[str, str] = {}
    for name in names:
        plain = unwrapped(name)
        factor = factors[name]
        if factor is not None and factor.adapter:
            plain = re.sub(rf"\.{re.escape(factor.adapter)}(?=(\.weight)?$)", "", plain)
        elif ".modules_to_save." in plain:
            plain = _saved(plain, adapters)
        found[name] = f"base_model.model.{plain}"
    return found
