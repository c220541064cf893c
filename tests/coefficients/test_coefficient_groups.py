"""Groups and chunks partition the elements they are said to: against index arrays, element by element."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from consilience.coefficients import Coefficients, boundaries, constant, expand, fit, make_groups, pieces_of
from consilience.coefficients.groups import GROUPINGS, REST, Group, group_namer
from consilience.errors import InputError

sizes = st.lists(st.integers(1, 40), min_size=1, max_size=6)


def owners(group: Group) -> dict[str, list[int]]:
    """Return, for every element of every tensor, the coefficient that the definition gives it."""
    numel = sum(n for _, n in group.tensors)
    found: dict[str, list[int]] = {}
    position = 0
    for name, held in group.tensors:
        # Element e of the group is in chunk i with floor(i n / m) <= e < floor((i + 1) n / m).
        found[name] = [
            group.first
            + next(i for i in range(group.chunks) if i * numel // group.chunks <= e < (i + 1) * numel // group.chunks)
            for e in range(position, position + held)
        ]
        position += held
    return found


@given(numel=st.integers(1, 2000), data=st.data())
def test_chunks_partition_a_tensor_and_none_is_empty(numel: int, data: st.DataObject) -> None:
    chunks = data.draw(st.integers(1, numel))
    edges = boundaries(numel, chunks)
    assert (edges[0], edges[-1], len(edges)) == (0, numel, chunks + 1)
    lengths = np.diff(edges)
    assert lengths.min() >= 1
    assert lengths.max() - lengths.min() <= 1
    values = np.arange(numel)
    parts = [values[a:b] for a, b in pairwise(edges)]
    np.testing.assert_array_equal(np.concatenate(parts), values)


@given(held=sizes, data=st.data())
def test_pieces_of_several_tensors_are_the_definition_element_by_element(held: list[int], data: st.DataObject) -> None:
    chunks = data.draw(st.integers(1, sum(held)))
    group = Group("g", tuple((f"t{i}", n) for i, n in enumerate(held)), chunks, data.draw(st.integers(0, 9)))
    expected = owners(group)
    pieces = pieces_of(group)
    assert list(pieces) == [name for name, _ in group.tensors]
    for name, numel in group.tensors:
        got: list[int] = []
        for piece in pieces[name]:
            assert piece.start == len(got)
            assert piece.stop > piece.start
            got += [piece.index] * (piece.stop - piece.start)
        assert got == expected[name]
        assert len(got) == numel
    # Every coefficient acts on something (the ceil-sized pieces of the public code leave some dead).
    used = {piece.index for found in pieces.values() for piece in found}
    assert used == set(range(group.first, group.first + chunks))


names = st.lists(
    st.sampled_from(
        [f"model.layers.{i}.{part}" for i in (0, 1, 10) for part in ("attn.q.weight", "attn.q.bias", "mlp.up.weight")]
        + ["model.embed.weight", "norm.weight", "norm.bias", "logit_scale", "h.3.ln.weight", "0.weight", "a.7"]
    ),
    unique=True,
    min_size=1,
)


@given(
    tensors=names.flatmap(
        lambda n: st.tuples(st.just(n), st.lists(st.integers(0, 9), min_size=len(n), max_size=len(n)))
    ),
    grouping=st.sampled_from([*GROUPINGS, r"re:layers\.(\d+)", "re:q|up", r"re:(\d+).*(weight|bias)"]),
    wanted=st.integers(-1, 12),
)
def test_groups_hold_every_tensor_once_and_number_their_coefficients(
    tensors: tuple[list[str], list[int]], grouping: str, wanted: int
) -> None:
    given_tensors = list(zip(*tensors, strict=True))
    groups = make_groups(given_tensors, grouping, lambda name: wanted)
    assert sorted(t for g in groups for t in g.tensors) == sorted(t for t in given_tensors if t[1])
    assert len({g.name for g in groups}) == len(groups)
    first = 0
    for group in groups:
        assert group.first == first
        assert group.chunks == max(1, min(wanted, group.numel))
        assert group.learned == (wanted > 0)
        first += group.chunks
        namer = group_namer(grouping)
        assert {namer(name) for name, _ in group.tensors} == {group.name}
        assert [name for name, _ in group.tensors] == [
            name for name, numel in given_tensors if numel and namer(name) == group.name
        ]


GROUPED = {
    "global": ["global", "global", "global", "global", "global", "global"],
    "block": ["model.layers.3", "model.layers.3", "model.norm", "logit_scale", "0", "h.1"],
    "module": ["model.layers.3.attn.q", "model.layers.3.attn.q", "model.norm", "logit_scale", "0", "h.1.e.2.w"],
    r"re:layers\.(\d+)\.(\w+)": ["3.attn", "3.attn", REST, REST, REST, REST],
    r"re:\bq\b|norm": ["q", "q", "norm", REST, REST, REST],
    r"re:(x)?norm|(q)": ["q", "q", "", REST, REST, REST],
}


@pytest.mark.parametrize("grouping", list(GROUPED))
def test_names_of_groups(grouping: str) -> None:
    tensors = [
        "model.layers.3.attn.q.weight",
        "model.layers.3.attn.q.bias",
        "model.norm.weight",
        "logit_scale",
        "0.weight",
        "h.1.e.2.w.b",
    ]
    assert [group_namer(grouping)(name) for name in tensors] == GROUPED[grouping]
    assert [group_namer("tensor")(name) for name in tensors] == tensors


HOSTILE = [
    "",
    ".",
    "..",
    "..weight",
    "0",
    ".0.",
    "٣.w",
    "²..w",
    "a\nb.1.w",
    "9999999999.w",
    "\x1b[31m",
    "x" * 9999,
    "$_^",
]


@pytest.mark.parametrize("grouping", [*GROUPINGS, r"re:(\d+)"])
def test_hostile_names_are_grouped_without_loss(grouping: str) -> None:
    groups = make_groups([(name, 3) for name in HOSTILE], grouping)
    assert sorted(name for g in groups for name, _ in g.tensors) == sorted(HOSTILE)


@pytest.mark.parametrize("grouping", ["tensors", "", "re:(", "re:a{99999999999999999999}", "re:" + "(" * 9999])
def test_a_wrong_grouping_is_one_line(grouping: str) -> None:
    with pytest.raises(InputError, match="grouping") as caught:
        group_namer(grouping)
    assert "\n" not in str(caught.value)


def elements(coefficients: Coefficients) -> dict[str, Any]:
    """Return every element's coefficients [K, numel] by tensor."""
    return {
        name: coefficients.alpha[:, index] for group in coefficients.groups for name, index in owners(group).items()
    }


