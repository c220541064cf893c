"""Every method against its paper's formula, written once more in extended precision, and its known special cases."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import consilience as cs

Array = npt.NDArray[Any]
State = dict[str, Array]

REAL = np.longdouble
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
TYPES: dict[str, Any] = {
    "bfloat16": BFLOAT16,
    "float16": np.dtype(np.float16),
    "float32": np.dtype(np.float32),
    "float64": np.dtype(np.float64),
}
#: (stored significand bits, exponent of the smallest normal number)
FORMAT = {"bfloat16": (7, -126), "float16": (10, -14), "float32": (23, -126), "float64": (52, -1022)}
PAIRS = list(itertools.product(TYPES, TYPES))


def exact(array: Array) -> Array:
    return array.astype(np.float64).astype(REAL)


def merged(base: State | None, experts: Any, **arguments: Any) -> State:
    out = cs.merge(base, experts, **arguments)
    assert isinstance(out, dict)
    return out


# ----------------------------------------------------------------------------------------------------------------------
# References: one value per element, and how large the numbers were that were added up to get it.


@dataclass
class Answer:
    """The exact result; ``other`` where a sign election is too close to call; ``size`` of the terms."""

    value: Array
    other: Array
    size: Array


def plain(value: Array, size: Array) -> Answer:
    return Answer(value, value, size)


def shares(weights: Sequence[float]) -> list[Any]:
    return [REAL(w) / sum(map(REAL, weights)) for w in weights]


def reference_linear(thetas: list[Array], weights: Sequence[float], normalize: bool) -> Answer:
    factors = shares(weights) if normalize else [REAL(w) for w in weights]
    value = sum(w * t for w, t in zip(factors, thetas, strict=True))
    return plain(np.asarray(value), np.asarray(sum(abs(w * t) for w, t in zip(factors, thetas, strict=True))))


def reference_sum(
    base: Array, taus: list[Array], weights: Sequence[float], scale: float, normalize: bool = False
) -> Answer:
    total = reference_linear(taus, weights, normalize)
    return plain(base + REAL(scale) * total.value, abs(base) * 4 + abs(REAL(scale)) * total.size)


def largest(tau: Array, count: int) -> Array:
    """Keep ``count`` entries of largest magnitude; of equal ones (ranked in float32) those that come first."""
    flat = tau.reshape(-1)
    order = np.argsort(-abs(flat).astype(np.float32), kind="stable")
    kept = np.zeros_like(flat)
    kept[order[:count]] = flat[order[:count]]
    return kept.reshape(tau.shape)


def reference_signed(
    base: Array, taus: list[Array], weights: Sequence[float], scale: float, mean: bool, epsilon: float
) -> Answer:
    """TIES' elect and merge. Where rounding could turn the elected sign, both outcomes are right."""
    rows = np.array([REAL(w) * t for w, t in zip(weights, taus, strict=True)])
    column = np.array(weights, REAL).reshape(-1, *[1] * base.ndim)
    total, sizes = rows.sum(0), abs(rows).sum(0)
    outcomes: list[Array] = []
    for agree in (rows > 0, rows < 0):
        divisor = np.where(agree, column, 0).sum(0) if mean else np.ones_like(total)
        divisor = np.where(abs(divisor) < 1e-8, 1, divisor)
        outcomes.append(base + REAL(scale) * (np.where(agree, rows, 0).sum(0) / divisor))
    positive, negative = outcomes
    close = (abs(total) <= 8 * epsilon * sizes) & (total != 0)
    value = np.where(total >= 0, positive, negative)
    other = np.where(close, np.where(total >= 0, negative, positive), value)
    lowest = min(abs(w) for w in weights) if mean else 1
    return Answer(value, other, abs(base) * 4 + abs(REAL(scale)) * sizes * 4 / lowest)


def kept_count(numel: int, density: float) -> int:
    return max(int(density * numel), 1 if density > 0 and numel else 0)


def reference_slerp(a: Array, b: Array, t: float) -> Answer:
    x, y, s = a.reshape(-1), b.reshape(-1), REAL(t)
    norms = np.sqrt((x * x).sum()) * np.sqrt((y * y).sum())
    cosine = (x * y).sum() / norms if norms else REAL(1)
    first, second = 1 - s, s
    if abs(cosine) <= 0.9995:
        angle = np.arccos(cosine)
        first, second = np.sin((1 - s) * angle) / np.sin(angle), np.sin(s * angle) / np.sin(angle)
    return plain(first * a + second * b, abs(first * a) + abs(second * b))


