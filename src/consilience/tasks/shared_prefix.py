"""Sequences that begin alike: what they share goes through the model once.

Rows of a task often begin with the same system prompt, and the choices of a row with the same question. In a decoder
nothing before a token depends on what comes after it, so the keys and values of such a *prefix* are computed once, and
each sequence runs on the tokens of its own, which attend to them. There are two levels:

    trunk | stem | branch      the trunk is shared by all sequences, a stem by the choices of one row

Both end where the first scored position of any sequence that shares them begins, so all logits come from branches. A
prefix is padded on the left, as in generation, so that the tokens that count lie side by side.

This is for decoders whose state is keys and values of every position, and nothing else: those without sliding windows,
recurrent states, images, or rotary frequencies that change with the length. Whether a model's logits are the same that
way is measured on a short probe, in the precision of its weights; all other models run on whole sequences.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from consilience.tasks.encoding import Encoded
from consilience.tasks.readout import Readout, padded

#: Sharing must spare at least this part of all tokens: below, more and smaller passes cost what it saves.
LEAST_SAVING = 0.1
#: Bound in bytes on the keys and values of a prefix, and on those of one layer that a batch makes of it.
KEYS_BYTES = 256 << 20
#: Tokens of the probe: three in the trunk, three and one in the stems, the others in the branches.
PROBE_TOKENS = 9
#: Largest difference of two logits of the probe that is rounding, as a part of the largest logit.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 3e-2, torch.float16: 1e-2}

_NEEDED = ("input_ids", "attention_mask", "use_cache", "logits_to_keep")
#: What models call their cache, as an input and in their output: the newer name first.
_CACHE_NAMES = ("cache", "past_key_values")


@dataclass(frozen=True, slots=True)
class Cost:
    """Bytes of the keys and values of one token in all layers, and how many layers have some."""

    token: int
    layers: int


#: What the probe found: None for models that run whole. Of a model only its code and configuration matter, and these
#: it keeps.
_probed: "WeakKeyDictionary[torch.nn.Module, Cost | None]" = WeakKeyDictionary()


class _Layer(DynamicLayer):
    """One layer's keys and values of a prefix, before those of a batch; ``keep`` adds the batch's to them.

    ``rows`` [B] says whose prefix each sequence of the batch continues; None: all continue the only one.
    """

    def __init__(self, keys: Tensor, values: Tensor, rows: Tensor | None, keep: bool) -> None:
        super().__init__()
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True
        self.keys, self.values = keys, values
        self.rows, self.keep = rows, keep

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Return the keys and values [B, heads, P + T, D] of the prefix and of the batch's own tokens."""
        assert self.keys is not None
        assert self.values is not None
        keys, values = self._joined(self.keys, key_states), self._joined(self.values, value_states)
        if self.keep:
            self.keys, self.values = keys, values
        return keys, values

    def _joined(self, prefix: Tensor, own: Tensor) -> Tensor:
        before = prefix.expand(len(own), -1, -1, -1) if self.rows is None else prefix[self.rows]
        return torch.cat([before, own], -2)


