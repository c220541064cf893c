"""Adapters whose modules go by other names than the base's files: a library may load a file's tensors under new names.

``transformers`` loads ``model.layers.0`` of a Qwen2-VL file, and ``language_model.model.layers.0`` of an InternVL one,
as ``model.language_model.layers.0``; adapters are saved under the module's name. Only beginnings differ, so a beginning
is exchanged for another where every name that has it then is a tensor of the base that its update fits.
"""

from collections import Counter
from dataclasses import replace

from consilience.checkpoints.adapter import Adapter, LoraPair
from consilience.checkpoints.checkpoint import TensorInfo

Rule = tuple[str, str]
Pairs = dict[str, LoraPair]
Tensors = dict[str, TensorInfo]
#: Least parts that two names must end in together: "0.self_attn.q_proj.weight".
_COMMON = 4


def follow_base(adapter: Adapter, tensors: Tensors) -> Adapter:
    """Return the adapter with its targets called as the base's files call them.

    Names of the base stay. Others change where exactly one exchange of beginnings is the likeliest to fit, and stay too
    where none does, to be refused by whoever checks them. ``names`` of the result has what the adapter called them.
    """
    pairs, whole = dict(adapter.pairs), dict(adapter.whole)
    names: dict[str, str] = {}
    lost = sorted(name for name in pairs.keys() | whole.keys() if name not in tensors)
    while lost and (rule := _best_rule(lost, pairs, whole, tensors)) is not None:
        for name in [name for name in lost if _starts(name, rule[0])]:
            new = _renamed(name, rule)
            if name in pairs:
                pairs[new] = replace(pairs.pop(name), target=new)
            if name in whole:
                whole[new] = whole.pop(name)
            names[new] = name
            lost.remove(name)
    return replace(adapter, pairs=pairs, whole=whole, names=names)


def _best_rule(lost: list[str], pairs: Pairs, whole: Tensors, tensors: Tensors) -> Rule | None:
    """Return the exchange for the first lost name: the one that keeps most of its parts."""
    first = lost[0]
    found: Counter[Rule] = Counter()
    for name in tensors:
        rule = _rule(first, name)
        if rule is not None and rule not in found and _fits(rule, lost, pairs, whole, tensors):
            found[rule] = (Counter(first.split(".")) & Counter(name.split("."))).total()
    best = found.most_common(2)
    if not best or (len(best) == 2 and best[0][1] == best[1][1]):
        return None
    return best[0][0]


def _rule(name: str, other: str) -> Rule | None:
    """Return what the beginning of ``name`` is exchanged for to give ``other``; None: they end too differently."""
    one, two = name.split("."), other.split(".")
    common = 0
    while common < min(len(one), len(two)) and one[-1 - common] == two[-1 - common]:
        common += 1
    if common < _COMMON:
        return None
    return ".".join(one[: len(one) - common]), ".".join(two[: len(two) - common])


def _starts(name: str, beginning: str) -> bool:
    return not beginning or name.startswith(f"{beginning}.")


def _renamed(name: str, rule: Rule) -> str:
    rest = name.removeprefix(f"{rule[0]}.") if rule[0] else name
    return f"{rule[1]}.{rest}" if rule[1] else rest


def _fits(rule: Rule, lost: list[str], pairs: Pairs, whole: Tensors, tensors: Tensors) -> bool:
    """Whether every lost name with the beginning becomes a tensor that its update fits and nothing else speaks of."""
    for name in lost:
        if _starts(name, rule[0]):
            new = _renamed(name, rule)
            info = tensors.get(new)
            if info is None or new in pairs or new in whole or not info.shape:
                return False
            flat = (info.shape[0], info.numel // max(info.shape[0], 1))
            if (name in pairs and pairs[name].delta_shape != flat) or (
                name in whole and whole[name].shape != info.shape
            ):
                return False
    return True