# ----------------------------------------------------------------------------------------------------------------------
# The measure: half a unit in the last place of the output, plus the rounding of the intermediate type.


def unit(value: Array, kind: str) -> Array:
    bits, lowest = FORMAT[kind]
    exponent = np.frexp(value)[1] - 1
    return np.ldexp(REAL(1), np.maximum(np.where(value == 0, lowest, exponent), lowest) - bits)


def epsilon_of(kinds: Sequence[str], out: str) -> float:
    """Unit roundoff of the type computed in: float64 where an output is wider than 16 bits or an input than 32."""
    return 2.0**-53 if out in ("float32", "float64") or "float64" in kinds else 2.0**-24


def check(out: Array, answer: Answer, kinds: Sequence[str], kind: str) -> None:
    assert out.dtype == TYPES[kind]
    assert out.shape == answer.value.shape
    if not out.size:
        return
    found = exact(out)
    slack = 6 * epsilon_of(kinds, kind) * answer.size
    errors = [abs(found - ref) - unit(ref, kind) * (0.5 + 2.0**-12) - slack for ref in (answer.value, answer.other)]
    worst = np.minimum(*errors)
    at = np.unravel_index(int(worst.argmax()), out.shape)
    assert worst.max() <= 0, f"element {at}: {found[at]} instead of {answer.value[at]}"
    if out.size > 100 and kind != "float64":  # the slack must not hide a narrow type: nearly all are the nearest number
        nearest = answer.value.astype(np.float64).astype(TYPES[kind])
        assert (out == nearest).mean() > (0.99 if out.size > 5000 else 0.95)


def values(rng: np.random.Generator, shape: tuple[int, ...], kind: str) -> Array:
    return np.asarray(rng.standard_normal(shape) * 0.1).astype(TYPES[kind])


def near(rng: np.random.Generator, base: Array, kind: str) -> Array:
    """An expert: the base plus a heavy-tailed change, a third of it zero."""
    change = np.asarray(rng.standard_t(3, base.shape) * 0.02 * (rng.random(base.shape) > 1 / 3))
    return np.asarray(base.astype(np.float64) + change).astype(TYPES[kind])


@dataclass
class Case:
    base: Array
    experts: dict[str, Array]

    @property
    def thetas(self) -> list[Array]:
        return [exact(e) for e in self.experts.values()]

    @property
    def taus(self) -> list[Array]:
        return [np.asarray(t - exact(self.base)) for t in self.thetas]

    def merge(self, **arguments: Any) -> Array:
        experts = {name: {"w": value} for name, value in self.experts.items()}
        return merged({"w": self.base}, experts, **arguments)["w"]


def case(kind: str, shape: tuple[int, ...] = (37, 113), count: int = 3, seed: int = 0) -> Case:
    rng = np.random.default_rng(seed)
    base = values(rng, shape, kind)
    return Case(base, {f"e{k}": near(rng, base, kind) for k in range(count)})


WEIGHTS = {"e0": 0.7, "e1": 1.9, "e2": 0.4}
MIXED = {"e0": 0.71, "e1": -1.37, "e2": 2.33}


@pytest.mark.parametrize(("kind", "out"), PAIRS)
@pytest.mark.parametrize("normalize", [True, False])
def test_linear(kind: str, out: str, normalize: bool) -> None:
    model = case(kind)
    found = model.merge(method="linear", weight=MIXED, normalize=normalize, out_dtype=out)
    check(found, reference_linear(model.thetas, list(MIXED.values()), normalize), [kind], out)


@pytest.mark.parametrize(("kind", "out"), PAIRS)
@pytest.mark.parametrize(("scale", "normalize"), [(1.0, False), (0.3, False), (-1.7, True)])
def test_task_arithmetic(kind: str, out: str, scale: float, normalize: bool) -> None:
    model = case(kind)
    parameters: dict[str, Any] = {"weight": MIXED, "lambda": scale, "normalize": normalize}
    found = model.merge(method="task_arithmetic", out_dtype=out, **parameters)
    answer = reference_sum(exact(model.base), model.taus, list(MIXED.values()), scale, normalize)
    check(found, answer, [kind], out)


