"""Which of a loaded model's parameters holds which stored tensor.

Names come from the files; libraries load them under names of their own (``visual.blocks.0`` becomes
``model.visual.blocks.0``). The map is found from names and shapes and then *proved* by the values: every parameter must
hold what the file holds, bit for bit. Where values prove nothing, because another parameter holds the same (norms of a
model that was never trained are all ones), the same change of name must have been proved by other tensors.
"""

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from consilience.errors import InputError

#: Elements of a parameter that are looked at to tell it from others of its shape.
_SAMPLE = 64


def _tail(a: str, b: str) -> int:
    """Number of trailing dotted parts that two names share."""
    count = 0
    for x, y in zip(reversed(a.split(".")), reversed(b.split(".")), strict=False):
        if x != y:
            break
        count += 1
    return count


def _likeness(a: str, b: str) -> tuple[int, int]:
    """Length of the common ending, and how many parts before it the two names share in any order."""
    tail = _tail(a, b)
    heads = [Counter(name.split(".")[: name.count(".") + 1 - tail]) for name in (a, b)]
    return tail, (heads[0] & heads[1]).total()


def _rule(stored: str, held: str) -> tuple[str, str]:
    """What a name's beginning was replaced by."""
    tail = _tail(stored, held)
    one, other = (name.split(".") for name in (stored, held))
    return ".".join(one[: len(one) - tail]), ".".join(other[: len(other) - tail])


def _only_best(name: str, others: Iterable[str]) -> str | None:
    """Return the one name that is most like ``name``: two parts in common at least, or all of the shorter one."""
    scores = sorted(((_likeness(name, other), other) for other in others), reverse=True)
    if not scores or (len(scores) > 1 and scores[0][0] == scores[1][0]):
        return None
    (tail, _), best = scores[0]
    return best if tail >= min(2, name.count(".") + 1, best.count(".") + 1) and tail else None


def match_names(stored: Mapping[str, tuple[int, ...]], held: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """Return stored name -> the model's name for every stored tensor that has a counterpart.

    An equal name wins; else, among the names nobody has, two of the same shape that are each most like the other, by
    their common ending first. What is settled makes room: it is done again until nothing changes.
    """
    found = {name: name for name, shape in stored.items() if held.get(name) == shape}
    lost: dict[Any, set[str]] = defaultdict(set)
    free: dict[Any, set[str]] = defaultdict(set)
    for names, sizes, places in ((lost, stored, found), (free, held, set(found.values()))):
        for name, shape in sizes.items():
            if name not in places:
                names[shape, name.rpartition(".")[2]].add(name)
    for key, names in lost.items():
        changed = True
        while changed:
            pairs = {name: _only_best(name, free[key]) for name in names}
            fits = {a: b for a, b in pairs.items() if b is not None and _only_best(b, names) == a}
            found |= fits
            names -= fits.keys()
            free[key] -= set(fits.values())
            changed = bool(fits)
    return {name: found[name] for name in stored if name in found}


def named_tensors(model: Any) -> dict[str, Any]:
    """Return a model's parameters and buffers by name, tied ones under every name."""
    return {
        **dict(model.named_buffers(remove_duplicate=False)),
        **dict(model.named_parameters(remove_duplicate=False)),
    }


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
    named = named_tensors(model)
    found = match_names(shapes, {name: tuple(value.shape) for name, value in named.items()})
    for name in wanted:
        if name not in found:
            raise InputError(
                f"{where}: tensor {name!r} is not a parameter of the loaded {type(model).__name__} (it may be fused or "
                "split there), so coefficients cannot be learned through it; exclude it if the experts leave it alone, "
                "or use a data-free method"
            )
    return {name: named[other] for name, other in found.items()}


def untie(model: Any, shapes: Mapping[str, tuple[int, ...]], aliases: Iterable[str]) -> None:
    """Give what a loaded model holds for these stored tensors memory of its own, where it is another's too.

    Args:
        model: the loaded model.
        shapes: shape of every stored tensor.
        aliases: stored tensors that are one with others in the base, and no longer are.
    """
    from torch.nn import Parameter

    for alias in aliases:
        named = named_tensors(model)
        name = match_names(shapes, {name: tuple(value.shape) for name, value in named.items()}).get(alias)
        if name is not None and sum(value is named[name] for value in named.values()) > 1:
            path, _, last = name.rpartition(".")
            held = named[name]
            setattr(model.get_submodule(path), last, Parameter(held.detach().clone(), requires_grad=held.requires_grad))


def renamed(model: Any, parameters: Mapping[str, Any]) -> dict[str, str]:
    """Return stored name -> the model's name of tensors that it holds under another name only."""
    names: dict[int, list[str]] = defaultdict(list)
    for name, value in named_tensors(model).items():
        names[id(value)].append(name)
    out: dict[str, str] = {}
    for name, value in parameters.items():
        if name not in names[id(value)]:
            out[name] = max(names[id(value)], key=lambda other: (_likeness(name, other), other))
    return out


def doubtful(model: Any, renames: Mapping[str, str], equal: Collection[str]) -> list[str]:
    """Return the stored names whose place in the model neither values nor other tensors prove.

    Args:
        model: the loaded model.
        renames: stored name -> the model's name, where they differ.
        equal: stored names whose values were found to be those of the parameter.
    """
    named = named_tensors(model)
    alike: dict[Any, set[int]] = defaultdict(set)
    marks = {name: _mark(value) for name, value in named.items()}
    for name, mark in marks.items():
        alike[mark].add(id(named[name]))
    alone = {stored for stored in equal if len(alike[marks[renames[stored]]]) == 1}
    rules = {_rule(stored, renames[stored]) for stored in alone}
    return [s for s, held in renames.items() if s not in alone and _rule(s, held) not in rules]


def _mark(value: Any) -> tuple[Any, ...]:
    """Return a tensor's shape and some of its values: tensors of other marks differ."""
    flat = value.detach().reshape(-1)
    return tuple(value.shape), tuple(flat[:: max(1, flat.numel() // _SAMPLE)].tolist())
