"""Models whose tensors go by other names than the base's files: which of theirs is which of the base's.

A name changes on its way from a file to a module and back: training wraps modules (``_orig_mod.``, ``module.``),
transformers renames what it loads (``conversions.py``), and a model saved with or without its head has another
beginning (``model.``, ``bert.``, ``language_model.model.``). Two names mean one tensor where they become equal once
wrappers and known renamings are undone, or where one beginning exchanged for another makes more names fit than any
other exchange. Names of the base stay. What nothing relates stays too, to be refused by whoever checks it.
"""

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace

from consilience.checkpoints.adapter import Adapter
from consilience.checkpoints.checkpoint import Checkpoint, TensorInfo
from consilience.checkpoints.peft_names import WRAPPERS
from consilience.experts.conversions import Rules, rules_for
from consilience.experts.model import Model

Tensors = Mapping[str, TensorInfo]
#: Whether what goes by a name could be, or update, a tensor of the base.
Fits = Callable[[TensorInfo], bool]
Exchange = tuple[str, str]
#: The weight of queries, keys and values of an ``nn.MultiheadAttention`` X, which PEFT adapts as X's own weight.
_IN_PROJ = "in_proj_weight"
#: Least parts that two names must end in together ("0.self_attn.q_proj.weight"), unless one is the end of the other.
_COMMON = 4
_LEAST = 2


def follow_base(model: Model, base: Checkpoint) -> Model:
    """Return the model with its tensors, and its adapter's targets, called as the base's files call them.

    ``names`` of the result, and of its adapter, have what the model itself calls those that were renamed.
    """
    checkpoint, adapter = model.checkpoint, model.adapter
    configs = [base.config, *([checkpoint.config] if checkpoint is not None else [])]
    names: dict[str, str] = {}
    if checkpoint is not None and checkpoint.tensors.keys() - base.tensors.keys():
        fits = {name: same_shape(info) for name, info in checkpoint.tensors.items()}
        renames = renamed(fits, base.tensors, rules_for(*configs))
        tensors = {renames.get(name, name): info for name, info in checkpoint.tensors.items()}
        checkpoint = replace(checkpoint, tensors=tensors)
        names |= {new: old for old, new in renames.items()}
    if adapter is not None:
        adapter = _follow(adapter, renamed(adapter_fits(adapter), base.tensors, rules_for(*configs)))
        names |= adapter.names
    return replace(model, checkpoint=checkpoint, adapter=adapter, names=names)


def _follow(adapter: Adapter, renames: Mapping[str, str]) -> Adapter:
    def new(name: str) -> str:
        return renames.get(name, name)

    pairs = {new(name): replace(pair, target=new(name)) for name, pair in adapter.pairs.items()}
    notes = adapter.notes
    for name in [name for name in pairs if name.endswith(f".{_IN_PROJ}") and name in renames.values()]:
        out = f"{name.removesuffix(_IN_PROJ)}out_proj.weight"
        if out in pairs:  # PEFT adds this update twice, in training as in merging (lora.MultiheadAttention.merge)
            pairs[out] = replace(pairs[out], scale=2 * pairs[out].scale)
            notes = (*notes, f"the update of {out} counts twice, as PEFT counts it in nn.MultiheadAttention")
    whole = {new(name): info for name, info in adapter.whole.items()}
    tokens = {new(name): rows for name, rows in adapter.tokens.items()}
    return replace(
        adapter, pairs=pairs, whole=whole, tokens=tokens, notes=notes, names={new: old for old, new in renames.items()}
    )


def same_shape(info: TensorInfo) -> Fits:
    """Return whether a tensor of the base has a tensor's shape."""
    return lambda tensor: tensor.shape == info.shape


def adapter_fits(adapter: Adapter) -> dict[str, Fits]:
    """Return, by target, whether an adapter's update could be that of a tensor of the base."""
    fits: dict[str, Fits] = {name: same_shape(info) for name, info in adapter.whole.items()}
    for name, tokens in adapter.tokens.items():
        fits.setdefault(name, lambda tensor, width=tokens.values.shape[1:]: tensor.shape[1:] == width)
    for name, pair in adapter.pairs.items():
        fits[name] = lambda tensor, pair=pair: pair.fits(tensor.shape)
    return fits


