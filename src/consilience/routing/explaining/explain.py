"""Explain a routed model's answer: it reads the prompt and the answer once more, and every layer's weights are kept.

The answer's tokens are those that were generated, not its text's: what is explained is what happened.
"""

from collections import Counter
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from consilience.coefficients.listing import Place, fold_kinds, place_of, short_kinds
from consilience.errors import InputError
from consilience.progress import Progress, ProgressOption, open_progress
from consilience.routing.explaining.explain_tokens import Token, answer_tokens, prompt_tokens
from consilience.routing.explaining.explanation import Explanation, Layer, Part
from consilience.routing.model import Routing
from consilience.tasks.generate import generation_config

#: A layer's name and its weights [tokens, K].
_Record = list[tuple[str, Tensor]]


def explain(
    model: Any,
    prompt: str,
    *,
    max_new_tokens: int = 32,
    answer: str | None = None,
    progress: ProgressOption = False,
) -> Explanation:
    """Return which expert took which token at which layer, of a prompt and its answer.

    Weights are those of the forward pass, w [layers, tokens, K], and shares their means. The query is the prompt's.

    Args:
        model: a routed model, as ``load_routed`` returns it.
        prompt: what is asked; a user's turn where the tokenizer has a chat template.
        max_new_tokens: most tokens of the answer, which is decoded greedily.
        answer: explain this answer instead of the model's own.
        progress: True for a bar (or lines) on standard error, a function called with (tokens written, most tokens), or
            a ``Progress``.

    Raises:
        InputError: the model is not routed, its weights are fixed by hand, the prompt or the answer is empty, or no
            routed layer runs on text.
    """
    routing = _routing(model)
    _check(prompt, "PROMPT", "write what the model is asked")
    if answer is not None:
        _check(answer, "answer", "leave it out to have the model write it")
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens: {max_new_tokens} must be at least 1")
    texts = routing.asked.texts
    asked = texts.encode(prompt)
    query = routing.asked.of(torch.tensor([asked]), None, None)[0]
    with _evaluating(model), routing.queries([query]), open_progress(progress) as shown:
        said = _generated(model, texts.tokenizer, asked, max_new_tokens, shown) if answer is None else None
        said = _given(model, texts.tokenizer, str(answer)) if said is None else said
        shown.phase("explaining")
        parts, left_out = _parts(model, texts.tokenizer, prompt, asked, said)
    cosines, scale, threshold = _similarity(routing, query)
    written = str(texts.tokenizer.decode(said, skip_special_tokens=True)).strip() if answer is None else answer
    return Explanation(
        prompt, query, written, routing.names, routing.settings, parts, cosines, scale, threshold, left_out
    )


def _routing(model: Any) -> Routing:
    routing = getattr(model, "routing", None)
    if not isinstance(routing, Routing):
        raise InputError("model: is not routed; load it with consilience.load_routed")
    if routing.router.fixed is not None:
        raise InputError("model: its weights are fixed by hand; leave routing.only or routing.plain to explain it")
    return routing


def _check(text: str, what: str, mend: str) -> None:
    if not text.strip():
        raise InputError(f"{what}: is empty; {mend}")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InputError(f"{what}: holds bytes that are no UTF-8; write it as text") from None


@contextmanager
def _evaluating(model: Any) -> Generator[None]:
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def _encodes(model: Any) -> bool:
    return bool(getattr(model.config, "is_encoder_decoder", False))


def _start(model: Any) -> int | None:
    """Return the id that a decoder starts with."""
    own = getattr(getattr(model, "generation_config", None), "decoder_start_token_id", None)
    return getattr(model.config, "decoder_start_token_id", None) if own is None else own


class _Streamer:
    """Tells of every token that is written; what ``generate`` starts from comes first, in one piece."""

    def __init__(self, progress: Progress) -> None:
        self.progress, self.started = progress, False

    def put(self, value: Tensor) -> None:
        if self.started:
            self.progress.advance(value.numel())
        self.started = True

    def end(self) -> None:
        pass


def _generated(model: Any, tokenizer: Any, asked: list[int], most: int, progress: Progress) -> list[int]:
    """Return the ids of the greedy answer; a decoder's start with what it is started by."""
    config = generation_config(model, tokenizer, most)
    config.decoder_start_token_id = _start(model)
    ids = torch.tensor([asked], device=model.device)
    progress.phase("writing the answer", most, "tokens")
    out = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        generation_config=config,
        streamer=_Streamer(progress),
    )[0].tolist()
    return out if _encodes(model) else out[len(asked) :]


