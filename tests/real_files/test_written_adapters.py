"""What --as-adapter writes is what PEFT loads, and computes what the experts' updates add up to."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.real_files.support import adapter, cli, hf, peft, real_file, tiny

KINDS = [["cat"], ["svd", "--rank", "8"]]


def written(tmp_path: Path, base: Any, kind: list[str], *configs: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Write half the sum of two adapters as one; return what PEFT's merge of that adapter lies off the experts' own."""
    base.save_pretrained(tmp_path / "base")

    def load() -> Any:
        return type(base).from_pretrained(tmp_path / "base").eval()

    updates: list[dict[str, torch.Tensor]] = []
    plain = load().state_dict()
    for number, config in enumerate(configs, 1):
        merged = adapter(load(), tmp_path / f"a{number}", seed=number, **config).merge_and_unload().state_dict()
        updates.append({name: merged[name] - plain[name] for name in plain})
    experts = [word for number in range(1, len(configs) + 1) for word in ("-e", f"x{number}={tmp_path / f'a{number}'}")]
    outcome = cli("merge", tmp_path / "base", tmp_path / "out", *experts, "--set", "weight=0.5", "--as-adapter", *kind)
    assert outcome.code == 0, outcome.said
    one = peft.PeftModel.from_pretrained(load(), tmp_path / "out").merge_and_unload().state_dict()
    return {name: one[name] - plain[name] - 0.5 * sum(update[name] for update in updates) for name in plain}


def close(off: dict[str, torch.Tensor]) -> None:
    worst = max(off, key=lambda name: off[name].abs().max().item() if off[name].is_floating_point() else 0.0)
    assert off[worst].abs().max() < 1e-4, worst


@pytest.mark.parametrize("kind", KINDS)
@real_file(6, family="ResNet", option="--as-adapter of 2-D convolutions", expected="PEFT's merges, averaged",
           before="broken output")  # fmt: skip
def test_convolutions(tmp_path: Path, kind: list[str]) -> None:
    config = hf.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=3)
    close(written(tmp_path, hf.ResNetForImageClassification(config), kind, *[{"target_modules": ["convolution"]}] * 2))


@pytest.mark.parametrize("kind", KINDS)
@real_file(6, family="Whisper", option="--as-adapter of 1-D convolutions and linear layers",
           expected="PEFT's merges, averaged", before="broken output")  # fmt: skip
def test_one_dimensional_convolutions(tmp_path: Path, kind: list[str]) -> None:
    sizes = {"vocab_size": 64, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2}
    sizes |= {"decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "num_mel_bins": 8}
    sizes |= {"max_source_positions": 16, "max_target_positions": 16, "pad_token_id": 0, "decoder_start_token_id": 1}
    base = hf.WhisperForConditionalGeneration(hf.WhisperConfig(**sizes))
    targets = {"target_modules": ["conv1", "conv2", "q_proj", "fc1"]}
    close(written(tmp_path, base, kind, targets, {"target_modules": ["conv2", "v_proj"]}))


@pytest.mark.parametrize("kind", KINDS)
@real_file(6, family="VideoMAE", option="--as-adapter of a 3-D convolution",
           expected="PEFT's merges, averaged", before="broken output")  # fmt: skip
def test_a_three_dimensional_convolution(tmp_path: Path, kind: list[str]) -> None:
    sizes = {"image_size": 8, "patch_size": 4, "num_frames": 2, "hidden_size": 16, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2, "intermediate_size": 32}
    base = hf.VideoMAEModel(hf.VideoMAEConfig(**sizes))
    close(written(tmp_path, base, kind, *[{"target_modules": ["projection"]}] * 2))


@pytest.mark.parametrize("kind", KINDS)
@real_file(6, family="GPT2", option="--as-adapter of embeddings, Conv1D and a head, with rank_pattern",
           expected="PEFT's merges, averaged", before="wrongly refused")  # fmt: skip
def test_embeddings_and_conv1d(tmp_path: Path, kind: list[str]) -> None:
    base = tiny("GPT2", "LMHeadModel", n_embd=32, n_layer=2, n_head=4, n_positions=64, tie_word_embeddings=False)
    targets = {"target_modules": ["wte", "c_attn", "lm_head"], "rank_pattern": {"h.1.attn.c_attn": 2}}
    close(written(tmp_path, base, kind, targets, {"target_modules": ["wpe", "c_proj"], "use_rslora": True}))


@real_file(6, family="PyTorch", option="--as-adapter, a target's name ends another's", expected="PEFT's modules",
           before="broken output")  # fmt: skip
def test_a_name_that_ends_another(tmp_path: Path) -> None:
    class Nested(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj = torch.nn.Linear(8, 8)
            self.deep = torch.nn.ModuleDict({"proj": torch.nn.Linear(8, 8)})

    from safetensors.torch import load_file, save_file

    torch.manual_seed(0)
    base = Nested()
    save_file(base.state_dict(), tmp_path / "base.safetensors")
    tuned = adapter(base, tmp_path / "a", target_modules="proj")
    assert cli("merge", tmp_path / "base.safetensors", tmp_path / "out", "-e", f"x={tmp_path / 'a'}",
               "--as-adapter", "cat").code == 0  # fmt: skip
    again = Nested()
    again.load_state_dict(load_file(tmp_path / "base.safetensors"))
    loaded = peft.PeftModel.from_pretrained(again, tmp_path / "out")
    names = [name for name, _ in loaded.named_parameters() if "lora_A" in name]
    assert names == [name for name, _ in tuned.named_parameters() if "lora_A" in name]
