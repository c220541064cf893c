"""Greedy generation through a model's chat template."""

from typing import Any, overload


@overload
def sample(model: Any, tokenizer: Any, prompt: str, max_new_tokens: int = 40, *, batch_size: int = 16) -> str: ...
@overload
def sample(
    model: Any,
    tokenizer: Any,
    prompt: list[str] | tuple[str, ...],
    max_new_tokens: int = 40,
    *,
    batch_size: int = 16,
) -> list[str]: ...
def sample(
    model: Any,
    tokenizer: Any,
    prompt: str | list[str] | tuple[str, ...],
    max_new_tokens: int = 40,
    *,
    batch_size: int = 16,
) -> str | list[str]:
    """Answer one prompt, or several at once, by greedy decoding: y_t = argmax_v p(v | x, y_<t).

    Each prompt is a user's turn where the tokenizer has a chat template and is given as it is otherwise. An answer ends
    at the model's end-of-sequence token or after ``max_new_tokens``; special tokens and white space around it are gone.

    Args:
        model: a transformers causal or encoder-decoder language model.
        tokenizer: its tokenizer.
        prompt: one prompt, or several.
        max_new_tokens: the most tokens of an answer.
        batch_size: prompts generated together (padded on the left).

    Raises:
        ValueError: ``max_new_tokens`` or ``batch_size`` is below 1.
    """
    import torch

    if max_new_tokens < 1 or batch_size < 1:
        raise ValueError("max_new_tokens and batch_size must be at least 1")
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    chat = bool(getattr(tokenizer, "chat_template", None))
    texts = [_turn(tokenizer, text) if chat else text for text in prompts]
    # A template writes its own special tokens; without one, or for an encoder, the tokenizer adds what it always adds.
    ids: list[list[int]] = [list(tokenizer(text, add_special_tokens=not chat).input_ids) for text in texts]
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    settings = greedy(model, tokenizer, max_new_tokens)
    training = model.training
    answers = [""] * len(prompts)
    model.eval()
    try:
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            width = max(len(ids[i]) for i in batch)
            inputs = torch.full((len(batch), width), int(settings.pad_token_id))
            mask = torch.zeros_like(inputs)
            for row, i in enumerate(batch):
                inputs[row, width - len(ids[i]) :] = torch.tensor(ids[i])
                mask[row, width - len(ids[i]) :] = 1
            with torch.no_grad():
                out = model.generate(
                    input_ids=inputs.to(model.device),
                    attention_mask=mask.to(model.device),
                    generation_config=settings,
                )
            new = out if getattr(model.config, "is_encoder_decoder", False) else out[:, width:]
            for i, text in zip(batch, tokenizer.batch_decode(new, skip_special_tokens=True), strict=True):
                answers[i] = text.strip()
    finally:
        model.train(training)
    return answers[0] if isinstance(prompt, str) else answers


def _turn(tokenizer: Any, text: str) -> str:
    turn = [{"role": "user", "content": text}]
    return str(tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True))


def greedy(model: Any, tokenizer: Any, max_new_tokens: int) -> Any:
    """Return a fresh configuration: a model's own may hold a temperature or a length that greedy decoding warns about.

    It has a padding token in any case: the tokenizer's, or the one that ends an answer, or 0.
    """
    from transformers import GenerationConfig

    own = getattr(model, "generation_config", None)
    end = getattr(own, "eos_token_id", None)
    end = tokenizer.eos_token_id if end is None else end
    first = end[0] if isinstance(end, list) else end
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else first
    return GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=end,
        pad_token_id=0 if pad is None else pad,
        bos_token_id=getattr(own, "bos_token_id", None),
        decoder_start_token_id=getattr(own, "decoder_start_token_id", None),
    )
