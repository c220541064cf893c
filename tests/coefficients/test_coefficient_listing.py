"""What is said of coefficients: against means taken element by element."""

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from consilience.coefficients import Coefficients, Trimmed, constant, make_groups
from consilience.coefficients.listing import (
    Place,
    coefficient_facts,
    coefficient_lines,
    fold_kinds,
    place_of,
    short_kinds,
    tensor_means,
    thirds,
)

PLACES = {
    "model.layers.3.self_attn.q_proj.weight": Place("model.layers", 3, "self_attn.q_proj.weight"),
    "h.11.ln.weight": Place("h", 11, "ln.weight"),
    "0.weight": Place("", 0, "weight"),
    "blocks.2.experts.7.w1": Place("blocks", 2, "experts.7.w1"),
    "model.norm.weight": Place("", None, "model.norm.weight"),
    "layer1.conv.weight": Place("", None, "layer1.conv.weight"),
    "parameters.3": Place("", None, "parameters.3"),
    "": Place("", None, ""),
    "a\n.1.b\n": Place("a\n", 1, "b\n"),
    "x.9999999999.w": Place("", None, "x.9999999999.w"),
}


@pytest.mark.parametrize("name", list(PLACES))
def test_places(name: str) -> None:
    assert place_of(name) == PLACES[name]


def test_short_kinds() -> None:
    assert short_kinds(["attn.q.weight", "mlp.up.weight"]) == {"attn.q.weight": "q", "mlp.up.weight": "up"}
    assert short_kinds(["attn.c_proj.weight", "mlp.c_proj.weight", "mlp.c_proj.bias"]) == {
        "attn.c_proj.weight": "attn.c_proj",
        "mlp.c_proj.weight": "mlp.c_proj",
        "mlp.c_proj.bias": "bias",
    }
    assert short_kinds(["w", "w.weight"]) == {"w": "w", "w.weight": "weight"}
    assert short_kinds([".weight", "", "a" + ".b" * 10000]) == {".weight": "weight", "": "", "a" + ".b" * 10000: "b"}
    assert short_kinds([]) == {}


@given(st.lists(st.lists(st.sampled_from(["a", "b", "weight", ""]), max_size=4).map(".".join), unique=True))
def test_short_kinds_stay_distinct(kinds: list[str]) -> None:
    found = short_kinds(kinds)
    assert list(found) == kinds
    assert len(set(found.values())) == len(kinds)


def test_many_kinds_are_folded() -> None:
    few = ["experts.0.w", "experts.1.w"]
    assert fold_kinds(few) == {kind: kind for kind in few}
    many = [f"experts.{e}.w{k}.0" for e in range(20) for k in (1, 2)]
    assert fold_kinds(many) == {kind: f"experts.*.{kind.split('.')[2]}.*" for kind in many}


@pytest.mark.parametrize(
    ("blocks", "expected"),
    [(1, "m"), (2, "fl"), (3, "fml"), (4, "fmml"), (6, "ffmmll"), (7, "ffmmmll"), (30, "f" * 10 + "m" * 10 + "l" * 10)],
)
def test_thirds_of_the_depth(blocks: int, expected: str) -> None:
    # Only the order of the numbers counts, and every tower has its own.
    places = [Place("t", 5 * block, "w") for block in range(blocks)]
    others = [Place("u", block, "w") for block in range(1000)]
    found = thirds([*reversed(places), *others, Place("", None, "head")])
    assert "".join(found[place][0] for place in places) == expected
    assert found[Place("", None, "head")] == "outside blocks"


def made() -> Coefficients:
    tensors = [(f"model.layers.{i}.{n}.weight", 6 + 4 * i) for i in range(3) for n in ("attn.q", "mlp.up")]
    tensors.append(("model.norm.weight", 5))
    groups = make_groups(tensors, "tensor", lambda name: 3 if "mlp" in name else 0 if "norm" in name else 1)
    alpha = np.random.default_rng(0).normal(size=(2, sum(g.chunks for g in groups)))
    parameters = {"gamma": 0.8, "exclude": ["official"], "T": None} | {f"p{i}": i for i in range(30)}
    more = {"lr": 0.02, "objective": "alignment", "parameters": parameters, "chunks": {f"g{i}": 1 for i in range(99)}}
    facts = {
        "method": "expert_merging_pp",
        "steps": 40,
        "samples": {"a": 8},
        "excluded": ["x", "y"],
        "loss": [0.1] * 50,
    }
    return Coefficients(("a", "b"), groups, alpha, Trimmed(0.2, True), facts | more)