@dataclass(frozen=True, slots=True)
class Prefix:
    """Keys and values [G, heads, P, D] of each layer for G prefixes, and which of their P positions count [G, P]."""

    layers: tuple[tuple[Tensor, Tensor], ...]
    mask: Tensor

    def cost(self) -> Cost:
        """Return what its tokens take."""
        taken = sum(states.nbytes for pair in self.layers for states in pair)
        return Cost(-(-taken // self.mask.numel()), len(self.layers))


@dataclass(frozen=True, slots=True)
class Decoder:
    """A model that shares prefixes, what it calls its cache, and whether it takes ``position_ids``."""

    readout: Readout
    cache: str
    positions: bool

    def after(
        self, prefix: Prefix, inputs: dict[str, Tensor], rows: Tensor | None = None, *, keep: bool = False
    ) -> dict[str, Any]:
        """Return the model's inputs for a right-padded batch [B, T] that continues a prefix (see ``_Layer``)."""
        ids = inputs["input_ids"]
        mask = prefix.mask.expand(len(ids), -1) if rows is None else prefix.mask[rows]
        cache: Any = DynamicCache()
        cache.layers = [_Layer(keys, values, rows, keep) for keys, values in prefix.layers]
        out: dict[str, Any] = {
            "input_ids": ids,
            "attention_mask": torch.cat([mask, inputs["attention_mask"]], 1),
            self.cache: cache,
            "use_cache": True,
        }
        if self.positions:  # other models count the mask
            out["position_ids"] = mask.sum(1, keepdim=True) + torch.arange(ids.shape[1], device=ids.device)
        return out

    def trunk(self, ids: Sequence[int]) -> Prefix | None:
        """Run the tokens that all sequences begin with; None if the model keeps other things than keys and values."""
        tokens = torch.tensor([list(ids) or [0]], device=self.readout.model.device)
        mask = torch.ones_like(tokens)
        out = self.readout.model(input_ids=tokens, attention_mask=mask, use_cache=True, logits_to_keep=1)
        cache: Any = getattr(out, self.cache, None)
        # Exactly these classes: those derived from them hold windows, recurrent states or indices.
        if type(cache) is not DynamicCache:
            return None
        layers: list[Any] = list(cache.layers)
        if not layers or any(type(layer) is not DynamicLayer for layer in layers):
            return None
        pairs = [(layer.keys, layer.values) for layer in layers]
        if not all(_one_per_token(states, tokens.shape[1]) for pair in pairs for states in pair):
            return None
        width = len(ids)  # without any, one token showed the shapes
        return Prefix(tuple((keys[:, :, :width], values[:, :, :width]) for keys, values in pairs), mask[:, :width])

    def stems(self, trunk: Prefix, stems: Sequence[Sequence[int]]) -> Prefix:
        """Run sequences that continue the trunk; the prefix of each is the trunk and its stem, padded on the left."""
        model = self.readout.model
        inputs = padded([Encoded(0, None, (), tuple(stem), (), ()) for stem in stems], model)[0]
        run = self.after(trunk, inputs, keep=True)
        model(**run, logits_to_keep=1)
        lengths = run["attention_mask"].sum(1, keepdim=True)
        width = run["attention_mask"].shape[1]
        # Column j of the result is column j - (width - length) of what was computed: padding goes to the left.
        columns = torch.arange(width, device=lengths.device) - (width - lengths)
        mask = (columns >= 0).to(run["attention_mask"].dtype)
        index = columns.clamp(min=0)[:, None, :, None]

        def moved(states: Tensor) -> Tensor:
            return states.gather(2, index.expand(-1, states.shape[1], -1, states.shape[3]))

        layers = run[self.cache].layers
        return Prefix(tuple((moved(layer.keys), moved(layer.values)) for layer in layers), mask)

    def states(
        self,
        prefix: Prefix,
        inputs: dict[str, Tensor],
        where: tuple[Tensor, Tensor],
        rows: Tensor | None = None,
    ) -> Tensor:
        """Return what ``Readout.states`` does, of a batch that continues a prefix."""
        return self.readout.states(self.after(prefix, inputs, rows), where)


def _one_per_token(states: Tensor | None, count: int) -> bool:
    return states is not None and states.ndim == 4 and states.shape[0] == 1 and states.shape[2] == count


def plain_decoder(readout: Readout) -> Decoder | None:
    """Return the model as a decoder whose states depend on tokens and positions before them alone, or None."""
    model: Any = readout.model
    # A hook on the model itself (a router that reads the query, say) expects to see whole inputs.
    if any(vars(model).get(hooks) for hooks in ("_forward_pre_hooks", "_forward_hooks")):
        return None
    parameters = inspect.signature(model.forward).parameters
    cache = next((name for name in _CACHE_NAMES if name in parameters), None)
    if cache is None or any(name not in parameters for name in _NEEDED) or not _plain_config(model.config):
        return None
    return Decoder(readout, cache, "position_ids" in parameters)


def decoder_of(readout: Readout, examples: Sequence[Encoded]) -> tuple[Decoder, Cost] | None:
    """Return the model as one that shares prefixes, and what these take; None where it has to run whole sequences."""
    model, decoder = readout.model, plain_decoder(readout)
    if decoder is None:
        return None
    if model not in _probed:
        ids = list(dict.fromkeys(token for one in examples for token in one.inputs))[:PROBE_TOKENS]
        if len(ids) < PROBE_TOKENS:
            return None
        with torch.autocast(model.device.type, enabled=False):
            _probed[model] = _probe(decoder, ids)
    cost = _probed[model]
    return None if cost is None else (decoder, cost)


def _plain_config(config: Any) -> bool:
    if getattr(config, "is_encoder_decoder", False) or getattr(config, "get_text_config", lambda: None)() is not config:
        return False
    if getattr(config, "_attn_implementation", None) not in ("sdpa", "eager"):
        return False  # kernels that need half precision, or compile for every shape
    # Under these the states of a token depend on how long its sequence becomes.
    rotary = {**(getattr(config, "rope_scaling", None) or {}), **(getattr(config, "rope_parameters", None) or {})}
    kinds = [one.get("rope_type", one.get("type")) for one in (rotary, *rotary.values()) if isinstance(one, dict)]
    return not any(kind in ("dynamic", "longrope") for kind in kinds)


def _probe(decoder: Decoder, ids: Sequence[int]) -> Cost | None:
    """Compare the logits of a trunk, two stems of unlike lengths and three branches with those of whole sequences."""
    trunk, stems = ids[:3], (ids[3:6], ids[3:4])
    branches, rows = (ids[6:8], ids[5:6], ids[4:9]), (0, 0, 1)
    whole = [[*trunk, *stems[row], *branch] for row, branch in zip(rows, branches, strict=True)]
    readout = decoder.readout
    model = readout.model

    def logits(sequences: Sequence[Sequence[int]], run: Callable[[dict[str, Tensor], Any], Tensor]) -> Tensor:
        scored = [range(len(s) - len(b), len(s)) for s, b in zip(sequences, branches, strict=True)]
        batch = [Encoded(0, None, (), tuple(s), tuple(p), ()) for s, p in zip(sequences, scored, strict=True)]
        inputs, where, _ = padded(batch, model)
        return readout.logits(run(inputs, where)).float()

    first = decoder.trunk(trunk)
    if first is None:
        return None
    prefix = decoder.stems(first, stems)
    owners = torch.tensor(rows, device=model.device)
    expected = logits(whole, readout.states)
    shared = logits(branches, lambda inputs, where: decoder.states(prefix, inputs, where, owners))
    tolerance = TOLERANCE.get(next(model.parameters()).dtype)
    same = tolerance is not None and bool((shared - expected).abs().max() <= tolerance * expected.abs().max())
    return first.cost() if same else None


@dataclass(frozen=True, slots=True)
class Unit:
    """Sequences that continue one stem, by index: the choices of a row, or a single sequence, whose stem is empty."""

    stem: tuple[int, ...]
    members: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Sharing:
    """Which tokens of some sequences are shared: the trunk, the units, and each sequence's branch."""

    trunk: tuple[int, ...]
    units: tuple[Unit, ...]
    branches: tuple[Encoded, ...]

    def spared(self) -> int:
        """How many tokens need not run."""
        stems = sum(len(unit.stem) * (len(unit.members) - 1) for unit in self.units)
        return len(self.trunk) * (len(self.branches) - 1) + stems


#: Indices of a batch's sequences; (sequence of the batch, position) pairs [N] each and targets [N], as ``padded`` gives
#: them; and each model's states at the pairs, as ``Readout.states`` gives them.
Pass = tuple[list[int], tuple[Tensor, Tensor], Tensor, list[Tensor]]


def _common(sequences: Sequence[tuple[int, ...]]) -> int:
    """The length of the longest prefix of all sequences: that of the first and the last in lexicographic order."""
    first, last = min(sequences), max(sequences)
    return next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))


