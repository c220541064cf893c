"""The sentences of an expert's card (its README.md) that are prose."""

import re
from pathlib import Path

from consilience.checkpoints.files import regular_size
from consilience.errors import InputError

#: A card says what an expert does near its top.
_READ = 32 << 10
#: Longer sentences are cut.
LONGEST = 400
_FEWEST_WORDS = 4
_FENCE = re.compile(r"^ {0,3}(?:```|~~~)")
_RULE = re.compile(r"^\s*(?:=+|-+)\s*$")
_HEADING = re.compile(r"^\s*#")
#: Tables, quotes, lists, pictures, badges and HTML say nothing in sentences; indented text is code.
_NOT_PROSE = re.compile(r"^(?:\s*(?:\||>|[-*+]\s|\d+[.)]\s|!\[|\[!\[|<)| {4}|\t)")
_END = re.compile(r"(?:(?<=[.!?])|(?<=[.!?][\"”')]))(?<!e\.g\.)(?<!i\.e\.)\s+(?=[\"“'(]?[A-ZÀ-Þ])")


def card_sentences(path: Path) -> list[str]:
    """Return the sentences of a Markdown card, in order, without front matter, headings, tables, lists and code.

    Raises:
        InputError: the file cannot be read.
    """
    regular_size(path)
    try:
        with path.open("rb") as file:
            text = file.read(_READ).decode("utf-8", errors="ignore")
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); check its permissions") from None
    found = [one for paragraph in _paragraphs(text) for one in sentences(_plain(paragraph))]
    return [one for one in found if len(one.split()) >= _FEWEST_WORDS]


def sentences(text: str) -> list[str]:
    """Return the sentences of running text: white space folded, and none longer than ``LONGEST`` characters."""
    parts = _END.split(" ".join(text.split()))
    return [part.strip()[:LONGEST] for part in parts if part.strip()]


def _paragraphs(text: str) -> list[str]:
    """Return paragraphs of prose, their lines joined."""
    found: list[str] = []
    lines: list[str] = []
    fenced = False
    for line in [*_body(text), ""]:
        fence = bool(_FENCE.match(line))
        if fence or fenced or not line.strip() or _HEADING.match(line):
            found, lines = [*found, _prose(lines)], []
        elif _RULE.match(line):
            lines = []  # what is underlined is a heading
        else:
            lines.append(line)
        fenced ^= fence
    return [one for one in found if one]


def _prose(lines: list[str]) -> str:
    """Return a paragraph up to where something else begins in it."""
    end = next((i for i, line in enumerate(lines) if _NOT_PROSE.match(line)), len(lines))
    return " ".join(lines[:end])


def _body(text: str) -> list[str]:
    """Return the lines after the front matter, without HTML comments."""
    lines = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL).splitlines()
    if lines and lines[0].strip() == "---":
        end = next((i for i, line in enumerate(lines[1:], 1) if line.strip() in ("---", "...")), 0)
        lines = lines[end + 1 :]
    return lines


def _plain(text: str) -> str:
    """Return text without Markdown's marks."""
    text = re.sub(r"!\[[^\]]*\]\([^)]*\)", "", text)
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text)
    return re.sub(r"<[^>]*>|[*`]+|(?<!\w)_+|_+(?!\w)", "", text)