def dense(coefficients: Coefficients, tensor: str) -> Any:
    pieces = coefficients.pieces[tensor]
    return np.concatenate(
        [np.repeat(coefficients.alpha[:, p.index, None], p.stop - p.start, axis=1) for p in pieces], axis=1
    )


def test_facts_are_means_over_elements() -> None:
    coefficients = made()
    facts = coefficient_facts("path", coefficients, values=True)
    assert json.loads(json.dumps(facts, allow_nan=False)) == facts
    counts = ["groups", "coefficients", "learned", "fixed", "chunked", "tensors", "parameters", "excluded"]
    assert [facts[key] for key in counts] == [7, 13, 12, 1, 3, 7, 65, 2]
    assert facts["facts"] == coefficients.facts
    assert facts["trimmed"] == {"density": 0.2, "elect": True}
    for name, (numel, mean) in tensor_means(coefficients).items():
        elements = dense(coefficients, name)
        assert elements.shape == (2, numel)
        np.testing.assert_allclose(mean, elements.mean(axis=1))
    for row, expert in enumerate("ab"):
        alpha = coefficients.alpha[row]
        assert facts["alpha"][expert] == pytest.approx(
            {"mean": alpha.mean(), "min": alpha.min(), "max": alpha.max(), "std": alpha.std()}
        )
    tables = {
        "by_type": {"attn.q.weight": "attn", "mlp.up.weight": "mlp", "model.norm.weight": "norm"},
        "by_depth": {
            "first third": "layers.0",
            "middle third": "layers.1",
            "last third": "layers.2",
            "outside blocks": "norm",
        },
    }
    for key, rows in tables.items():
        assert [row["name"] for row in facts[key]] == list(rows)
        for row in facts[key]:
            members = [name for name in coefficients.pieces if rows[row["name"]] in name]
            assert row["tensors"] == len(members)
            elements = np.concatenate([dense(coefficients, name) for name in members], axis=1)
            np.testing.assert_allclose(list(row["mean"].values()), elements.mean(axis=1))
    (group,) = [g for g in facts["group_list"] if g["name"] == "model.layers.1.mlp.up.weight"]
    assert group["alpha"]["b"] == coefficients.of(group["name"])[1].tolist()
    assert "group_list" not in coefficient_facts("path", coefficients)


def test_lines_say_what_counts() -> None:
    text = " ".join(" ".join(coefficient_lines(coefficient_facts("path", made(), values=True))).split())
    for words in [
        "path: coefficients of 2 experts",
        "13 coefficients per expert in 7 groups: 12 learned, 1 fixed; 3 groups in chunks",
        "7 tensors, 65 parameters; 2 excluded",
        "method: expert_merging_pp",
        "objective: alignment",
        "steps: 40",
        "samples: a 8",
        "lr: 0.02",
        "parameters: gamma 0.8; exclude official; T None; p0 0;",
        "; p29 29",
        "density 0.2, signs elected",
        "last third (2)",
        "model.norm.weight 5 parameters fixed",
        "a (3 chunks): ",
    ]:
        assert words in text
    assert "loss" not in text
    assert "g98" not in text
    assert "0.1, 0.1" not in text


def test_strange_facts_are_told_short() -> None:
    tensors = [(f"layers.{i}.w{k}", 1) for i in range(2) for k in range(60)]
    facts: dict[str, Any] = {"method": ["m"] * 10**5, "x" * 10**5: 1, "steps": "s" * 10**5, "excluded": True, "n": None}
    coefficients = constant(["e" * 300, "f"], make_groups(tensors, "tensor"), [0.1, 1e-12], **facts)
    lines = coefficient_lines(coefficient_facts("path", coefficients))
    assert max(map(len, lines)) < 420
    assert len(lines) < 100
    assert "... and 20 more; --json lists all" in "\n".join(lines)


def test_no_groups() -> None:
    lines = coefficient_lines(coefficient_facts("path", constant(["a"], (), [0.1])))
    assert lines[0] == "path: coefficients of 1 expert"
