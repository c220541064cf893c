"""Which of a loaded model's parameters holds which stored tensor.

Names come from the files; libraries load them under names of their own (``visual.blocks.0`` becomes
``model.visual.blocks.0``). The map is found from names and shapes and then *proved* by the values: every parameter must
hold what the file holds, bit for bit.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from consilience.errors import InputError


def _tail(a: str, b: str) -> int:
    """Number of trailing dotted parts that two names share."""
    count = 0
    for x, y in zip(reversed(a.split(".")), reversed(b.split(".")), strict=False):
        if x != y:
            break
        count += 1
    return count


def match_names(stored: Mapping[str, tuple[int, ...]], held: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """Return stored name -> the model's name for every stored tensor that has a counterpart.

    An equal name wins; else, among the names nobody has, the one of the same shape with the longest common ending, if
    it is the only one.
    """
    found = {name: name for name, shape in stored.items() if held.get(name) == shape}
    free = [name for name in held if name not in found]
    for name, shape in stored.items():
        if name in found:
            continue
        scores = sorted(((_tail(name, other), other) for other in free if held[other] == shape), reverse=True)
        if scores and scores[0][0] and (len(scores) == 1 or scores[0][0] > scores[1][0]):
            found[name] = scores[0][1]
            free.remove(scores[0][1])
    return found


def parameters_of(
    model: Any, shapes: Mapping[str, tuple[int, ...]], wanted: Iterable[str], where: str
) -> dict[str, Any]:
    """Return stored name -> parameter (or buffer) of a transformers model.

    Args:
        model: the loaded model.
        shapes: shape of every stored tensor.
        wanted: names that must be found.
        where: how errors name the model.

    Raises:
        InputError: a wanted tensor has no counterpart (a library may fuse or split tensors as it loads them).
    """
    named = {
        **dict(model.named_buffers(remove_duplicate=False)),
        **dict(model.named_parameters(remove_duplicate=False)),
    }
    found = match_names(shapes, {name: tuple(value.shape) for name, value in named.items()})
    for name in wanted:
        if name not in found:
            raise InputError(
                f"{where}: tensor {name!r} is not a parameter of the loaded {type(model).__name__} (it may be fused or "
                "split there), so coefficients cannot be learned through it; exclude it, or use a data-free method"
            )
    return {name: named[other] for name, other in found.items()}
