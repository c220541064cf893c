"""A Sentence Transformers folder is merged with the weights of its further modules."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.real_files.support import State, adapter, cli, hf, merged, real_file, refused, state, tiny

BERT: dict[str, Any] = {"num_key_value_heads": 4}


def sentence_model(
    folder: Path, seed: int, *, dense: str = "2_Dense/model.safetensors", modules: dict[str, State] | None = None
) -> Any:
    """Save a BERT with the modules that sentence-transformers 6 lists, and return it."""
    model = tiny("Bert", "Model", seed=seed)
    model.save_pretrained(folder)
    parts: dict[str, State] = (
        {dense: {"linear.weight": torch.randn(16, 32), "linear.bias": torch.randn(16)}} if dense else {}
    )
    parts |= {f"{name}/model.safetensors": tensors for name, tensors in (modules or {}).items()}
    listed = [{"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"}]
    for number, (path, tensors) in enumerate(parts.items(), 1):
        place = folder / path
        place.parent.mkdir(parents=True)
        (place.parent / "config.json").write_text(json.dumps({"in_features": 32, "out_features": 16, "bias": True}))
        save_file(tensors, place) if place.suffix == ".safetensors" else torch.save(tensors, place)
        listed.append({"idx": number, "name": str(number), "path": str(Path(path).parent), "type": "x.Dense"})
    (folder / "modules.json").write_text(json.dumps(listed))
    return model


def dense_of(folder: Path) -> State:
    return load_file(folder / "2_Dense/model.safetensors")


@real_file(6, family="Sentence Transformers", option="a Dense module in a subfolder", expected="mean of the files",
           before="broken output")  # fmt: skip
def test_a_dense_module(tmp_path: Path) -> None:
    for number, name in enumerate(("base", "e1", "e2")):
        sentence_model(tmp_path / name, number)
    outcome = merged(tmp_path / "base", tmp_path / "out", "--method", "linear", a=tmp_path / "e1", b=tmp_path / "e2")
    assert outcome.code == 0, outcome.said
    one, two, out = (dense_of(tmp_path / name) for name in ("e1", "e2", "out"))
    for name, value in out.items():
        torch.testing.assert_close(value, (one[name] + two[name]) / 2)
    assert out.keys() == one.keys()
    assert json.loads((tmp_path / "out/modules.json").read_text())[1]["path"] == "2_Dense"
    hf.AutoModel.from_pretrained(tmp_path / "out")  # the model at the top is as it was
    assert state(tmp_path / "out").keys() == state(tmp_path / "base").keys()


@real_file(6, family="Sentence Transformers", option="a Dense module in pytorch_model.bin, one expert without it",
           expected="task arithmetic on the files", before="broken output")  # fmt: skip
def test_a_pickled_module(tmp_path: Path) -> None:
    for number, name in enumerate(("base", "e1")):
        sentence_model(tmp_path / name, number, dense="2_Dense/pytorch_model.bin")
    tiny("Bert", "Model", seed=5).save_pretrained(tmp_path / "e2")
    outcome = merged(tmp_path / "base", tmp_path / "out", a=tmp_path / "e1", b=tmp_path / "e2")
    assert outcome.code == 0, outcome.said
    assert "b: has no weights in 2_Dense" in outcome.out
    want = torch.load(tmp_path / "e1/2_Dense/pytorch_model.bin")
    for name, value in dense_of(tmp_path / "out").items():
        torch.testing.assert_close(value, want[name])
    assert not (tmp_path / "out/2_Dense/pytorch_model.bin").exists()


@real_file(6, family="Sentence Transformers", option="LoRA, and two further modules", expected="bytes of the base",
           before="broken output")  # fmt: skip
def test_modules_beside_an_adapter(tmp_path: Path) -> None:
    inner = {"3_Router/query_0_Inner": {"weight": torch.randn(4)}}
    model = sentence_model(tmp_path / "base", 0, modules=inner)
    tuned = adapter(model, tmp_path / "a", target_modules=["query", "value"])
    assert merged(tmp_path / "base", tmp_path / "out", "--shard-size", "20KB", x=tmp_path / "a").code == 0
    for module in ("2_Dense", "3_Router/query_0_Inner"):
        ours, theirs = (load_file(tmp_path / name / module / "model.safetensors") for name in ("base", "out"))
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    want = tuned.merge_and_unload().state_dict()
    got = hf.AutoModel.from_pretrained(tmp_path / "out").state_dict()
    for name, value in got.items():
        torch.testing.assert_close(value, want[name])


@real_file(6, family="Sentence Transformers", option="all weights in subfolders (0_Transformer)", expected="the files",
           before="wrongly refused")  # fmt: skip
def test_a_model_in_a_subfolder(tmp_path: Path) -> None:
    for number, name in enumerate(("base", "e1")):
        tiny("Bert", "Model", seed=number).save_pretrained(tmp_path / name / "0_Transformer")
        (tmp_path / name / "modules.json").write_text('[{"idx": 0, "name": "0", "path": "0_Transformer", "type": "x"}]')
    assert merged(tmp_path / "base", tmp_path / "out", x=tmp_path / "e1").code == 0
    got, want = (hf.AutoModel.from_pretrained(tmp_path / name / "0_Transformer") for name in ("out", "e1"))
    for name, value in got.state_dict().items():
        torch.testing.assert_close(value, want.state_dict()[name])
    assert cli("inspect", tmp_path / "out").code == 0


@real_file(6, family="Sentence Transformers", option="modules.json that leads out", expected="the file named",
           before="silent loss", now="refused, true cause")  # fmt: skip
def test_a_list_that_leads_out(tmp_path: Path) -> None:
    for number, name in enumerate(("base", "e1")):
        sentence_model(tmp_path / name, number)
    (tmp_path / "base/modules.json").write_text('[{"path": "../e1/2_Dense"}]')
    refused(
        merged(tmp_path / "base", tmp_path / "out", x=tmp_path / "e1"), "modules.json", "../e1/2_Dense", "leads out"
    )