@given(held=sizes, data=st.data())
def test_expand_is_the_mean_over_elements(held: list[int], data: st.DataObject) -> None:
    tensors = [(f"b.{i % 2}.t{i}", n) for i, n in enumerate(held)]
    draw = st.integers(0, 6)
    counts = {grouping: data.draw(draw) for grouping in ("old", "new")}
    grouping = st.sampled_from(["global", "block", "tensor"])
    old = make_groups(tensors, data.draw(grouping), lambda name: counts["old"])
    new = make_groups(tensors, data.draw(grouping), lambda name: counts["new"])
    count = sum(g.chunks for g in old)
    alpha = np.random.default_rng(data.draw(st.integers(0, 99))).normal(size=(2, count))
    source = Coefficients(("a", "b"), old, alpha, facts={"steps": 3})
    result = expand(source, new)
    assert result.facts == {"steps": 3}
    values = elements(source)
    indices = {name: index for group in new for name, index in owners(group).items()}
    for number in range(result.count):
        covered = np.concatenate([values[n][:, np.array(index) == number] for n, index in indices.items()], axis=1)
        np.testing.assert_allclose(result.alpha[:, number], covered.mean(axis=1), rtol=1e-12, atol=1e-15)


@given(held=sizes, chunks=st.integers(0, 30), seed=st.integers(0, 99))
def test_cutting_a_group_keeps_every_element_to_the_bit(held: list[int], chunks: int, seed: int) -> None:
    tensors = [(f"b.{i % 2}.t{i}", n) for i, n in enumerate(held)]
    old = make_groups(tensors, "block")
    alpha = np.random.default_rng(seed).normal(size=(3, len(old)))
    source = Coefficients(("a", "b", "c"), old, alpha)
    result = expand(source, make_groups(tensors, "block", lambda name: chunks))
    back = expand(result, old)
    after = elements(result)
    for name, values in elements(source).items():
        np.testing.assert_array_equal(after[name], values)
    np.testing.assert_array_equal(back.alpha, alpha)


@given(held=sizes, seed=st.integers(0, 99), chunks=st.integers(1, 12))
def test_chunk_coefficients_that_are_equal_act_as_one(held: list[int], seed: int, chunks: int) -> None:
    """B8: with one chunk, or equal coefficients in all, the chunked merge is the layer-wise one."""
    rng = np.random.default_rng(seed)
    tensors = [(f"t{i}", n) for i, n in enumerate(held)]
    tau = {name: rng.normal(size=(2, n)) for name, n in tensors}
    layerwise = Coefficients(("a", "b"), make_groups(tensors, "tensor"), rng.normal(size=(2, len(held))))
    one = expand(layerwise, make_groups(tensors, "tensor", lambda name: 1))
    assert one.groups == layerwise.groups
    np.testing.assert_array_equal(one.alpha, layerwise.alpha)
    many = expand(layerwise, make_groups(tensors, "tensor", lambda name: chunks))
    for number, (name, _) in enumerate(tensors):
        merged = np.concatenate(
            [(tau[name][:, p.start : p.stop] * many.alpha[:, p.index, None]).sum(axis=0) for p in many.pieces[name]]
        )
        np.testing.assert_array_equal(merged, (tau[name] * layerwise.alpha[:, number, None]).sum(axis=0))
        np.testing.assert_array_equal(many.of(name), np.repeat(layerwise.of(name), len(many.pieces[name]), axis=1))


