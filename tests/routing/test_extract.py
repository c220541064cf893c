"""Extraction against full singular value decompositions, PEFT, and models whose names differ from their files'."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from consilience.__main__ import run
from consilience.engine.low_rank import factorise, sketch
from consilience.errors import InputError
from consilience.routing.conversion.extract import extract
from consilience.routing.conversion.linear import layout
from consilience.routing.expert import Expert, read_factors
from consilience.routing.install import install
from consilience.routing.settings import Settings
from consilience.tasks.load import load_model
from tests.student.tiny import llava, save_family
from tests.tasks.tiny_models import make_llama

Weights = dict[str, NDArray[np.float64]]


def weights_of(folder: Path) -> Weights:
    held = load_file(folder / "model.safetensors")
    return {name: value.double().numpy() for name, value in held.items()}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, and an expert of which all but the first block's queries were trained."""
    place = tmp_path_factory.mktemp("models")
    base, expert = make_llama(), make_llama()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, value in expert.named_parameters():
            if name != "model.layers.0.self_attn.q_proj.weight":
                value += 0.05 * torch.randn(value.shape, generator=generator)
    base.save_pretrained(place / "base")
    expert.save_pretrained(place / "expert")
    return place


def svd(models: Path, tensor: str) -> tuple[Any, Any, Any]:
    tau = weights_of(models / "expert")[tensor] - weights_of(models / "base")[tensor]
    return np.linalg.svd(tau, full_matrices=False)


@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 14), st.integers(0, 2**31 - 1), st.integers(0, 12))
def test_factors_are_the_best_of_their_rank(rows: int, columns: int, rank: int, seed: int, zeros: int) -> None:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rows, columns))
    x[:, : min(zeros, columns - 1)] = 0
    found = factorise(x, rank)
    s = np.linalg.svd(x, compute_uv=False)
    assert found.rank == min(rank, rows, columns)
    assert found.kept == pytest.approx((s[:rank] ** 2).sum(), rel=1e-9)
    assert found.total == pytest.approx((s**2).sum(), rel=1e-12)
    assert np.linalg.norm(x - found.b @ found.a) == pytest.approx(np.sqrt((s[rank:] ** 2).sum()), abs=1e-7 * s[0])
    # Balanced: either factor has half of the singular values' weight.
    assert np.allclose(np.square(found.b).sum(0)[s[: found.rank] > 1e-6], s[: found.rank][s[: found.rank] > 1e-6])


@given(st.integers(2, 10), st.integers(2, 10), st.floats(0.01, 1.0), st.integers(0, 2**31 - 1))
def test_energy_takes_the_fewest_directions(rows: int, columns: int, energy: float, seed: int) -> None:
    x = np.random.default_rng(seed).standard_normal((rows, columns))
    found = factorise(x, energy=energy)
    squares = np.linalg.svd(x, compute_uv=False) ** 2
    assert found.kept >= energy * squares.sum() * (1 - 1e-9)
    assert squares[: found.rank - 1].sum() < energy * squares.sum() * (1 + 1e-9)
    assert factorise(x, 2, energy).rank == min(2, found.rank)


def test_a_sketch_is_nearly_the_best() -> None:
    rng = np.random.default_rng(1)
    x = rng.standard_normal((150, 20)) @ rng.standard_normal((20, 120)) + 0.01 * rng.standard_normal((150, 120))
    found, best = sketch(x, 5), factorise(x, 5)
    assert best.kept * 0.999 <= found.kept <= best.kept * (1 + 1e-9)
    assert found.total == pytest.approx(best.total)


def test_peft_adds_the_truncated_update(models: Path, tmp_path: Path) -> None:
    found = extract(models / "base", models / "expert", tmp_path / "out", rank=3)
    merged = load_model(models / "base", adapter=tmp_path / "out").state_dict()
    base = weights_of(models / "base")
    assert len(found.layers) == 13
    for layer in found.layers:
        u, s, vt = svd(models, layer.tensor)
        assert layer.tensor == f"{layer.module}.weight"
        assert layer.energy == pytest.approx((s[:3] ** 2).sum() / (s**2).sum(), rel=1e-9)
        expected = base[layer.tensor] + (u[:, :3] * s[:3]) @ vt[:3]
        assert np.allclose(merged[layer.tensor].numpy(), expected, atol=1e-5)
    untouched = "model.layers.0.self_attn.q_proj.weight"
    assert np.array_equal(merged[untouched].numpy(), base[untouched].astype(np.float32))


