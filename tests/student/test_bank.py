"""The bank's passes against dense arithmetic in float64: any shape, dtype and form of expert, any cut of the work."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from consilience.api import build_recipe, merge_recipe, plan_recipe
from consilience.coefficients import Coefficients, make_groups
from consilience.coefficients.coefficients import Trimmed
from consilience.coefficients.groups import Group
from consilience.engine.plan import Plan
from consilience.errors import InputError
from consilience.student.bank import Bank, mergeable

State = dict[str, torch.Tensor]
#: Matrices that adapters change, a wide one, and tensors that only full weights change.
SHAPES: dict[str, tuple[int, ...]] = {
    "x.0.weight": (24, 17),
    "x.1.weight": (9, 130),
    "x.1.bias": (130,),
    "y.weight": (3, 5, 4),
    "z": (),
    "none": (0, 4),
}
ADAPTED = ("x.0", "x.1")


@dataclass
class Zoo:
    """Models on disk, and in float64: the base, and every expert's task vectors."""

    folder: Path
    base: dict[str, Any]
    taus: dict[str, dict[str, Any]]

    def plan(self, experts: Sequence[str]) -> Plan:
        paths = {name: str(self.folder / name) for name in experts}
        return plan_recipe(build_recipe("task_arithmetic", str(self.folder / "base"), paths, {}))

    def stack(self, name: str, experts: Sequence[str]) -> Any:
        zero = np.zeros_like(self.base[name])
        return np.stack([self.taus[e].get(name, zero).ravel() for e in experts])


def save_model(folder: Path, state: Mapping[str, torch.Tensor]) -> None:
    folder.mkdir(parents=True)
    save_file(dict(state), folder / "model.safetensors")
    (folder / "config.json").write_text('{"model_type": "none"}')


def doubled(state: State) -> dict[str, Any]:
    return {name: value.double().numpy() for name, value in state.items()}


