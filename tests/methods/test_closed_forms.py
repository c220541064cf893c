"""WUDI and its kin against least squares by pseudo-inverse, descent, the published steps, and their identities."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

import consilience as cs
from consilience.methods.closed_form import divided, nearest, participation
from tests.methods.matrices import CONFIG, Array, draw, write

METHODS = ("wudi", "actmat", "tact", "swudi_a", "wudi_v2", "ace")
SHAPES = [(12, 12), (20, 9), (7, 33)]


def merged(vectors: list[Array], method: str, **arguments: Any) -> Array:
    base = draw(*vectors[0].shape, seed=99)
    experts = {f"e{k}": {"w": base + vector} for k, vector in enumerate(vectors)}
    out: Any = cs.merge({"w": base}, experts, method=method, **arguments)
    return out["w"] - base


def experts(shape: tuple[int, int], count: int, seed: int = 0) -> list[Array]:
    """Task vectors of different lengths and falling spectra."""
    found: list[Array] = []
    for k in range(count):
        u, _, v = np.linalg.svd(draw(*shape, seed=seed + k), full_matrices=False)
        found.append((0.05 + 0.1 * k) * (u * 0.8 ** np.arange(len(v))) @ v)
    return found


def least(wanted: list[Array], used: list[Array]) -> Array:
    """The minimiser of least norm: X [A_1^T ... A_K^T] = [T_1 A_1^T ... T_K A_K^T] by the pseudo-inverse of A."""
    return np.concatenate([t @ a.T for t, a in zip(wanted, used, strict=True)], 1) @ np.linalg.pinv(
        np.concatenate(used).T, rcond=1e-9
    )


def loss(x: Array, wanted: list[Array], used: list[Array]) -> float:
    return sum(float(np.square((x - t) @ a.T).sum()) for t, a in zip(wanted, used, strict=True))


def over(vectors: list[Array], power: float) -> list[Array]:
    return [v / np.linalg.norm(v) ** power for v in vectors]


def cut(vector: Array, count: int) -> tuple[Array, Array]:
    """The leading triples' product, and S V^T of them."""
    u, s, v = np.linalg.svd(vector, full_matrices=False)
    return (u[:, :count] * s[:count]) @ v[:count], s[:count, None] * v[:count]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("count", [1, 2, 3])
