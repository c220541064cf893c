import json
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from consilience.errors import InputError
from consilience.tasks import Message, Row, Task, load_task, overlap, read_rows
from consilience.tasks.rows import default_name, parse_row

#: Hypothesis builds its tables of characters on first use, which takes seconds on a busy machine.
patient = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


def parsed_or_said(line: bytes | str) -> Row | str:
    """The row of a line, or what is said about it."""
    try:
        return parse_row(line, "f.jsonl:3")
    except InputError as error:
        return str(error)


text = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30)
plain_rows = st.one_of(
    st.fixed_dictionaries({"text": text}),
    st.fixed_dictionaries({"prompt": text}, optional={"response": text, "label": st.integers(), "image": text}),
    st.fixed_dictionaries(
        {
            "messages": st.lists(
                st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"]), "content": text}), min_size=1
            )
        }
    ),
)


@patient
@given(plain_rows)
def test_a_written_row_is_read_as_it_was(row: dict[str, Any]):
    read = parse_row(json.dumps(row))
    assert read.model_dump(exclude_none=True, mode="json") == row
    assert read == parse_row(json.dumps(row, ensure_ascii=False).encode())


@patient
@given(st.binary(max_size=60))
def test_any_bytes_are_a_row_or_one_line_of_error(line: bytes):
    outcome = parsed_or_said(line)
    assert isinstance(outcome, Row) or (outcome.startswith("f.jsonl:3: ") and "\n" not in outcome)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
keys = st.sampled_from(["text", "prompt", "response", "messages", "image", "label", "choices", "role", "content"])


@patient
@given(st.dictionaries(keys, json_values, max_size=4))
def test_any_json_object_is_a_row_or_one_line_of_error(value: dict[str, Any]):
    row = parsed_or_said(json.dumps(value))
    if isinstance(row, Row):
        assert sum(part is not None for part in (row.text, row.prompt, row.messages)) == 1
    else:
        assert row.startswith("f.jsonl:3: ")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"promt": "a"}', "unknown key 'promt'; did you mean 'prompt'?"),
        (
            '{"messages": [{"role": "user", "contents": "a"}]}',
            "unknown key 'messages.0.contents'; did you mean 'content'?",
        ),
        ('{"prompt": "a", "prompt": "b"}', "key 'prompt' appears twice"),
        ('{"text": "a", "label": NaN}', "NaN is not JSON"),
        ('{"text": "a", "label": -Infinity}', "-Infinity is not JSON"),
        ("", "blank line"),
        ("   ", "blank line"),
        ("[1]", "a JSON list, not an object"),
        ('{"text": "a"', "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ('{"label": ' + "1" * 5000 + ', "text": "a"}', "f.jsonl:1: "),
        ('{"text": "\\ud800"}', "text: holds half a surrogate pair"),
        ("{}", "none of text, prompt, messages"),
        ('{"text": "a", "prompt": "b"}', "both text and prompt"),
        ('{"text": "a", "response": "b"}', "response goes with prompt"),
        ('{"text": ""}', "text: String should have at least 1 character"),
        ('{"text": 3}', "text: is a number, and must be text"),
        ('{"text": "a", "label": true}', "label"),
        ('{"messages": []}', "messages is empty"),
        ('{"messages": [{"role": "human", "content": "a"}]}', "messages.0.role: Input should be 'system'"),
        ('{"prompt": "a", "choices": ["x", "y"]}', "choices need a label"),
        ('{"prompt": "a", "choices": ["x", "y"], "label": 2}', "label 2 is not an index into 2 choices"),
        ('{"prompt": "a", "choices": ["x", "y"], "label": -1}', "label -1 is not an index"),
        ('{"prompt": "a", "choices": ["yes", "no"], "label": "yess"}', "did you mean 'yes'?"),
        ('{"prompt": "a", "choices": ["x", "x"], "label": 0}', "all different"),
        ('{"prompt": "a", "choices": ["x", "y"], "label": 0, "response": "y"}', "response differs"),
        ('{"text": "a", "choices": ["x", "y"], "label": 0}', "choices go with prompt or messages"),
    ],
)
def test_a_wrong_row_is_one_line_that_names_file_line_and_mend(line: str, said: str, rows_file: Callable[..., Path]):
    path = rows_file(line)
    with pytest.raises(InputError) as caught:
        read_rows(path)
    message = str(caught.value).replace(str(path), "f.jsonl")
    assert message.startswith("f.jsonl:1: ")
    assert said in message