@pytest.mark.parametrize(("kind", "out"), PAIRS)
@pytest.mark.parametrize("normalize", [True, False])
def test_ties(kind: str, out: str, normalize: bool) -> None:
    model = case(kind)
    density = {"e0": 0.2, "e1": 0.55, "e2": 1.0}
    parameters: dict[str, Any] = {"weight": WEIGHTS, "density": density, "lambda": 0.8, "normalize": normalize}
    found = model.merge(method="ties", out_dtype=out, **parameters)
    taus = [largest(t, kept_count(t.size, d)) for t, d in zip(model.taus, density.values(), strict=True)]
    epsilon = epsilon_of([kind], out)
    answer = reference_signed(exact(model.base), taus, list(WEIGHTS.values()), 0.8, normalize, epsilon)
    check(found, answer, [kind], out)


@pytest.mark.parametrize(("kind", "out"), [("bfloat16", "bfloat16"), ("float32", "float32"), ("float64", "float64")])
def test_ties_over_the_whole_model(kind: str, out: str) -> None:
    rng = np.random.default_rng(1)
    shapes = {"b": (4097,), "a": (), "c": (61, 67), "empty": (0, 4)}
    base = {n: values(rng, s, kind) for n, s in shapes.items()}
    experts = {f"e{k}": {n: near(rng, b, kind) for n, b in base.items()} for k in range(3)}
    experts["e1"]["c"] = base["c"]  # a tensor nobody ranks high must lose all its entries to the others
    found = merged(base, experts, method="ties", density=0.1, trim="model", out_dtype=out)
    shapes = dict(sorted(shapes.items()))
    flat = [np.concatenate([(exact(e[n]) - exact(base[n])).reshape(-1) for n in shapes]) for e in experts.values()]
    trimmed = [largest(f, kept_count(f.size, 0.1)) for f in flat]
    answer = reference_signed(
        np.concatenate([exact(base[n]).reshape(-1) for n in shapes]),
        trimmed,
        [1, 1, 1],
        1,
        True,
        epsilon_of([kind], out),
    )
    begin = 0
    for name, shape in shapes.items():
        part = slice(begin, begin + base[name].size)
        begin = part.stop
        pieces = (x[part].reshape(shape) for x in (answer.value, answer.other, answer.size))
        check(found[name], Answer(*pieces), [kind], out)


def test_ties_keeps_the_first_of_equal_magnitudes() -> None:
    """Magnitudes 1 (many) and 2 (few): of the many, the lowest indices survive, whatever their sign."""
    rng = np.random.default_rng(2)
    tau = rng.choice([-1.0, 1.0], 5000)
    tau[rng.permutation(5000)[:100]] *= 2
    found = merged({"w": np.zeros(5000)}, {"a": {"w": tau}}, method="ties", density=0.3)["w"]
    ones = np.flatnonzero(abs(tau) == 1)
    expected = np.where(abs(tau) == 2, tau, 0)
    expected[ones[: 1500 - 100]] = tau[ones[: 1500 - 100]]
    np.testing.assert_array_equal(found, expected)


def test_ties_over_the_model_gives_equal_magnitudes_out_by_tensor_name() -> None:
    """Not by the order of a file or dict, so that resharding a model cannot change its merge."""
    base = {"b": np.zeros(10), "a": np.zeros(10)}
    experts = {"expert": {"b": np.ones(10), "a": np.ones(10)}}
    found = merged(base, experts, method="ties", density=0.6, trim="model")
    np.testing.assert_array_equal(found["a"], np.ones(10))
    np.testing.assert_array_equal(found["b"], [1.0, 1.0] + [0.0] * 8)


@pytest.mark.parametrize("density", [0.0, 1e-9, 0.5, 1.0])
def test_ties_keeps_exactly_the_stated_number(density: float) -> None:
    tau = np.random.default_rng(3).permutation(np.arange(1.0, 4098.0))
    found = merged({"w": np.zeros(4097)}, {"a": {"w": tau}}, method="ties", density=density)["w"]
    assert np.count_nonzero(found) == kept_count(4097, density)
    if np.count_nonzero(found):
        assert found[found > 0].min() == 4097 - kept_count(4097, density) + 1