def plan(examples: Sequence[Encoded], longest: int) -> Sharing:
    """Find what sequences share: a trunk, and stems, which together have at most ``longest`` tokens."""
    free = [one.inputs[: one.positions[0]][:longest] for one in examples]  # before the first scored position
    cut = _common(free)
    rows: dict[tuple[int, bool], list[int]] = {}
    for index, one in enumerate(examples):
        rows.setdefault((one.row, True) if one.candidate is not None else (index, False), []).append(index)
    units: list[Unit] = []
    branches = list(examples)
    for members in rows.values():
        end = _common([free[i] for i in members]) if len(members) > 1 else cut
        units.append(Unit(free[members[0]][cut:end], tuple(members)))
        for i in members:
            one = examples[i]
            branches[i] = replace(one, inputs=one.inputs[end:], positions=tuple(p - end for p in one.positions))
    return Sharing(examples[0].inputs[:cut], tuple(units), tuple(branches))


def batches(sharing: Sharing, cost: Cost, batch_size: int, tokens: int) -> Iterator[list[Unit]]:
    """Put units into batches, those with stems first, the longest first.

    Args:
        sharing: what is shared.
        cost: what keys and values take.
        batch_size: the most sequences of a batch; a unit stays together in any case.
        tokens: the most padded tokens of a batch.
    """

    def shape(unit: Unit) -> tuple[int, int]:
        return len(unit.stem), max(len(sharing.branches[i].inputs) for i in unit.members)

    def fits(stem: int, branch: int, stems: int, branches: int) -> bool:
        width = len(sharing.trunk) + stem
        return (
            branches <= batch_size
            and max(stem * stems, branch * branches) <= tokens
            and (stem == 0 or stems * width * cost.token <= KEYS_BYTES)
            and branches * (width + branch) * cost.token <= KEYS_BYTES * cost.layers
        )

    batch: list[Unit] = []
    widest_stem = widest_branch = count = 0
    for unit in sorted(sharing.units, key=lambda unit: (*map(int.__neg__, shape(unit)), unit.members)):
        stem, branch = shape(unit)
        wider = max(widest_stem, stem), max(widest_branch, branch)
        joins = bool(stem) == bool(widest_stem) and fits(*wider, len(batch) + 1, count + len(unit.members))
        if batch and not joins:
            yield batch
            batch, count, wider = [], 0, (stem, branch)
        batch.append(unit)
        count += len(unit.members)
        widest_stem, widest_branch = wider
    if batch:
        yield batch


