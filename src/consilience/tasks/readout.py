"""Where a model's logits come from, and how rows become padded tensors: what measuring and learning share.

The output layer is the dear part of a small model with a large vocabulary, and most of its rows would be thrown away:
its input is caught by a hook instead, and it is applied only where a token counts. Whether a model's logits *are*
``output_embeddings(x)`` is checked on a short probe; models that scale or cap their logits afterwards run plainly.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from consilience.errors import InputError
from consilience.tasks.encoding import Encoded

if TYPE_CHECKING:
    from torch import Tensor

PROBE_TOKENS = 8


@dataclass(frozen=True, slots=True)
class Readout:
    """How a model's logits come about: ``head`` maps caught states to logits; None: they are only had whole."""

    model: Any
    head: Any | None
    vocabulary: int

    def states(self, inputs: dict[str, Any], where: tuple["Tensor", "Tensor"]) -> "Tensor":
        """Return head inputs [N, H] (or logits [N, V] without a head) at N (sequence, position) pairs."""
        if self.head is None:
            return self.model(**{"use_cache": False, **inputs}).logits[where]
        states, _ = caught(self.model, self.head, inputs)
        return states[where]

    def logits(self, states: "Tensor") -> "Tensor":
        """Return the logits [n, V] of n states, in the dtype that they are computed in."""
        return states if self.head is None else self.head(states)


def caught(model: Any, head: Any, inputs: dict[str, Any], *, short: bool = True) -> tuple[Any, Any]:
    """Run a model; return (the input its head got [B, T, H], its logits). With ``short`` the head sees one position."""
    seen: list[Any] = []

    def hook(_module: Any, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        seen.append(args[0] if args else None)
        return (apart(args[0][:, -1:]), *args[1:]) if short and args else None

    handle = head.register_forward_pre_hook(hook)
    try:
        logits = model(**{"use_cache": False, **inputs}).logits
    finally:
        handle.remove()
    return (seen[0] if len(seen) == 1 else None), logits


def apart(states: Any) -> Any:
    """Return states in memory of their own: of a view torch makes one product a row, and each copies the weight first.

    Asked for contiguous memory, torch leaves a view of one row a view.
    """
    import torch

    return states.clone(memory_format=torch.contiguous_format)


def transforms_logits(config: Any) -> bool:
    """Whether a config names a scale or cap on logits; one too weak to show in a probe would still bias a loss."""
    own = config.get_text_config() if hasattr(config, "get_text_config") else config
    for key, value in own.to_dict().items():
        named = ("logit" in key and any(word in key for word in ("scal", "cap", "mult"))) or "lm_head_mult" in key
        if named and "att" not in key and value not in (None, False, 0, 1):
            return True
    return False


def readout(model: Any, probe: Encoded) -> Readout:
    """Find out how a model's logits come about, by a short forward pass."""
    import torch

    inputs = padded([probe], model, PROBE_TOKENS)[0]
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    # A head of another kind may need to know which sequence a state is of, which states by themselves do not say.
    if head is None or type(head) is not torch.nn.Linear or transforms_logits(model.config):
        return Readout(model, None, model(**inputs, use_cache=False).logits.shape[-1])
    states, logits = caught(model, head, inputs, short=False)
    if states is not None and states.ndim == 3 and states.shape[:2] == logits.shape[:2]:
        again = head(states)
        if again.shape == logits.shape and torch.allclose(again.float(), logits.float(), rtol=1e-4, atol=1e-6):
            return Readout(model, head, logits.shape[-1])
    return Readout(model, None, logits.shape[-1])


def padded(
    batch: Sequence[Encoded], model: Any, limit: int | None = None
) -> tuple[dict[str, "Tensor"], tuple["Tensor", "Tensor"], "Tensor"]:
    """Right-padded inputs [B, T], the scored (sequence, position) pairs [N] each, and their targets [N] (-1: none)."""
    import torch

    def side(sequences: list[tuple[int, ...]], name: str) -> dict[str, "Tensor"]:
        width = max(len(sequence) for sequence in sequences)
        # Any id does for padding: masked out, and under causal attention nothing scored comes after it.
        ids = torch.zeros(len(sequences), width, dtype=torch.long)
        mask = torch.zeros(len(sequences), width, dtype=torch.long)
        for i, sequence in enumerate(sequences):
            ids[i, : len(sequence)] = torch.tensor(sequence, dtype=torch.long)
            mask[i, : len(sequence)] = 1
        return {f"{name}input_ids": ids.to(model.device), f"{name}attention_mask": mask.to(model.device)}

    own = [one.inputs[:limit] for one in batch]
    sources = [one.source[:limit] for one in batch]
    inputs = {**side(sources, ""), **side(own, "decoder_")} if any(sources) else side(own, "")
    rows = torch.tensor([i for i, one in enumerate(batch) for _ in one.positions])
    columns = torch.tensor([p for one in batch for p in one.positions])
    targets = torch.tensor([t for one in batch for t in one.targets or (-1,) * len(one.positions)])
    return inputs, (rows.to(model.device), columns.to(model.device)), targets.to(model.device)


def decoder_start(model: Any) -> int:
    """Return the id that an encoder-decoder model's decoder starts with."""
    for config in (model.config, getattr(model, "generation_config", None)):
        for key in ("decoder_start_token_id", "bos_token_id", "pad_token_id"):
            start = getattr(config, key, None)
            if start is not None:
                return int(start)
    raise InputError("the encoder-decoder model's config names no decoder_start_token_id; add it to config.json")
