"""Generation through a model's chat template: greedy, or sampled."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, overload

from consilience.tasks.decode import decode, draws
from consilience.tasks.encoding import check_ids, vocabulary_of

#: A text, or the turns of a conversation.
Prompt = str | Sequence[Mapping[str, str]]


@overload
def sample(
    model: Any,
    tokenizer: Any,
    prompt: str,
    max_new_tokens: int = 40,
    *,
    batch_size: int = 16,
    temperature: float = 0.0,
    seed: int = 0,
    advance: Callable[[int], None] | None = None,
) -> str: ...
@overload
def sample(
    model: Any,
    tokenizer: Any,
    prompt: list[str] | list[Prompt] | tuple[Prompt, ...],
    max_new_tokens: int = 40,
    *,
    batch_size: int = 16,
    temperature: float = 0.0,
    seed: int = 0,
    advance: Callable[[int], None] | None = None,
) -> list[str]: ...
def sample(
    model: Any,
    tokenizer: Any,
    prompt: str | list[str] | list[Prompt] | tuple[Prompt, ...],
    max_new_tokens: int = 40,
    *,
    batch_size: int = 16,
    temperature: float = 0.0,
    seed: int = 0,
    advance: Callable[[int], None] | None = None,
) -> str | list[str]:
    """Answer one prompt, or several at once, by greedy decoding or by sampling.

        y_t = argmax_v p(v | x, y_<t)                   temperature 0
        y_t ~ softmax( ln p( . | x, y_<t) / T )         temperature T; all of the vocabulary, no top-k, no top-p

    Each prompt is a user's turn, or a list of turns ({"role", "content"}), where the tokenizer has a chat template; a
    text is given as it is otherwise. An answer ends
    at the model's end-of-sequence token or after ``max_new_tokens``; special tokens and white space around it are gone.

    Args:
        model: a transformers causal or encoder-decoder language model.
        tokenizer: its tokenizer.
        prompt: one text, or several prompts.
        max_new_tokens: the most tokens of an answer.
        batch_size: prompts generated together (padded on the left).
        temperature: T >= 0.
        seed: of the samples. The same prompts in the same batches give the same answers; a prompt that occurs twice
            is answered twice.
        advance: called with the number of prompts of every finished batch.

    Raises:
        ValueError: ``max_new_tokens`` or ``batch_size`` is below 1, or ``temperature`` is negative,
            or a conversation comes without a chat template.
    """
    if max_new_tokens < 1 or batch_size < 1:
        raise ValueError("max_new_tokens and batch_size must be at least 1")
    if temperature < 0:
        raise ValueError("temperature must not be negative")
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    chat = bool(getattr(tokenizer, "chat_template", None))
    texts = [_given(tokenizer, one, chat=chat) for one in prompts]
    found = continued(
        model, tokenizer, texts, max_new_tokens, batch_size=batch_size, temperature=temperature, seed=seed,
        special=not chat, advance=advance,
    )  # fmt: skip
    answers = [text.strip() for text in tokenizer.batch_decode(found, skip_special_tokens=True)]
    return answers[0] if isinstance(prompt, str) else answers


def continued(
    model: Any,
    tokenizer: Any,
    texts: Sequence[str],
    max_new_tokens: int,
    *,
    batch_size: int = 16,
    temperature: float = 0.0,
    seed: int = 0,
    special: bool = True,
    advance: Callable[[int], None] | None = None,
) -> list[list[int]]:
    """Return the ids that a model writes after each text, as ``sample`` does; ``special``: texts lack special tokens.

    A template writes its own; without one, or for an encoder, the tokenizer adds what it always adds.
    """
    import torch

    ids: list[list[int]] = [list(tokenizer(text, add_special_tokens=special).input_ids) for text in texts]
    vocabulary = vocabulary_of(model)
    for text, own in zip(texts, ids, strict=True):
        check_ids(own, tokenizer, vocabulary, f"prompt {text[:40]!r}")
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    padding = int(generation_config(model, tokenizer, max_new_tokens).pad_token_id)
    training = model.training
    found: list[list[int]] = [[] for _ in texts]
    model.eval()
    try:
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            width = max(len(ids[i]) for i in batch)
            inputs = torch.full((len(batch), width), padding)
            mask = torch.zeros_like(inputs)
            for row, i in enumerate(batch):
                inputs[row, width - len(ids[i]) :] = torch.tensor(ids[i])
                mask[row, width - len(ids[i]) :] = 1
            draw = draws(temperature, max_new_tokens, len(batch), [seed, start])
            settings = generation_config(model, tokenizer, max_new_tokens)
            for i, own in zip(batch, decode(model, inputs, mask, settings, draw), strict=True):
                found[i] = own
            if advance is not None:
                advance(len(batch))
    finally:
        model.train(training)
    return found


def _given(tokenizer: Any, prompt: Prompt, *, chat: bool) -> str:
    """Return the text that a model continues."""
    if isinstance(prompt, str) and not chat:
        return prompt
    if not chat:
        raise ValueError("a conversation needs a tokenizer with a chat template")
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))


def generation_config(model: Any, tokenizer: Any, max_new_tokens: int) -> Any:
    """Return a fresh configuration: a model's own may hold a temperature, a top-k or a length that was not asked for.

    It is greedy; ``Draws`` make it draw.
    It has a padding token in any case: the tokenizer's if the model has a row for it, or the one that ends an answer,
    or 0.
    """
    from transformers import GenerationConfig

    own = getattr(model, "generation_config", None)
    end = getattr(own, "eos_token_id", None)
    end = tokenizer.eos_token_id if end is None else end
    first = end[0] if isinstance(end, list) else end
    rows = vocabulary_of(model)
    pad = next((i for i in (tokenizer.pad_token_id, first) if i is not None and (rows is None or i < rows)), 0)
    return GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=end,
        pad_token_id=pad,
        bos_token_id=getattr(own, "bos_token_id", None),
        decoder_start_token_id=getattr(own, "decoder_start_token_id", None),
    )
