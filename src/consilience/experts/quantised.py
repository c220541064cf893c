"""Quantised weights in a merge: copied where nothing changes them, else refused by the name of their format."""

from collections.abc import Callable
from dataclasses import replace

from consilience.checkpoints.checkpoint import TensorInfo
from consilience.checkpoints.dtypes import DType
from consilience.checkpoints.fp8 import read_as_floats
from consilience.checkpoints.packed import (
    PackedWeight,
    Packing,
    is_packed_type,
    packing,
    quantises_when_run,
    quantization_of,
)
from consilience.errors import InputError
from consilience.experts.conversions import rules_for
from consilience.experts.model import Model
from consilience.experts.names import Fits, renamed


def packed_alike(model: Model, donor: Model, packed: Packing, private: Callable[[str], bool]) -> Packing:
    """Return the weights that an expert stores packed as the donor does: the same tensors, shapes and types.

    Raises:
        InputError: one of the two stores a weight packed and the other does not, or does so in another way.
    """
    assert model.checkpoint is not None
    assert donor.checkpoint is not None
    own = packing(model.checkpoint)
    ours, theirs = donor.checkpoint.tensors, model.checkpoint.tensors
    alike: dict[str, PackedWeight] = {}
    for name in sorted(packed.weights.keys() | own.weights.keys()):
        here, there = packed.weights.get(name), own.weights.get(name)
        weight = there or here
        assert weight is not None
        if all(map(private, weight.parts)):
            continue
        same = here is not None and there is not None and set(here.parts) == set(there.parts)
        if same and there is not None and all(_layout(ours[part]) == _layout(theirs[part]) for part in there.parts):
            alike[name] = there
            continue
        raise InputError(f"{_differs(model, donor, name, here, there)}; {weight.advice}")
    return Packing(alike)


def _layout(tensor: TensorInfo) -> tuple[tuple[int, ...], DType]:
    return tensor.shape, tensor.dtype


def _differs(model: Model, donor: Model, name: str, here: PackedWeight | None, there: PackedWeight | None) -> str:
    """Say how two models store a weight, the quantised one first."""
    if there is None:
        assert here is not None
        return f"{donor.reference}: {_stored(donor, here)}, and {model.reference} stores it {_plain(model, name)}"
    other = _plain(donor, name) if here is None else f"quantised in another way ({here.format})"
    return f"{model.reference}: {_stored(model, there)}, and {donor.reference} stores it {other}"


def _stored(model: Model, weight: PackedWeight) -> str:
    """Say which weight is quantised, how, and which tensor shows it."""
    assert model.checkpoint is not None
    tensors = model.checkpoint.tensors
    part = max(weight.parts, key=lambda name: (is_packed_type(tensors[name].dtype), tensors[name].nbytes))
    kind = tensors[part].dtype.name
    which = (
        f"tensor {part!r} ({kind}) is quantised"
        if part == weight.name
        else (f"{weight.name!r} is quantised (tensor {part!r}, {kind})")
    )
    return f"{which}, stored as {weight.format}"


def _plain(model: Model, name: str) -> str:
    assert model.checkpoint is not None
    info = model.checkpoint.tensors.get(name)
    if info is not None and info.codec is not None:
        return f"as {info.codec.parts[0].dtype.name} with scales"
    return "not at all" if info is None else f"unquantised ({info.dtype.name})"


def in_floats(model: Model) -> Model:
    """Return a model whose quantised weights are tensors of floats, if they can be read so.

    Raises:
        InputError: they could be, and a scale is missing, or of the wrong shape.
    """
    return model if model.checkpoint is None else replace(model, checkpoint=read_as_floats(model.checkpoint))


def packed_target(model: Model, donor: Model, packed: Packing) -> tuple[str, PackedWeight] | None:
    """Return what an adapter changes of the weights that the donor stores packed, and which; None: nothing."""
    adapter = model.adapter
    assert adapter is not None
    targets = sorted(adapter.pairs.keys() | adapter.whole.keys() | adapter.tokens.keys())
    renames = _packed_names(targets, donor, packed)
    weights = ((name, packed.get(renames.get(name, name))) for name in targets)
    return next(((name, weight) for name, weight in weights if weight is not None), None)


def refuse_packed_target(model: Model, donor: Model, packed: Packing) -> None:
    """Refuse an adapter that changes a weight which the donor stores packed: an update needs values to be added to.

    Raises:
        InputError: names the weight, its format and what to pass instead.
    """
    changed_weight = packed_target(model, donor, packed)
    if changed_weight is not None:
        name, weight = changed_weight
        raise InputError(
            f"{model.reference}: it adapts {name!r}, and in {donor.reference} {_stored(donor, weight)}; {weight.advice}"
        )


def _packed_names(targets: list[str], donor: Model, packed: Packing) -> dict[str, str]:
    """Return an adapter's name -> the packed weight's, for targets that the donor has under no name of its own."""
    checkpoint = donor.checkpoint
    assert checkpoint is not None
    lost = [name for name in targets if name not in checkpoint.tensors and packed.get(name) is None]
    weights = {name: checkpoint.tensors[weight.parts[0]] for name, weight in packed.weights.items()}
    fits: dict[str, Fits] = {name: lambda tensor: True for name in lost}
    return renamed(fits, weights, rules_for(checkpoint.config)) if lost and weights else {}


def changed(model: Model, donor: Model, weight: PackedWeight) -> InputError:
    """Return the error for an expert whose packed weight differs from the donor's."""
    return InputError(
        f"{model.reference}: {_stored(model, weight)}, and differs from {donor.reference}; merging needs values: "
        f"{weight.advice}"
    )


def packed_notes(donor: Model, packed: Packing) -> list[str]:
    """Say what is copied because it is quantised, or that a config speaks of quantisation where there is none."""
    assert donor.checkpoint is not None
    config = donor.checkpoint.config or {}
    if packed.weights:
        count = len(packed.weights)
        return [f"{count} weights are stored as {packed.formats} and stay as {donor.name} has them"]
    said = quantization_of(config)
    if said is None or quantises_when_run(config):
        return []
    method = said.get("quant_method", "no method named")
    return [
        f"config.json of {donor.name} says that it is quantised ({method}), and no tensor is: the output's config does "
        "not say so"
    ]
