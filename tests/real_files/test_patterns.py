"""rank_pattern and alpha_pattern mean what PEFT means, on the names they were written for."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.real_files.support import IDS, SIZES, adapter, hf, logits, merged, peft, real_file, refused, tiny

Q0 = "model.layers.0.self_attn.q_proj"


def check(tmp_path: Path, base: Any, tuned: Any) -> str:
    """Merge tmp_path/a into tmp_path/base; the output has PEFT's unmerged logits. Return what was said."""
    outcome = merged(tmp_path / "base", tmp_path / "out", x=tmp_path / "a")
    assert outcome.code == 0, outcome.said
    torch.testing.assert_close(logits(tmp_path / "out"), logits(tuned), atol=1e-5, rtol=1e-4)
    return outcome.said


def qwen(tmp_path: Path, family: str = "Qwen2", **config: Any) -> tuple[Any, Any]:
    base = tiny(family, tie_word_embeddings=False)
    base.save_pretrained(tmp_path / "base")
    settings: Any = {"target_modules": ["q_proj", "v_proj"]} | config
    return base, adapter(base, tmp_path / "a", **settings)


def rename(folder: Path, new: Callable[[str], str]) -> None:
    file = folder / "adapter_model.safetensors"
    save_file({new(name): tensor for name, tensor in load_file(file).items()}, file)


@real_file(4, family="Qwen2", option="alpha_pattern, one module", expected="PEFT, unmerged", before="right")
def test_a_plain_alpha_pattern(tmp_path: Path) -> None:
    check(tmp_path, *qwen(tmp_path, alpha_pattern={"layers.0.self_attn.q_proj": 32}))


@real_file(
    4, family="Qwen2", option="keys start with _orig_mod. (torch.compile), alpha_pattern with ^",
    expected="PEFT, unmerged", before="wrong numbers",
)  # fmt: skip
def test_a_compiled_peft_model(tmp_path: Path) -> None:
    models = qwen(tmp_path, alpha_pattern={f"^{Q0}": 32})
    rename(tmp_path / "a", lambda name: f"_orig_mod.{name}")
    check(tmp_path, *models)


@real_file(
    4, family="Qwen2", option="_orig_mod. behind base_model.model., alpha_pattern with ^", expected="PEFT, unmerged",
    before="wrong numbers",
)  # fmt: skip
def test_peft_on_a_compiled_model(tmp_path: Path) -> None:
    models = qwen(tmp_path, alpha_pattern={f"^{Q0}": 32})
    rename(tmp_path / "a", lambda name: name.replace("base_model.model.", "base_model.model._orig_mod."))
    check(tmp_path, *models)


@real_file(
    4, family="Qwen2", option="keys start with module. (DDP), alpha_pattern with ^", expected="PEFT, unmerged",
    before="wrong numbers",
)  # fmt: skip
def test_a_distributed_model(tmp_path: Path) -> None:
    models = qwen(tmp_path, alpha_pattern={f"^{Q0}": 32})
    rename(tmp_path / "a", lambda name: f"module.{name}")
    check(tmp_path, *models)


@real_file(
    4, family="Llama", option="_fsdp_wrapped_module. and _checkpoint_wrapped_module. within names, rank_pattern with ^",
    expected="PEFT, unmerged", before="wrong cause named",
)  # fmt: skip
def test_wrapped_blocks(tmp_path: Path) -> None:
    models = qwen(tmp_path, "Llama", rank_pattern={f"^{Q0}$": 2}, alpha_pattern={r"^model\.layers\.[01]\..*v_proj": 5})
    wrapper = "_fsdp_wrapped_module._checkpoint_wrapped_module."
    rename(tmp_path / "a", lambda name: name.replace("layers.0.", f"layers.0.{wrapper}"))
    check(tmp_path, *models)


@real_file(
    4, family="Mistral", option="_orig_mod. in each block (regional compile), use_rslora, both patterns",
    expected="PEFT, unmerged", before="wrong cause named",
)  # fmt: skip
def test_regional_compile(tmp_path: Path) -> None:
    patterns = {"rank_pattern": {f"^{Q0}": 6}, "alpha_pattern": {f"^{Q0}": 9}}
    models = qwen(tmp_path, "Mistral", use_rslora=True, **patterns)
    rename(tmp_path / "a", lambda name: name.replace(".self_attn.", "._orig_mod.self_attn."))
    check(tmp_path, *models)


@real_file(
    4, family="Qwen3", option="two rank_pattern keys for one module: saving sorts them", expected="PEFT, unmerged",
    before="wrongly refused",
)  # fmt: skip
def test_the_factors_decide_the_rank(tmp_path: Path) -> None:
    models = qwen(tmp_path, "Qwen3", rank_pattern={"v_proj": 2, ".*1.self_attn.v_proj": 6})
    written = json.loads((tmp_path / "a/adapter_config.json").read_text())["rank_pattern"]
    assert next(iter(written)) != "v_proj"
    check(tmp_path, *models)