def renamed(fits: Mapping[str, Fits], tensors: Tensors, rules: Iterable[Rules]) -> dict[str, str]:
    """Return a model's name -> the base's, for every name that the base does not have and can be found there.

    What most names follow counts: first from known renamings alone, then with exchanged beginnings too. Where sets of
    renamings that explain as much disagree about a name, it is left out.

    Args:
        fits: by each of the model's names, whether it could be a given tensor.
        tensors: the base's.
        rules: sets of renamings that may relate the two, likeliest first.
    """
    lost = [name for name in fits if name not in tensors]
    free = [name for name in tensors if name not in fits]
    sets = [Rules(()), *(rule for rule in rules if _changes(rule, [*lost, *free]))] if lost else []
    best: list[dict[str, str]] = [{}]
    for exchanging in (False, True):
        for rule in sets:
            found = _related(lost, free, fits, tensors, rule, exchanging=exchanging)
            if len(found) >= len(best[0]):
                best = [*best, found] if len(found) == len(best[0]) else [found]
        if len(best[0]) == len(lost):
            break
    return {name: new for name, new in best[0].items() if all(other.get(name, new) == new for other in best)}


def _changes(rules: Rules, names: Iterable[str]) -> bool:
    """Whether rules rename anything; names that differ in numbers alone are looked at once."""
    return any(rules(name) != name for name in {re.sub(r"\d+", "0", name) for name in names})


def _related(
    lost: Collection[str],
    free: Collection[str],
    fits: Mapping[str, Fits],
    tensors: Tensors,
    rules: Rules,
    *,
    exchanging: bool,
) -> dict[str, str]:
    """Return the renames under one set of rules: of names that become equal, then by exchanged beginnings."""

    def key(name: str) -> str:
        return rules(WRAPPERS.sub("", name))

    ours, theirs = _by_key(lost, key), _by_key(free, key)
    for name in [name for name in theirs if name.endswith(f".{_IN_PROJ}")]:
        theirs.setdefault(f"{name.removesuffix(_IN_PROJ)}weight", theirs[name])
    found = {ours.pop(name): theirs.pop(name) for name in [*ours] if name in theirs}
    while exchanging and (exchange := _best_exchange(ours, theirs, fits, tensors)) is not None:
        for name in [name for name in ours if _starts(name, exchange[0])]:
            new = _exchanged(name, exchange)
            if new in theirs:
                found[ours.pop(name)] = theirs.pop(new)
    return found


def _by_key(names: Iterable[str], key: Callable[[str], str]) -> dict[str, str]:
    """Return key -> name, without the keys that several names have."""
    keys = {name: key(name) for name in names}
    counts = Counter(keys.values())
    return {key: name for name, key in keys.items() if counts[key] == 1}


def _best_exchange(
    ours: Mapping[str, str], theirs: Mapping[str, str], fits: Mapping[str, Fits], tensors: Tensors
) -> Exchange | None:
    """Return the one exchange of beginnings that makes most names fit, and then keeps most of their parts."""
    for first in sorted(ours, key=lambda name: (-name.count("."), name)):
        scores: dict[Exchange, tuple[int, int]] = {}
        for name in theirs:
            exchange = _exchange(first, name)
            if exchange is not None and exchange not in scores and fits[ours[first]](tensors[theirs[name]]):
                kept = (Counter(first.split(".")) & Counter(name.split("."))).total()
                scores[exchange] = (_count(exchange, ours, theirs, fits, tensors), kept)
        best = sorted(scores.items(), key=lambda item: item[1], reverse=True)[:2]
        if best and (len(best) == 1 or best[0][1] != best[1][1]):
            return best[0][0]
    return None


def _count(
    exchange: Exchange, ours: Mapping[str, str], theirs: Mapping[str, str], fits: Mapping[str, Fits], tensors: Tensors
) -> int:
    pairs = ((ours[name], theirs.get(_exchanged(name, exchange))) for name in ours if _starts(name, exchange[0]))
    return sum(other is not None and fits[name](tensors[other]) for name, other in pairs)


def _exchange(name: str, other: str) -> Exchange | None:
    """Return what the beginning of ``name`` is exchanged for to give ``other``; None: they end too differently."""
    one, two = name.split("."), other.split(".")
    shorter = min(len(one), len(two))
    common = 0
    while common < shorter and one[-1 - common] == two[-1 - common]:
        common += 1
    if common < _COMMON and (common < shorter or common < _LEAST):
        return None
    return ".".join(one[: len(one) - common]), ".".join(two[: len(two) - common])


def _starts(name: str, beginning: str) -> bool:
    return not beginning or name.startswith(f"{beginning}.")


def _exchanged(name: str, exchange: Exchange) -> str:
    rest = name.removeprefix(f"{exchange[0]}.") if exchange[0] else name
    return f"{exchange[1]}.{rest}" if exchange[1] else rest


def alike(name: str, fits: Fits, tensors: Tensors) -> list[str]:
    """Return the base's tensors that a name nothing settled may mean: they end alike and it fits them."""
    return [other for other in tensors if _exchange(name, other) is not None and fits(tensors[other])]
