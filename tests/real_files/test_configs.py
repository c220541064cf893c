"""Configs of one model in two shapes: flat and nested, of transformers 4 and 5, and values inside a part."""

import json
from pathlib import Path
from typing import Any

import torch

from tests.real_files.support import IDS, SIZES, cli, hf, logits, merged, moved, real_file, refused, tiny
from tests.real_files.test_usable import edit, pair, read, silent, warned

MROPE = {"type": "mrope", "mrope_section": [1, 1, 2]}


def qwen2_vl(tmp_path: Path) -> tuple[Path, Path]:
    """Save a base whose config is flat, as transformers 4 wrote it, and a fine-tune as transformers 5 saves it."""
    vision = {
        "depth": 1, "embed_dim": 16, "mlp_ratio": 2, "num_heads": 2, "hidden_size": 32, "patch_size": 4,
        "spatial_merge_size": 2, "temporal_patch_size": 2, "in_channels": 3,
    }  # fmt: skip
    text = SIZES | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 2]}}
    base, expert = tmp_path / "base", tmp_path / "e"
    torch.manual_seed(0)
    model = hf.Qwen2VLForConditionalGeneration(hf.Qwen2VLConfig(text_config=text, vision_config=vision))
    model.save_pretrained(base)
    moved(model, 1).save_pretrained(expert)
    nested = read(base)
    inside = {k: v for k, v in nested.pop("text_config").items() if k not in ("model_type", "rope_parameters")}
    nested["vision_config"].pop("rope_parameters", None)
    flat = inside | nested | {"rope_theta": 1e6, "rope_scaling": MROPE}
    (base / "config.json").write_text(json.dumps(flat))
    return base, expert


def words(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        return hf.Qwen2VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()(IDS).logits


@real_file(7, family="Qwen2-VL", option="a flat config of transformers 4, and text_config of 5, in both orders",
           expected="transformers, loading the output", before="silent loss")  # fmt: skip
def test_flat_and_nested_configs_are_one(tmp_path: Path) -> None:
    base, expert = qwen2_vl(tmp_path)
    silent(merged(base, tmp_path / "plain", "--strict", e=expert))
    silent(merged(base, tmp_path / "chosen", "--strict", "--config", "e", e=expert))
    silent(merged(expert, tmp_path / "back", "--strict", "--config", "e", e=base))
    assert read(tmp_path / "chosen")["vision_config"]["embed_dim"] == 16
    for out, wanted in (("plain", expert), ("chosen", expert), ("back", base)):
        torch.testing.assert_close(words(tmp_path / out), words(wanted), atol=1e-5, rtol=1e-5)
    edit(base, rms_norm_eps=1e-3)
    warned(merged(base, tmp_path / "eps", e=expert), "text_config.rms_norm_eps 1e-05", "in the base 0.001",
           "{rms_norm_eps: VALUE}")  # fmt: skip


@real_file(7, family="T5 v1.1", option="the flag that scales outputs: transformers 4's spelling chosen over 5's",
           expected="transformers, loading the output", before="silent loss")  # fmt: skip
def test_scaling_of_outputs_is_chosen(tmp_path: Path) -> None:
    def scores(folder: Path) -> Any:
        model = hf.T5ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
        with torch.no_grad():
            return model(input_ids=IDS, decoder_input_ids=IDS).logits

    base, expert = pair(tmp_path, "T5", "ForConditionalGeneration", decoder_start_token_id=0)
    edit(base, scale_decoder_outputs=False)
    edit(expert, drop=("scale_decoder_outputs",), tie_word_embeddings=False)  # as transformers 4 says the same
    silent(merged(base, tmp_path / "same", "--strict", "--config", "e", e=expert))
    torch.testing.assert_close(scores(tmp_path / "same"), scores(expert), atol=1e-4, rtol=1e-5)
    edit(base, scale_decoder_outputs=True)
    warned(merged(base, tmp_path / "other", e=expert), "scale_decoder_outputs false", "in the base true")


@real_file(7, family="Llava", option="a value inside text_config: beside it, and as the warning's hint writes it",
           expected="transformers, loading the output", before="silent loss")  # fmt: skip
def test_hint_names_the_part(tmp_path: Path) -> None:
    vision = {"model_type": "clip_vision_model", "hidden_size": 32, "image_size": 16, "intermediate_size": 48,
              "num_attention_heads": 4, "num_hidden_layers": 1, "patch_size": 4}  # fmt: skip
    config = hf.LlavaConfig(text_config={"model_type": "llama", **SIZES}, vision_config=vision, image_token_index=60)
    model = hf.LlavaForConditionalGeneration(config)
    base, expert = tmp_path / "base", tmp_path / "e"
    model.save_pretrained(base)
    moved(model, 1).save_pretrained(expert)
    edit(expert, text_config=read(expert)["text_config"] | {"rope_parameters": None, "rope_theta": 5e5})
    hint = "config: {text_config.rope_theta: VALUE} sets it"
    refused(cli("check", base, "-e", f"e={expert}", "--strict"), "rope_theta 500000", hint)
    refused(cli("check", base, "-e", f"e={expert}", "--config", "rope_theta=500000.0"), "write text_config.rope_theta")
    silent(merged(base, tmp_path / "out", "--strict", "--config", "text_config.rope_theta=500000.0", e=expert))
    found = hf.AutoConfig.from_pretrained(tmp_path / "out").text_config.rope_parameters
    assert found["rope_theta"] == 5e5


@real_file(7, family="Llama", option="rope_scaling: {factor: 8} on a llama3 scaling; rope_theta where both differ",
           expected="transformers, loading the output", before="silent loss")  # fmt: skip
def test_one_value_of_a_scaling(tmp_path: Path) -> None:
    scaling = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 16, "rope_theta": 1e4}  # fmt: skip
    base, expert = tmp_path / "base", tmp_path / "e"
    tiny("Llama", rope_parameters=scaling).save_pretrained(base)
    moved(tiny("Llama", rope_parameters=scaling | {"factor": 8.0, "rope_theta": 5e5}), 1).save_pretrained(expert)
    hint = "config: {rope_scaling: {factor: VALUE, ...}} sets it"
    refused(cli("check", base, "-e", f"e={expert}", "--strict", "--config", "rope_theta=500000.0"), "factor 8", hint)
    chosen = ("--config", "rope_theta=500000.0", "--config", "rope_scaling={factor: 8.0}")
    silent(merged(base, tmp_path / "out", "--strict", *chosen, e=expert))
    torch.testing.assert_close(logits(tmp_path / "out"), logits(expert), atol=1e-5, rtol=1e-5)