@pytest.mark.parametrize(
    ("taus", "weights", "mean", "expected"),
    [
        ([[2.0], [-1.0], [4.0]], [1.0, 1.0, 1.0], True, 3.0),
        ([[2.0], [-1.0], [4.0]], [1.0, 1.0, 1.0], False, 6.0),
        ([[2.0], [-2.0], [0.0]], [1.0, 1.0, 1.0], True, 2.0),  # an exact draw counts as +
        ([[-3.0], [1.0], [0.0]], [1.0, 1.0, 1.0], True, -3.0),  # zeros do not agree with anybody
        ([[0.0], [0.0], [0.0]], [1.0, 1.0, 1.0], True, 0.0),
        ([[2.0], [4.0], [-9.0]], [3.0, 1.0, 1.0], True, 2.5),  # weighted election, weighted mean
        ([[2.0], [-4.0], [1.0]], [1.0, -1.0, 1.0], False, 7.0),  # a negative weight turns the vote
    ],
)
def test_ties_by_hand(taus: list[list[float]], weights: list[float], mean: bool, expected: float) -> None:
    base = {"w": np.array([10.0])}
    experts = {f"e{k}": {"w": base["w"] + np.array(t)} for k, t in enumerate(taus)}
    weight = {f"e{k}": w for k, w in enumerate(weights)}
    found = merged(base, experts, method="ties", density=1.0, weight=weight, normalize=mean)
    assert found["w"].tolist() == [10.0 + expected]


@pytest.mark.parametrize("method", ["ties", "dare_ties"])
@pytest.mark.parametrize("kind", ["float32", "float64", "bfloat16"])
def test_agreeing_weights_that_cancel_do_not_blow_up(method: str, kind: str) -> None:
    """0.1 + 0.2 - 0.3 is 5.6e-17 in float64: it counts as zero and so as a divisor of 1."""
    base = {"w": np.zeros(4, TYPES[kind])}
    signs = {"a": 1.0, "b": 1.0, "c": -1.0}
    experts = {name: {"w": np.full(4, s, TYPES[kind])} for name, s in signs.items()}
    weight = {"a": 0.1, "b": 0.2, "c": -0.3}
    found = merged(base, experts, method=method, weight=weight, density=1.0, normalize=True)["w"]
    np.testing.assert_allclose(found.astype(np.float64), 0.6, rtol=1e-2)


@pytest.mark.parametrize(("kind", "out"), PAIRS)
@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
def test_slerp(kind: str, out: str, t: float) -> None:
    rng = np.random.default_rng(4)
    a, b = values(rng, (37, 113), kind), values(rng, (37, 113), kind)
    mixed = (0.5 * a.astype(np.float64) + 1.1 * b.astype(np.float64)).astype(TYPES[kind])
    model = Case(a, {"other": mixed})
    check(model.merge(method="slerp", t=t, out_dtype=out), reference_slerp(exact(a), exact(mixed), t), [kind], out)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ([1.0, 2.0, 3.0], [2.0, 4.0, 6.0]),  # collinear: linear interpolation
        ([1.0, 2.0, 3.0], [-1.0, -2.0, -3.0]),  # opposite: no great circle is singled out
        ([1.0, 2.0, 3.0], [1.0, 2.0, 3.001]),  # a fine-tune's angle
        ([1.0, 0.0, 0.0], [0.9994, 0.0346, 0.0]),  # the widest cosine that still takes the great circle
        ([1.0, 0.0, 0.0], [0.9996, 0.0283, 0.0]),  # and one that does not
        ([0.0, 0.0, 0.0], [1.0, 2.0, 3.0]),
        ([1.0, 2.0, 3.0], [0.0, 0.0, 0.0]),
        ([0.0, 0.0, 0.0], [0.0, 0.0, 0.0]),
        ([1e-100, 0.0, 0.0], [0.0, 1e-100, 0.0]),  # squares of norms underflow when multiplied
        ([1e100, 0.0, 0.0], [0.0, 1e100, 0.0]),
        ([3.0, 0.0, 0.0], [0.0, 4.0, 0.0]),  # a right angle: weights sin(pi/4) each
    ],
)
def test_slerp_special_directions(a: list[float], b: list[float]) -> None:
    model = Case(np.array(a), {"other": np.array(b)})
    for t in (0.0, 0.25, 0.5, 1.0):
        check(
            model.merge(method="slerp", t=t),
            reference_slerp(exact(model.base), model.thetas[0], t),
            ["float64"],
            "float64",
        )