def test_minimisers_are_those_of_least_squares(shape: tuple[int, int], count: int) -> None:
    vectors = experts(shape, count)
    close: dict[str, Any] = {"atol": 1e-7, "rtol": 1e-6}
    np.testing.assert_allclose(merged(vectors, "wudi"), least(vectors, over(vectors, 1)), **close)
    np.testing.assert_allclose(merged(vectors, "wudi", divide="norm"), least(vectors, over(vectors, 0.5)), **close)
    np.testing.assert_allclose(merged(vectors, "actmat"), least(vectors, vectors), **close)
    half: dict[str, Any] = {"lambda": 0.5}
    np.testing.assert_allclose(merged(vectors, "actmat", **half), 0.5 * least(vectors, vectors), **close)
    trimmed = [np.where(np.abs(v) > np.sort(np.abs(v).ravel())[v.size - v.size // 2 - 1], v, 0) for v in vectors]
    np.testing.assert_allclose(merged(vectors, "tact"), least(vectors, trimmed), **close)
    np.testing.assert_allclose(merged(vectors, "tact", density=1.0), least(vectors, vectors), **close)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("centre", ["none", "mean"])
def test_wudi_v2_is_nearest_to_its_start(shape: tuple[int, int], centre: str) -> None:
    """Gradient descent from the published start leads there: the start and a move within the rows that are used."""
    vectors = experts(shape, 3)
    mean, count = np.mean(vectors, 0), min(shape) // 3
    used = [cut(v, count)[1] / np.linalg.norm(v) for v in vectors]
    wanted = [cut(v - mean, count)[0] + mean if centre == "mean" else cut(v, count)[0] for v in vectors]
    for rest, start in (("mean", mean), ("sum", np.sum(vectors, 0)), ("zero", np.zeros(shape))):
        expected = start + least([t - start for t in wanted], used)
        np.testing.assert_allclose(merged(vectors, "wudi_v2", centre=centre, rest=rest), expected, atol=1e-7)


@pytest.mark.parametrize("shape", SHAPES)
def test_swudi_a_is_the_published_filter(shape: tuple[int, int]) -> None:
    """As published: theta_0 - P theta_0 + D V f / L V^T with f = 1 on the participating eigenvalues of C."""
    vectors = experts(shape, 3)
    used = over(vectors, 1)
    c = sum((a.T @ a for a in used), np.zeros((shape[1], shape[1])))
    d = sum((v @ a.T @ a for v, a in zip(vectors, used, strict=True)), np.zeros(shape))
    values, basis = np.linalg.eigh(c)
    y = np.sqrt(np.maximum(values, 0))
    top = basis[:, len(y) - int(np.ceil(y.sum() ** 2 / np.square(y).sum())) :]
    inverse = top @ np.diag(1 / np.diag(top.T @ c @ top)) @ top.T
    for rest, start in (("sum", np.sum(vectors, 0)), ("mean", np.mean(vectors, 0)), ("zero", np.zeros(shape))):
        expected = start - start @ top @ top.T + d @ inverse
        np.testing.assert_allclose(merged(vectors, "swudi_a", rest=rest), expected, atol=1e-7)


def test_published_steps_end_above_the_minimum() -> None:
    """300 steps of Adam from the sum, per expert, as the official code does; its interference is never less."""
    torch = pytest.importorskip("torch")
    vectors = [v.astype(np.float32) for v in experts((24, 40), 4)]
    stack = torch.tensor(np.stack(vectors))
    x = torch.nn.Parameter(stack.sum(0))
    adam = torch.optim.Adam([x], lr=1e-3)
    norms = stack.square().sum((1, 2))
    for _ in range(300):
        adam.zero_grad()
        ((x - stack) @ stack.transpose(1, 2)).square().sum((1, 2)).div(norms).sum().backward()
        adam.step()
    used = over(vectors, 1)
    own = loss(merged(vectors, "wudi"), vectors, used)
    assert own <= loss(x.detach().numpy(), vectors, used)


@pytest.mark.parametrize("method", ["wudi", "actmat", "tact", "swudi_a"])
def test_one_expert_stays_itself(method: str) -> None:
    for shape in SHAPES:
        (vector,) = experts(shape, 1)
        np.testing.assert_allclose(
            merged([vector], method, **({"density": 1.0} if method == "tact" else {})), vector, atol=1e-7
        )


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.floats(1e-3, 1e3), st.sampled_from(["wudi", "actmat", "swudi_a", "wudi_v2"]))
def test_scale_and_rotations_pass_through(seed: int, scale: float, method: str) -> None:
    vectors = experts((10, 7), 3, seed)
    left, right = (np.linalg.qr(draw(n, n, seed=seed + 9))[0] for n in (10, 7))
    plain = merged(vectors, method)
    turned = merged([scale * left @ vector @ right for vector in vectors], method)
    np.testing.assert_allclose(turned, scale * left @ plain @ right, atol=1e-6 * scale)


def test_actmat_and_wudi_agree_on_equal_lengths() -> None:
    vectors = over(experts((14, 10), 3), 1)
    np.testing.assert_allclose(merged(vectors, "wudi"), merged(vectors, "actmat"), atol=1e-9)
    longer = [vectors[0], 3 * vectors[1], vectors[2]]
    assert np.abs(merged(longer, "wudi") - merged(longer, "actmat")).max() > 1e-3


def test_independent_rows_come_back_whole() -> None:
    """Four row spaces of rank 4 in 32 dimensions: nothing is disturbed, and the result is not their sum."""
    vectors = [draw(20, 4, seed=k) @ draw(4, 32, seed=k + 10) for k in range(4)]
    for method in ("wudi", "actmat"):
        found = merged(vectors, method)
        for vector in vectors:
            np.testing.assert_allclose(found @ vector.T, vector @ vector.T, atol=1e-7)
        assert np.linalg.norm(found - np.sum(vectors, 0)) > 0.2 * np.linalg.norm(found)


def test_orthogonal_rows_add_up() -> None:
    rows = np.linalg.qr(draw(30, 30, seed=5))[0]
    vectors = [draw(8, 6, seed=k) @ rows[6 * k : 6 * k + 6] for k in range(3)]
    for method in ("wudi", "actmat", "swudi_a"):
        np.testing.assert_allclose(merged(vectors, method), np.sum(vectors, 0), atol=1e-8)


@pytest.mark.parametrize("method", [m for m in METHODS if m not in ("tact", "ace")])
def test_adapters_are_merged_as_their_products_are(method: str, tmp_path: Path) -> None:
    base = {"layer.q_proj.weight": draw(24, 17, seed=7)}
    folder = write(tmp_path / "base", base, "{}")
    adapters: dict[str, Path] = {}
    tuned: dict[str, Path] = {}
    for k in range(3):
        a, b = draw(3, 17, seed=10 + k), draw(24, 3, seed=20 + k)
        sides = {"base_model.model.layer.q_proj.lora_A.weight": a, "base_model.model.layer.q_proj.lora_B.weight": b}
        adapters[f"e{k}"] = write(tmp_path / f"a{k}", sides, CONFIG, "adapter_model.safetensors")
        whole = {"layer.q_proj.weight": base["layer.q_proj.weight"] + 2 * b @ a}
        tuned[f"e{k}"] = write(tmp_path / f"t{k}", whole, "{}")
    found = []
    for number, models in enumerate((adapters, tuned)):
        out = tmp_path / f"out{number}"
        cs.merge(folder, {n: str(p) for n, p in models.items()}, out, method=method)
        found.append(load_file(out / "model.safetensors")["layer.q_proj.weight"].astype(np.float64))
    np.testing.assert_allclose(found[0], found[1], atol=2e-3, rtol=1e-3)


def test_untouched_experts_are_no_obstacle() -> None:
    vectors = [np.zeros((9, 6)), *experts((9, 6), 2)]
    np.testing.assert_allclose(merged(vectors, "wudi"), merged(vectors[1:], "wudi"), atol=1e-8)
    for method in METHODS:
        assert np.isfinite(merged(vectors, method)).all()
        zero = merged([np.zeros((9, 6))] * 2, method)
        np.testing.assert_array_equal(zero, np.zeros((9, 6)))


def ace(vectors: list[Array], ridge: float, gate: float) -> Array:
    """ACE-Merging, restated: matrices are built one by one as its text has them."""
    sizes = [float(np.trace(v.T @ v)) for v in vectors]
    logs = np.log(sizes)
    flag = logs.var(ddof=1) / logs.mean() ** 2 > gate
    m, n = vectors[0].shape
    centring = np.eye(m) - np.ones((m, m)) / m
    s = [(centring @ v).T @ (centring @ v) for v in vectors]
    traces = [np.trace(one) if flag else 1.0 for one in s]
    s = [one / t for one, t in zip(s, traces, strict=True)]
    r = [one + ridge / t * np.eye(n) for one, t in zip(s, traces, strict=True)]
    row = np.sum(s, 0).mean(0) / (np.mean(sizes) if flag else 1.0)
    w = sum(centring @ v @ one for v, one in zip(vectors, r, strict=True)) @ np.linalg.inv(
        sum(r) + np.outer(np.ones(n), row)
    )
    if flag:
        d = sum(v @ (one - sum(r) / len(r)) for v, one in zip(vectors, s, strict=True)) + w
        u, values, vt = np.linalg.svd(d)
        k = int(0.3 * min(m, n))
        w = w + values[:k].mean() * u[:, :k] @ vt[:k]
    return w


@pytest.mark.parametrize("shape", SHAPES)
def test_ace_is_as_published_on_both_sides_of_its_gate(shape: tuple[int, int]) -> None:
    vectors = experts(shape, 3)
    for gate in (0.0, 1e9):
        np.testing.assert_allclose(merged(vectors, "ace", gate=gate), ace(vectors, 1e-2, gate), atol=1e-8)
    np.testing.assert_allclose(merged(vectors, "ace", ridge=1e-4), ace(vectors, 1e-4, 0.3), atol=1e-7)


def test_ace_depends_on_the_unit_of_the_weights() -> None:
    """Its page says so: the gate opens near a norm of 1, and the result is not in proportion."""
    vectors = [scale * draw(12, 12, seed=k) / 12 for k, scale in enumerate((0.5, 1.0, 2.0))]
    plain, scaled = merged(vectors, "ace"), merged([10 * v for v in vectors], "ace") / 10
    assert np.linalg.norm(plain - scaled) > 0.1 * np.linalg.norm(plain)
    common = np.ones((12, 1)) * draw(1, 12, seed=3)
    assert np.abs(merged([common, common], "ace")).max() < 1e-9


@given(st.integers(0, 2**31), st.integers(1, 12), st.integers(1, 12))
def test_division_is_by_the_pseudo_inverse(seed: int, size: int, rank: int) -> None:
    half = draw(size, min(rank, size), seed=seed)
    gram = half @ half.T
    load = draw(3, size, seed=seed + 1) @ gram
    np.testing.assert_allclose(divided(load, gram), load @ np.linalg.pinv(gram, rcond=1e-12), rtol=1e-4, atol=1e-4)


def test_ill_conditioned_covariances_are_not_divided_by() -> None:
    """A direction of relative size 1e-9 is none that float64 knows of after squaring."""
    basis = np.linalg.qr(draw(6, 6, seed=1))[0]
    rows = np.diag([1, 1, 1, 1, 1, 1e-9]) @ basis
    found = nearest([rows], [rows], [1.0])
    np.testing.assert_allclose(found, rows, atol=1e-8)


def test_participation_counts_what_takes_part() -> None:
    assert participation(np.ones(7)) == 7
    assert participation(np.array([1e-12, 1e-12, 1.0])) == 2  # (1 + 2e-6)^2 is more than 1
    assert participation(np.array([])) == 0
