"""Pictures are PNG files of a sensible size for any coefficients, and show what they should."""

import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from consilience.coefficients import Coefficients, make_groups
from consilience.coefficients.picture import importance_picture, picture
from consilience.errors import InputError


def transformer(blocks: int, tower: str = "model.layers", outside: bool = False) -> list[tuple[str, int]]:
    parts = [*(f"self_attn.{n}_proj" for n in "qkvo"), *(f"mlp.{n}_proj" for n in ("gate", "up", "down"))]
    tensors = [(f"{tower}.{i}.{part}.weight", 64) for i in range(blocks) for part in parts]
    return [("embed.weight", 99), *tensors, ("norm.weight", 9), ("norm.bias", 9)] if outside else tensors


def made(tensors: list[tuple[str, int]], experts: int, grouping: str = "tensor", **facts: Any) -> Coefficients:
    groups = make_groups(tensors, grouping, lambda name: len(name) % 3)
    names = tuple(f"expert {k}" for k in range(experts))
    alpha = np.random.default_rng(0).normal(0.3, 0.2, (experts, sum(g.chunks for g in groups)))
    return Coefficients(names, groups, alpha, facts={"alphabar": [0.3] * experts, "method": "m"} | facts)


def size(png: bytes) -> tuple[int, int]:
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    return struct.unpack(">II", png[16:24])


CASES: dict[str, tuple[Coefficients, bool]] = {
    "30 blocks, 4 experts": (made(transformer(30), 4), True),
    "2 blocks, 3 experts, tensors outside": (made(transformer(2, outside=True), 3), True),
    "two towers, different anchors": (
        made(transformer(3, "vision.layers") + transformer(4), 2, alphabar=[0.1, 0.3]),
        False,
    ),
    "by module": (made(transformer(2, outside=True), 2, "module"), True),
    "by block": (made(transformer(12), 3, "block"), True),
    "global": (made(transformer(2), 5, "global"), False),
    "by pattern": (made(transformer(2), 2, r"re:(\w+)_proj"), True),
    "no blocks": (made([("conv", 3), ("fc", 4)], 2), True),
    "one number": (made([("w", 1)], 1), False),
    "a mixture": (made([(f"l.{i}.experts.{e}.w", 4) for i in range(2) for e in range(64)], 2), True),
    "many experts": (made(transformer(2), 40), False),
    "many tensors outside": (made([*transformer(1), *((f"t{i}", 2) for i in range(40))], 1), True),
    "anchors that are none": (made(transformer(2), 2, alphabar=["x", None], method=7), False),
    "anchors of others": (made(transformer(2), 2, alphabar=[0.1]), False),
    "all at the anchor": (made(transformer(2), 1).with_alpha(np.full((1, made(transformer(2), 1).count), 0.3)), False),
    "huge": (made(transformer(2), 2).with_alpha(np.full((2, made(transformer(2), 2).count), -1e308)), False),
}


QUICK = {"2 blocks, 3 experts, tensors outside", "global", "one number", "anchors of others"}


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, id=name, marks=() if name in QUICK else pytest.mark.slow) for name, case in CASES.items()],
)
def test_pictures_of_all_kinds(case: tuple[Coefficients, bool]) -> None:
    coefficients, with_importance = case
    count = len(coefficients.groups)
    shares = {group.name: 1 / count for group in coefficients.groups} if with_importance else None
    width, height = size(picture(coefficients, importance=shares))
    assert 400 < width < 3000
    assert 250 < height < 9000
    if shares is not None:
        width, height = size(importance_picture(shares))
        assert 400 < width < 3000
        assert 250 < height < 3000


HOSTILE = ["$\\frac$", "$x", "\x1b[31m", "漢字", "a\nb", "x" * 5000, "", "{}", "%s", "_hidden", "\u202e"]