# ----------------------------------------------------------------------------------------------------------------------
# DARE: the masks are random, so they are recovered from runs of one expert on a zero base, then put in the formula.


def dropped(tau: Array, density: float, seed: int, name: str = "e0", **arguments: Any) -> Array:
    return merged(
        {"w": np.zeros_like(tau)}, {name: {"w": tau}}, method="dare_linear", density=density, seed=seed, **arguments
    )["w"]


def test_dare_multiplies_what_it_keeps_by_one_over_density() -> None:
    tau = np.random.default_rng(5).standard_normal(20_001)
    for density in (0.1, 0.3, 0.9):
        found = dropped(tau, density, 0)
        kept = found != 0
        np.testing.assert_array_equal(found[kept], tau[kept] * (1 / density))
        np.testing.assert_array_equal(dropped(tau, density, 0, rescale=False)[kept], tau[kept])
        deviation = np.sqrt(tau.size * density * (1 - density))
        assert abs(kept.sum() - tau.size * density) < 4.5 * deviation


def test_dare_keeps_every_entry_equally_often_and_is_unbiased() -> None:
    rng = np.random.default_rng(6)
    tau, density, runs = rng.standard_normal(1009), 0.3, 600
    total, count = np.zeros(tau.size), np.zeros(tau.size)
    for seed in range(runs):
        found = dropped(tau, density, seed)
        total += found
        count += found != 0
    z = (count - runs * density) / np.sqrt(runs * density * (1 - density))
    assert abs(z).max() < 5
    assert abs(z.mean()) < 5 / np.sqrt(tau.size)
    assert 0.8 < z.var() < 1.2  # neither a fixed share per entry nor per-seed clumps
    error = (total / runs - tau) / (abs(tau) * np.sqrt((1 / density - 1) / runs))
    assert abs(error).max() < 5


def test_dare_masks_are_independent_between_seeds_experts_tensors_and_neighbours() -> None:
    n, density = 40_000, 0.5
    ones = np.ones(n)
    masks = [dropped(ones, density, 0), dropped(ones, density, 1), dropped(ones, density, 0, "e1")]
    other = merged({"v": np.zeros(n)}, {"e0": {"v": ones}}, method="dare_linear", density=density, seed=0)["v"]
    signs = [np.where(m != 0, 1.0, -1.0) for m in [*masks, other]]
    for a, b in itertools.combinations(signs, 2):
        assert abs((a * b).mean()) < 5 / np.sqrt(n)
    for lag in (1, 2, 8, 64, 4096):
        assert abs((signs[0][lag:] * signs[0][:-lag]).mean()) < 5 / np.sqrt(n - lag)


def test_dare_masks_are_nested_in_density() -> None:
    """One uniform number per entry decides, so a lower density keeps a subset: sweeps over density are comparable."""
    ones = np.ones(10_000)
    low, high = dropped(ones, 0.2, 3) != 0, dropped(ones, 0.7, 3) != 0
    assert not (low & ~high).any()


def test_dare_l1_rescaling_restores_the_norm() -> None:
    tau = np.random.default_rng(7).standard_normal((101, 101))
    found = dropped(tau, 0.2, 0, rescale="l1")
    plain_found = dropped(tau, 0.2, 0, rescale=False)
    np.testing.assert_allclose(abs(found).sum(), abs(tau).sum(), rtol=1e-12)
    ratio = abs(tau).sum() / abs(plain_found).sum()
    np.testing.assert_allclose(found, plain_found * ratio, rtol=1e-12)


