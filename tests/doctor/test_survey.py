"""The pass over checkpoints, against whole matrices in float64."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from doctor_models import SHAPES, Make, drawn, moved, write_adapter, write_model

from consilience.api import plan_recipe
from consilience.doctor.evidence.survey import Survey, survey
from consilience.errors import InputError
from consilience.progress import CallbackProgress
from consilience.recipe.schema import parse_recipe

NAMES = ("a", "b", "c")


def _survey(recipe: dict[str, Any], **options: Any) -> Survey:
    plan = plan_recipe(parse_recipe(recipe, "recipe"))
    try:
        names = tuple(expert.name for expert in plan.experts)
        return survey(names, [tensor.stack for tensor in plan.tensors], **options)
    finally:
        plan.close()


@pytest.fixture
def case(make: Make) -> tuple[dict[str, Any], dict[str, Any], dict[str, dict[str, Any]]]:
    """A recipe of three experts, its base and the experts' tensors; ``c`` leaves a tensor as it is."""
    base = drawn(0)
    experts = {name: moved(base, drawn(seed), 0.1) for seed, name in enumerate(NAMES, 1)}
    experts["c"]["model.norm.weight"] = base["model.norm.weight"].copy()
    experts["b"]["model.layers.0.mlp.weight"][:, ::2] = base["model.layers.0.mlp.weight"][:, ::2]
    return make(base, **experts), base, experts


def _vectors(base: dict[str, Any], experts: dict[str, Any], name: str) -> np.ndarray:
    return np.stack([(experts[k][name] - base[name]).astype(np.float64).ravel() for k in NAMES])


def test_every_figure_is_that_of_whole_tensors(case: Any) -> None:
    recipe, base, experts = case
    found = _survey(recipe)
    assert [one.name for one in found.tensors] == list(SHAPES)
    for one in found.tensors:
        tau, origin = _vectors(base, experts, one.name), base[one.name].astype(np.float64).ravel()
        assert one.geometry.gram == pytest.approx(tau @ tau.T, rel=1e-5, abs=1e-5)
        assert one.geometry.with_base == pytest.approx(tau @ origin, rel=1e-5, abs=1e-4)
        assert one.geometry.base == pytest.approx(origin @ origin, rel=1e-6)
        assert one.magnitudes == pytest.approx(np.abs(tau).sum(1), rel=1e-5)
        assert one.kept == pytest.approx(np.abs(tau.sum(0)).sum(), rel=1e-5)
        assert one.changed.tolist() == (tau != 0).sum(1).tolist()
        both = [[int(((x != 0) & (y != 0)).sum()) * (j != k) for k, y in enumerate(tau)] for j, x in enumerate(tau)]
        opposite = [[int((x * y < 0).sum()) for y in tau] for x in tau]
        assert (one.both.tolist(), one.opposite.tolist()) == (both, opposite)


def _energies(base: dict[str, Any], experts: dict[str, Any], name: str) -> np.ndarray:
    shape = SHAPES[name]
    tau = _vectors(base, experts, name).reshape(3, *shape)
    return np.array([[np.linalg.norm(x @ y.T) ** 2 for y in tau] for x in tau])


def test_exact_energies_are_those_of_whole_matrices(case: Any) -> None:
    recipe, base, experts = case
    for one in _survey(recipe, exact=True).tensors:
        if len(one.shape) > 1:
            assert one.energies == pytest.approx(_energies(base, experts, one.name), rel=1e-5)
            assert one.errors is not None
            assert not one.errors.any()
        else:
            assert one.energies is None


def _low_rank(seed: int, rank: int) -> dict[str, Any]:
    generator = np.random.default_rng(seed)
    return {
        name: generator.normal(size=(shape[0], rank)) @ generator.normal(size=(rank, shape[1]))
        if len(shape) > 1
        else np.zeros(shape)
        for name, shape in SHAPES.items()
    }