@real_file(
    4, family="Qwen2", option="two alpha_pattern keys for one module", expected="PEFT's reload", before="right"
)  # fmt: skip
def test_two_alphas(tmp_path: Path) -> None:
    base, _ = qwen(tmp_path, alpha_pattern={"v_proj": 2, ".*1.self_attn.v_proj": 6})
    reloaded = peft.PeftModel.from_pretrained(tiny("Qwen2", tie_word_embeddings=False), tmp_path / "a").eval()
    said = check(tmp_path, base, reloaded)
    assert "alpha_pattern" in said
    assert "both apply" in said


@real_file(
    4, family="Qwen2", option="rank_pattern says another rank than the factors have", expected="PEFT refuses it too",
    before="right", now="refused, true cause",
)  # fmt: skip
def test_a_rank_that_contradicts(tmp_path: Path) -> None:
    qwen(tmp_path)
    path = tmp_path / "a/adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rank_pattern": {"q_proj": 8}}))
    outcome = merged(tmp_path / "base", tmp_path / "out", x=tmp_path / "a")
    refused(outcome, "adapter_config.json", "q_proj", "rank 8", "rank 4")
    with pytest.raises(RuntimeError, match="size mismatch"):
        peft.PeftModel.from_pretrained(tiny("Qwen2", tie_word_embeddings=False), tmp_path / "a")


@real_file(
    4, family="T5", option="rank_pattern by block and side, all attention layers", expected="PEFT, unmerged",
    before="right",
)  # fmt: skip
def test_t5(tmp_path: Path) -> None:
    config = hf.T5Config(
        vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0,
        tie_word_embeddings=False, dropout_rate=0.0,
    )  # fmt: skip
    torch.manual_seed(0)
    base = hf.T5ForConditionalGeneration(config).eval()
    base.save_pretrained(tmp_path / "base")
    patterns: Any = {
        "rank_pattern": {"^decoder.*.SelfAttention.q": 2},
        "alpha_pattern": {r"block\.0\..*EncDec.*\.v": 3},
    }
    tuned = adapter(base, tmp_path / "a", target_modules=["q", "v"], **patterns)
    outcome = merged(tmp_path / "base", tmp_path / "out", x=tmp_path / "a")
    assert outcome.code == 0, outcome.said
    loaded = hf.T5ForConditionalGeneration.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    with torch.no_grad():
        expected = tuned(input_ids=IDS, decoder_input_ids=IDS).logits
        torch.testing.assert_close(loaded(input_ids=IDS, decoder_input_ids=IDS).logits, expected, atol=1e-5, rtol=1e-4)


@real_file(
    4, family="Qwen2-VL", option="alpha_pattern on the module's name, which the base's file has otherwise",
    expected="PEFT's update", before="right",
)  # fmt: skip
def test_a_pattern_on_a_name_that_the_file_has_otherwise(tmp_path: Path) -> None:
    text = SIZES | {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}}
    vision = {"depth": 1, "embed_dim": 16, "num_heads": 2, "hidden_size": 32, "patch_size": 4, "mlp_ratio": 2}
    torch.manual_seed(0)
    config = hf.Qwen2VLConfig(text_config=text, vision_config=vision)
    base = hf.Qwen2VLForConditionalGeneration(config).eval()
    base.save_pretrained(tmp_path / "base")
    module = "model.language_model.layers.0.self_attn.q_proj"
    tuned = adapter(base, tmp_path / "a", target_modules=[module], alpha_pattern={f"^{module}$": 3})
    outcome = merged(tmp_path / "base", tmp_path / "out", x=tmp_path / "a")
    assert outcome.code == 0, outcome.said
    out, held = load_file(tmp_path / "out/model.safetensors"), load_file(tmp_path / "base/model.safetensors")
    changed = [name for name in held if not torch.equal(held[name], out[name])]
    assert len(changed) == 1
    layer = tuned.get_submodule(f"base_model.model.{module}")
    expected = layer.get_delta_weight("default")
    torch.testing.assert_close(out[changed[0]] - held[changed[0]], expected, atol=1e-6, rtol=1e-4)


@real_file(
    4, family="Qwen2", option="a pattern that takes exponential time", expected="ends within seconds",
    before="never ends", now="refused, true cause",
)  # fmt: skip
def test_an_exponential_pattern(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    qwen(tmp_path)
    monkeypatch.setattr("consilience.checkpoints.patterns.SECONDS", 0.5)
    path = tmp_path / "a/adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"alpha_pattern": {r"((\w|\.)+)+!": 2}}))
    refused(
        merged(tmp_path / "base", tmp_path / "out", x=tmp_path / "a"), "adapter_config.json", "alpha_pattern", "0.5 s"
    )