@pytest.mark.parametrize(
    "grouping",
    [pytest.param("tensor", marks=pytest.mark.slow), pytest.param("block", marks=pytest.mark.slow), "global"],
)
def test_hostile_names_are_drawn_as_they_are(grouping: str) -> None:
    """Warnings are errors here: an unknown character, or a formula in a name, must not raise one."""
    tensors = [(f"{name}.{i}.{kind}.w", 4) for name in HOSTILE[:3] for i in range(2) for kind in HOSTILE]
    tensors += [(name, 3) for name in HOSTILE]
    groups = make_groups(tensors, grouping)
    alpha = np.linspace(-1, 1, len(HOSTILE) * len(groups)).reshape(len(HOSTILE), len(groups))
    coefficients = Coefficients(tuple(HOSTILE), groups, alpha, facts={"method": HOSTILE[0]})
    size(picture(coefficients, importance={g.name: 0.0 for g in groups}))
    size(importance_picture({g.name: 0.0 for g in groups}))


def test_bytes_are_the_files_and_the_same_every_time(tmp_path: Path) -> None:
    coefficients = made(transformer(2), 2)
    data = picture(coefficients, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes() == data == picture(coefficients, str(tmp_path / "b.png"))
    shares = {g.name: 0.1 for g in coefficients.groups}
    assert importance_picture(shares, tmp_path / "c.png") == (tmp_path / "c.png").read_bytes()


@pytest.mark.slow
def test_importance_comes_from_the_facts_where_it_is() -> None:
    coefficients = made(transformer(2), 2)
    shares: dict[str, Any] = {g.name: 0.5 + i for i, g in enumerate(coefficients.groups)}
    plain, given = picture(coefficients), picture(coefficients, importance=shares)
    assert plain != given
    assert picture(coefficients.with_alpha(coefficients.alpha, importance=shares)) == given
    name = coefficients.groups[0].name
    for wrong in ({}, 3, shares | {name: None}, shares | {name: -1}, shares | {name: "0.5"}):
        assert picture(coefficients.with_alpha(coefficients.alpha, importance=wrong)) == plain


def test_nothing_to_draw() -> None:
    with pytest.raises(InputError, match="no groups"):
        picture(Coefficients(("a",), (), np.zeros((1, 0))))
    with pytest.raises(InputError, match="no groups"):
        importance_picture({})


def pixels(png: bytes) -> Any:
    import io

    from matplotlib.image import imread

    return imread(io.BytesIO(png))[..., :3]


def share_of(image: Any, test: Any) -> float:
    return float(np.mean(test(image[..., 0], image[..., 1], image[..., 2])))


def test_colours_show_the_side_of_the_anchor() -> None:
    """Above the anchor is red, below is blue, at it is white, wherever the anchor is and though it differs."""
    tensors = transformer(6)
    red = {"test": lambda r, g, b: (r > 0.35) & (r > 1.6 * b)}
    blue = {"test": lambda r, g, b: (b > 0.35) & (b > 1.6 * r)}
    for anchors in ([0.3, 0.3], [0.1, 0.7]):
        base = made(tensors, 2, alphabar=anchors)
        spread = np.linspace(0.01, 0.1, base.count)
        for sign, seen, unseen in ((1, red, blue), (-1, blue, red)):
            coefficients = base.with_alpha(np.array(anchors)[:, None] + sign * spread)
            grid = pixels(picture(coefficients))[:, : -size(picture(coefficients))[0] // 5]  # less the colour bar
            assert share_of(grid, **seen) > 0.1
            assert share_of(grid, **unseen) < 0.005


def test_without_matplotlib_one_line_names_the_extra() -> None:
    probe = """
import sys
sys.modules["matplotlib"] = None
from consilience.errors import InputError
from consilience.coefficients import constant, make_groups
from consilience.coefficients.picture import picture, importance_picture
coefficients = constant(["a"], make_groups([("w", 3)], "tensor"), [1.0])
for draw in (lambda: picture(coefficients), lambda: importance_picture({"w": 1.0})):
    try:
        draw()
    except InputError as error:
        assert "consilience[report]" in str(error)
    else:
        raise SystemExit("drawn")
"""
    subprocess.run([sys.executable, "-c", probe], check=True)
