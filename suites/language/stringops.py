"""String operations: six things to do with the letters of a word.

Two of them are generators of reasoning-gym, which lends its words to the other four.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from suites.language.gym import SEED, generator
from suites.language.rows import Row, plain

N_EACH = 2000
"""How many items each operation gets, before words that recur are dropped."""


@dataclass(frozen=True)
class Operation:
    """An instruction, with ``{}`` in the place of the word, and the function that it asks for."""

    prompt: str
    apply: Callable[[str], str]


def without_vowels(word: str) -> str:
    """The word without a, e, i, o and u."""
    return re.sub("[aeiou]", "", word)


def alphabetical(word: str) -> str:
    """The letters of the word in alphabetical order."""
    return "".join(sorted(word))


OPERATIONS = (
    Operation('Write the word "{}" in capital letters.', str.upper),
    Operation('Put the letters of the word "{}" in alphabetical order.', alphabetical),
    Operation('Spell the word "{}" with hyphens between its letters.', "-".join),
    Operation('Write the word "{}" without its vowels.', without_vowels),
)
"""The operations for which reasoning-gym has no generator."""


def operation_rows(words: Iterable[str], n_each: int) -> Iterator[Row]:
    """``n_each`` rows for each of ``OPERATIONS``, on different words drawn with a seed."""
    usable = sorted(
        {word.lower() for word in words if re.fullmatch("[A-Za-z]+", word) and without_vowels(word.lower())}
    )
    drawn = Random(SEED).sample(usable, n_each * len(OPERATIONS))
    for i, word in enumerate(drawn):
        operation = OPERATIONS[i % len(OPERATIONS)]
        yield Row(word, operation.prompt.format(word), operation.apply(word))


def backward_rows(items: Iterable[dict[str, Any]]) -> Iterator[Row]:
    """A row for each item of ``spell_backward``."""
    for item in items:
        yield Row(plain(item["metadata"]["word"]), item["question"], item["answer"])


def counting_rows(items: Iterable[dict[str, Any]]) -> Iterator[Row]:
    """A row for each item of ``letter_counting``."""
    for item in items:
        yield Row(plain(" ".join(item["metadata"]["span"])), item["question"], item["answer"])


def stringops_rows(_work: Path) -> Iterator[Row]:
    """Words of three to seven letters; for counting, up to three words in a row of a story.

    No word and no phrase comes twice, so that training does not tell how a word of the test rows is spelled.
    """
    backward = generator("algorithmic.spell_backward", N_EACH, max_word_len=7)
    yield from backward_rows(backward)
    yield from counting_rows(generator("algorithmic.letter_counting", N_EACH, min_words=1, max_words=3))
    yield from operation_rows(backward.words, N_EACH)