@pytest.mark.parametrize(("kind", "out"), PAIRS)
@pytest.mark.parametrize(("method", "normalize"), [("dare_linear", False), ("dare_ties", False), ("dare_ties", True)])
def test_dare_sums(kind: str, out: str, method: str, normalize: bool) -> None:
    model = case(kind)
    density = {"e0": 0.3, "e1": 0.8, "e2": 1.0}
    parameters: dict[str, Any] = {
        "weight": WEIGHTS,
        "density": density,
        "lambda": 1.2,
        "normalize": normalize,
        "seed": 9,
    }
    found = model.merge(method=method, out_dtype=out, **parameters)
    ones = np.ones(model.base.shape)
    masks = [dropped(ones, d, 9, name) != 0 for name, d in density.items()]
    taus = [np.where(m, t, 0) / REAL(d) for m, t, d in zip(masks, model.taus, density.values(), strict=True)]
    weights, base = list(WEIGHTS.values()), exact(model.base)
    answer = reference_sum(base, taus, weights, 1.2)
    if method == "dare_ties":
        answer = reference_signed(base, taus, weights, 1.2, normalize, epsilon_of([kind], out))
    answer.size = answer.size * 2
    check(found, answer, [kind], out)


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
def test_density_zero_returns_the_base(method: str) -> None:
    model = case("float32")
    np.testing.assert_array_equal(model.merge(method=method, density=0.0), model.base)
    np.testing.assert_array_equal(model.merge(method=method, density=0.0, rescale="l1"), model.base)


# ----------------------------------------------------------------------------------------------------------------------
# Special cases that every implementation must meet exactly.


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("task_arithmetic", {}),
        ("task_arithmetic", {"weight": 5.0, "normalize": True}),
        ("ties", {"density": 1.0}),
        ("ties", {"density": 1.0, "trim": "model"}),
        ("ties", {"density": 1.0, "weight": 0.5}),
        ("dare_linear", {}),
        ("dare_linear", {"rescale": "l1"}),
        ("dare_ties", {}),
        ("dare_ties", {"normalize": True}),
        ("slerp", {"t": 1.0}),
        ("linear", {"weight": 3.0}),
    ],
)
def test_one_expert_returns_that_expert(kind: str, method: str, parameters: dict[str, Any]) -> None:
    model = case(kind, count=1)
    expert = model.experts["e0"]
    # The task vector of a float64 expert need not be a float64 number; where it is not, the last bit may differ.
    tau = expert.astype(np.float64) - model.base.astype(np.float64)
    representable = exact(tau) == model.taus[0]
    assert representable.mean() > (0.2 if kind == "float64" else 0.999)
    np.testing.assert_array_equal(model.merge(method=method, **parameters)[representable], expert[representable])


@pytest.mark.parametrize("kind", TYPES)
def test_identical_models_average_to_themselves(kind: str) -> None:
    expert = case(kind, count=1).experts["e0"]
    for count in (2, 3, 7):
        found = merged(None, {f"e{k}": {"w": expert} for k in range(count)}, method="linear")["w"]
        if kind != "float64":  # computed in a wider type, so the last bit is right
            np.testing.assert_array_equal(found, expert)
        else:
            np.testing.assert_allclose(found, expert, rtol=2.0**-51)


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "dare_linear", "dare_ties", "slerp"])
def test_experts_equal_to_the_base_return_the_base(kind: str, method: str) -> None:
    base = case(kind, count=1).base
    experts = {f"e{k}": {"w": base} for k in range(1 if method == "slerp" else 3)}
    np.testing.assert_array_equal(merged({"w": base}, experts, method=method)["w"], base)


@pytest.mark.parametrize("kind", TYPES)
def test_dare_that_drops_nothing_is_task_arithmetic(kind: str) -> None:
    model = case(kind)
    expected = model.merge(method="task_arithmetic", weight=WEIGHTS)
    for rescale in ("exact", "l1", False):
        found = model.merge(method="dare_linear", weight=WEIGHTS, density=1.0, rescale=rescale)
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "ties", "dare_linear", "dare_ties"])
def test_order_of_experts_does_not_matter(kind: str, method: str) -> None:
    """Up to the rounding of a sum in another order (and the sign where a sum is zero but for rounding)."""
    model = case(kind)
    parameters: dict[str, Any] = {"weight": WEIGHTS}
    parameters |= {} if method in ("linear", "task_arithmetic") else {"density": {"e0": 0.3, "e1": 0.5, "e2": 0.8}}
    first = model.merge(method=method, **parameters)
    for order in itertools.permutations(model.experts):
        again = Case(model.base, {name: model.experts[name] for name in order}).merge(method=method, **parameters)
        if kind != "float64":
            assert (first == again).mean() > 0.98
        if method in ("linear", "task_arithmetic", "dare_linear"):
            difference = abs(exact(first) - exact(again))
            assert (difference <= 4 * unit(exact(first), kind) + 1e-15).all()


