"""The quick ways through headers say what the thorough ones say."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from consilience.checkpoints import lora_names
from consilience.checkpoints.adapter_files import adapter_files
from consilience.checkpoints.safetensors_file import _entry, _plain_entry, may_hold_factors  # pyright: ignore[reportPrivateUsage]
from consilience.errors import InputError

SIZES = st.one_of(st.integers(-2, 5), st.sampled_from([1 << 59, 1 << 60, 1 << 64, True, False, 1.0, "1", None]))
ENTRIES = st.one_of(
    st.fixed_dictionaries(
        {"dtype": st.sampled_from(["F32", "BF16", "U8", "F4", "", 3, None]), "shape": st.lists(SIZES, max_size=4),
         "data_offsets": st.lists(SIZES, max_size=3)},
        optional={"more": st.none()},
    ),
    st.sampled_from([None, [], 3, {}, {"dtype": "F32", "shape": 3, "data_offsets": [0, 4]}]),
)  # fmt: skip
WELL_FORMED = st.tuples(st.lists(st.integers(0, 5), max_size=4), st.integers(0, 9)).map(
    lambda drawn: {
        "dtype": "F32", "shape": drawn[0], "data_offsets": [drawn[1], drawn[1] + 4 * int(np.prod(drawn[0], dtype=int))],
    }
)  # fmt: skip


@given(ENTRIES)
def test_odd_entries_are_left_to_the_thorough_reader(raw: Any) -> None:
    quick = _plain_entry("x", raw, 100)
    try:
        thorough = _entry(Path("f"), "x", raw, 100)
    except InputError:
        assert quick is None
    else:
        assert quick in (None, thorough)


@given(WELL_FORMED)
def test_well_formed_entries_are_read_quickly(raw: Any) -> None:
    assert _plain_entry("x", raw, 100) == _entry(Path("f"), "x", raw, 100)


KINDS = {"like": lora_names._LIKE, **lora_names._OTHER_KINDS}  # pyright: ignore[reportPrivateUsage]


@pytest.mark.parametrize("kind", list(KINDS))
@given(data=st.data())
def test_every_name_of_a_factor_hints_at_it(kind: str, data: st.DataObject) -> None:
    name = data.draw(st.from_regex(KINDS[kind]))
    assert lora_names.hints_at_factors(name)
    assert lora_names.first_factor(["model.w", name]) == name


def test_names_that_json_escapes_are_read(tmp_path: Path) -> None:
    """``\\u006c`` is an l: a header may spell a factor's name so."""
    names = ["base_model.model.q.lora_A.weight", "base_model.model.q.lora_B.weight"]
    file = tmp_path / "x.safetensors"
    save_file({name: np.ones((2, 2), np.float32) for name in names}, file)
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    text = json.dumps(json.loads(raw[8 : 8 + length])).replace("lora", "\\u006cora").encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])
    assert b"lora" not in file.read_bytes()
    assert may_hold_factors(file)
    assert adapter_files(file) is not None


def test_a_model_s_header_is_not_taken_for_an_adapter_s(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    save_file({"model.layers.0.q.weight": np.ones((2, 2), np.float32)}, file)
    assert not may_hold_factors(file)
    assert adapter_files(file) is None
    file.write_bytes(file.read_bytes()[:20])  # what cannot be read is the thorough reader's to refuse
    assert may_hold_factors(file)
