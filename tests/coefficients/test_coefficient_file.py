"""A coefficients file comes back bit for bit, or ends in one line that names the file."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from consilience.coefficients import (
    Coefficients,
    Trimmed,
    constant,
    is_coefficients,
    load_coefficients,
    make_groups,
    save_coefficients,
)
from consilience.errors import InputError

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
floats = st.floats(allow_nan=False, allow_infinity=False)
facts = st.dictionaries(
    text, st.recursive(st.none() | st.booleans() | st.integers() | floats | text, st.lists, max_leaves=5), max_size=4
)


@st.composite
def coefficients(draw: st.DrawFn) -> Coefficients:
    tensors = draw(st.lists(st.tuples(text, st.integers(1, 1 << 40)), max_size=5, unique_by=lambda t: t[0]))
    grouping = draw(st.sampled_from(["global", "tensor", "module"]))
    groups = make_groups(tensors, grouping, lambda name: len(name) % 4)
    experts = tuple(draw(st.lists(text, min_size=1, max_size=3, unique=True)))
    count = sum(group.chunks for group in groups)
    values = draw(st.lists(floats, min_size=len(experts) * count, max_size=len(experts) * count))
    trimmed = draw(st.none() | st.builds(Trimmed, st.floats(0.01, 1), st.booleans()))
    alpha = np.array(values, np.float64).reshape(len(experts), count)
    return Coefficients(experts, groups, alpha, trimmed, draw(facts))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("files")


@settings(deadline=None)
@given(made=coefficients(), form=st.sampled_from(["folder", "new/folder", "v1.2", "x.safetensors", "y.json"]))
def test_saved_and_loaded_are_the_same_bits(place: Path, made: Coefficients, form: str) -> None:
    save_coefficients(place / form, made)
    assert is_coefficients(place / form)
    found = load_coefficients(place / form)
    assert (found.experts, found.groups, found.trimmed, found.facts) == (
        made.experts,
        made.groups,
        made.trimmed,
        made.facts,
    )
    assert found.alpha.dtype == np.float64
    assert found.alpha.shape == made.alpha.shape
    assert found.alpha.tobytes() == made.alpha.tobytes()
    assert not list(place.rglob("*.partial"))


def small() -> Coefficients:
    groups = make_groups([("x", 4), ("y", 2)], "tensor", lambda name: 2 if name == "x" else 0)
    return constant(["a", "b"], groups, [0.5, -0.25], method="m")


def test_other_programs_read_it(tmp_path: Path) -> None:
    save_coefficients(tmp_path, small())
    np.testing.assert_array_equal(load_file(tmp_path / "coefficients.safetensors")["alpha"], [[0.5] * 3, [-0.25] * 3])
    document = json.loads((tmp_path / "coefficients.json").read_text())
    assert document == {
        "format": 1,
        "experts": ["a", "b"],
        "groups": [
            {"name": "x", "tensors": [["x", 4]], "chunks": 2, "learned": True},
            {"name": "y", "tensors": [["y", 2]], "chunks": 1, "learned": False},
        ],
        "facts": {"method": "m"},
    }


def test_every_way_to_name_one(tmp_path: Path) -> None:
    inner = tmp_path / "merged" / "consilience"
    save_coefficients(inner, small())
    for path in (inner, inner / "coefficients.json", inner / "coefficients.safetensors"):
        assert is_coefficients(path)
        assert load_coefficients(path).experts == ("a", "b")
    # An output folder is a model first; its coefficients can be loaded by its name all the same.
    assert not is_coefficients(tmp_path / "merged")
    assert load_coefficients(tmp_path / "merged").experts == ("a", "b")
    # A folder's own coefficients go before those of a folder inside it.
    save_coefficients(tmp_path / "merged" / "coefficients.json", small().with_alpha(np.zeros((2, 3))))
    assert not load_coefficients(tmp_path / "merged").alpha.any()


def test_what_is_no_coefficients_file(tmp_path: Path) -> None:
    save_file({"w": np.ones(2)}, tmp_path / "model.safetensors")
    (tmp_path / "model.json").write_text("{}")
    (tmp_path / "coefficients.json").write_text("{}")
    (tmp_path / "bad.safetensors").write_text("no header")
    (tmp_path / "bad.json").write_text("{}")
    names = ["model.safetensors", "model.json", "coefficients.json", "bad.json", "gone", "a\0b", "n" * 5000, "", "/"]
    assert [name for name in names if is_coefficients(tmp_path / name if name else name)] == []
    for name in ("gone", "coefficients.json", "n" * 5000):
        with pytest.raises(InputError, match="coefficients"):
            load_coefficients(tmp_path / name)


def test_nothing_is_written_when_saving_fails(tmp_path: Path) -> None:
    save_coefficients(tmp_path, small())
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(InputError, match="NaN or Inf"):
        save_coefficients(tmp_path, small().with_alpha(np.full((2, 3), np.nan)))
    with pytest.raises(ValueError, match="JSON compliant"):
        save_coefficients(tmp_path, small().with_alpha(np.ones((2, 3)), loss=float("nan")))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def changed(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """Return the damage that edits the parsed JSON."""

    def damage(folder: Path) -> None:
        document = json.loads((folder / "coefficients.json").read_text())
        change(document)
        (folder / "coefficients.json").write_text(json.dumps(document))

    return damage


def put(*path: Any, value: Any) -> Callable[[Path], None]:
    def change(document: dict[str, Any]) -> None:
        target: Any = document
        for key in path[:-1]:
            target = target[key]
        target[path[-1]] = value

    return changed(change)


def drop(*path: Any) -> Callable[[Path], None]:
    def change(document: dict[str, Any]) -> None:
        target: Any = document
        for key in path[:-1]:
            target = target[key]
        del target[path[-1]]

    return changed(change)


def tensors(**held: Any) -> Callable[[Path], None]:
    return lambda folder: save_file(held, folder / "coefficients.safetensors")


def bad_values(value: float) -> Callable[[Path], None]:
    alpha = np.ones((2, 3))
    alpha[1, 2] = value
    return tensors(alpha=alpha)


def raw(name: str, content: bytes) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / f"coefficients.{name}").write_bytes(content)

    return damage


ALPHA = np.ones((2, 3))
DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    **{f"no {key}": (drop(key), key) for key in ("format", "experts", "groups")},
    **{f"no groups.{key}": (drop("groups", 0, key), f"groups.0.{key}") for key in ("name", "tensors", "chunks")},
    **{
        f"{key} = {value!r}": (put(key, value=value), key)
        for key, values in {
            "format": ["1", 1.5, True, None, 2, -1],
            "experts": [[], "ab", [1, 2], None, {}],
            "groups": [{}, "x", [1], [[]], [{}], None],
            "facts": [[], None, "x", {"loss": float("nan")}, {"loss": [1, {"x": float("inf")}]}],
            "trimmed": [{}, [], 0.2, {"density": 0.5}, {"density": 0, "elect": True}, {"density": "1", "elect": True}],
            "surprise": [1],
        }.items()
        for value in values
    },
    **{
        f"groups.0.{key} = {value!r}": (put("groups", 0, key, value=value), word or "groups.0")
        for key, value, word in [
            ("name", 1, ""),
            ("name", "y", "'y' twice"),
            ("tensors", [], ""),
            ("tensors", ["x", 4], ""),
            ("tensors", [["x"]], ""),
            ("tensors", [["x", 4, 5]], ""),
            ("tensors", [["x", "4"]], ""),
            ("tensors", [["x", 4.0]], ""),
            ("tensors", [["x", True]], ""),
            ("tensors", [["x", 0]], ""),
            ("tensors", [["x", -4]], ""),
            ("tensors", [["x", 1 << 60]], ""),
            ("tensors", [[None, 4]], ""),
            ("tensors", [["y", 4]], "'y' twice"),
            ("tensors", [["x", 4], ["x", 4]], "'x' twice"),
            ("tensors", [["x", 1]], "more chunks"),
            ("chunks", 0, ""),
            ("chunks", -1, ""),
            ("chunks", "2", ""),
            ("chunks", 2.5, ""),
            ("chunks", True, ""),
            ("chunks", 5, "more chunks"),
            ("chunks", 10**400, ""),
            ("chunks", 3, "shape"),
            ("learned", "yes", ""),
            ("learned", 1, ""),
            ("learned", None, ""),
            ("extra", 1, ""),
        ]
    },
    "an expert too few": (put("experts", value=["a"]), "[1, 3]"),
    "an expert too many": (put("experts", value=["a", "b", "c"]), "[3, 3]"),
    "an expert twice": (put("experts", value=["a", "a"]), "'a' twice"),
    "no groups at all": (put("groups", value=[]), "[2, 0]"),
    "density NaN": (put("trimmed", value={"density": float("nan"), "elect": False}), "trimmed.density"),
    "density above 1": (put("trimmed", value={"density": 1.5, "elect": False}), "trimmed.density"),
    "NaN": (bad_values(np.nan), "NaN"),
    "Inf": (bad_values(-np.inf), "NaN or Inf"),
    "a row too many": (tensors(alpha=np.ones((3, 3))), "shape [3, 3]"),
    "a column too few": (tensors(alpha=np.ones((2, 2))), "shape [2, 2]"),
    "flat": (tensors(alpha=np.ones(6)), "'alpha'"),
    "a third dimension": (tensors(alpha=np.ones((2, 3, 1))), "'alpha'"),
    "float32": (tensors(alpha=ALPHA.astype(np.float32)), "float64"),
    "another name": (tensors(beta=ALPHA), "'alpha'"),
    "two tensors": (tensors(alpha=ALPHA, beta=ALPHA), "'alpha'"),
    "no tensors": (raw("safetensors", struct.pack("<Q", 2) + b"{}"), "no tensors"),
    "an empty file": (raw("safetensors", b""), "truncated"),
    "a truncated file": (lambda f: _truncate(f / "coefficients.safetensors"), "truncated"),
    "no JSON": (raw("json", b"{"), "JSON"),
    "empty JSON": (raw("json", b""), "JSON"),
    "a JSON list": (raw("json", b"[]"), "not an object"),
    "not UTF-8": (raw("json", b'{"\xff": 1}'), "JSON"),
    "a key twice": (raw("json", b'{"format": 1, "format": 1}'), "twice"),
    "deep JSON": (raw("json", b'{"facts": ' + b"[" * 5000 + b"]" * 5000 + b"}"), "json"),
    "a lone surrogate": (raw("json", b'{"experts": ["\\ud800"]}'), "JSON"),
    "no safetensors": (lambda f: (f / "coefficients.safetensors").unlink(), "side by side"),
    "no json": (lambda f: (f / "coefficients.json").unlink(), "side by side"),
}


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=list(DAMAGE))
def test_a_malformed_file_is_one_line(tmp_path: Path, damage: tuple[Callable[[Path], None], str]) -> None:
    save_coefficients(tmp_path, small())
    load_coefficients(tmp_path)
    damage[0](tmp_path)
    with pytest.raises(InputError) as caught:
        load_coefficients(tmp_path)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path}/coefficients.")
    assert "\n" not in message
    assert damage[1] in message


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | text,
    lambda v: st.lists(v, max_size=3) | st.dictionaries(text, v, max_size=3),
    max_leaves=6,
)
group_entries = st.fixed_dictionaries(
    {},
    optional={
        "name": text | json_values,
        "tensors": st.lists(st.tuples(text, st.integers(-1, 5)), max_size=3) | json_values,
        "chunks": st.integers(-1, 4) | json_values,
        "learned": st.booleans() | json_values,
    },
)


@settings(max_examples=200, deadline=None)
@given(
    document=st.fixed_dictionaries(
        {},
        optional={
            "format": st.just(1) | json_values,
            "experts": st.lists(text, max_size=3) | json_values,
            "groups": st.lists(group_entries, max_size=3) | json_values,
            "facts": json_values,
            "trimmed": json_values,
        },
    )
)
@example({"format": 1, "experts": ["a", "b"], "groups": [{"name": "g", "tensors": [["x", 9]], "chunks": 3}]})
def test_any_json_loads_or_ends_in_one_line(place: Path, document: dict[str, Any]) -> None:
    folder = place / "any"
    save_coefficients(folder, small())
    (folder / "coefficients.json").write_text(json.dumps(document))
    try:
        found = load_coefficients(folder)
    except InputError:  # always one line, whatever the file holds
        return
    assert found.alpha.shape == (len(found.experts), found.count)
    assert sum(len({p.index for p in pieces}) for pieces in found.pieces.values()) >= found.count
    save_coefficients(folder, found)


def test_a_terminal_is_safe_from_names(tmp_path: Path) -> None:
    save_coefficients(tmp_path, small())
    put("groups", 0, "\x1b[31m\n", value=1)(tmp_path)
    with pytest.raises(InputError) as caught:
        load_coefficients(tmp_path)
    assert str(caught.value).isprintable()
