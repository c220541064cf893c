"""Decoding of one padded batch: by transformers' generate, in rounds after which the rows that ended leave the batch.

Answers of one batch differ in length, and a row that has ended would be computed until the last one has. A prompt that
occurs several times is read once. Numbers to draw by are made beforehand, so that what a row draws depends neither on
rounds nor on the rows beside it.
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

#: Tokens of a round.
ROUND = 8


@dataclass
class Draws:
    """Draws every row's next token from softmax(logits / T): a logits processor for greedy decoding.

    One uniform number finds its token on the running sum of probabilities (float64, so that tokens without any are
    never drawn): torch.multinomial takes an exponential variate for every entry of the vocabulary instead, a sixth of
    the time that a small model needs for a token.

    ``uniform`` [steps, rows] are the numbers, ``rows`` those of the batch, ``step`` how many tokens are drawn.
    """

    temperature: float
    uniform: Any
    rows: Any
    step: int = 0

    def __call__(self, _ids: Any, logits: Any) -> Any:
        """Return logits that leave one token a row."""
        import torch

        running = torch.softmax(logits.float() / self.temperature, -1).cumsum(-1, dtype=torch.float64)
        at = self.uniform[self.step, self.rows, None].to(running.device) * running[:, -1:]
        self.step += 1
        token = torch.searchsorted(running, at, right=True).clamp(max=logits.shape[-1] - 1)
        return torch.full_like(logits, -torch.inf).scatter_(1, token, 0.0)


def draws(temperature: float, steps: int, rows: int, entropy: Sequence[int]) -> Draws | None:
    """Return what makes greedy decoding draw; None at temperature 0."""
    import torch

    if not temperature:
        return None
    uniform = np.random.default_rng(list(entropy)).random((steps, rows))
    return Draws(temperature, torch.from_numpy(uniform), torch.arange(rows))


def decode(model: Any, inputs: Any, mask: Any, settings: Any, draw: Draws | None) -> list[list[int]]:
    """Return the ids that a model writes after each row of ``inputs`` [B, T], up to an end and without padding.

    Args:
        model: on its device, in evaluation mode.
        inputs: ids, padded on the left.
        mask: 0 at padding.
        settings: of the generation, which this changes; an answer has at most ``max_new_tokens`` ids.
        draw: what draws; None: greedy.
    """
    import torch

    cache = _cache(model)
    seq2seq = bool(getattr(model.config, "is_encoder_decoder", False))
    written: list[list[int]] = [[] for _ in inputs]
    alive = torch.arange(len(inputs))
    ends = _ends(settings)
    left, steps = settings.max_new_tokens, settings.max_new_tokens if cache is None else ROUND
    if cache is not None:
        _read_once(model, inputs, mask, settings, cache)
    while left and len(alive):
        settings.max_new_tokens = steps = min(steps, left)
        out = _generate(model, inputs, mask, settings, cache, draw)
        new = out[:, 1:] if seq2seq else out[:, inputs.shape[1] :]
        going: list[int] = []
        for at, (row, own) in enumerate(zip(alive.tolist(), new.tolist(), strict=True)):
            end = next((i for i, one in enumerate(own) if one in ends), None)
            written[row] += own if end is None else own[: end + 1]
            if end is None:
                going.append(at)
        left -= steps
        kept = torch.tensor(going, dtype=torch.long)
        alive, inputs = alive[kept], out[kept]
        mask = torch.cat([mask[kept], mask.new_ones(len(kept), new.shape[1])], 1)
        if draw is not None:
            draw.rows = alive
        if cache is not None and left and len(kept) < len(out):
            cache.batch_select_indices(kept.to(model.device))
    return written


def _generate(model: Any, inputs: Any, mask: Any, settings: Any, cache: Any, draw: Draws | None) -> Any:
    import torch

    beside = {} if cache is None else {_keyword(model): cache}
    with torch.no_grad():
        return model.generate(
            input_ids=inputs.to(model.device), attention_mask=mask.to(model.device), generation_config=settings,
            logits_processor=[] if draw is None else [draw], **beside,
        ).cpu()  # fmt: skip


def _keyword(model: Any) -> str:
    """Return what ``generate`` calls the cache: transformers renames it on the way to version 6."""
    return (
        "cache" if "cache" in inspect.signature(model.prepare_inputs_for_generation).parameters else "past_key_values"
    )


def _read_once(model: Any, inputs: Any, mask: Any, settings: Any, cache: Any) -> None:
    """Fill the cache with all but the last token of every row, where rows that are equal make this cheaper."""
    import torch

    different, place = torch.unique(torch.cat([inputs, mask], 1), dim=0, return_inverse=True)
    width = inputs.shape[1] - 1
    # A row of padding alone would leave states that are not numbers.
    if len(different) == len(inputs) or not bool(mask[:, :width].any(1).all()):
        return
    wanted, settings.max_new_tokens = settings.max_new_tokens, 1
    _generate(model, different[:, :width], different[:, width + 1 : -1], settings, cache, None)
    settings.max_new_tokens = wanted
    cache.batch_select_indices(place.to(model.device))


def _ends(settings: Any) -> set[int]:
    end = settings.eos_token_id
    return set(end) if isinstance(end, list) else {end} - {None}


def _cache(model: Any) -> Any:
    """Return an empty cache that rows can leave; None: the model has none such, and decodes in one round."""
    from transformers.cache_utils import DynamicCache, DynamicLayer

    able = getattr(model, "_supports_default_dynamic_cache", None)
    stateful = getattr(model.config, "is_encoder_decoder", False) or getattr(model, "_is_stateful", False)
    if stateful or able is None or not able():
        return None
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    plain = bool(cache.layers) and all(isinstance(layer, DynamicLayer) for layer in cache.layers)
    return cache if plain else None