def passes(
    readouts: Sequence[Readout], examples: Sequence[Encoded], batch_size: int, tokens: int
) -> Iterator[Pass] | None:
    """Run sequences with shared prefixes, a batch at a time; None where a model cannot, or it does not pay."""
    if len(examples) < 2:
        return None
    longest = max(len(one.inputs) for one in examples)
    if plan(examples, longest).spared() < LEAST_SAVING * sum(len(one.inputs) for one in examples):
        return None
    found = [decoder_of(readout, examples) for readout in readouts]
    able = [one for one in found if one is not None]
    if len(able) < len(found):
        return None
    cost = max((cost for _, cost in able), key=lambda cost: cost.token / cost.layers)
    return _passes([decoder for decoder, _ in able], cost, examples, batch_size, tokens)


def _passes(
    decoders: Sequence[Decoder], cost: Cost, examples: Sequence[Encoded], batch_size: int, tokens: int
) -> Iterator[Pass]:
    sharing = plan(examples, KEYS_BYTES // cost.token)
    trunks = [decoder.trunk(sharing.trunk) for decoder in decoders]
    for batch in batches(sharing, cost, batch_size, tokens):
        members = [i for unit in batch for i in unit.members]
        inputs, where, targets = padded([sharing.branches[i] for i in members], decoders[0].readout.model)
        states: list[Tensor] = []
        for decoder, trunk in zip(decoders, trunks, strict=True):
            assert trunk is not None  # the probe had one
            device = trunk.mask.device
            prefix, rows = trunk, None
            if batch[0].stem:
                prefix = decoder.stems(trunk, [unit.stem for unit in batch])
                rows = torch.tensor([k for k, unit in enumerate(batch) for _ in unit.members], device=device)
            own = {name: value.to(device) for name, value in inputs.items()}
            states.append(decoder.states(prefix, own, where, rows))
        yield members, where, targets, states
