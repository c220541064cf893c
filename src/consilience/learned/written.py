"""Further prompts in the manner of a few that are given, written by the base model: more to learn from, no labels.

The base is shown a conversation of a few of the prompts with their expert's answers, and writes the user's next turn
itself. Where all the given prompts begin alike, the turn is begun for it in that way; where they end alike, it is ended
in that way, from where the ending begins: "How is the word "x" pronounced? Answer in phonemes." needs an x alone.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from consilience.errors import InputError
from consilience.tasks.generate import continued

#: Prompts that a conversation shows, fewest characters of a shared beginning or ending, most tokens of a prompt.
SHOTS, SHARED, TOKENS = 2, 10, 160
#: Prompts that are written after one conversation: it is read once for all of them.
ALIKE = 4
#: Tokens that are written for each prompt that is asked for, on average: fewer come back where most are not finished.
EFFORT = 48
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
        model: the base, or with no ``given`` an expert.
        tokenizer: with a chat template.
        given: prompts; without any, each is written as the first turn of a conversation.
        answers: an answer to each.
        count: how many to write; what is unfinished or a repetition is dropped, and others are written instead until
            ``EFFORT`` tokens a prompt are spent (without any given, as many as one may have).
        batch_size: prompts written together.
        seed: of the choice of what is shown, and of the samples (temperature 1).
        advance: called with the number of further prompts of every batch.

    Raises:
        InputError: there is no chat template, or it does not mark the end of a turn.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise InputError(
            "prompts are written as turns, and the base has no chat template (written_prompts=0 asks for none)"
        )
    generator = np.random.default_rng(seed)
    shots = min(SHOTS, len(given))
    beginning, ending = (common_beginning(given), common_ending(given)) if given else ("", "")
    longest = min(TOKENS, 2 * max((len(tokenizer(text).input_ids) for text in given), default=TOKENS) + 8)
    if not given:  # nothing says how long prompts are, and an answer has to fit behind them
        context = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 4 * TOKENS
        longest = min(longest, context // 4)
    effort = EFFORT if given else longest
    # Decoded together: many tokenizers drop the space before what they decode first.
    before = list(tokenizer(beginning, add_special_tokens=False).input_ids) if beginning else []
    found: dict[str, None] = {}
    spent = 0
    while len(found) < count and spent < effort * count:
        texts: list[str] = []
        end = ""
        for _ in range(max(1, min(batch_size, count) // ALIKE)):
            chosen: list[int] = generator.permutation(len(given))[:shots].tolist()
            text, end = _opened(tokenizer, [(given[i], answers[i]) for i in chosen])
            texts += [_begun(tokenizer, text + beginning)] * ALIKE
        written = continued(
            model, tokenizer, texts, longest, batch_size=batch_size, temperature=1.0, seed=seed + spent, special=False
        )
        spent += sum(len(ids) for ids in written) or len(written)
        finished = (_finished(tokenizer.decode(before + ids), end, ending) for ids in written)
        more = [text for text in finished if text and not any(token in text for token in tokenizer.all_special_tokens)]
        new = [text for text in dict.fromkeys(more) if text not in {*found, *given, beginning.strip()}]
        new = new[: count - len(found)]
        found |= dict.fromkeys(new)
        if advance is not None:
            advance(len(new))
    return list(found)


def _begun(tokenizer: Any, text: str) -> str:
    """Return a text that has a token to go on from."""
    if tokenizer(text, add_special_tokens=False).input_ids:
        return text
    first = tokenizer.bos_token or tokenizer.eos_token
    if first is None:
        raise InputError("the chat template begins a conversation with no token; give prompts to begin with")
    return first


def _finished(text: str, end: str, ending: str) -> str:
    """Return a written turn up to its end, with the ending that the given ones share; empty if it has no end."""
    turn, over, _ = text.partition(end)
    if ending:
        begun = _opening(ending).search(turn)
        return turn[: begun.start()].lstrip() + ending if begun else ""
    return turn.strip() if over else ""


def _opening(ending: str) -> re.Pattern[str]:
    """Return what finds where an ending begins: all of it up to the end of its first word."""
    first = re.search(r"\w+", ending)
    opening = ending[: first.end()] if first else ending
    return re.compile((r"(?<!\w)" if opening[:1].isalnum() else "") + re.escape(opening) + (r"\b" if first else ""))


def common_beginning(given: Sequence[str]) -> str:
    """Return what all texts begin with, in whole words, if it is long enough to be more than chance."""
    # The first and the last in order differ as early as any two do.
    first, last = min(given), max(given)
    same = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    shared = first[:same]
    if any(text[same : same + 1].isalnum() for text in (first, last)):
        shared = shared.rstrip("".join(set(filter(str.isalnum, shared))))
    shared = shared.rstrip(" ")  # a tokenizer gives a space to the next word
    return shared if len(shared) >= SHARED else ""


def common_ending(given: Sequence[str]) -> str:
    """Return what all texts end with, in whole words, if it is long enough to be more than chance."""
    backwards = common_beginning([text.rstrip()[::-1] for text in given])
    return backwards[::-1]


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
