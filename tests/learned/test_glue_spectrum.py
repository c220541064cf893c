"""What a run reports of Proposition 1's constant, against the singular values of dense matrices."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from consilience.api import build_recipe, learn, merge_recipe
from consilience.cli.learning import summary
from consilience.coefficients import load_coefficients
from consilience.student.bank import Bank
from tests.learned.tiny_experts import read_state, sentences, write_adapter, write_base, write_expert, write_rows

FULL, LORA = ("a", "b", "c"), ("x", "y")
State = dict[str, Any]


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=str)
def zoo(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("spectrum")
    base = write_base(place / "base", dtype=request.param)
    for seed, name in enumerate(FULL):
        write_expert(place / name, base, seed, scale=0.2)
    for seed, name in enumerate(LORA):
        write_adapter(place / name, base, seed)
    write_rows(place / "train.jsonl", [{"prompt": text, "response": " w7"} for text in sentences(20, 4)])
    return place


def recipe(zoo: Path, names: Sequence[str], **parameters: Any) -> Any:
    target, values = {"train": str(zoo / "train.jsonl")}, {"steps": 1, "optimizer": "sgd"} | parameters
    return build_recipe("glue", str(zoo / "base"), {n: str(zoo / n) for n in names}, values, target=target)


def dense(zoo: Path, name: str) -> State:
    """An expert's weights in float64, whatever form it is stored in."""
    state = {key: value.double().numpy() for key, value in read_state(zoo / "base").items()}
    if (zoo / name / "adapter_config.json").is_file():
        config = json.loads((zoo / name / "adapter_config.json").read_text())
        factors = load_file(zoo / name / "adapter_model.safetensors")
        for key, a in factors.items():
            if ".lora_A." in key:
                b = factors[key.replace(".lora_A.", ".lora_B.")]
                target = key.removeprefix("base_model.model.").replace(".lora_A.", ".")
                state[target] = state[target] + config["lora_alpha"] / config["r"] * (b.double() @ a.double()).numpy()
        return state
    return {key: value.double().numpy() for key, value in read_state(zoo / name).items()}


def expected(zoo: Path, names: Sequence[str], groups: Any) -> tuple[float, float]:
    """Both singular values of the dense matrices of every group, and the largest."""
    states, found = [dense(zoo, name) for name in names], list[tuple[float, float]]()
    for group in groups:
        theta = np.stack([np.concatenate([s[key].ravel() for key, _ in group.tensors]) for s in states])
        found.append((float(np.linalg.norm(theta, 2)), float(np.linalg.norm(theta - theta.mean(0), 2))))
    whole, centred = np.max(found, axis=0).tolist()
    return whole, centred


@pytest.mark.parametrize("names", [FULL, LORA, ("a", "x", "y"), ("b",)], ids="+".join)
@pytest.mark.parametrize("granularity", ["global", pytest.param("block", marks=pytest.mark.slow)])
def test_the_singular_values_are_those_of_the_dense_matrix(zoo: Path, names: Sequence[str], granularity: str) -> None:
    found = learn(recipe(zoo, names, granularity=granularity, exclude=["*norm*", "*embed*"]))
    assert not any("norm" in name or "embed" in name for group in found.groups for name, _ in group.tensors)
    whole, centred = expected(zoo, names, found.groups)
    assert found.facts["sigma_max"] == pytest.approx(whole, rel=1e-5)
    assert found.facts["sigma_max_centred"] == pytest.approx(centred, rel=1e-5, abs=1e-6)
    (told,) = [line for line in summary(found) if "sigma_max" in line]
    shown = [float(part.split()[-1]) for part in told.split(",")]
    assert shown == pytest.approx([whole, centred], rel=1e-3, abs=1e-6)


def test_what_all_experts_share_is_no_part_of_the_centred_value(zoo: Path, tmp_path: Path) -> None:
    """The same expert under three names, and a base that is far away."""
    (tmp_path / "train.jsonl").write_bytes((zoo / "train.jsonl").read_bytes())
    for name in ("base", "a", "b", "c"):
        (tmp_path / name).mkdir()
        for file in (zoo / "base").iterdir():
            (tmp_path / name / file.name).write_bytes(file.read_bytes())
    save_file(
        {key: value + 1 for key, value in read_state(zoo / "base").items()},
        tmp_path / "base" / "model.safetensors",
        {"format": "pt"},
    )
    found = learn(recipe(tmp_path, FULL))
    size = np.sqrt(sum((v**2).sum() for v in dense(zoo, "base").values()))
    assert found.facts["sigma_max"] == pytest.approx(np.sqrt(3) * size, rel=1e-5)
    assert found.facts["sigma_max_centred"] < 1e-6 * found.facts["sigma_max"]


def test_a_run_that_goes_on_reads_no_weight_for_it_again(
    zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, gram = list[Bank](), Bank.gram

    def counted(self: Bank) -> Any:
        calls.append(self)
        return gram(self)

    monkeypatch.setattr(Bank, "gram", counted)
    first = learn(recipe(zoo, LORA), tmp_path / "out")
    merge_recipe(recipe(zoo, LORA), tmp_path / "out")
    assert len(calls) == 1
    again = load_coefficients(tmp_path / "out")
    for key in ("sigma_max", "sigma_max_centred"):
        assert again.facts[key] == first.facts[key]
    other = learn(recipe(zoo, LORA, exclude=["*mlp*"]), tmp_path / "other")
    assert len(calls) == 2
    assert other.facts["sigma_max"] < first.facts["sigma_max"]
    kept = next((tmp_path / "other.partial").rglob("spectrum-*.json"))
    kept.write_text("[1]")  # damaged: it is found again
    assert learn(recipe(zoo, LORA, exclude=["*mlp*"]), tmp_path / "other").facts["sigma_max"] == pytest.approx(
        other.facts["sigma_max"]
    )
    assert len(calls) == 3
