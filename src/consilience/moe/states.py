"""What a dense model's layers see of prompts: the states that routers are made of, and those that they route.

    hidden, hidden_last   the layer's input (before attention and its norm) at a prompt's last token
    hidden_avg            the same, mean over a prompt's tokens
    mlp_input             the input of the layer's MLP, which is what a router is multiplied by, mean over its tokens
    mlp_input_last        the same at the last token
    cheap_embed           the sum of the tokens' embeddings, the same for all layers

An expert's router is the mean over its positive prompts less the mean over its negative ones, scaled to length 1. The
first five of a prompt are pooled over real tokens only, however prompts are batched.
"""

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from consilience.errors import InputError
from consilience.moe.gates import Array, Routed, normalised

Floats = npt.NDArray[np.float64]
#: Tokens of a forward pass, padding included, unless one prompt has more.
BATCH_TOKENS = 2048
Seen = Callable[[int, Tensor, Tensor], None]


@dataclass(frozen=True, eq=False)
class Dense:
    """A loaded dense model, its blocks, and its tokenizer."""

    model: Any
    blocks: Sequence[Any]
    tokenizer: Any

    @property
    def begins(self) -> int | None:
        """The token that begins every text, if there is one."""
        return self.tokenizer.bos_token_id if self.tokenizer.bos_token else None

    def encode(self, prompts: Sequence[str], where: str) -> list[list[int]]:
        """Return every prompt's tokens, after the token that begins a text, as mergekit has it.

        Raises:
            InputError: a prompt has no token, or one that the model has no row for.
        """
        start = self.tokenizer.bos_token or ""
        ids: list[list[int]] = self.tokenizer(
            [start + prompt for prompt in prompts], add_special_tokens=False
        ).input_ids
        rows = self.model.get_input_embeddings().weight.shape[0]
        for prompt, tokens in zip(prompts, ids, strict=True):
            if not tokens:
                raise InputError(f"{where}: the prompt {prompt!r} has no tokens; write some text")
            if max(tokens) >= rows:
                raise InputError(f"{where}: the prompt {prompt!r} has token {max(tokens)}, and the base {rows} rows")
        return ids