@pytest.mark.parametrize("rank", [1, 3, 24])
def test_sketched_energies_are_right_in_the_mean_and_their_errors_say_how_far_off(make: Make, rank: int) -> None:
    base = drawn(0)
    experts = {name: moved(base, _low_rank(seed, rank), 0.1) for seed, name in enumerate(NAMES, 1)}
    recipe, name = make(base, **experts), "model.layers.0.mlp.weight"
    exact = _energies(base, experts, name)
    draws = [next(one for one in _survey(recipe, seed=seed).tensors if one.name == name) for seed in range(60)]
    values = np.array([one.energies for one in draws])
    spread = values.std(0, ddof=1)
    assert np.abs(values.mean(0) - exact) / (spread / np.sqrt(60) + 1e-3 * exact) == pytest.approx(0, abs=4.5)
    said = np.sqrt((np.array([one.errors for one in draws]) ** 2).mean(0))
    assert (said > 0.4 * spread).all()  # of one direction alone the jackknife says too much, never too little
    assert rank == 1 or said == pytest.approx(spread, rel=0.6)


def test_an_update_of_one_direction_has_an_effective_rank_of_one(make: Make) -> None:
    base = drawn(0)
    recipe = make(base, a=moved(base, _low_rank(1, 1)), b=moved(base, _low_rank(2, 1)))
    for one in _survey(recipe).tensors:
        if one.energies is not None:
            ranks = np.diag(one.geometry.gram) ** 2 / np.diag(one.energies)
            assert ranks == pytest.approx(np.ones(2), rel=0.1)


def test_threads_and_blocks_change_nothing_beyond_rounding(case: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = case[0]
    whole = _survey(recipe, threads=1)
    monkeypatch.setattr("consilience.doctor.evidence.survey.SEGMENT", 100)
    parts = _survey(recipe, threads=3)
    for one, other in zip(whole.tensors, parts.tensors, strict=True):
        assert one.name == other.name
        assert other.geometry.gram == pytest.approx(one.geometry.gram, rel=1e-6, abs=1e-6)
        assert other.opposite.tolist() == one.opposite.tolist()
        if one.energies is not None:
            assert other.energies == pytest.approx(one.energies, rel=1e-3)


def test_progress_is_told_of_every_byte_once(case: Any) -> None:
    heard: list[tuple[int, int]] = []
    found = _survey(case[0], progress=CallbackProgress(lambda done, total: heard.append((done, total))))
    assert heard[-1] == (found.bytes_read, found.bytes_read)
    assert [done for done, _ in heard] == sorted(done for done, _ in heard)


def test_nan_is_refused_by_name(make: Make) -> None:
    base = drawn(0)
    broken = moved(base, drawn(1), 0.1)
    broken["model.layers.1.mlp.weight"][3, 3] = np.nan
    with pytest.raises(InputError, match=r"b.*model\.layers\.1\.mlp\.weight"):
        _survey(make(base, a=moved(base, drawn(2), 0.1), b=broken))


def test_adapters_are_surveyed_as_the_product_of_their_factors(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", drawn(0))
    taus: list[np.ndarray] = []
    for seed, name in enumerate(("one", "other")):
        a, b = write_adapter(tmp_path / name, "model.layers.0.mlp", 4, seed)
        taus.append(2.0 * b.astype(np.float64) @ a)
    models = [{"model": str(tmp_path / name)} for name in ("one", "other")]
    found = _survey({"merge_method": "task_arithmetic", "base_model": str(base), "models": models}, exact=True)
    (tensor,) = found.tensors
    assert tensor.geometry.gram == pytest.approx(
        np.array([[float((x * y).sum()) for y in taus] for x in taus]), rel=1e-4
    )
    assert tensor.energies == pytest.approx(
        np.array([[np.linalg.norm(x @ y.T) ** 2 for y in taus] for x in taus]), rel=1e-4
    )
