"""Results on disk: the same values, few lines, and a line per key and row."""

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from studies.json_rows import WIDTH, json_rows

plain = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
values = st.recursive(
    plain, lambda inner: st.lists(inner, max_size=6) | st.dictionaries(st.text(), inner, max_size=6), max_leaves=60
)


@given(values)
def test_reading_returns_what_was_written_in_the_same_order(value: Any) -> None:
    assert json.dumps(json.loads(json_rows(value))) == json.dumps(value)


def test_the_two_outer_levels_have_a_line_per_entry_and_short_ones_share_one() -> None:
    losses = [[1 / 3] * 30, [2 / 3] * 30]
    record = {"id": "a", "setting": {"seed": 1}, "result": {"name": "é", "losses": losses}}
    assert json_rows(record).splitlines() == [
        "{",
        '"id":"a",',
        '"setting":{"seed":1},',
        '"result":{',
        '"name":"é",',
        f'"losses":{json.dumps(losses, separators=(",", ":"))}',
        "}",
        "}",
    ]
    rows = {"rows": [{"net": "a", "seconds": [1 / 3] * 20}, {"net": "b", "seconds": []}]}
    first = json.dumps(rows["rows"][0], separators=(",", ":"))
    assert json_rows(rows).splitlines() == ["{", '"rows":[', f"{first},", '{"net":"b","seconds":[]}', "]", "}"]
    assert json_rows({"a": [1, 2]}) == '{"a":[1,2]}\n'


def test_keys_are_written_as_json_writes_them() -> None:
    value = {1: "x" * WIDTH, False: 2, None: 3, 0.5: 4, 'q"': {2: ["y" * WIDTH]}}
    assert json.loads(json_rows(value)) == json.loads(json.dumps(value))


def test_numbers_that_are_not_finite_are_refused_unless_allowed() -> None:
    with pytest.raises(ValueError, match="Out of range"):
        json_rows({"y": math.nan})
    assert math.isnan(json.loads(json_rows({"y": math.nan}, allow_nan=True))["y"])
    with pytest.raises(TypeError):
        json_rows({"y": {1, 2}})
