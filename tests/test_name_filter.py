"""Patterns of tensor names against plain tests of the names."""

from typing import Any

import pytest

from consilience.errors import InputError
from consilience.name_filter import any_filter, name_filter

NAMES = [
    "model.embed_tokens.weight",
    *(f"model.layers.{i}.{part}.weight" for i in range(5) for part in ("self_attn.q_proj", "mlp.up_proj")),
    "model.norm.weight",
    "lm_head.weight",
]


@pytest.mark.parametrize(
    ("pattern", "matching"),
    [
        ("mlp", lambda name: "mlp" in name),
        ("layers.1.", lambda name: "layers.1." in name),
        ("*", lambda name: True),
        (None, lambda name: True),
        ("*.mlp.*", lambda name: ".mlp." in name),
        ("model.layers.?.mlp*", lambda name: name.startswith("model.layers.") and ".mlp" in name),
        ("mlp*", lambda name: name.startswith("mlp")),
        ("re:layers\\.[13]\\.", lambda name: "layers.1." in name or "layers.3." in name),
        ("re:^lm_head", lambda name: name.startswith("lm_head")),
        ("re:weight$", lambda name: True),
        ("MLP", lambda name: False),
    ],
)
def test_a_filter_is_a_substring_a_glob_or_a_regex(pattern: str | None, matching: Any) -> None:
    test = name_filter(pattern, "r.yaml")
    assert [test(name) for name in NAMES] == [matching(name) for name in NAMES]


def test_brackets_are_plain_text_without_a_star() -> None:
    assert name_filter("a[0]", "r.yaml")("x.a[0].weight")
    assert not name_filter("a[0]", "r.yaml")("x.a0.weight")


def test_any_of_several() -> None:
    out = any_filter(["*norm*", r"re:^.+\.bias$", "vision", "lm_head.weight"], "exclude")
    yes = ["model.norm.weight", "a.bias", "vision_model.x", "lm_head.weight", "norm", "x\nnorm"]
    no = ["LM_HEAD.weight", "bias", "lm_head", ""]
    assert [name for name in yes if not out(name)] == []
    assert [name for name in no if out(name)] == []
    assert not any_filter([], "exclude")("anything")
    globs = any_filter(["classifier.*", "*.head?.weight"], "private")
    assert globs("classifier.weight")
    assert globs("x.head1.weight")
    assert not globs("model.classifier.weight")
    assert not globs("x.head12.weight")
    # Late binding would test every name against the last pattern only.
    assert any_filter(["re:a", "re:b"], "exclude")("a")


@pytest.mark.parametrize("pattern", ["re:(", "re:a{99999999999999999999}", "re:" + "(" * 9999])
def test_a_wrong_pattern_is_one_line(pattern: str) -> None:
    with pytest.raises(InputError, match=r"exclude: .*not a regular expression") as caught:
        any_filter([pattern], "exclude")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("pattern", ["", "re:"])
def test_an_empty_pattern_means_nothing(pattern: str) -> None:
    with pytest.raises(InputError, match="empty"):
        name_filter(pattern, "private")
