"""A sequence's tokens as a reader sees them: their pieces of text, and whose words they are."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

Role = Literal["template", "prompt", "answer"]
#: What stands for bytes that are no whole character.
_UNFINISHED = "\N{REPLACEMENT CHARACTER}"
#: Most bytes, and so most tokens, of a character in UTF-8.
_LONGEST_CHARACTER = 4


@dataclass(frozen=True, slots=True)
class Token:
    """A token's piece of text, whose it is (the chat template's, the prompt's or the answer's), and if it is special.

    A character that several tokens make up is the last one's; the others have no text.
    """

    text: str
    role: Role
    special: bool = False


def pieces(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """Return each token's piece of the text that all of them decode to.

    A token is decoded behind the one before it: some tokenizers drop the space at the start of what they decode.
    """

    def decode(some: Sequence[int]) -> str:
        return str(tokenizer.decode(list(some), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    found: list[str] = []
    before, group = list[int](), list[int]()
    for place, token in enumerate(ids):
        group.append(token)
        known, text = decode(before), decode([*before, *group])
        whole = not text.endswith(_UNFINISHED) or len(group) == _LONGEST_CHARACTER or place == len(ids) - 1
        if not whole:
            found.append("")
            continue
        found.append(text[len(known) :] if text.startswith(known) else decode(group))
        before, group = group, []
    return found


def special_ids(tokenizer: Any) -> set[int]:
    """Return the ids of a tokenizer's special tokens, those that only a chat template uses among them."""
    added = {int(i) for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | {int(i) for i in tokenizer.all_special_ids}


def prompt_tokens(tokenizer: Any, ids: Sequence[int], prompt: str) -> tuple[Token, ...]:
    """Return the tokens of a prompt as a model is asked it; what is not in ``prompt`` is the template's.

    Where a tokenizer rewrites the text, so that the prompt is not found in it, all but special tokens are the prompt's.
    """
    special, texts = special_ids(tokenizer), pieces(tokenizer, ids)
    whole = "".join(texts)
    start = whole.rfind(prompt.strip())
    first, last = (start, start + len(prompt.strip())) if start >= 0 else (0, len(whole) + 1)
    found: list[Token] = []
    at = 0
    for i, text in zip(ids, texts, strict=True):
        inside = max(at + len(text), at + 1) > first and at < last
        at += len(text)
        found.append(Token(text, "prompt" if inside and i not in special else "template", i in special))
    return tuple(found)


def answer_tokens(tokenizer: Any, ids: Sequence[int]) -> tuple[Token, ...]:
    """Return the tokens of an answer."""
    special = special_ids(tokenizer)
    texts = pieces(tokenizer, ids)
    return tuple(Token(text, "answer", i in special) for i, text in zip(ids, texts, strict=True))
