"""Whether a layer stores its weight [in, out] is decided per layer, not by an adapter's one ``fan_in_fan_out``."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.real_files.support import IDS, adapter, cli, hf, logits, merged, peft, real_file, refused, tiny

GPT: dict[str, Any] = {
    "vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "n_ctx": 64, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
DROPLESS: dict[str, float] = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}


def gpt(family: str = "GPT2", head: str = "LMHeadModel", **config: Any) -> Any:
    made = getattr(hf, f"{family}Config")(**GPT | DROPLESS | {"tie_word_embeddings": False} | config)
    torch.manual_seed(0)
    return getattr(hf, f"{family}{head}")(made).eval()


def written_flag(folder: Path) -> bool:
    return json.loads((folder / "adapter_config.json").read_text())["fan_in_fan_out"]


def set_flag(folder: Path, value: bool) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"fan_in_fan_out": value}))


@real_file(
    3, family="BERT + GPT-2", option="encoder-decoder: Linear and Conv1D targets, fan_in_fan_out true",
    expected="PEFT, unmerged", before="wrong numbers",
)  # fmt: skip
def test_encoder_decoder(tmp_path: Path) -> None:
    bert = hf.BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
    )
    decoder = hf.GPT2Config(add_cross_attention=True, is_decoder=True, **GPT)
    torch.manual_seed(0)
    base = hf.EncoderDecoderModel(hf.EncoderDecoderConfig.from_encoder_decoder_configs(bert, decoder)).eval()
    base.save_pretrained(tmp_path / "base")
    tuned = adapter(base, tmp_path / "a", target_modules=["query", "value", "c_attn", "q_attn", "c_proj"])
    assert written_flag(tmp_path / "a")
    assert merged(tmp_path / "base", tmp_path / "out", x=tmp_path / "a").code == 0
    loaded = hf.EncoderDecoderModel.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    with torch.no_grad():
        expected = tuned(input_ids=IDS, decoder_input_ids=IDS).logits
        torch.testing.assert_close(loaded(input_ids=IDS, decoder_input_ids=IDS).logits, expected, atol=1e-5, rtol=1e-4)


@real_file(
    3, family="ViT + GPT-2", option="vision-encoder-decoder: Conv2d and Conv1D targets",
    expected="PEFT, unmerged", before="wrongly refused",
)  # fmt: skip
def test_vision_encoder_decoder(tmp_path: Path) -> None:
    vit = hf.ViTConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, image_size=16, patch_size=8
    )
    decoder = hf.GPT2Config(add_cross_attention=True, is_decoder=True, **GPT)
    torch.manual_seed(0)
    both = hf.VisionEncoderDecoderConfig.from_encoder_decoder_configs(vit, decoder)
    base = hf.VisionEncoderDecoderModel(both).eval()
    base.save_pretrained(tmp_path / "base")
    tuned = adapter(base, tmp_path / "a", target_modules=["projection", "c_attn", "c_proj"])
    outcome = merged(tmp_path / "base", tmp_path / "out", x=tmp_path / "a")
    assert outcome.code == 0, outcome.said
    loaded = hf.VisionEncoderDecoderModel.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    pixels = torch.linspace(-1, 1, 3 * 16 * 16).view(1, 3, 16, 16)
    with torch.no_grad():
        expected = tuned(pixel_values=pixels, decoder_input_ids=IDS).logits
        got = loaded(pixel_values=pixels, decoder_input_ids=IDS).logits
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)


@real_file(
    3, family="GPT-2", option="head adapted beside Conv1D: saved fan_in_fan_out is false", expected="PEFT, unmerged",
    before="wrongly refused",
)  # fmt: skip
def test_conv1d_with_a_linear_head(tmp_path: Path) -> None:
    base = gpt()
    base.save_pretrained(tmp_path / "base")
    tuned = adapter(base, tmp_path / "a", target_modules=["c_attn", "c_proj", "lm_head"])
    assert not written_flag(tmp_path / "a")
    outcome = merged(tmp_path / "base", tmp_path / "out", x=tmp_path / "a")
    assert outcome.code == 0, outcome.said
    torch.testing.assert_close(logits(tmp_path / "out"), logits(tuned), atol=1e-5, rtol=1e-4)


@real_file(
    3, family="GPT-2", option="the same, two adapters, --as-adapter cat", expected="PEFT, unmerged",
    before="wrongly refused",
)  # fmt: skip
def test_conv1d_and_linear_as_one_adapter(tmp_path: Path) -> None:
    gpt().save_pretrained(tmp_path / "base")
    targets = ["c_attn", "c_proj", "lm_head"]
    save = {"save_embedding_layers": False}
    one, two = (
        adapter(gpt(), tmp_path / n, seed=s, save=save, target_modules=targets) for n, s in (("a", 1), ("b", 2))
    )
    experts = {"a": tmp_path / "a", "b": tmp_path / "b"}
    outcome = merged(tmp_path / "base", tmp_path / "out", "--as-adapter", "cat", **experts)
    assert outcome.code == 0, outcome.said
    tuned = peft.PeftModel.from_pretrained(gpt(), tmp_path / "out").eval()
    whole = {n: m.get_delta_weight("default") for n, m in one.named_modules() if hasattr(m, "get_delta_weight")}
    other = dict(two.named_modules())
    for name, module in tuned.named_modules():
        if name in whole:
            expected = whole[name] + other[name].get_delta_weight("default")
            torch.testing.assert_close(module.get_delta_weight("default"), expected, atol=1e-5, rtol=1e-4)


@real_file(
    3, family="Llama", option="fan_in_fan_out: true on square Linear layers, which PEFT ignores",
    expected="PEFT, unmerged", before="wrong numbers",
)  # fmt: skip
def test_a_flag_that_peft_ignores(tmp_path: Path) -> None:
    base = tiny("Llama", tie_word_embeddings=False)
    base.save_pretrained(tmp_path / "base")
    tuned = adapter(base, tmp_path / "a", target_modules=["q_proj", "o_proj"])
    set_flag(tmp_path / "a", True)
    assert merged(tmp_path / "base", tmp_path / "out", x=tmp_path / "a").code == 0
    torch.testing.assert_close(logits(tmp_path / "out"), logits(tuned), atol=1e-5, rtol=1e-4)


@real_file(
    3, family="OpenAI GPT", option="Conv1D and head", expected="PEFT, unmerged", before="wrongly refused"
)  # fmt: skip
def test_openai_gpt(tmp_path: Path) -> None:
    base = gpt("OpenAIGPT")
    base.save_pretrained(tmp_path / "base")
    tuned = adapter(base, tmp_path / "a", target_modules=["c_proj", "c_fc", "lm_head"])
    outcome = merged(tmp_path / "base", tmp_path / "out", x=tmp_path / "a")
    assert outcome.code == 0, outcome.said
    loaded = hf.OpenAIGPTLMHeadModel.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    torch.testing.assert_close(logits(loaded), logits(tuned), atol=1e-5, rtol=1e-4)


@real_file(
    3, family="Decision Transformer", option="square Linear embeddings beside Conv1D", expected="PEFT's update",
    before="wrongly refused",
)  # fmt: skip
def test_decision_transformer(tmp_path: Path) -> None:
    config = hf.DecisionTransformerConfig(hidden_size=32, n_layer=1, n_head=2, state_dim=32, act_dim=3)
    torch.manual_seed(0)
    base = hf.DecisionTransformerModel(config).eval()
    base.save_pretrained(tmp_path / "base")
    tuned = adapter(base, tmp_path / "a", target_modules=["embed_state", "c_proj", "c_attn"])
    outcome = merged(tmp_path / "base", tmp_path / "out", x=tmp_path / "a")
    assert outcome.code == 0, outcome.said
    out, held = load_file(tmp_path / "out/model.safetensors"), load_file(tmp_path / "base/model.safetensors")
    layers = {
        n.removeprefix("base_model.model."): m for n, m in tuned.named_modules() if hasattr(m, "get_delta_weight")
    }
    assert len(layers) == 4
    for name, layer in layers.items():
        difference = out[f"{name}.weight"] - held[f"{name}.weight"]
        torch.testing.assert_close(difference, layer.get_delta_weight("default"), atol=1e-6, rtol=1e-4)


class _Block(torch.nn.Module):
    """A block as nanoGPT writes it: Linear layers under GPT-2's names."""

    def __init__(self) -> None:
        super().__init__()
        self.c_attn, self.c_proj = torch.nn.Linear(32, 96), torch.nn.Linear(32, 32)

    def forward(self, u: torch.Tensor) -> torch.Tensor:
        return self.c_proj(self.c_attn(u).tanh()[..., :32])


