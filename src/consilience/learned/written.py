"""Further prompts in the manner of a few that are given, written by the base model: more to learn from, no labels.

The base is shown a conversation of a few of the prompts with their expert's answers, and writes the user's next turn
itself. Where all the given prompts begin alike, the turn is begun for it in that way.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from consilience.errors import InputError
from consilience.tasks.generate import continued

#: Prompts that a conversation shows, most characters that a shared beginning must have, tokens of a written prompt.
SHOTS, BEGINNING, TOKENS = 2, 10, 160
_MARK = "\u2063MARK\u2063"


def write_prompts(
    model: Any,
    tokenizer: Any,
    given: Sequence[str],
    answers: Sequence[str],
    count: int,
    *,
    batch_size: int = 16,
    seed: int = 0,
    advance: Callable[[int], None] | None = None,
) -> list[str]:
    """Return at most ``count`` further prompts.

    Args:
        model: the base.
        tokenizer: with a chat template.
        given: prompts, at least two.
        answers: an answer to each.
        count: how many to write; what is unfinished or a repetition is dropped, so fewer come back.
        batch_size: prompts written together.
        seed: of the choice of what is shown, and of the samples (temperature 1).
        advance: called with the number of every finished batch.

    Raises:
        InputError: there is no chat template, it does not mark the end of a turn, or there are fewer than two prompts.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise InputError(
            "prompts are written as turns, and the base has no chat template (written_prompts=0 asks for none)"
        )
    if len(given) < 2:
        raise InputError("there are not two text prompts to go by (written_prompts=0 asks for none)")
    generator = np.random.default_rng(seed)
    shots = min(SHOTS, len(given))
    beginning = common_beginning(given)
    texts: list[str] = []
    end = ""
    for _ in range(count):
        chosen: list[int] = generator.permutation(len(given))[:shots].tolist()
        text, end = _opened(tokenizer, [(given[i], answers[i]) for i in chosen])
        texts.append(text + beginning)
    longest = max(len(tokenizer(text).input_ids) for text in given)
    found = continued(
        model, tokenizer, texts, min(TOKENS, 2 * longest + 8), batch_size=batch_size, temperature=1.0, seed=seed,
        special=False, advance=advance,
    )  # fmt: skip
    # Decoded together: many tokenizers drop the space before what they decode first.
    before = list(tokenizer(beginning, add_special_tokens=False).input_ids) if beginning else []
    written = [tokenizer.decode(before + ids) for ids in found]
    finished = [text.partition(end)[0].strip() for text in written if end in text]
    whole = [text for text in finished if not any(token in text for token in tokenizer.all_special_tokens)]
    return [text for text in dict.fromkeys(whole) if text and text not in given and text != beginning.strip()]


def common_beginning(given: Sequence[str]) -> str:
    """Return what all texts begin with, in whole words, if it is long enough to be more than chance."""
    # The first and the last in order differ as early as any two do.
    first, last = min(given), max(given)
    same = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    shared = first[:same]
    if any(text[same : same + 1].isalnum() for text in (first, last)):
        shared = shared.rstrip("".join(set(filter(str.isalnum, shared))))
    shared = shared.rstrip(" ")  # a tokenizer gives a space to the next word
    return shared if len(shared) >= BEGINNING else ""


def _opened(tokenizer: Any, pairs: Sequence[tuple[str, str]]) -> tuple[str, str]:
    """Return a conversation up to where the user's next turn begins, and what the template writes after a turn."""
    turns: list[dict[str, str]] = []
    for prompt, answer in pairs:
        turns += [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer or "."}]
    turns.append({"role": "user", "content": _MARK})
    whole = str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
    before, _, after = whole.partition(_MARK)
    special = [token for token in tokenizer.all_special_tokens if token in after]
    first = min(special, key=after.index) if special else after.strip()[:8]
    if not first:
        raise InputError("the chat template does not mark where a user's turn ends (written_prompts=0 asks for none)")
    return before, first