def test_the_line_is_counted_from_one(rows_file: Callable[..., Path]):
    with pytest.raises(InputError, match=r"rows\.jsonl:2: blank line"):
        read_rows(rows_file('{"text": "a"}', "", '{"text": "b"}'))


def test_bytes_that_are_not_utf8(tmp_path: Path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a"}\n{"text": "\xff"}\n')
    with pytest.raises(InputError, match=r"a\.jsonl:2: not UTF-8 at byte 10"):
        read_rows(path)


def test_byte_order_mark_windows_line_ends_and_unusual_separators(tmp_path: Path):
    path = tmp_path / "a.jsonl"
    path.write_bytes('\ufeff{"text": "a\u2028b"}\r\n{"text": "c"}'.encode())
    assert [row.text for row in read_rows(path)] == ["a\u2028b", "c"]


def test_files_that_hold_no_rows(tmp_path: Path):
    (tmp_path / "empty.jsonl").touch()
    for path, said in (
        ("empty.jsonl", "holds no rows"),
        ("emty.jsonl", "did you mean 'empty.jsonl'"),
        (".", "is a folder"),
    ):
        with pytest.raises(InputError, match=said):
            read_rows(tmp_path / path)
    with pytest.raises(InputError, match="regular"):
        read_rows("/dev/zero")


def test_gold_is_the_label_as_an_index():
    assert Row(prompt="p", choices=("a", "b"), label="b").gold == 1
    assert Row(prompt="p", choices=("a", "b"), label=0, response="a").gold == 0
    assert Row(prompt="p", label=3).gold is None


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("heldout/code/test.jsonl", "code"),
        ("heldout/code.jsonl", "code"),
        ("test.jsonl", "test"),
        ("data/Validation/test.jsonl", "test"),
        ("a/math/heldout/TEST.jsonl", "math"),
        ("code/part-1.jsonl", "part-1"),
    ],
)
def test_tasks_are_named_after_what_says_most(path: str, name: str):
    assert default_name(Path(path)) == name


def test_name_equals_path(rows_file: Callable[..., Path]):
    path = rows_file('{"text": "a"}', name="x=y/test.jsonl")
    assert load_task(f"mine={path}").name == "mine"
    assert load_task(str(path)).name == "x=y"  # a path that exists is a path
    assert load_task(path).where(4) == f"{path}:5"
    for bad in (f"a b={path}", f"={path}", "name="):
        with pytest.raises(InputError, match="NAME=PATH"):
            load_task(bad)


def test_digest_is_of_content(rows_file: Callable[..., Path]):
    a = load_task(rows_file('{"prompt": "a", "response": "b"}', name="a.jsonl"))
    b = load_task(rows_file('{"response":"b","prompt":"a"}', name="b.jsonl"))
    c = load_task(rows_file('{"prompt": "a", "response": "c"}', name="c.jsonl"))
    assert a.digest == b.digest != c.digest
    assert Task("t", (Row(prompt="a"), Row(prompt="b"))).digest != Task("t", (Row(prompt="b"), Row(prompt="a"))).digest


def test_overlap_sees_through_case_spacing_and_form():
    a = Task(
        "a",
        (
            Row(prompt="What  is\nTWO?", response="2"),
            Row(prompt="new", response="x"),
            Row(text="What is ﬁve? 5"),
            Row(prompt="picture", image="1.png"),
            Row(prompt="Tea or coffee?", choices=("tea", "coffee"), label=1),
        ),
    )
    b = Task(
        "b",
        (
            Row(prompt="unrelated"),
            Row(messages=(Message(role="system", content="s"), Message(role="user", content="what is two?"))),
            Row(prompt="What is five?", response="5"),
            Row(prompt="picture", image="2.png"),
            Row(text="tea or coffee? coffee"),
            Row(messages=(Message(role="assistant", content="hello"),)),
        ),
    )
    found = overlap(a, b)
    assert found.pairs == ((0, 1), (2, 2), (4, 4))
    assert (found.n_a, found.n_b, found.n_shared) == (5, 6, 3)
    assert overlap(b, a).pairs == ((1, 0), (2, 2), (4, 4))


@patient
@given(st.lists(st.text(string.ascii_letters, min_size=1, max_size=3), min_size=1, max_size=8))
def test_overlap_with_itself_is_everything(prompts: list[str]):
    task = Task("t", tuple(Row(prompt=p) for p in prompts))
    assert overlap(task, task).n_shared == len(prompts)