@real_file(
    3, family="nanoGPT", option="flat file, GPT-2's names on square Linear layers", expected="PEFT, unmerged",
    before="right",
)  # fmt: skip
def test_linear_layers_of_gpt2_names(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = _Block()
    save_file(base.state_dict(), tmp_path / "base.safetensors")
    tuned = adapter(base, tmp_path / "a", target_modules=["c_attn", "c_proj"])
    assert merged(tmp_path / "base.safetensors", tmp_path / "out.safetensors", x=tmp_path / "a").code == 0
    loaded = _Block()
    loaded.load_state_dict(load_file(tmp_path / "out.safetensors"))
    u = torch.linspace(-1, 1, 64).view(2, 32)
    torch.testing.assert_close(loaded(u), tuned(u), atol=1e-5, rtol=1e-4)


@real_file(
    3, family="GPT-2", option="flat file without a config, Conv1D and head", expected="PEFT's update",
    before="wrong numbers",
)  # fmt: skip
def test_conv1d_of_a_file_without_config(tmp_path: Path) -> None:
    base = gpt()
    save_file({k: v.clone() for k, v in base.state_dict().items()}, tmp_path / "base.safetensors")
    tuned = adapter(base, tmp_path / "a", target_modules=["attn.c_proj", "lm_head"])
    outcome = merged(tmp_path / "base.safetensors", tmp_path / "out.safetensors", x=tmp_path / "a")
    assert outcome.code == 0, outcome.said
    with torch.no_grad():
        expected = tuned(IDS).logits
    loaded = gpt()
    loaded.load_state_dict(load_file(tmp_path / "out.safetensors"))
    torch.testing.assert_close(logits(loaded), expected, atol=1e-5, rtol=1e-4)


@real_file(
    3, family="own architecture", option="square layers alone, fan_in_fan_out: true", expected="not in the files",
    before="wrong numbers", now="refused, true cause",
)  # fmt: skip
def test_a_square_layer_of_an_unknown_architecture(tmp_path: Path) -> None:
    save_file({f"{n}.weight": torch.randn(32, 32) for n in ("one", "two")}, tmp_path / "base.safetensors")
    base = torch.nn.ModuleDict({n: torch.nn.Linear(32, 32, bias=False) for n in ("one", "two")})
    adapter(base, tmp_path / "a", target_modules=["one", "two"])
    set_flag(tmp_path / "a", True)
    outcome = merged(tmp_path / "base.safetensors", tmp_path / "out.safetensors", x=tmp_path / "a")
    refused(outcome, "one", "square", "fan_in_fan_out")
    assert not (tmp_path / "out.safetensors").exists()


def _recipe(tmp_path: Path, base: Path, *adapters: Path) -> Path:
    path = tmp_path / "route.yaml"
    models = [{"model": str(a), "name": a.name} for a in adapters]
    path.write_text(json.dumps({"base_model": str(base), "models": models, "routing": {"local": "arrow", "top_k": 1}}))
    return path


def _save(model: Any, folder: Path) -> None:
    from tokenizers import Tokenizer, models

    model.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(64)}, unk_token="w0"))
    hf.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", pad_token="w0").save_pretrained(folder)