def test_full_rank_is_the_expert_s_linear_layers(models: Path, tmp_path: Path) -> None:
    found = extract(models / "base", models / "expert", tmp_path / "out", energy=1.0)
    merged, expert = load_model(models / "base", adapter=tmp_path / "out").state_dict(), weights_of(models / "expert")
    for layer in found.layers:
        assert np.allclose(merged[layer.tensor].numpy(), expert[layer.tensor], atol=1e-5)
    assert found.energy == pytest.approx(1, abs=1e-9)


def test_energy_gives_every_layer_its_rank(models: Path, tmp_path: Path) -> None:
    found = extract(models / "base", models / "expert", tmp_path / "out", energy=0.6)
    for layer in found.layers:
        squares = svd(models, layer.tensor)[1] ** 2
        assert layer.rank == int((np.cumsum(squares) < 0.6 * squares.sum()).sum()) + 1
    assert len({layer.rank for layer in found.layers}) > 1
    merged, base = load_model(models / "base", adapter=tmp_path / "out").state_dict(), weights_of(models / "base")
    for layer in found.layers:
        s = svd(models, layer.tensor)[1]
        kept = np.linalg.norm(merged[layer.tensor].double().numpy() - base[layer.tensor]) ** 2
        assert kept == pytest.approx((s[: layer.rank] ** 2).sum(), rel=1e-4)


def test_what_is_left_out_is_said(models: Path, tmp_path: Path) -> None:
    found = extract(models / "base", models / "expert", tmp_path / "out", rank=2)
    base, expert = weights_of(models / "base"), weights_of(models / "expert")
    squares = {name: float(np.square(expert[name] - base[name]).sum()) for name in base}
    whole = sum(squares.values())
    norms = sum(value for name, value in squares.items() if "norm" in name)
    assert found.left_out["embeddings"] == pytest.approx(squares["model.embed_tokens.weight"] / whole, rel=1e-6)
    assert found.left_out["norms"] == pytest.approx(norms / whole, rel=1e-6)
    assert sum(layer.total for layer in found.layers) == pytest.approx(
        whole * (1 - sum(found.left_out.values())), rel=1e-6
    )
    record = json.loads((tmp_path / "out/extraction.json").read_text())
    assert record["left_out"] == found.left_out
    assert [layer["rank"] for layer in record["layers"]] == [2] * 13
    assert str(found).startswith("13 linear layers, rank 2, ")


def test_an_untied_output_layer_is_left_out(tmp_path: Path) -> None:
    base = make_llama(tie_word_embeddings=False)
    base.save_pretrained(tmp_path / "base")
    with torch.no_grad():
        base.lm_head.weight += 0.1
        base.model.layers[1].mlp.up_proj.weight[0] += 0.2
    base.save_pretrained(tmp_path / "expert")
    found = extract(tmp_path / "base", tmp_path / "expert", tmp_path / "out", rank=4, energy=0.9)
    assert [(layer.tensor, layer.rank) for layer in found.layers] == [("model.layers.1.mlp.up_proj.weight", 1)]
    assert list(found.left_out) == ["output layer"]


def test_it_joins_a_routed_model(models: Path, tmp_path: Path) -> None:
    extract(models / "base", models / "expert", tmp_path / "out", rank=4)
    model, ids = load_model(models / "base"), torch.tensor([[5, 9, 40, 77]])
    install(model, [Expert("tuned", read_factors(tmp_path / "out"))], Settings("none"))
    merged = load_model(models / "base", adapter=tmp_path / "out")
    with torch.no_grad():
        assert torch.allclose(model(ids).logits, merged(ids).logits, atol=1e-3, rtol=1e-4)


def test_factors_take_the_base_s_dtype_or_another(models: Path, tmp_path: Path) -> None:
    for name in ("base", "expert"):
        load_model(models / name, dtype="bfloat16").save_pretrained(tmp_path / name)
    for dtype, expected in ((None, torch.bfloat16), ("float32", torch.float32)):
        extract(tmp_path / "base", tmp_path / "expert", tmp_path / "out", rank=2, dtype=dtype, force=True)
        held = load_file(tmp_path / "out/adapter_model.safetensors")
        assert {value.dtype for value in held.values()} == {expected}


def test_names_that_differ_from_the_file_s(tmp_path: Path) -> None:
    save_family(tmp_path, llava, ("math",))
    found = extract(tmp_path / "base", tmp_path / "math", tmp_path / "out", energy=1.0)
    renamed = [layer for layer in found.layers if layer.tensor != f"{layer.module}.weight"]
    assert renamed
    merged = load_model(tmp_path / "base", adapter=tmp_path / "out")
    expert = dict(load_model(tmp_path / "math").named_parameters())
    held = dict(merged.named_parameters())
    for layer in found.layers:
        name = f"{layer.module}.weight"
        assert torch.allclose(held[name], expert[name], atol=1e-5)


