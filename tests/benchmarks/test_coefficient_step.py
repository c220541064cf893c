"""The step benchmark: its sides compute the same thing, and its page says what was found."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from benchmarks import coefficient_step, step_results
from benchmarks.coefficient_step import jobs_of
from benchmarks.step_experts import KINDS, SCALE, Kind, make_experts
from benchmarks.step_floor import mapped, task_vectors
from benchmarks.step_results import STEP, Row, compare
from benchmarks.step_sides import SIDES, Found, Side, Spec


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama in bf16 whose output layer is its embedding, as SmolLM2's is."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=96, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, initializer_range=0.3, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("base")
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


def spec_of(base: Path, kind: Kind, folder: Path, count: int = 3) -> Spec:
    experts = make_experts(base, folder / "step", kind, count)
    return Spec("ours", kind, base, experts, 12, 1, 1, False, True)


def changes(base: Path, folder: Path, kind: Kind) -> dict[str, torch.Tensor]:
    """Task vectors in float64, by definition."""
    (path,) = folder.glob("*.safetensors")
    stored = load_file(path)
    if kind == "dense":
        origin = mapped(base)
        return {name: value.double() - origin[name].double() for name, value in stored.items()}
    stems = [name.removesuffix(".lora_A.weight") for name in stored if name.endswith("lora_A.weight")]
    return {
        stem.removeprefix("base_model.model.") + ".weight": SCALE
        * stored[f"{stem}.lora_B.weight"].double()
        @ stored[f"{stem}.lora_A.weight"].double()
        for stem in stems
    }


@pytest.mark.parametrize("kind", KINDS)
def test_experts_are_small_changes_made_once(base: Path, tmp_path: Path, kind: Kind) -> None:
    first = make_experts(base, tmp_path / "a", kind, 2)
    again = make_experts(base, tmp_path / "b", kind, 2)
    for name, folder in first.items():
        for one, other in zip(folder.glob("*.safetensors"), again[name].glob("*.safetensors"), strict=True):
            assert one.read_bytes() == other.read_bytes()
    origin = mapped(base)
    for name, change in changes(base, first["expert1"], kind).items():
        if name.endswith("proj.weight"):
            assert float(change.std() / origin[name].float().std()) == pytest.approx(0.0125, rel=0.5)
    file = next(first["expert0"].glob("*.safetensors"))
    stamp = file.stat().st_mtime_ns
    make_experts(base, tmp_path / "a", kind, 3)
    assert file.stat().st_mtime_ns == stamp


@pytest.mark.parametrize("kind", KINDS)
def test_the_floor_does_the_two_passes(base: Path, tmp_path: Path, kind: Kind) -> None:
    spec = spec_of(base, kind, tmp_path)
    vectors = task_vectors(kind, base, list(spec.experts.values()))
    each = [changes(base, folder, kind) for folder in spec.experts.values()]
    alpha = torch.tensor([0.3, -0.2, 0.7])
    weights = {name: torch.empty(vectors.base[name].shape) for name in vectors.names}
    gradients = {name: torch.randn(vectors.base[name].shape) for name in vectors.names}
    vectors.blend(alpha, weights)
    products = vectors.products(gradients)
    assert set(each[0]) == set(vectors.names)
    for name in vectors.names:
        exact = vectors.base[name].double() + sum(float(a) * t[name] for a, t in zip(alpha, each, strict=True))
        assert torch.allclose(weights[name].double(), exact, rtol=1e-5, atol=1e-6)
        inner = [float((gradients[name].double() * change[name]).sum()) for change in each]
        assert products[name] == pytest.approx(inner, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_ours_and_the_straightforward_gradient_agree(base: Path, tmp_path: Path, kind: Kind) -> None:
    spec = spec_of(base, kind, tmp_path)
    ours, plain = SIDES["ours"](spec), SIDES["straightforward"](spec)
    rows = [Row("ours", kind, 3, 1, ours), Row("straightforward", kind, 3, 1, plain)]
    found = compare(*rows)
    assert found.same
    assert found.error < 1e-4
    assert found.coefficients == 3 * len(plain.gradient)
    assert {"step", "step, hidden too", "blend", "compute", "products"} == set(ours.seconds)
    assert all(len(values) == spec.repeat for values in ours.seconds.values())
    name = next(iter(ours.gradient))
    ours.gradient[name][0] += 1.0
    assert not compare(*rows).same


def test_the_floor_runs_and_times_its_parts(base: Path, tmp_path: Path) -> None:
    found = SIDES["floor"](spec_of(base, "dense", tmp_path))
    assert set(found.seconds) == {"step", "blend", "compute", "products"}
    parts = sum(found.seconds[part][0] for part in ("blend", "compute", "products"))
    assert 0 < parts <= found.seconds["step"][0]


def test_what_is_run() -> None:
    settings = coefficient_step.parse(["--threads", "1"])
    assert settings.kinds == KINDS
    assert (settings.k, settings.tokens, settings.threads, settings.pinned) == (5, 128, (1,), True)
    assert settings.folder.parts[-3:] == ("docs", "results", "bench")
    titles = [job.title for job in jobs_of(settings)]
    assert titles[:3] == [f"{side} dense K=5 threads=1" for side in ("floor", "ours", "straightforward")]
    assert titles[-4:] == [f"ours {kind} K={k} threads=1" for kind in KINDS for k in (2, 8)]
    part = coefficient_step.parse(["--experts", "lora", "--only", "floor", "--threads", "1"])
    assert [job.title for job in jobs_of(part)] == ["floor lora K=5 threads=1"]
    assert part.folder.parts[-2:] == ("bench", "results")


@pytest.mark.parametrize("arguments", [["--threads", "0"], ["--threads", "9999"], ["--k", "x"], ["--experts", "both"]])
def test_what_cannot_be_run_is_refused(arguments: list[str]) -> None:
    with pytest.raises(SystemExit):
        coefficient_step.parse(arguments)


def test_a_failed_process_costs_no_other_result(tmp_path: Path) -> None:
    def row(side: Side, experts: int, seconds: float, memory: float, failure: str = "") -> Row:
        found = Found({STEP: [seconds, seconds + 0.2, seconds + 0.1]}, {}, {"w": [1.0] * experts})
        return Row(side, "dense", experts, 1, found if not failure else Found(), memory, 0.0, failure)

    rows = (
        row("floor", 5, 2.0, 900.0), row("ours", 5, 2.2, 1000.0), row("straightforward", 5, 4.0, 3500.0),
        row("ours", 2, 2.0, 990.0), row("ours", 8, 2.5, 1010.0), row("floor", 3, 0.0, 0.0, "exit status 1: no"),
    )  # fmt: skip
    made = step_results.Results(
        date="2026-01-02T03:04:05+00:00",
        machine={"processor": "p", "cores": "2"},
        versions={"python": "3.11"},
        settings={"repeat": "3"},
        parameters=134_515_008,
        experts=5,
        tokens=128,
        rows=rows,
        checks=coefficient_step.checks_of(rows, 5),
    )
    path = step_results.save(made, tmp_path)
    assert step_results.load(path) == made
    assert json.loads(path.read_text())["checks"][0]["same"] is True
    text = path.with_suffix(".md").read_text()
    assert "| dense, 1 thread | time, consilience / floor | 1.10 | <= 1.15 | met |" in text
    assert "| dense, 1 thread | time, straightforward / consilience | 1.78 | >= 2 | missed |" in text
    assert "| dense, 1 thread | memory, straightforward / consilience | 3.50 | >= 3 | met |" in text
    assert "| dense, 1 thread | memory, consilience with K = 8 / K = 2 | 1.02 | <= 1.05 | met |" in text
    assert "Failed: floor, dense, 1 thread, K = 3 (exit status 1: no)." in text


def test_gradients_of_other_tensors_are_no_match() -> None:
    one = Row("ours", "dense", 1, 1, Found({}, {}, {"a": [1.0]}))
    other = Row("straightforward", "dense", 1, 1, Found({}, {}, {"b": [1.0]}))
    with pytest.raises(ValueError, match="same tensors"):
        compare(one, other)


@pytest.mark.slow
def test_a_run_of_one_side(base: Path, tmp_path: Path) -> None:
    status = coefficient_step.main(
        ["--base", str(base), "--cache", str(tmp_path), "--k", "2", "--tokens", "8", "--repeat", "1", "--threads", "1",
         "--experts", "lora", "--only", "floor"]
    )  # fmt: skip
    assert status == 0
    found = step_results.load(tmp_path / "results" / "coefficient_step.json")
    (row,) = found.rows
    assert (row.failure, row.experts, found.parameters > 0) == ("", 2, True)
    assert row.anon_mb > 50
    assert len(row.found.seconds[STEP]) == 1