@real_file(
    3, family="Llama", option="route build, fan_in_fan_out: true on Linear layers", expected="PEFT, unmerged",
    before="wrongly refused",
)  # fmt: skip
def test_routing_with_a_flag_that_peft_ignores(tmp_path: Path) -> None:
    import consilience as cs

    base = tiny("Llama", tie_word_embeddings=False)
    _save(base, tmp_path / "base")
    tuned = adapter(base, tmp_path / "a", target_modules=["q_proj", "o_proj"])
    set_flag(tmp_path / "a", True)
    outcome = cli("route", "build", _recipe(tmp_path, tmp_path / "base", tmp_path / "a"), tmp_path / "out")
    assert outcome.code == 0, outcome.said
    routed: Any = cs.load_routed(tmp_path / "out")
    with torch.no_grad():
        got = routed(input_ids=IDS).logits
    torch.testing.assert_close(got, logits(tuned), atol=1e-5, rtol=1e-4)


@real_file(
    3, family="GPT-2", option="route build on Conv1D layers", expected="the module's class",
    before="wrong cause named", now="refused, true cause",
)  # fmt: skip
@pytest.mark.parametrize("targets", [["c_attn", "c_proj"], ["c_attn", "lm_head"]])
def test_routing_names_the_conv1d(tmp_path: Path, targets: list[str]) -> None:
    base = gpt()
    _save(base, tmp_path / "base")
    adapter(base, tmp_path / "a", target_modules=targets, save={"save_embedding_layers": False})
    outcome = cli("route", "build", _recipe(tmp_path, tmp_path / "base", tmp_path / "a"), tmp_path / "out")
    refused(outcome, "c_attn", "Conv1D", "consilience merge")
    assert "fan_in_fan_out" not in outcome.err
