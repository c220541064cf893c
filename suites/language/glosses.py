"""Glosses: short definitions of English words, from WordNet."""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from suites.language.rows import Row
from suites.packages import debian_package

PACKAGE = "wordnet-base"
PARTS = {"noun": "noun", "verb": "verb", "adj": "adjective", "adv": "adverb"}
"""WordNet's names of the parts of speech, and ours."""

MAX_LENGTH = 60
"""The longest definition that is kept, in characters."""

_ALLOWED = re.compile(r"[a-z(][A-Za-z0-9 ,.'()/-]*")
_MARKED = re.compile(r"\b(slur|offensive|disparag|derogat|obscen|vulgar|ethnic|sexual|intercourse)", re.IGNORECASE)


@dataclass(frozen=True)
class Lemma:
    """A word as one part of speech: how many of its senses are tagged in WordNet's texts, and its first synset."""

    word: str
    part: str
    tagged: int
    offset: str


def parse_index(text: str, part: str) -> Iterator[Lemma]:
    """The entries of an index file (wndb(5)): plain words of 3 to 12 letters with a tagged sense.

    A line is ``lemma pos synsets n pointer*n senses tagged offset...``; the licence at the top is indented.
    """
    for line in text.splitlines():
        fields = line.split()
        if line.startswith(" ") or not re.fullmatch("[a-z]{3,12}", fields[0]):
            continue
        tagged, offset = fields[5 + int(fields[3]) : 7 + int(fields[3])]
        if int(tagged):
            yield Lemma(fields[0], part, int(tagged), offset)


def parse_glosses(text: str) -> dict[str, str]:
    """The gloss of every synset of a data file (wndb(5)), by its offset: what comes after the bar."""
    lines = (line for line in text.splitlines() if not line.startswith(" "))
    return {line[:8]: line.partition(" | ")[2].strip() for line in lines}


def definition(gloss: str) -> str | None:
    """The first definition of a gloss; none if it is long, has unusual signs, or marks the word as a rude one.

    A gloss is definitions and quoted examples, with semicolons between.
    """
    first = re.split(r';|\s"', gloss)[0].strip()
    balanced = first.count("(") == first.count(")")
    if not balanced or not 8 <= len(first) <= MAX_LENGTH or not _ALLOWED.fullmatch(first) or _MARKED.search(gloss):
        return None
    return first


def commonest(lemmas: Iterable[Lemma]) -> list[Lemma]:
    """One lemma for each word: the part of speech with the most tagged senses, the first of equals."""
    best: dict[str, Lemma] = {}
    for lemma in lemmas:
        if lemma.word not in best or lemma.tagged > best[lemma.word].tagged:
            best[lemma.word] = lemma
    return list(best.values())


def define_rows(lemmas: Iterable[Lemma], glosses: Mapping[tuple[str, str], str]) -> Iterator[Row]:
    """A row for each lemma with a usable definition; ``glosses`` go by part of speech and offset.

    The definition is the key: of two words that share one, only the first is kept, so that no answer is in two splits.
    """
    for lemma in lemmas:
        meaning = definition(glosses[lemma.part, lemma.offset])
        if meaning is not None:
            yield Row(meaning, f'Define the {PARTS[lemma.part]} "{lemma.word}" in a few words.', meaning)


def gloss_rows(work: Path) -> Iterator[Row]:
    """Word and part of speech to the first definition of its first sense."""
    folder = debian_package(PACKAGE, work) / "usr/share/wordnet"
    lemmas: list[Lemma] = []
    glosses: dict[tuple[str, str], str] = {}
    for part in PARTS:
        lemmas += parse_index((folder / f"index.{part}").read_text(encoding="utf-8"), part)
        data = parse_glosses((folder / f"data.{part}").read_text(encoding="utf-8"))
        glosses |= {(part, offset): gloss for offset, gloss in data.items()}
    yield from define_rows(commonest(lemmas), glosses)