@given(numel=st.integers(1, 300), data=st.data())
def test_every_coefficient_of_a_chunked_tensor_has_a_gradient(numel: int, data: st.DataObject) -> None:
    chunks = data.draw(st.integers(1, numel))
    (group,) = make_groups([("w", numel)], "tensor", lambda name: chunks)
    gradient = np.zeros(group.chunks)
    for piece in pieces_of(group)["w"]:
        gradient[piece.index] += np.ones(numel)[piece.start : piece.stop] @ np.ones(piece.stop - piece.start)
    assert (gradient > 0).all()
    assert gradient.sum() == numel


def test_expand_refuses_other_tensors() -> None:
    source = constant(["a"], make_groups([("x", 4), ("y", 2)], "tensor"), [1.0])
    for tensors in ([("x", 4)], [("x", 4), ("y", 3)], [("x", 4), ("y", 2), ("z", 1)]):
        with pytest.raises(ValueError, match=r"'[xyz]'"):
            expand(source, make_groups(tensors, "tensor"))


def test_shapes_are_checked() -> None:
    groups = make_groups([("x", 4), ("y", 2)], "tensor", lambda name: 2)
    with pytest.raises(ValueError, match="shape"):
        constant(["a", "b"], groups, [1.0])
    with pytest.raises(ValueError, match="shape"):
        Coefficients(("a",), groups, np.zeros((1, 3)))
    coefficients = constant(["a"], groups, [1.0], method="m")
    with pytest.raises(ValueError, match="shape"):
        coefficients.with_alpha(np.zeros((1, 3)))
    values = np.arange(4.0)[None]
    changed = coefficients.with_alpha(values, steps=2)
    values += 1
    assert changed.alpha.tolist() == [[0, 1, 2, 3]]
    assert changed.facts == {"method": "m", "steps": 2}
    assert coefficients.facts == {"method": "m"}
    assert coefficients.alpha.tolist() == [[1, 1, 1, 1]]


def test_which_coefficients_are_learned() -> None:
    chunks = {"x": 2, "y": 0, "z": 1}
    groups = make_groups([("x", 4), ("y", 2), ("z", 1)], "tensor", chunks.__getitem__)
    assert constant(["a"], groups, [1.0]).learned.tolist() == [True, True, False, True]


@given(st.permutations(["a", "b", "c", "d"]), st.permutations(["a", "b", "c", "d"]))
def test_fit_orders_the_rows(stored: list[str], wanted: list[str]) -> None:
    groups = make_groups([("x", 4)], "tensor", lambda name: 2)
    alpha = np.array([[ord(name), -ord(name)] for name in stored], float)
    fitted = fit(Coefficients(tuple(stored), groups, alpha), wanted, {"x": 4, "free": 9}, "here")
    assert fitted.experts == tuple(wanted)
    assert fitted.alpha.tolist() == [[ord(name), -ord(name)] for name in wanted]


WRONG: dict[str, tuple[list[str], dict[str, int], list[str], list[str]]] = {
    "an expert too many": (["a", "b", "c"], {"x": 4, "y": 2}, [], ["'c'", "has no coefficients"]),
    "an expert too few": (["a"], {"x": 4, "y": 2}, [], ["'b'", "not an expert"]),
    "an expert twice": (["a", "b", "b"], {"x": 4, "y": 2}, [], ["twice"]),
    "another expert": (["a", "c"], {"x": 4, "y": 2}, [], ["a, b"]),
    "a missing tensor": (["a", "b"], {"x": 4, "yy": 2}, [], ["'y'", "not in the base", "'yy'"]),
    "another size": (["a", "b"], {"x": 4, "y": 3}, [], ["'y'", "3 elements", "but 2"]),
    "a private tensor": (["a", "b"], {"x": 4, "y": 2}, ["y"], ["'y'", "private"]),
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=list(WRONG))
def test_fit_says_what_does_not_fit(wrong: tuple[list[str], dict[str, int], list[str], list[str]]) -> None:
    experts, tensors, frozen, words = wrong
    coefficients = constant(["a", "b"], make_groups([("x", 4), ("y", 2)], "tensor"), [1.0, 2.0])
    with pytest.raises(InputError) as caught:
        fit(coefficients, experts, tensors, "file.json", frozen=frozen)
    message = str(caught.value)
    assert message.startswith("file.json: ")
    assert [word for word in words if word not in message] == []


@given(numel=st.integers(1, 1 << 50), chunks=st.integers(1, 200))
def test_huge_tensors_are_cut_exactly(numel: int, chunks: int) -> None:
    assume(chunks <= numel)
    (group,) = make_groups([("w", numel)], "tensor", lambda name: chunks)
    pieces = pieces_of(group)["w"]
    assert sum(p.stop - p.start for p in pieces) == numel
    assert len(pieces) == chunks