class Stop(Exception):
    """Stands for whatever ends a process."""


def test_an_interrupted_run_goes_on(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(done: int, total: int) -> None:
        if done == total // 2:
            raise Stop

    whole = extract(models / "base", models / "expert", tmp_path / "whole", rank=2)
    with pytest.raises(Stop):
        extract(models / "base", models / "expert", tmp_path / "out", rank=2, progress=stop)
    assert not (tmp_path / "out").exists()
    counted: list[int] = []
    monkeypatch.setattr(
        "consilience.routing.conversion.extract.factorise", lambda *args: counted.append(1) or factorise(*args)
    )
    assert extract(models / "base", models / "expert", tmp_path / "out", rank=2) == whole
    assert 0 < len(counted) < 13
    for name in ("adapter_model.safetensors", "adapter_config.json", "extraction.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not (tmp_path / "out.partial").exists()


def test_the_card_links_to_the_base_s_hub_ids_alone(models: Path, tmp_path: Path) -> None:
    shutil.copytree(models / "base", tmp_path / "base")
    stated = {None: None, "base_model: acme/base": ["acme/base"], "base_model: local-folder": None}
    for matter, ids in stated.items():
        if matter is not None:
            (tmp_path / "base/README.md").write_text(f"---\n{matter}\n---\n")
        extract(tmp_path / "base", models / "expert", tmp_path / "out", rank=1, force=True)
        _, front, body = (tmp_path / "out/README.md").read_text().split("---\n", 2)
        card = yaml.safe_load(front)
        assert card.get("base_model") == ids
        assert card.get("base_model_relation") == (None if ids is None else "adapter")
        assert "part of the update of expert: " in body


def test_another_rank_starts_anew(models: Path, tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        if done == total:
            raise Stop

    with pytest.raises(Stop):
        extract(models / "base", models / "expert", tmp_path / "out", rank=1, progress=stop)
    assert {layer.rank for layer in extract(models / "base", models / "expert", tmp_path / "out", rank=2).layers} == {2}


def with_nan(place: Path) -> None:
    held = load_file(place / "model.safetensors")
    held["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
    save_file(held, place / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "neither is given"),
        ({"rank": 0}, "at least 1"),
        ({"energy": 1.5}, r"lie in \(0, 1\]"),
        ({"rank": 1, "dtype": "bflot16"}, "did you mean 'bfloat16'"),
    ],
)
def test_settings_out_of_range_are_named(models: Path, tmp_path: Path, settings: Any, said: str) -> None:
    with pytest.raises(InputError, match=said):
        extract(models / "base", models / "expert", tmp_path / "out", **settings)


def test_models_that_cannot_be_extracted_leave_nothing(models: Path, tmp_path: Path) -> None:
    shutil.copytree(models / "expert", tmp_path / "broken")
    with_nan(tmp_path / "broken")
    with pytest.raises(InputError, match=r"up_proj.weight': 1 of its 1536 values are NaN or Inf; repair the model$"):
        extract(models / "base", tmp_path / "broken", tmp_path / "out", rank=1)
    with pytest.raises(InputError, match="is the base itself"):
        extract(models / "base", models / "base", tmp_path / "out", rank=1)
    shutil.copytree(models / "base", tmp_path / "same")
    with pytest.raises(InputError, match="nothing to extract"):
        extract(models / "base", tmp_path / "same", tmp_path / "out", rank=1)
    with pytest.raises(InputError, match="is a lone file"):
        extract(models / "base/model.safetensors", models / "expert", tmp_path / "out", rank=1)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/held").write_text("")
    with pytest.raises(InputError, match="not empty"):
        extract(models / "base", models / "expert", tmp_path / "full", rank=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken", "full", "same"]


def test_a_config_without_a_model_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "toy"}')
    with pytest.raises(InputError, match="names no model to build"):
        layout(tmp_path, {})


def test_the_command_says_what_is_kept(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "out")
    assert run(["route", "extract", str(models / "base"), str(models / "expert"), out, "--rank", "2"]) == 0
    line = capsys.readouterr().out.strip()
    assert line.startswith(f"{out}: 13 linear layers, rank 2, ")
    assert "left out, of the whole update: embeddings" in line
    assert "\n" not in line