def test_mixed_types_keep_the_bases() -> None:
    rng = np.random.default_rng(8)
    base = values(rng, (4097,), "bfloat16")
    model = Case(
        base, {"a": near(rng, base, "float32"), "b": near(rng, base, "float16"), "c": near(rng, base, "float64")}
    )
    found = model.merge(method="task_arithmetic")
    kinds = ["bfloat16", "float32", "float16", "float64"]
    check(found, reference_sum(exact(base), model.taus, [1, 1, 1], 1.0), kinds, "bfloat16")


def test_subnormal_and_extreme_values() -> None:
    """Halves of the smallest numbers round to even; sums that reach the largest number stay finite."""
    tiny, huge = np.float16(2.0**-24), np.float16(65504)
    state = [
        {"w": np.array([tiny, 3 * tiny, huge, -huge, 1.0], np.float16)},
        {"w": np.array([0, 0, huge, -huge, 3], np.float16)},
    ]
    found = merged(None, state, method="linear")["w"]
    np.testing.assert_array_equal(found, np.array([0, 2 * tiny, huge, -huge, 2], np.float16))


SMALL: list[tuple[int, ...]] = [(), (0,), (3, 0, 2), (1,), (1, 1, 1), (7,), (2, 3, 5, 7)]
#: Around a reduction leaf and a segment of 4096, inside a row, over several segments and blocks.
LARGE: list[tuple[int, ...]] = [(4095,), (4096,), (4097,), (3, 2731), (8191,), (8193,), (65537,)]


@settings(max_examples=120, deadline=None)
@given(
    shape=st.sampled_from(SMALL + LARGE),
    kind=st.sampled_from(list(TYPES)),
    out=st.sampled_from(list(TYPES)),
    method=st.sampled_from(["linear", "task_arithmetic", "ties", "dare_linear", "slerp"]),
    density=st.sampled_from([0.0, 0.07, 0.5, 0.999, 1.0]),
    segment=st.sampled_from([4096, 8192, 1 << 22]),
    block=st.sampled_from([4096, 1 << 16]),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_shape(
    shape: tuple[int, ...], kind: str, out: str, method: str, density: float, segment: int, block: int, seed: int
) -> None:
    model = case(kind, shape, 1 if method == "slerp" else 3, seed)
    base, taus, thetas = exact(model.base), model.taus, model.thetas
    epsilon = epsilon_of([kind], out)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("consilience.engine.plan.SEGMENT", segment)
        patch.setattr("consilience.experts.block.LARGEST_BLOCK", block)
        patch.setattr("consilience.experts.block.SMALLEST_BLOCK", block)
        if method == "linear":
            found = model.merge(method=method, out_dtype=out)
            answer = reference_linear(thetas, [1, 1, 1], True)
        elif method == "task_arithmetic":
            found = model.merge(method=method, out_dtype=out)
            answer = reference_sum(base, taus, [1, 1, 1], 1)
        elif method == "ties":
            found = model.merge(method=method, density=density, out_dtype=out)
            trimmed = [largest(t, kept_count(t.size, density)) for t in taus]
            answer = reference_signed(base, trimmed, [1, 1, 1], 1, True, epsilon)
        elif method == "dare_linear":
            found = model.merge(method=method, density=density, seed=seed, out_dtype=out)
            masks = [dropped(np.ones(shape), density, seed, f"e{k}") != 0 for k in range(3)]
            kept = [np.where(m, t, 0) / REAL(density or 1) for m, t in zip(masks, taus, strict=True)]
            answer = reference_sum(base, kept, [1, 1, 1], 1)
        else:
            found = model.merge(method=method, t=0.3, out_dtype=out)
            answer = reference_slerp(base, thetas[0], 0.3)
    check(found, answer, [kind], out)