def make_zoo(folder: Path, dtype: torch.dtype, shapes: Mapping[str, tuple[int, ...]] = SHAPES, seed: int = 0) -> Zoo:
    """A base; full experts ``full`` and ``same`` (some tensors equal); adapters ``lora``, ``rs`` and ``turned``."""
    generator = torch.Generator().manual_seed(seed)

    def noise(shape: Sequence[int], size: float = 1.0) -> torch.Tensor:
        return torch.randn(tuple(shape), generator=generator) * size

    base = {name: noise(shape).to(dtype) for name, shape in shapes.items()}
    save_model(folder / "base", base)
    zoo = Zoo(folder, doubled(base), {})
    for name in ("full", "same"):
        own = {n: (v.float() + noise(v.shape, 0.1)).to(dtype) for n, v in base.items()}
        own |= {n: base[n] for n in list(base)[::2]} if name == "same" else {}
        save_model(folder / name, own)
        zoo.taus[name] = {n: v - zoo.base[n] for n, v in doubled(own).items()}
    for name, config in {
        "lora": {"r": 2, "lora_alpha": 3},
        "rs": {"r": 4, "lora_alpha": 2, "use_rslora": True},
        "turned": {"r": 3, "lora_alpha": 3, "fan_in_fan_out": True},
    }.items():
        rank: int = config["r"]
        scale = config["lora_alpha"] / (rank**0.5 if name == "rs" else rank)
        tensors: State = {}
        zoo.taus[name] = {}
        for module in ADAPTED[: 1 if name == "rs" else 2]:
            out, into = shapes[f"{module}.weight"]
            if name == "turned":
                out, into = into, out
            a, b = noise((rank, into), 0.3).to(dtype), noise((out, rank), 0.3).to(dtype)
            tensors |= {f"base_model.model.{module}.lora_A.weight": a, f"base_model.model.{module}.lora_B.weight": b}
            update = scale * (b.double() @ a.double()).numpy()
            zoo.taus[name][f"{module}.weight"] = update.T if name == "turned" else update
        (folder / name).mkdir()
        save_file(tensors, folder / name / "adapter_model.safetensors")
        (folder / name / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"} | config))
    return zoo


DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.fixture(scope="module")
def zoos(tmp_path_factory: pytest.TempPathFactory) -> dict[torch.dtype, Zoo]:
    return {dtype: make_zoo(tmp_path_factory.mktemp("zoo"), dtype) for dtype in DTYPES}


def opened(plan: Plan, grouping: str = "tensor", chunks: Callable[[str], int] | None = None, **more: Any) -> Any:
    groups = make_groups(mergeable(plan, lambda name: False), grouping, chunks)
    return Bank(plan, groups, **more), groups


def indices(groups: Sequence[Group]) -> dict[str, Any]:
    """Which coefficient every element has, counted out element by element."""
    found: dict[str, Any] = {}
    for group in groups:
        edges = [i * group.numel // group.chunks for i in range(group.chunks + 1)]
        order = np.concatenate([np.full(edges[i + 1] - edges[i], group.first + i) for i in range(group.chunks)])
        begin = 0
        for name, numel in group.tensors:
            found[name] = order[begin : begin + numel]
            begin += numel
    return found


def check(zoo: Zoo, experts: Sequence[str], bank: Bank, groups: Sequence[Group], dtype: torch.dtype) -> None:
    """Both passes, the norms and the inner products against dense float64."""
    exact = dtype in (torch.float32, torch.float64)
    rtol = 1e-12 if exact else 2e-5
    generator = np.random.default_rng(1)
    alpha = generator.normal(size=(len(experts), bank.count))
    where = indices(groups)
    weights = {name: torch.full((tensor.numel,), torch.nan).double() for name, tensor in bank.tensors.items()}
    bank.blend(alpha, weights)
    gradients = {name: torch.from_numpy(generator.normal(size=len(value))) for name, value in weights.items()}
    slopes = bank.products(gradients)
    expected = np.zeros_like(alpha)
    norms, grams = bank.l1(), bank.gram()
    assert set(grams) == set(weights)
    assert set(weights) == {name for name in where if np.abs(zoo.stack(name, experts)).any() or name in norms}
    for name, value in weights.items():
        taus = zoo.stack(name, experts)
        blend = zoo.base[name].ravel() + (alpha[:, where[name]] * taus).sum(0)
        np.testing.assert_allclose(value.numpy(), blend, rtol=rtol, atol=rtol * 10, err_msg=name)
        np.testing.assert_allclose(norms[name], np.abs(taus).sum(1), rtol=rtol, atol=rtol, err_msg=name)
        stack = np.concatenate([zoo.base[name].reshape(1, -1), taus])
        np.testing.assert_allclose(grams[name], stack @ stack.T, rtol=rtol, atol=rtol * 100, err_msg=name)
        each = taus * gradients[name].numpy()
        for k in range(len(experts)):
            np.add.at(expected[k], where[name], each[k])
    np.testing.assert_allclose(slopes, expected, rtol=rtol * 10, atol=rtol * 100)


CUTS: list[tuple[str, Callable[[str], int] | None]] = [
    ("tensor", None),
    ("tensor", lambda name: 1 + len(name) % 5),
    ("tensor", lambda name: 10_000),
    ("module", lambda name: 3),
    ("global", lambda name: 13),
]
TEAMS = [("full", "lora", "rs"), ("lora", "rs", "turned"), ("rs",), ("same", "full")]


@pytest.mark.parametrize("team", TEAMS, ids="+".join)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_both_passes_are_dense_arithmetic(zoos: dict[torch.dtype, Zoo], dtype: torch.dtype, team: list[str]) -> None:
    zoo = zoos[dtype]
    plan = zoo.plan(team)
    for grouping, chunks in CUTS:
        bank, groups = opened(plan, grouping, chunks, threads=1)
        check(zoo, team, bank, groups, dtype)
        bank.close()
    plan.close()


def test_tensors_that_no_expert_changes_have_no_coefficients(zoos: dict[torch.dtype, Zoo]) -> None:
    plan = zoos[torch.float32].plan(("lora", "rs"))
    bank, groups = opened(plan)
    assert set(bank.tensors) == {"x.0.weight", "x.1.weight"}
    assert bank.products({}).shape == (2, len(groups))
    assert bank.nbytes > 0
    bank.close()
    plan.close()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("team", TEAMS[:2], ids="+".join)
def test_segments_and_threads_change_no_byte(
    zoos: dict[torch.dtype, Zoo], dtype: torch.dtype, team: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    zoo, found = zoos[dtype], list[tuple[bytes, ...]]()
    for segment, threads in ((1 << 22, 1), (1 << 22, 2), (64, 2), (64, 1)):
        monkeypatch.setattr("consilience.engine.plan.SEGMENT", segment)
        plan = zoo.plan(team)
        bank, groups = opened(plan, "tensor", lambda name: 4, threads=threads)
        check(zoo, team, bank, groups, dtype)
        alpha = np.random.default_rng(2).normal(size=(len(team), bank.count))
        weights = {name: torch.empty(tensor.numel) for name, tensor in bank.tensors.items()}
        bank.blend(alpha, weights)
        slopes = bank.products({n: torch.sin(torch.arange(len(v), dtype=torch.float32)) for n, v in weights.items()})
        norms = b"".join(v.tobytes() for part in (bank.l1(), bank.gram()) for v in part.values())
        found.append((b"".join(w.numpy().tobytes() for w in weights.values()), slopes.tobytes(), norms))
        bank.close()
        plan.close()
    assert found[0] == found[1]
    assert found[2] == found[3]
    assert found[0][0] == found[2][0]  # only sums depend on where segments are cut


def test_blocks_inside_a_segment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("consilience.experts.block.CACHE", 0)  # the smallest blocks: 8192 elements
    shapes = {"x.0.weight": (150, 131), "x.1.weight": (3, 9000), "b": (8193,)}
    zoo = make_zoo(tmp_path, torch.bfloat16, shapes)
    plan = zoo.plan(("full", "lora"))
    for grouping, chunks in (("tensor", 7), ("global", 5), ("tensor", 1)):
        bank, groups = opened(plan, grouping, lambda name, chunks=chunks: chunks, threads=2)
        check(zoo, ("full", "lora"), bank, groups, torch.bfloat16)
        bank.close()
    plan.close()


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 40),
    more=st.lists(st.integers(0, 6), max_size=3),
    chunks=st.integers(1, 50),
    grouping=st.sampled_from(["tensor", "module", "global"]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
def test_any_shapes(
    tmp_path_factory: pytest.TempPathFactory,
    rows: int,
    columns: int,
    more: list[int],
    chunks: int,
    grouping: str,
    dtype: torch.dtype,
    seed: int,
) -> None:
    shapes = {"x.0.weight": (rows, columns), "x.1.weight": (columns, rows), "x.1.bias": tuple(more)}
    zoo = make_zoo(tmp_path_factory.mktemp("any"), dtype, shapes, seed)
    team = ("lora", "turned", "full") if seed % 2 else ("lora", "rs")
    plan = zoo.plan(team)
    bank, groups = opened(plan, grouping, lambda name: chunks, threads=1)
    check(zoo, team, bank, groups, dtype)
    bank.close()
    plan.close()


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_students_own_dtype_is_rounded_to_once(
    zoos: dict[torch.dtype, Zoo], dtype: torch.dtype, kind: torch.dtype
) -> None:
    zoo, team = zoos[dtype], ("full", "lora")
    plan = zoo.plan(team)
    bank, _ = opened(plan, threads=1)
    alpha = np.random.default_rng(3).normal(size=(2, bank.count))
    wide = {name: torch.empty(t.numel, dtype=torch.float64) for name, t in bank.tensors.items()}
    narrow = {name: torch.empty(t.numel, dtype=kind) for name, t in bank.tensors.items()}
    bank.blend(alpha, wide)
    bank.blend(alpha, narrow)
    assert all(torch.equal(narrow[name], wide[name].to(kind)) for name in wide)
    gradients = {name: torch.sin(torch.arange(len(value))).to(kind) for name, value in wide.items()}
    same = {name: value.double() for name, value in gradients.items()}
    np.testing.assert_array_equal(bank.products(gradients), bank.products(same))
    bank.close()
    plan.close()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_write_gives_every_models_own_values(zoos: dict[torch.dtype, Zoo], dtype: torch.dtype) -> None:
    zoo, team = zoos[dtype], ("full", "lora", "turned")
    plan = zoo.plan(team)
    bank, _ = opened(plan, threads=1)
    for name, base in zoo.base.items():
        for k, expert in [(None, "base"), *enumerate(team)]:
            out = torch.full((base.size,), torch.nan)
            bank.write(name, k, out)
            tau = 0 if k is None else zoo.taus[expert].get(name, np.zeros_like(base))
            tolerance = 0 if k is None or expert == "full" else 1e-6
            np.testing.assert_allclose(out, (base + tau).ravel(), rtol=tolerance, atol=tolerance, err_msg=name)
    bank.close()
    plan.close()


# ----------------------------------------------------------------------------------------------------------------------
# Trimmed task vectors.


def trimmed_stack(zoo: Zoo, team: Sequence[str], density: float, elect: bool) -> dict[str, Any]:
    """Largest entries over all tensors together, then (with ``elect``) the sign of the sum."""
    names = sorted(name for name in zoo.base if np.abs(zoo.stack(name, team)).any())
    joined = np.concatenate([zoo.stack(name, team) for name in names], 1)
    for row in joined:
        keep = max(int(density * row.size), 1)
        order = np.argsort(-np.abs(row.astype(np.float32)), kind="stable")
        row[order[keep:]] = 0
    if elect:
        sign = np.where(joined.sum(0) >= 0, 1.0, -1.0)
        joined[joined * sign < 0] = 0
    cuts = np.cumsum([zoo.base[name].size for name in names])[:-1]
    return dict(zip(names, np.split(joined, cuts, 1), strict=True))


@pytest.mark.parametrize("elect", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("segment", [1 << 22, 128])
def test_trimmed_task_vectors(
    zoos: dict[torch.dtype, Zoo],
    tmp_path: Path,
    elect: bool,
    dtype: torch.dtype,
    segment: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The bank and the streaming merge keep the same entries: those that plain sorting keeps."""
    monkeypatch.setattr("consilience.engine.plan.SEGMENT", segment)
    zoo, team, trimmed = zoos[dtype], ("full", "same", "turned"), Trimmed(0.3, elect)
    expected = trimmed_stack(zoo, team, 0.3, elect)
    plan = zoo.plan(team)
    bank, groups = opened(plan, "tensor", lambda name: 3, trimmed=trimmed, threads=2)
    alpha = np.random.default_rng(4).normal(size=(3, bank.count))
    weights = {name: torch.empty(t.numel, dtype=torch.float64) for name, t in bank.tensors.items()}
    bank.blend(alpha, weights)
    slopes = bank.products({name: torch.ones(len(value)) for name, value in weights.items()})
    norms = bank.l1()
    bank.close()
    plan.close()
    where, total = indices(groups), np.zeros_like(alpha)
    blends: dict[str, Any] = {}
    for name, stack in expected.items():
        blends[name] = zoo.base[name].ravel() + (alpha[:, where[name]] * stack).sum(0)
        np.testing.assert_allclose(weights[name], blends[name], rtol=2e-5, atol=2e-5, err_msg=name)
        np.testing.assert_allclose(norms[name], np.abs(stack).sum(1), rtol=2e-5, atol=2e-5)
        for k in range(3):
            np.add.at(total[k], where[name], stack[k])
    np.testing.assert_allclose(slopes, total, rtol=1e-4, atol=1e-4)
    recipe = build_recipe("coefficients", str(zoo.folder / "base"), {e: str(zoo.folder / e) for e in team}, {})
    merge_recipe(
        recipe.model_copy(update={"out_dtype": "float64"}),
        tmp_path / "out",
        coefficients=Coefficients(team, groups, alpha, trimmed),
    )
    from safetensors.torch import load_file

    merged = load_file(tmp_path / "out" / "model.safetensors")
    for name, blend in blends.items():
        np.testing.assert_allclose(merged[name].numpy().ravel(), blend, rtol=2e-5, atol=2e-5, err_msg=name)


# ----------------------------------------------------------------------------------------------------------------------
# Wrong values.


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(("broken", "tensor"), [("full", "x.1.bias"), ("lora", "x.0"), ("base", "x.0.weight")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_nan_in_a_model_is_one_line(
    tmp_path: Path, dtype: torch.dtype, broken: str, tensor: str, value: float, threads: int
) -> None:
    zoo = make_zoo(tmp_path, dtype)
    from safetensors.torch import load_file

    file = tmp_path / broken / ("adapter_model.safetensors" if broken == "lora" else "model.safetensors")
    state = load_file(file)
    state[next(name for name in state if tensor in name)].view(-1)[1] = value
    save_file(state, file)
    plan = zoo.plan(("full", "lora"))
    bank, _ = opened(plan, threads=threads)
    weights = {name: torch.empty(t.numel) for name, t in bank.tensors.items()}
    with pytest.raises(InputError) as caught:
        bank.blend(np.ones((2, bank.count)), weights)
    message = str(caught.value)
    assert "\n" not in message
    assert f"{tensor.removesuffix('.weight')}" in message
    assert "NaN or Inf" in message
    bank.close()
    tolerant, _ = opened(plan, threads=threads, allow_nonfinite=True)
    tolerant.blend(np.ones((2, bank.count)), weights)
    assert not all(torch.isfinite(value).all() for value in weights.values())
    tolerant.close()
    plan.close()


# ----------------------------------------------------------------------------------------------------------------------
# Memory.

PEAK = """
import json, sys, threading, time
from pathlib import Path
import numpy as np
import torch
torch.set_num_threads(1)
from consilience.api import build_recipe, plan_recipe
from consilience.coefficients import make_groups
from consilience.student.bank import Bank, mergeable

def anonymous():
    text = Path("/proc/self/status").read_text()
    return int(text.split("RssAnon:")[1].split()[0]) / 1024

class Peak(threading.Thread):
    value, done = 0.0, False
    def run(self):
        while not self.done:
            self.value = max(self.value, anonymous())
            time.sleep(0.001)

place, found = Path(sys.argv[1]), {}
for count in (2, 8, 2, 8):  # the first round compiles the kernels
    peak = Peak(daemon=True)
    peak.start()
    experts = {f"e{k}": str(place / f"e{k}") for k in range(count)}
    plan = plan_recipe(build_recipe("task_arithmetic", str(place / "base"), experts, {}))
    bank = Bank(plan, make_groups(mergeable(plan, lambda name: False), "tensor"), threads=1)
    weights = {name: torch.zeros(t.numel) for name, t in bank.tensors.items()}
    for step in range(2):
        bank.blend(np.full((count, bank.count), 0.1 * step), weights)
        bank.products({name: torch.ones_like(value) for name, value in weights.items()})
    bank.close()
    plan.close()
    del weights
    peak.done = True
    peak.join()
    found[count] = peak.value
print(json.dumps(found))
"""


@pytest.mark.slow
@pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="anonymous memory is read from /proc, which only Linux has"
)
def test_eight_experts_take_the_memory_of_two(tmp_path: Path) -> None:
    """A student of 30 MB; an expert held in memory would be 15 MB, a tenth of the whole."""
    generator = torch.Generator().manual_seed(0)
    base = {f"layers.{i}.weight": torch.randn(1024, 1024, generator=generator).bfloat16() for i in range(7)}
    save_model(tmp_path / "base", base)
    save_model(tmp_path / "e0", {name: value + 1 for name, value in base.items()})
    for k in range(1, 8):
        (tmp_path / f"e{k}").mkdir()
        for file in ("model.safetensors", "config.json"):
            os.link(tmp_path / "e0" / file, tmp_path / f"e{k}" / file)
    ended = subprocess.run(
        [sys.executable, "-c", PEAK, str(tmp_path)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    found = json.loads(ended.stdout)
    assert found["8"] <= 1.05 * found["2"], found
