"""Any bytes are either a safetensors file, read as the safetensors library reads it, or an ``InputError``."""

import json
import struct
import tracemalloc
from math import prod
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from consilience.checkpoints import DTYPES, open_checkpoint
from consilience.checkpoints.safetensors_file import encode_header, read_header
from consilience.errors import InputError

Found = dict[str, tuple[str, list[int], bytes]]

SEED = save(
    {
        "model.layers.0.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
        "model.layers.0.bias": np.arange(3, dtype=np.float16),
        "half": np.arange(4).astype(ml_dtypes.bfloat16),
        "empty": np.zeros((0, 4), np.float32),
        "scalar": np.array(7, np.int64),
    },
    {"format": "pt"},
)
HEADER = 8 + struct.unpack("<Q", SEED[:8])[0]
#: What the JSON of a header is made of: single bytes that keep a mutated header close to well-formed.
TELLING = b'{}[],:"0123456789-eE.\\ \x00\xffFUI_'


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz") / "x.safetensors"


def by_us(path: Path) -> Found:
    """Every tensor of a file, through the public way in."""
    checkpoint = open_checkpoint(path)
    found = {
        name: (t.dtype.name, list(t.shape), checkpoint.read(name).tobytes()) for name, t in checkpoint.tensors.items()
    }
    checkpoint.storage.close()
    return found


def by_the_library(data: bytes) -> Found:
    return {name: (t["dtype"], list(t["shape"]), bytes(t["data"])) for name, t in safetensors.deserialize(data)}


def agrees(path: Path, data: bytes) -> bool:
    """Whether we read ``data``; if we do, the library must read the same tensors."""
    path.write_bytes(data)
    found, refused = None, ""
    try:
        found = by_us(path)
    except InputError as error:
        refused = str(error)
    if found is None:
        assert str(path) in refused
        return False
    if b"-0" not in data:  # JSON's other way to write the integer 0, which the library does not take
        assert found == by_the_library(data)
    return True


edits = st.lists(
    st.tuples(
        st.sampled_from(["replace", "insert", "delete", "double"]),
        st.one_of(st.integers(0, HEADER - 1), st.integers(0, len(SEED) - 1)),
        st.one_of(st.sampled_from(TELLING), st.integers(0, 255)),
    ),
    min_size=1,
    max_size=4,
)


def edited(data: bytes, changes: list[tuple[str, int, int]]) -> bytes:
    out = bytearray(data)
    for kind, at, byte in changes:
        at %= len(out)
        if kind == "replace":
            out[at] = byte
        elif kind == "insert":
            out.insert(at, byte)
        elif kind == "delete":
            del out[at]
        else:
            out[at:at] = out[at : at + 9]
    return bytes(out)


def fixed_length(data: bytes) -> bytes:
    """Make the length field true again, so that the mutation reaches the JSON."""
    end = data.rfind(b"}") + 1
    return struct.pack("<Q", max(end - 8, 0)) + data[8:]


def test_the_seed_is_read(path: Path) -> None:
    assert agrees(path, SEED)


@settings(max_examples=200, deadline=None)
@given(changes=edits)
def test_mutated_bytes(path: Path, changes: list[tuple[str, int, int]]) -> None:
    agrees(path, edited(SEED, changes))


@settings(max_examples=200, deadline=None)
@given(changes=edits)
def test_mutated_json(path: Path, changes: list[tuple[str, int, int]]) -> None:
    agrees(path, fixed_length(edited(SEED, [(kind, at % HEADER, byte) for kind, at, byte in changes])))


@settings(max_examples=100, deadline=None)
@given(length=st.integers(0, len(SEED) - 1))
def test_any_beginning_of_a_file_is_refused(path: Path, length: int) -> None:
    assert not agrees(path, SEED[:length])


@settings(max_examples=100, deadline=None)
@given(data=st.binary(max_size=200))
def test_any_bytes(path: Path, data: bytes) -> None:
    agrees(path, data)


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-2, 40)
    | st.integers()
    | st.floats()
    | st.sampled_from(["F32", "BF16", "I64", "F8_E4M3", "x", "dtype", "shape", "data_offsets"])
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)
entries = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "BF16", "I64", "F8_E4M3", "F4", "f32"]) | json_values,
        "shape": st.lists(st.integers(-1, 4) | st.just(2**60) | json_values, max_size=3) | json_values,
        "data_offsets": st.lists(st.integers(-1, 24) | json_values, min_size=2, max_size=2) | json_values,
        "more": json_values,
    },
)


