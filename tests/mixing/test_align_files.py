"""``consilience align``: elements change places and nothing else, OUT is a model, and it says what that is worth."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from consilience.__main__ import run
from consilience.mixing.alignment import permute
from consilience.mixing.symmetry_trace import symmetry_of_module
from tests.tasks.tiny_models import make_llama, make_tokenizer

AXES = "up.weight: [hidden, null]\nup.bias: [hidden]\ndown.weight: [null, [hidden, 2]]\n"


def flat_state(seed: int) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    shapes = {"up.weight": (6, 4), "up.bias": (6,), "down.weight": (3, 8)}
    state = {name: torch.randn(shape, generator=random).to(torch.bfloat16) for name, shape in shapes.items()}
    return state | {"steps": torch.tensor(seed)}


@pytest.fixture
def flat(tmp_path: Path) -> Path:
    state = flat_state(1)
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    moved = {name: value.clone() for name, value in state.items()}
    moved["up.weight"], moved["up.bias"] = state["up.weight"][order], state["up.bias"][order]
    moved["down.weight"][:, :6] = state["down.weight"][:, order]
    save_file(state, tmp_path / "base.safetensors")
    torch.save({"model_state_dict": moved}, tmp_path / "model.pt")
    (tmp_path / "axes.yaml").write_text(AXES)
    return tmp_path


@pytest.fixture
def llamas(tmp_path: Path) -> Path:
    """A base in bfloat16, and itself with all units reordered, in several files."""
    tokenizer = make_tokenizer()
    base = make_llama(0)
    base.config.use_cache = False
    symmetry = symmetry_of_module(base, torch.randint(1, 300, (2, 6)))
    assert sorted(group.size for group in symmetry.groups) == [2, 2, 32, 48, 48]
    base.to(torch.bfloat16).save_pretrained(tmp_path / "base")
    random = np.random.default_rng(0)
    orders = {group.name: random.permutation(group.size) for group in symmetry.groups}
    other = make_llama(1).to(torch.bfloat16)
    other.load_state_dict(permute(base.state_dict(), symmetry, orders))
    other.save_pretrained(tmp_path / "model", max_shard_size="30KB")
    for name in ("base", "model"):
        tokenizer.save_pretrained(tmp_path / name)
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "the cat", "response": "sat on the mat"}) + "\n")
    return tmp_path


def align(folder: Path, *arguments: str) -> int:
    return run(["align", *(str(folder / each) if each[0] not in "-0123456789" else each for each in arguments)])


def test_a_file_of_tensors_is_put_in_order_by_the_axes(flat: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ("base.safetensors", "model.pt", "out.safetensors", "--axes", "axes.yaml")
    assert align(flat, *command) == 0
    written, expected = load_file(flat / "out.safetensors"), load_file(flat / "base.safetensors")
    assert all(
        torch.equal(written[name], value) and written[name].dtype == value.dtype for name, value in expected.items()
    )
    said = capsys.readouterr().out
    assert "squared distance" in said
    assert "-> 0" in said
    assert "same outputs: not checked" in said
    assert align(flat, *command) == 2
    assert "exists and is not empty" in capsys.readouterr().err
    assert sorted(path.name for path in flat.iterdir()) == [
        "axes.yaml",
        "base.safetensors",
        "model.pt",
        "out.safetensors",
    ]


def test_a_transformers_folder_is_traced_checked_and_written_whole(
    llamas: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert align(llamas, "base", "model", "out", "--rows", "rows.jsonl", "--json", "-q") == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    out = llamas / "out"
    written = {name: value for file in sorted(out.glob("*.safetensors")) for name, value in load_file(file).items()}
    expected = load_file(llamas / "base" / "model.safetensors")
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[name], value) for name, value in expected.items())
    assert found["distance"] == 0
    assert found["changed"] < 1e-5
    assert abs(found["line"]["barrier_before"]) > 0.01  # of either sign: these networks were never trained
    assert found["line"]["barrier"] == pytest.approx(0, abs=1e-4)
    names = {path.name for path in (llamas / "model").iterdir()}
    assert {path.name for path in out.iterdir()} == names | {"consilience"}
    lineage = json.loads((out / "consilience" / "lineage.json").read_text())
    assert lineage["method"] == "align"
    assert lineage["report"]["verdict"] == found["verdict"]
    assert set(lineage["output"]["tensors"]) == set(written)
    from transformers import AutoModelForCausalLM

    tokens = torch.tensor([[5, 9, 40, 7]])
    base, model = (AutoModelForCausalLM.from_pretrained(llamas / name, dtype=torch.float32) for name in ("base", "out"))
    assert torch.equal(base(tokens).logits, model(tokens).logits)


def test_bad_input_is_one_line_and_leaves_nothing(llamas: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file(flat_state(0), llamas / "flat.safetensors")
    (llamas / "axes.yaml").write_text(AXES)
    (llamas / "odd.yaml").write_text("up.weight: [3]\n")
    (llamas / "unknown.yaml").write_text("up.weigth: [hidden, null]\n")
    (llamas / "none.jsonl").write_text('{"prompt": "the cat"}\n')
    folder = llamas / "other-tokens"
    make_llama(2).save_pretrained(folder)
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["cat sat"])
    tokenizer.save_pretrained(folder)
    before = sorted(path.name for path in llamas.iterdir())
    pair = ("flat.safetensors", "flat.safetensors")
    refusals = {
        (*pair, "o.safetensors"): "state which axes may be reordered (--axes FILE",
        (*pair, "o", "--axes", "axes.yaml"): "name it with the ending .safetensors",
        (*pair, "o.safetensors", "--axes", "odd.yaml"): "up.weight: [3] is no list of axes",
        (*pair, "o.safetensors", "--axes", "unknown.yaml"): "did you mean 'up.weight'?",
        (*pair, "o.safetensors", "--axes", "axes.yaml", "--rows", "rows.jsonl"): "no loss",
        ("base", "nowhere", "o"): "nowhere",
        ("base", "other-tokens", "o"): "its tokenizer is not",
        ("base", "model", "o", "--rows", "none.jsonl"): "no row has a response",
        ("base", "model", "model"): "choose another OUT",
    }
    capsys.readouterr()
    for arguments, text in refusals.items():
        assert align(llamas, *arguments) == 2, arguments
        said = capsys.readouterr().err.splitlines()
        assert len(said) == 1, said
        assert text in said[0]
        assert sorted(path.name for path in llamas.iterdir()) == before