@contextmanager
def watching(dense: Dense, *, mlp: bool, seen: Callable[[int, Tensor], None]) -> Generator[None]:
    """Show the inputs [B, T, H] of all blocks (or of their MLPs) to ``seen`` in the forward passes within."""
    handles: list[Any] = []
    for number, block in enumerate(dense.blocks):

        def hook(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], number: int = number) -> None:
            seen(number, args[0] if args else kwargs["hidden_states"])

        handles.append((block.mlp if mlp else block).register_forward_pre_hook(hook, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def run(
    dense: Dense, prompts: Sequence[list[int]], *, mlp: bool, seen: Callable[[int, Sequence[int], Tensor, Tensor], None]
) -> None:
    """Run prompts through a model, and show ``seen`` what comes into every layer.

    That is (layer, the prompts' places, states [B, T, H], which of them are real [B, T]).
    """
    device = dense.model.device
    order = sorted(range(len(prompts)), key=lambda place: len(prompts[place]))
    while order:
        length = len(prompts[order[-1]])
        places = order[-max(1, BATCH_TOKENS // length) :]
        del order[-len(places) :]
        ids, mask = (
            torch.zeros(len(places), length, dtype=torch.long),
            torch.zeros(len(places), length, dtype=torch.long),
        )
        for row, place in enumerate(places):
            count = len(prompts[place])
            ids[row, :count], mask[row, :count] = torch.tensor(prompts[place]), 1
        ids, mask = ids.to(device), mask.to(device)

        def show(layer: int, states: Tensor, places: Sequence[int] = places, mask: Tensor = mask) -> None:
            seen(layer, places, states, mask.bool())

        with torch.no_grad(), watching(dense, mlp=mlp, seen=show):
            dense.model.base_model(input_ids=ids, attention_mask=mask, use_cache=False)


def mean_state(dense: Dense, prompts: Sequence[list[int]], mode: str) -> Floats:
    """Return the mean state of prompts in every layer, [layers, hidden]."""
    if mode == "cheap_embed":
        return _embedded(dense, prompts)
    mlp, last = mode.startswith("mlp_input"), mode in ("hidden", "hidden_last", "mlp_input_last")
    hidden = dense.model.get_input_embeddings().weight.shape[1]
    total = np.zeros((len(dense.blocks), hidden))

    def add(layer: int, places: Sequence[int], states: Tensor, real: Tensor) -> None:
        used = real.clone()
        if mlp and dense.begins is not None:
            # It is the same in all texts, so that it tells no experts apart.
            used[:, 0] &= torch.tensor([len(prompts[p]) == 1 or prompts[p][0] != dense.begins for p in places]).to(used)
        weight = used.double()
        if last:
            weight = torch.zeros_like(weight).scatter_(1, (real.sum(1) - 1)[:, None], 1.0)
        weight = weight / weight.sum(1, keepdim=True)
        total[layer] += torch.einsum("bt,bth->h", weight, states.double()).cpu().numpy()

    run(dense, prompts, mlp=mlp, seen=add)
    return total / len(prompts)


def _embedded(dense: Dense, prompts: Sequence[list[int]]) -> Floats:
    """Return the sum of all tokens' embeddings, of length 1, for every layer."""
    weight = dense.model.get_input_embeddings().weight
    total = np.zeros(weight.shape[1])
    with torch.no_grad():
        for prompt in prompts:
            total += weight[torch.tensor(prompt, device=weight.device)].double().sum(0).cpu().numpy()
    return np.repeat(normalised(total)[None], len(dense.blocks), axis=0)


def gate(dense: Dense, positive: Sequence[list[int]], negative: Sequence[list[int]], mode: str, where: str) -> Array:
    """Return one expert's router in every layer, [layers, hidden], of length 1.

    Raises:
        InputError: positive and negative prompts are the same to the model.
    """
    state = mean_state(dense, positive, mode)
    scale = np.linalg.norm(state, axis=-1)
    if negative:
        state = state - mean_state(dense, negative, mode)
    if (np.linalg.norm(state, axis=-1) <= 1e-6 * scale).any():
        raise InputError(f"{where}: its positive and negative prompts are the same to the base, so it has no router")
    return normalised(state).astype(np.float32)


def routing_of(
    dense: Dense, name: str, expert: int, prompts: Sequence[list[int]], routers: Array, per_token: int
) -> Routed:
    """Return where an expert's own prompts go, by the states that the dense model's MLPs see.

    Args:
        dense: the base.
        name: the expert's.
        expert: its number.
        prompts: tokens.
        routers: [layers, experts, hidden].
        per_token: experts that a token is sent to.
    """
    weights = torch.from_numpy(routers).to(dense.model.device)
    share, first = np.zeros(len(dense.blocks)), np.zeros(len(dense.blocks))
    votes = np.zeros((len(prompts), routers.shape[1]))
    tokens = sum(len(prompt) - _beginning(dense, prompt) for prompt in prompts)

    def count(layer: int, places: Sequence[int], states: Tensor, real: Tensor) -> None:
        chosen = (states.float() @ weights[layer].T).topk(per_token, dim=-1).indices.cpu().numpy()
        counted = real.cpu().numpy().copy()
        for row, place in enumerate(places):
            counted[row, 0] &= not _beginning(dense, prompts[place])
            votes[place] += np.bincount(chosen[row, :, 0][counted[row]], minlength=votes.shape[1])
        share[layer] += (chosen == expert).any(-1)[counted].sum()
        first[layer] += (chosen[..., 0] == expert)[counted].sum()

    run(dense, prompts, mlp=True, seen=count)
    own = float((votes.argmax(1) == expert).mean())
    return Routed(name, len(prompts), tokens, tuple(share / tokens), tuple(first / tokens), own)


def _beginning(dense: Dense, prompt: Sequence[int]) -> int:
    """Return 1 for a prompt whose first token begins every text, and so is nobody's."""
    return int(len(prompt) > 1 and prompt[0] == dense.begins)
