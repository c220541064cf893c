"""Sentences of cards."""

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from consilience.errors import InputError
from consilience.routing.instructions.card import LONGEST, card_sentences, sentences
from suites.language import DOMAINS, adapter_path

CARD = """---
license: apache-2.0
description: Front matter is no prose at all.
---
# A heading that looks like a sentence.
<!-- A comment that nobody
is meant to read. -->
![badge](https://example.org/a-picture.svg) This line is a picture and its words.

Underlined words are a heading too
==================================

- A list item is not what we look for.
1. Nor is a numbered one, ever.
> Nor is what others have said.

| a table | has no sentences. |
|---|---|

```python
print("Code is not prose either. Not at all.")
```

    Indented text is code as well.

It turns **plain** [English](https://example.org) into `SQL` for
snake_case tables, e.g. of shops. Short one. It was trained on 3.5 million rows!
| and then | a table |
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "README.md"
    path.write_text(text, encoding="utf-8")
    return path


def test_only_prose_is_read(tmp_path: Path) -> None:
    assert card_sentences(write(tmp_path, CARD)) == [
        "It turns plain English into SQL for snake_case tables, e.g. of shops.",
        "It was trained on 3.5 million rows!",
    ]


def test_prose_may_follow_a_heading_at_once(tmp_path: Path) -> None:
    assert card_sentences(write(tmp_path, "# Title\nIt answers questions on maps.\n")) == [
        "It answers questions on maps."
    ]


@pytest.mark.parametrize("domain", DOMAINS)
def test_cards_of_the_suite_say_what_their_expert_does(domain: str) -> None:
    first, second, *_ = card_sentences(adapter_path(domain) / "README.md")
    assert first.startswith("One of the four core experts")
    assert second.startswith("It answers one kind of instruction:")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(alphabet=st.sampled_from("aB.!? \n#`~|<>-[]()*_\t1é") | st.characters(codec="utf-8"), max_size=300))
def test_any_text_is_a_card(tmp_path: Path, text: str) -> None:
    path = tmp_path / "README.md"
    path.write_bytes(text.encode())
    for one in card_sentences(path):
        assert one == one.strip()
        assert "\n" not in one
        assert len(one) <= LONGEST


@given(
    st.lists(st.sampled_from(["It sorts words.", "Does it rhyme?", "Add, e.g. A to 3.5 B.", "(It is done.)", "Why?"]))
)
def test_sentences_are_cut_where_they_end(parts: list[str]) -> None:
    assert sentences("  ".join(parts)) == parts


def test_bytes_that_are_no_text_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    path.write_bytes(b"\xff\xfeIt answers one kind of question.\n")
    assert card_sentences(path) == ["It answers one kind of question."]


def test_a_missing_card_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"README\.md: cannot be read"):
        card_sentences(tmp_path / "README.md")