@settings(max_examples=200, deadline=None)
@given(
    header=st.dictionaries(st.text(max_size=3) | st.just("__metadata__"), entries | json_values, max_size=3),
    data=st.binary(max_size=24),
)
def test_any_json_as_header(path: Path, header: dict[str, Any], data: bytes) -> None:
    text = json.dumps(header).encode()
    agrees(path, struct.pack("<Q", len(text)) + text + data)


names = st.text(st.characters(exclude_categories=["Cs"]), max_size=20).filter(lambda name: name != "__metadata__")
tensors = st.dictionaries(
    names,
    st.tuples(st.sampled_from(sorted(DTYPES)), st.lists(st.integers(0, 4), max_size=4).map(tuple), st.randoms()),
    min_size=1,
    max_size=6,
)


@settings(max_examples=200, deadline=None)
@given(specs=tensors, metadata=st.dictionaries(names, st.text(st.characters(exclude_categories=["Cs"]), max_size=9)))
def test_what_we_write_both_read(path: Path, specs: dict[str, Any], metadata: dict[str, str]) -> None:
    wanted: Found = {}
    for name, (code, shape, random) in specs.items():
        wanted[name] = (code, list(shape), random.randbytes(prod(shape) * DTYPES[code].itemsize))
    order = [(name, DTYPES[code], tuple(shape)) for name, (code, shape, _) in wanted.items()]
    header, offsets = encode_header(order, metadata)
    data = header + b"".join(raw for _, _, raw in wanted.values())
    assert agrees(path, data)
    found, held = read_header(path)
    assert held == metadata
    assert len(header) % 8 == 0
    assert {e.name: e.offset for e in found.values()} == dict(zip(wanted, offsets, strict=True))
    assert by_us(path) == wanted
    with safetensors.safe_open(path, "numpy") as file:
        assert set(file.keys()) == set(wanted)
        assert (file.metadata() or {}) == metadata


arrays = st.dictionaries(
    names,
    st.tuples(
        st.sampled_from(["float32", "float64", "float16", "int64", "int8", "uint8", "bool"]),
        st.lists(st.integers(0, 4), max_size=4).map(tuple),
        st.integers(0, 255),
    ),
    min_size=1,
    max_size=6,
)


@settings(max_examples=100, deadline=None)
@given(specs=arrays)
def test_what_the_library_writes_we_read(path: Path, specs: dict[str, tuple[str, tuple[int, ...], int]]) -> None:
    wanted = {name: np.full(shape, value % 2, dtype) for name, (dtype, shape, value) in specs.items()}
    path.write_bytes(save(wanted))
    found = by_us(path)
    assert {name: (shape, raw) for name, (_, shape, raw) in found.items()} == {
        name: (list(array.shape), array.tobytes()) for name, array in wanted.items()
    }


BOMBS: dict[str, tuple[bytes, int]] = {
    "a length of 2**63": (b"{}", 1 << 63),
    "a length of 99 MB": (b"{}", 99_000_000),
    "a size of 2**60": (b'{"x":{"dtype":"F32","shape":[1152921504606846976],"data_offsets":[0,4]}}', 0),
    "a span of 2**50": (b'{"x":{"dtype":"U8","shape":[1125899906842624],"data_offsets":[0,1125899906842624]}}', 0),
    "a product of many": (b'{"x":{"dtype":"U8","shape":[%s2],"data_offsets":[0,4]}}' % (b"999999999999," * 20_000), 0),
    "a number of 5000 digits": (b'{"x":{"dtype":"U8","shape":[%s],"data_offsets":[0,4]}}' % (b"9" * 5000), 0),
    "deep nesting": (b'{"x":' + b"[" * 100_000 + b"]" * 100_000 + b"}", 0),
    "a long name": (b'{"%s":1}' % (b"x" * 1_000_000), 0),
}


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_take_little_memory(path: Path, name: str) -> None:
    text, length = BOMBS[name]
    path.write_bytes(struct.pack("<Q", length or len(text)) + text + b"1234")
    tracemalloc.start()
    try:
        with pytest.raises(InputError) as caught:
            open_checkpoint(path)
        assert tracemalloc.get_traced_memory()[1] < 20_000_000 + 20 * len(text)
    finally:
        tracemalloc.stop()
    assert len(str(caught.value)) < 2000


def test_a_file_that_shrinks_after_it_was_opened_is_said(path: Path) -> None:
    path.write_bytes(SEED)
    checkpoint = open_checkpoint(path)
    path.write_bytes(SEED[: HEADER + 4])
    assert checkpoint.read("empty").size == 0
    with pytest.raises(InputError, match="'scalar': file ended while it was read"):
        checkpoint.read("scalar")
    checkpoint.storage.close()
