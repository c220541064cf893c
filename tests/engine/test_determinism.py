"""The same bytes for any number of threads, block and segment size, hash seed, and way of passing the models."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from safetensors.numpy import load_file, save_file

import consilience as cs
from consilience.api import build_recipe, plan_recipe
from consilience.checkpoints import open_checkpoint
from consilience.engine.lineage import checkpoint_fingerprints, model_fingerprint
from consilience.engine.summary import Summary

Array = npt.NDArray[Any]
State = dict[str, Array]
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)

#: Odd sizes, several segments of 4096 elements, every type, and values that are copied rather than merged.
TENSORS: dict[str, tuple[tuple[int, ...], Any]] = {
    "model.embed_tokens.weight": ((301, 61), BFLOAT16),
    "model.layers.0.weight": ((127, 129), np.dtype(np.float32)),
    "model.layers.0.bias": ((3,), np.dtype(np.float16)),
    "model.layers.1.weight": ((12289,), BFLOAT16),
    "model.layers.1.wide": ((4099,), np.dtype(np.float64)),
    "model.norm.scale": ((), np.dtype(np.float32)),
    "model.empty": ((0, 5), np.dtype(np.float32)),
    "model.norm.running_var": ((17,), np.dtype(np.float32)),
    "model.norm.steps": ((2,), np.dtype(np.int64)),
}


def make_states() -> dict[str, State]:
    """A base and three experts whose task vectors hold few distinct magnitudes, so that every trim meets ties."""
    rng = np.random.default_rng(11)
    base: State = {}
    for name, (shape, dtype) in TENSORS.items():
        base[name] = np.asarray(rng.integers(-8, 9, shape) / 8).astype(dtype)
    states = {"base": base}
    for expert in ("math", "code", "chat"):
        change = {n: np.asarray(rng.integers(-4, 5, a.shape) / 64).astype(np.float64) for n, a in base.items()}
        states[expert] = {
            n: a if a.dtype == np.int64 else np.asarray(a.astype(np.float64) + change[n]).astype(a.dtype)
            for n, a in base.items()
        }
    return states


STATES = make_states()
RUNS: dict[str, dict[str, Any]] = {
    "linear": {"method": "linear", "weight": {"math": 0.3, "code": 0.5, "chat": 0.7}},
    "task_arithmetic": {"method": "task_arithmetic", "weight": {"math": 0.3, "code": 0.5, "chat": 0.7}},
    "ties": {"method": "ties", "density": {"math": 0.1, "code": 0.37, "chat": 1.0}},
    "ties-model": {"method": "ties", "density": 0.23, "trim": "model", "weight": {"math": 0.3, "code": 0.5, "chat": 1}},
    "dare_linear": {"method": "dare_linear", "density": 0.3, "seed": 5},
    "dare_l1": {"method": "dare_linear", "density": 0.3, "rescale": "l1"},
    "dare_ties": {
        "method": "dare_ties",
        "density": {"math": 0.1, "code": 0.5, "chat": 0.9},
        "rescale": "l1",
        "seed": 1,
    },
    "slerp": {"method": "slerp", "t": 0.3},
    "breadcrumbs_ties": {"method": "breadcrumbs_ties", "rescale": "l1", "weight": 0.5, "density": 0.4},
    "sce": {"method": "sce", "select_topk": 0.3},
    "ramplus_tl": {"method": "ramplus_tl", "epsilon": 0.02},
    "della": {"method": "della", "density": 0.6, "epsilon": 0.2, "seed": 4},
    "della_l1": {"method": "della_linear", "density": 0.6, "rescale": "l1"},
    "arcee_fusion": {"method": "arcee_fusion"},
    "pcb": {"method": "pcb", "ratio": 0.3},
    "nuslerp-rows": {"method": "nuslerp", "nuslerp_flatten": False, "weight": {"math": 0.3, "code": 0.5}},
    "nuslerp-columns": {"method": "nuslerp", "nuslerp_flatten": False, "nuslerp_row_wise": True},
    "model_stock-filters": {"method": "model_stock", "filter_wise": True},
    "karcher": {"method": "karcher"},
    "stochastic": {"method": "task_arithmetic", "weight": 0.3, "stochastic_rounding": True, "seed": 3},
    "half": {"method": "ties", "density": 0.2, "out_dtype": "float16", "stochastic_rounding": True},
}


def experts_of(run: dict[str, Any], models: dict[str, Any]) -> dict[str, Any]:
    count = {"slerp": 1, "arcee_fusion": 1, "nuslerp": 2}.get(run["method"], 3)
    return {name: models[name] for name in ["math", "code", "chat"][:count]}


def in_memory(name: str, **more: Any) -> State:
    run = RUNS[name]
    out = cs.merge(STATES["base"], experts_of(run, STATES), **run, **more)
    assert isinstance(out, dict)
    return out


def digest(state: State) -> str:
    """One digest of names, types, shapes and bytes, in the order of names (files sort by type, dicts do not)."""
    whole = hashlib.sha256()
    for name, array in sorted(state.items()):
        whole.update(f"{name} {array.dtype} {array.shape}".encode() + array.tobytes())
    return whole.hexdigest()


def write_models(folder: Path, shards: int = 1) -> dict[str, str]:
    paths: dict[str, str] = {}
    for model, state in STATES.items():
        place = folder / model
        place.mkdir(parents=True)
        (place / "config.json").write_text("{}")
        paths[model] = str(place)
        if shards == 1:
            save_file(state, place / "model.safetensors")
            continue
        names, where = sorted(state, reverse=True), {}
        for number in range(shards):
            file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
            save_file({n: state[n] for n in names[number::shards]}, place / file)
            where |= dict.fromkeys(names[number::shards], file)
        (place / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return paths


def merge_files(paths: dict[str, str], out: Path, name: str, shard_size: int | None = None, **more: Any) -> Summary:
    run = {k: v for k, v in (RUNS[name] | more).items() if k not in ("stochastic_rounding", "threads")}
    recipe = build_recipe(
        run.pop("method"),
        paths["base"],
        experts_of(RUNS[name], paths),
        {k: v for k, v in run.items() if k not in ("seed", "out_dtype")},
        **{k: v for k, v in run.items() if k in ("seed", "out_dtype")},
    )
    stochastic = RUNS[name].get("stochastic_rounding", False)
    summary = cs.merge_recipe(
        recipe, out, shard_size=shard_size, threads=more.get("threads"), stochastic_rounding=stochastic
    )
    assert isinstance(summary, Summary)
    return summary


def load_folder(folder: Path) -> State:
    return {n: a for file in sorted(folder.glob("*.safetensors")) for n, a in load_file(file).items()}


@pytest.mark.parametrize("name", RUNS)
def test_threads_segments_and_blocks_do_not_change_a_bit(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = digest(in_memory(name, threads=1))
    for segment in (4096, 3 * 4096, 1 << 22):
        for block in (4096, 2 * 4096, 1 << 16):
            monkeypatch.setattr("consilience.engine.plan.SEGMENT", segment)
            monkeypatch.setattr("consilience.experts.block.SMALLEST_BLOCK", block)
            monkeypatch.setattr("consilience.experts.block.LARGEST_BLOCK", block)
            for threads in (1, 2, 4) if block == 4096 else (3,):
                assert digest(in_memory(name, threads=threads)) == expected, (segment, block, threads)


@pytest.mark.parametrize("name", RUNS)
def test_files_memory_and_shards_give_the_same_tensors(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("consilience.engine.plan.SEGMENT", 4096)
    expected = digest(in_memory(name))
    single = write_models(tmp_path / "single")
    sharded = write_models(tmp_path / "sharded", shards=3)
    fingerprints: set[str] = set()
    for number, (paths, shard_size) in enumerate([(single, None), (sharded, None), (single, 40_000), (sharded, 1)]):
        out = tmp_path / f"out-{number}"
        fingerprints.add(merge_files(paths, out, name, shard_size).fingerprint)
        assert digest(load_folder(out)) == expected
        files = sorted(p.name for p in out.glob("*.safetensors"))
        index = out / "model.safetensors.index.json"
        if shard_size is None:
            assert files == ["model.safetensors"]
            assert not index.exists()
        else:
            assert len(files) > 1
            assert sorted(set(json.loads(index.read_text())["weight_map"].values())) == files
    assert len(fingerprints) == 1
    written = model_fingerprint(checkpoint_fingerprints(open_checkpoint(tmp_path / "out-2")))
    assert fingerprints == {written}


def test_the_weight_file_itself_does_not_depend_on_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("consilience.engine.plan.SEGMENT", 4096)
    paths = write_models(tmp_path)
    for name in ("ties", "dare_ties", "stochastic"):
        files: set[bytes] = set()
        for threads in (1, 2, 4):
            out = tmp_path / f"{name}-{threads}"
            merge_files(paths, out, name, threads=threads)
            files.add((out / "model.safetensors").read_bytes())
        assert len(files) == 1


DRIVER = """
import sys
sys.path.insert(0, sys.argv[1])
from test_determinism import RUNS, digest, in_memory
for name in RUNS:
    print(name, digest(in_memory(name)))