def _given(model: Any, tokenizer: Any, answer: str) -> list[int]:
    ids = list(tokenizer(answer, add_special_tokens=False).input_ids)
    if not ids:
        raise InputError("answer: has no tokens; write some text")
    start = _start(model) if _encodes(model) else None
    return ids if start is None else [start, *ids]


def _parts(
    model: Any, tokenizer: Any, prompt: str, asked: list[int], said: list[int]
) -> tuple[tuple[Part, ...], tuple[str, ...]]:
    """Run the model once, and return its sequences and the layers that belong to none."""
    before, after = prompt_tokens(tokenizer, asked, prompt), answer_tokens(tokenizer, said)
    if _encodes(model):
        after = (Token(after[0].text, "template", True), *after[1:])
        # Cross-attention's keys and values see the encoder's tokens: what a layer saw is told by the number of tokens.
        # Where the two are of one length the decoder gets one token more, which those before it do not notice.
        more = said[-1:] if len(asked) == len(said) else []
        record = _recorded(model, input_ids=asked, decoder_input_ids=said + more)
        sequences = {len(asked): ("encoder", before), len(said) + len(more): ("decoder", after)}
    else:
        record = _recorded(model, input_ids=asked + said)
        sequences = {len(asked) + len(said): ("text", before + after)}
    layers = dict(zip((name for name, _ in record), _layers([name for name, _ in record]), strict=True))
    parts: list[Part] = []
    for length, (name, tokens) in sequences.items():
        own = [(layers[layer], weights) for layer, weights in record if len(weights) == length]
        if own:
            values = torch.stack([weights[: len(tokens)] for _, weights in own]).numpy().astype(np.float32)
            parts.append(Part(name, tokens, tuple(layer for layer, _ in own), values))
    if not parts:
        raise InputError("model: no routed layer runs on this text; its experts adapt other parts of it")
    return tuple(parts), tuple(layer for layer, weights in record if len(weights) not in sequences)


def _recorded(model: Any, **ids: Sequence[int]) -> _Record:
    """Return the weights of every layer in one pass; a layer that runs again has a number behind its name."""
    record: _Record = []
    times: Counter[str] = Counter()

    def watch(name: str, weights: Tensor) -> None:
        times[name] += 1
        own = name if times[name] == 1 else f"{name} ({times[name]})"
        record.append((own, weights.reshape(-1, weights.shape[-1]).float().cpu()))

    inputs = {name: torch.tensor([list(some)], device=model.device) for name, some in ids.items()}
    with model.routing.watched(watch):
        model(**inputs, attention_mask=torch.ones_like(inputs["input_ids"]), use_cache=False)
    return record


def _layers(names: Sequence[str]) -> list[Layer]:
    """Return layers with their blocks and kinds, which their names tell."""
    places = [place_of(name) for name in names]
    folded = fold_kinds(place.kind for place in places)
    short = short_kinds(folded.values())
    towers = _towers([place.tower for place in places if place.block is not None])
    return [
        Layer(name, _block(place, towers), short[folded[place.kind]]) for name, place in zip(names, places, strict=True)
    ]


def _block(place: Place, towers: dict[str, str]) -> str:
    return "outside blocks" if place.block is None else f"{towers[place.tower]} block {place.block}".strip()


def _towers(names: Sequence[str]) -> dict[str, str]:
    """Return what tells towers apart: ``encoder.block`` and ``decoder.block`` are encoder and decoder."""
    parts = {name: name.split(".") for name in names}
    while parts and len({tuple(p[:1]) for p in parts.values()}) == 1 and any(parts.values()):
        parts = {name: p[1:] for name, p in parts.items()}
    while parts and len({tuple(p[-1:]) for p in parts.values()}) == 1 and any(parts.values()):
        parts = {name: p[:-1] for name, p in parts.items()}
    return {name: ".".join(p) for name, p in parts.items()}


def _similarity(routing: Routing, query: str) -> tuple[Any, float | None, float | None]:
    """Return the query's cosines [K], their scale, and its threshold; nothing where instructions do not count."""
    if not routing.settings.instructed or routing.asked.semantics is None:
        return None, None, None
    found = routing.asked.semantics([query], routing.settings)
    fitted = getattr(routing.asked.semantics, "adaptive", None) if routing.settings.scale == "adaptive" else None
    threshold = None if fitted is None else float(fitted.threshold)
    return found.cosines[0].double().cpu().numpy(), float(routing.router.scale_of(found)[0]), threshold
