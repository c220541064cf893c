"""What is written is opened by its own library before it is installed; what is wrong there is an error."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from consilience.engine import load_check
from tests.real_files.support import adapter, cli, hf, logits, merged, moved, real_file, refused, state, tiny


def said(out: Path) -> str:
    return json.loads((out / "consilience/lineage.json").read_text())["loader"]


@real_file(
    6, family="Qwen2, tied", option="an output that unties", expected="transformers' load", before="wrongly refused"
)
def test_an_untied_output_is_opened(tmp_path: Path) -> None:
    base = tiny("Qwen2", tie_word_embeddings=True)
    base.save_pretrained(tmp_path / "base")
    tuned = adapter(base, tmp_path / "a", target_modules=["lm_head"])
    outcome = merged(tmp_path / "base", tmp_path / "out", x=tmp_path / "a")
    assert outcome.code == 0, outcome.said
    assert f"opened by transformers {hf.__version__}" in outcome.out
    assert said(tmp_path / "out") == f"opened by transformers {hf.__version__}"
    torch.testing.assert_close(logits(tmp_path / "out"), logits(tuned), atol=1e-5, rtol=1e-4)


@real_file(6, family="Llama", option="a config chosen that asks for another layer", expected="transformers' load",
           before="wrong cause named", now="refused, true cause")  # fmt: skip
def test_a_config_that_does_not_fit(tmp_path: Path) -> None:
    tiny("Llama", tie_word_embeddings=False).save_pretrained(tmp_path / "base")
    tiny("Llama", tie_word_embeddings=False, seed=1).save_pretrained(tmp_path / "e")
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"merge_method: linear\nbase_model: {tmp_path / 'base'}\nmodels: [{{model: {tmp_path / 'e'}, parameters: "
        "{weight: 1}}]\nconfig: {num_hidden_layers: 3}\n"
    )
    outcome = cli("merge", recipe, tmp_path / "out")
    refused(outcome, "transformers", "makes up 'model.layers.2.", "config:")
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()


@real_file(6, family="Llama", option="a base that lacks a name and has another too many", expected="transformers' load",
           before="wrongly refused")  # fmt: skip
def test_what_the_base_lacks_is_no_error(tmp_path: Path) -> None:
    tiny("Llama", tie_word_embeddings=True).save_pretrained(tmp_path / "base")
    tensors = state(tmp_path / "base") | {"model.extra": torch.ones(3)}
    del tensors["model.norm.weight"]
    save_file(tensors, tmp_path / "base/model.safetensors", metadata={"format": "pt"})
    adapter(tiny("Llama", tie_word_embeddings=True), tmp_path / "a", target_modules=["lm_head"])
    assert merged(tmp_path / "base", tmp_path / "out", x=tmp_path / "a").code == 0
    assert said(tmp_path / "out").endswith("as the base is")


@real_file(6, family="GPT2", option="--as-adapter, opened by PEFT", expected="PEFT", before="right")
def test_an_adapter_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny("GPT2", "LMHeadModel", n_embd=32, n_layer=2, n_head=4)
    base.save_pretrained(tmp_path / "base")
    adapter(base, tmp_path / "a", target_modules=["c_attn"], task_type="CAUSAL_LM")
    command = ("merge", tmp_path / "base", tmp_path / "out", "-e", f"x={tmp_path / 'a'}", "--as-adapter", "cat")
    outcome = cli(*command)
    assert "opened by peft" in outcome.out, outcome.said
    assert said(tmp_path / "out").startswith("opened by peft")
    stored = load_check._stored  # pyright: ignore[reportPrivateUsage]

    def broken(checkpoint: Any) -> Any:
        """Lose a dimension of every factor that is written, as convolutions did."""
        shapes = stored(checkpoint)
        return shapes if ".partial" not in str(checkpoint.path) else {n: (d, s[1:]) for n, (d, s) in shapes.items()}

    monkeypatch.setattr(load_check, "_stored", broken)
    refused(cli(*command, "--force"), "peft", "does not fit", "lora_A")


@real_file(6, family="Llama", option="flat files, remote code, no config.json", expected="the reason is said",
           before="silent loss", now="warned")  # fmt: skip
def test_what_no_loader_opens(tmp_path: Path) -> None:
    flat = tmp_path / "base.safetensors"
    save_file({"w": torch.ones(2)}, flat)
    save_file({"w": torch.zeros(2)}, tmp_path / "e.safetensors")
    outcome = merged(flat, tmp_path / "out.safetensors", x=tmp_path / "e.safetensors")
    assert "not opened by a loader: a flat state dict" in outcome.out
    refused(
        merged(flat, tmp_path / "o.safetensors", "--check-load", x=tmp_path / "e.safetensors"), "--check-load", "flat"
    )
    for seed, name in enumerate(("code", "e")):
        tiny("Llama", seed=seed).save_pretrained(tmp_path / name)
    config = json.loads((tmp_path / "code/config.json").read_text()) | {"auto_map": {"AutoModel": "m.Model"}}
    (tmp_path / "code/config.json").write_text(json.dumps(config))
    outcome = merged(tmp_path / "code", tmp_path / "o", "--check-load", x=tmp_path / "e")
    refused(outcome, "--check-load", "--trust-remote-code")


@real_file(6, family="Mistral", option="--check-load on the base's own names", expected="transformers' load",
           before="right")  # fmt: skip
def test_a_forced_check(tmp_path: Path) -> None:
    for seed, name in enumerate(("base", "e")):
        tiny("Mistral", seed=seed).save_pretrained(tmp_path / name)
    assert merged(tmp_path / "base", tmp_path / "out", x=tmp_path / "e").code == 0
    assert said(tmp_path / "out") == load_check.OWN
    outcome = merged(tmp_path / "base", tmp_path / "forced", "--check-load", x=tmp_path / "e")
    assert outcome.code == 0, outcome.said
    assert said(tmp_path / "forced").startswith("opened by transformers")


@pytest.mark.filterwarnings("ignore")
def test_a_check_is_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONSILIENCE_CACHE", str(tmp_path / "cache"))
    base = tiny("Qwen2", tie_word_embeddings=True)
    base.save_pretrained(tmp_path / "base")
    adapter(base, tmp_path / "a", target_modules=["lm_head"])
    assert merged(tmp_path / "base", tmp_path / "out", x=tmp_path / "a").code == 0
    monkeypatch.setattr(load_check.LOADER, "ask", lambda request: pytest.fail("asked again"))
    assert merged(tmp_path / "base", tmp_path / "again", x=tmp_path / "a").code == 0
    assert said(tmp_path / "again") == said(tmp_path / "out")


@real_file(6, family="Llama", option="--dry-run --check-load", expected="transformers' load", before="silent loss",
           now="refused, true cause")  # fmt: skip
def test_a_dry_run_opens_what_it_plans(tmp_path: Path) -> None:
    tiny("Llama").save_pretrained(tmp_path / "base")
    moved(tiny("Llama"), 1).save_pretrained(tmp_path / "a")
    words = ("merge", tmp_path / "base", tmp_path / "out", "-e", f"a={tmp_path}/a", "--dry-run", "--check-load")
    told = cli(*words)
    assert told.code == 0, told.said
    assert "opened by transformers" in told.out
    refused(cli(*words, "--config", "hidden_size=64"), "does not fit")
    adapter(tiny("Llama"), tmp_path / "lora", target_modules=["q_proj"])
    lora = (*words[:4], f"a={tmp_path}/lora", *words[5:], "--as-adapter", "cat")
    refused(cli(*lora), "an adapter is opened once it is written")
    assert not (tmp_path / "out").exists()