"""


def test_hash_seed_does_not_change_a_bit() -> None:
    expected = "".join(f"{name} {digest(in_memory(name))}\n" for name in RUNS)
    running = [
        subprocess.Popen(
            [sys.executable, "-W", "error", "-c", DRIVER, str(Path(__file__).parent)],
            env=os.environ | {"PYTHONHASHSEED": seed},
            stdout=subprocess.PIPE,
            text=True,
        )
        for seed in ("1", "2")
    ]
    for process in running:
        assert process.communicate()[0] == expected
        assert process.returncode == 0


def test_seeds_and_expert_names_do_change_random_methods(tmp_path: Path) -> None:
    for name in ("dare_linear", "dare_ties", "stochastic", "half"):
        assert len({digest(in_memory(name, **{k: v})) for k, v in (("threads", 1), ("threads", 2))}) == 1
        run = {k: v for k, v in RUNS[name].items() if k != "seed"}
        others = [cs.merge(STATES["base"], experts_of(run, STATES), **run, seed=seed) for seed in (7, 8)]
        assert len({digest(o) for o in others if isinstance(o, dict)}) == 2


def test_two_equal_experts_under_other_names_are_dropped_independently() -> None:
    base = {"w": np.zeros(4096)}
    experts = {"a": {"w": np.ones(4096)}, "b": {"w": np.ones(4096)}}
    out = cs.merge(base, experts, method="dare_linear", density=0.5)
    assert isinstance(out, dict)
    counts = np.bincount(out["w"].astype(int), minlength=5)  # 0, 2 or 4: kept in none, one, both
    assert counts[0] > 800
    assert counts[2] > 1600
    assert counts[4] > 800


# ----------------------------------------------------------------------------------------------------------------------
# Stochastic rounding


SIGNIFICAND = {"bfloat16": 7, "float16": 10, "float32": 23}
NUMPY: dict[str, Any] = {"bfloat16": BFLOAT16, "float16": np.dtype(np.float16), "float32": np.dtype(np.float32)}
SMALLEST = {"bfloat16": -126, "float16": -14, "float32": -126}


def rounded(values: Array, kind: str, seed: int = 0) -> Array:
    out = cs.merge(None, {"a": {"w": values}}, method="linear", out_dtype=kind, stochastic_rounding=True, seed=seed)
    assert isinstance(out, dict)
    return out["w"].astype(np.float64)


@pytest.mark.parametrize("source", ["float32", "float64"])
@pytest.mark.parametrize("kind", SIGNIFICAND)
@pytest.mark.parametrize("sign", [1, pytest.param(-1, marks=pytest.mark.slow)])
def test_stochastic_rounding_lands_on_the_neighbours_with_the_right_odds(source: str, kind: str, sign: int) -> None:
    if source == "float32" and kind == "float32":
        return
    n, normal = 20_000, 2.0 ** SMALLEST[kind]
    unit = 2.0 ** -SIGNIFICAND[kind]
    for lower, step in (
        (1.0, unit),
        (2.0 - unit, unit),  # the upper neighbour is the next power of two
        (normal, normal * unit),
        (normal * (1 - unit), normal * unit),  # the largest subnormal
        (0.0, normal * unit),
        (5 * normal * unit, normal * unit),
    ):
        for share in (0.25, 0.5, 0.90625):
            x = sign * (lower + share * step)
            values = np.full(n, x, source)
            assert values[0] == x or source == "float32"  # float32 cannot hold a share of a bfloat16 subnormal's unit
            if values[0] != x:
                continue
            found = rounded(values, kind)
            assert set(np.unique(abs(found))) <= {lower, lower + step}
            assert (np.sign(found) * sign >= 0).all()
            up = (abs(found) > lower).mean()
            assert abs(up - share) < 5 * np.sqrt(share * (1 - share) / n), (lower, share)


@pytest.mark.parametrize("kind", SIGNIFICAND)
def test_stochastic_rounding_leaves_representable_values_alone(kind: str) -> None:
    codes = np.arange(1 << 16, dtype=np.uint16)
    held = (codes.astype(np.uint32) * 65537).view(np.float32) if kind == "float32" else codes.view(NUMPY[kind])
    with np.errstate(invalid="ignore"):  # numpy warns of signalling NaNs
        values = held[np.isfinite(held)].astype(np.float64)
    np.testing.assert_array_equal(rounded(values, kind), values)


def test_stochastic_rounding_is_unbiased_over_seeds() -> None:
    rng = np.random.default_rng(12)
    values = rng.standard_normal(500)
    runs = 400
    found = np.array([rounded(values, "bfloat16", seed) for seed in range(runs)])
    unit = 2.0 ** (np.frexp(values)[1] - 8)
    share = np.abs(values) / unit % 1
    sigma = unit * np.sqrt(np.maximum(share * (1 - share), 1e-4) / runs)
    assert (abs(found.mean(0) - values) < 5.5 * sigma).all()


def test_stochastic_rounding_keeps_updates_that_rounding_to_nearest_loses() -> None:
    """A change of 1/16 unit vanishes when rounded to nearest; on average it must not."""
    base = {"w": np.ones(40_000, BFLOAT16)}
    experts = {"a": {"w": np.full(40_000, 1 + 2.0**-11, np.float32)}}
    nearest = cs.merge(base, experts)
    fair = cs.merge(base, experts, stochastic_rounding=True)
    assert isinstance(nearest, dict)
    assert isinstance(fair, dict)
    assert (nearest["w"] == 1).all()
    assert abs(fair["w"].astype(np.float64).mean() - 1 - 2.0**-11) < 5 * 2.0**-7 * np.sqrt(1 / 16 / 40_000)


def test_the_summary_reports_what_stochastic_rounding_cost(tmp_path: Path) -> None:
    paths = write_models(tmp_path)
    plain = merge_files(paths, tmp_path / "nearest", "task_arithmetic", weight=0.3).rounding
    fair = merge_files(paths, tmp_path / "stochastic", "stochastic").rounding
    assert plain > 0
    assert plain < fair < 4 * plain


def test_the_plan_of_random_methods_is_keyed_by_the_seed(tmp_path: Path) -> None:
    paths = write_models(tmp_path)
    experts = {"math": paths["math"]}
    digests = {plan_recipe(build_recipe("dare_linear", paths["base"], experts, {}, seed=s)).digest for s in (0, 0, 1)}
    assert len(digests) == 2
