"""Quantised and packed weights: copied as they are where no expert changes them, else refused by format."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.real_files.support import (
    State,
    adapter,
    cli,
    hf,
    logits,
    merged,
    moved,
    real_file,
    refused,
    state,
    tiny,
)

ROWS = [{"prompt": f"w{i} w{i + 3}", "response": f" w{2 * i}"} for i in range(4)]


def quantise(folder: Path, pack: Any, config: dict[str, Any], *names: str, **metadata: str) -> State:
    """Rewrite the weights whose names hold one of ``names`` as ``pack`` does; return what they then stand for."""
    tensors, plain = state(folder), dict[str, torch.Tensor]()
    packed: State = {}
    for name, value in tensors.items():
        if any(part in name for part in names) and value.ndim > 1 and "bias" not in name:
            parts, plain[name] = pack(name, value)
            packed |= parts
        else:
            packed[name] = plain[name] = value
    save_file(packed, folder / "model.safetensors", metadata={"format": "pt"} | metadata)
    edited = json.loads((folder / "config.json").read_text()) | {"quantization_config": config}
    (folder / "config.json").write_text(json.dumps(edited))
    return plain


def fp8(name: str, value: torch.Tensor, block: int = 16) -> tuple[State, torch.Tensor]:
    """Pack as transformers' FP8 (DeepSeek-V3's): one scale a block."""
    rows, columns = (-(-n // block) for n in value.shape)
    wide = torch.zeros(rows * block, columns * block)
    wide[: value.shape[0], : value.shape[1]] = value
    scale = wide.reshape(rows, block, columns, block).abs().amax((1, 3)) / 448
    spread = scale.repeat_interleave(block, 0)[: value.shape[0]].repeat_interleave(block, 1)[:, : value.shape[1]]
    packed = (value / spread).to(torch.float8_e4m3fn)
    return {name: packed, f"{name}_scale_inv": scale}, packed.float() * spread


def fp8_exponents(name: str, value: torch.Tensor) -> tuple[State, torch.Tensor]:
    """Pack as transformers' FP8 with ``scale_fmt: ue8m0``: every scale a power of two, stored as its exponent."""
    parts, _ = fp8(name, value)
    scale = parts[f"{name}_scale_inv"].log2().ceil().exp2()
    spread = scale.repeat_interleave(16, 0)[: value.shape[0]].repeat_interleave(16, 1)[:, : value.shape[1]]
    packed = (value / spread).to(torch.float8_e4m3fn)
    return {name: packed, f"{name}_scale_inv": scale.to(torch.float8_e8m0fnu)}, packed.float() * spread


def torchao(name: str, value: torch.Tensor) -> tuple[State, torch.Tensor]:
    """Pack as torchao 0.18 writes Int8WeightOnlyConfig to safetensors."""
    scale = value.abs().amax(1, keepdim=True) / 127
    packed = (value / scale).round().to(torch.int8)
    stem = name.removesuffix(".weight")
    zero = torch.zeros_like(scale, dtype=torch.int8)
    parts = {f"{stem}._weight_qdata": packed, f"{stem}._weight_scale": scale, f"{stem}._weight_zero_point": zero}
    return parts, packed * scale


def hqq(name: str, value: torch.Tensor) -> tuple[State, torch.Tensor]:
    """Pack as HQQLinear's state dict: numbers, scale and zero, and its settings as small tensors."""
    stem, half = name.removesuffix(".weight"), value.numel() // 2
    meta = {"nbits": torch.tensor(4, dtype=torch.int32), "axis": torch.tensor(1, dtype=torch.int32)}
    meta |= {"shape": torch.tensor(value.shape), "group_size": torch.tensor(16, dtype=torch.int32)}
    meta |= {"scale": torch.ones(value.numel() // 16, 1), "zero": torch.full((value.numel() // 16, 1), 7.5)}
    meta["W_q"] = torch.arange(half, dtype=torch.int32).to(torch.uint8).reshape(-1, 16)
    return {f"{stem}.{key}": tensor for key, tensor in meta.items()}, value


def quanto(name: str, value: torch.Tensor) -> tuple[State, torch.Tensor]:
    """Pack as optimum-quanto's qint8 state dict."""
    scale = value.abs().amax(1, keepdim=True) / 127
    module = name.removesuffix(".weight")
    parts = {f"{name}._data": (value / scale).round().to(torch.int8), f"{name}._scale": scale}
    return parts | {f"{module}.input_scale": torch.ones(()), f"{module}.output_scale": torch.ones(())}, value


def nf4(name: str, value: torch.Tensor) -> tuple[State, torch.Tensor]:
    """Pack as bitsandbytes writes NF4 with double quantisation (the numbers stand for nothing here)."""
    draw = torch.Generator().manual_seed(value.numel())
    packed = torch.randint(0, 256, (value.numel() // 2, 1), dtype=torch.uint8, generator=draw)
    parts = {name: packed, f"{name}.absmax": packed[: value.numel() // 64, 0].clone()}
    parts |= {f"{name}.quant_map": torch.linspace(-1, 1, 16), f"{name}.nested_absmax": torch.ones(1)}
    parts |= {f"{name}.nested_quant_map": torch.linspace(-1, 1, 256)}
    parts[f"{name}.quant_state.bitsandbytes__nf4"] = torch.tensor(list(b'{"quant_type": "nf4"}'), dtype=torch.uint8)
    return parts, value


def compressed(name: str, value: torch.Tensor) -> tuple[State, torch.Tensor]:
    """Pack as compressed-tensors writes 4-bit weights."""
    stem = name.removesuffix(".weight")
    packed = torch.zeros(value.shape[0], value.shape[1] // 8, dtype=torch.int32)
    parts = {f"{stem}.weight_packed": packed, f"{stem}.weight_scale": torch.ones(value.shape[0], 1).bfloat16()}
    return parts | {f"{stem}.weight_shape": torch.tensor(value.shape)}, value


def gptq(name: str, value: torch.Tensor) -> tuple[State, torch.Tensor]:
    """Pack as GPTQ does."""
    stem, (rows, columns) = name.removesuffix(".weight"), value.shape
    parts: State = {f"{stem}.qweight": torch.zeros(columns // 8, rows, dtype=torch.int32)}
    parts |= {f"{stem}.qzeros": torch.zeros(1, rows // 8, dtype=torch.int32), f"{stem}.scales": torch.ones(1, rows)}
    return parts | {f"{stem}.g_idx": torch.zeros(columns, dtype=torch.int32)}, value


def base_of(tmp_path: Path, family: str = "Llama", **config: Any) -> Any:
    model = tiny(family, "ForCausalLM", **{"tie_word_embeddings": False} | config)
    model.save_pretrained(tmp_path / "base")
    return model


def mxfp4(name: str, value: torch.Tensor) -> tuple[State, torch.Tensor]:
    """Pack a gpt-oss expert as openai/gpt-oss-20b does; transformers alone says what it stands for."""
    experts, rows, columns = value.shape
    draw = torch.Generator().manual_seed(rows)
    blocks = torch.randint(0, 256, (experts, columns, rows // 32, 16), dtype=torch.uint8, generator=draw)
    return {f"{name}_blocks": blocks, f"{name}_scales": torch.full((experts, columns, rows // 32), 121).byte()}, value


def gpt_oss(tmp_path: Path) -> Any:
    sizes = {"hidden_size": 64, "intermediate_size": 64, "head_dim": 32, "num_attention_heads": 2}
    sizes |= {"num_local_experts": 2, "num_experts_per_tok": 2, "layer_types": ["full_attention"] * 2}
    base_of(tmp_path, "GptOss", **sizes)
    skip = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    config = {"quant_method": "mxfp4", "modules_to_not_convert": skip}
    quantise(tmp_path / "base", mxfp4, config, "gate_up_proj", "down_proj")
    return hf.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32).eval()


@real_file(2, family="gpt-oss", option="MXFP4 experts, LoRA on attention", expected="PEFT, unmerged",
           before="broken output")  # fmt: skip
def test_lora_beside_mxfp4(tmp_path: Path) -> None:
    tuned = adapter(gpt_oss(tmp_path), tmp_path / "a", target_modules=["q_proj", "v_proj"])
    assert merged(tmp_path / "base", tmp_path / "out", x=tmp_path / "a").code == 0
    torch.testing.assert_close(logits(tmp_path / "out"), logits(tuned), atol=1e-5, rtol=1e-4)
    assert json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]["quant_method"] == "mxfp4"


@real_file(2, family="gpt-oss", option="MXFP4, a dense full expert", expected="its own format named",
           before="wrong cause named", now="refused, true cause")  # fmt: skip
def test_a_dense_expert_on_mxfp4(tmp_path: Path) -> None:
    gpt_oss(tmp_path).save_pretrained(tmp_path / "dense", save_original_format=False)
    outcome = merged(tmp_path / "base", tmp_path / "out", x=tmp_path / "dense")
    refused(outcome, "base", "MXFP4", "down_proj", "dense stores it unquantised (F32)", "save_original_format=False")


FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [16, 16]}


def fp8_base(tmp_path: Path, family: str = "Qwen3", **config: Any) -> State:
    base_of(tmp_path, family, **config)
    skip = FP8 | {"modules_to_not_convert": ["lm_head", "self_attn"]}
    return quantise(tmp_path / "base", fp8, skip, "up_proj", "down_proj", "gate_proj")


@real_file(2, family="Qwen3", option="FP8 blocks, LoRA on skipped layers", expected="PEFT, unmerged",
           before="wrongly refused")  # fmt: skip
def test_lora_on_what_fp8_skips(tmp_path: Path) -> None:
    fp8_base(tmp_path, head_dim=8)
    model = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32).eval()
    tuned = adapter(model, tmp_path / "a", target_modules=["lm_head", "o_proj"])
    assert merged(tmp_path / "base", tmp_path / "out", x=tmp_path / "a").code == 0
    torch.testing.assert_close(logits(tmp_path / "out"), logits(tuned), atol=1e-5, rtol=1e-4)
    before, after = state(tmp_path / "base"), state(tmp_path / "out")
    assert all(torch.equal(before[n].view(torch.uint8), after[n].view(torch.uint8)) for n in before if "mlp" in n)


@real_file(2, family="Qwen3", option="FP8 blocks, LoRA on one of them", expected="PEFT, unmerged",
           before="wrong cause named")  # fmt: skip
def test_lora_on_fp8(tmp_path: Path) -> None:
    fp8_base(tmp_path, head_dim=8)
    model = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32).eval()
    tuned = adapter(model, tmp_path / "a", target_modules=["up_proj"])
    outcome = merged(tmp_path / "base", tmp_path / "out", x=tmp_path / "a")
    assert "6 weights are stored as FP8 with block scales (F8_E4M3) and read as floats" in outcome.out
    torch.testing.assert_close(logits(tmp_path / "out"), logits(tuned), atol=1e-5, rtol=1e-4)
    assert {value.dtype for value in state(tmp_path / "out").values()} == {torch.float32}
    assert "quantization_config" not in (tmp_path / "out/config.json").read_text()


@real_file(2, family="Qwen3", option="FP8 blocks that do not fill a weight, a plain expert", expected="torch's formula",
           before="wrong cause named")  # fmt: skip
def test_partial_blocks_beside_a_plain_expert(tmp_path: Path) -> None:
    plain = fp8_base(tmp_path, head_dim=8, intermediate_size=40)
    model = hf.AutoModelForCausalLM.from_config(hf.AutoConfig.from_pretrained(tmp_path / "base"), dtype=torch.float32)
    expert = model.state_dict()
    shutil.copytree(tmp_path / "base", tmp_path / "e")
    save_file({name: value.contiguous() for name, value in expert.items()}, tmp_path / "e/model.safetensors")
    assert merged(tmp_path / "base", tmp_path / "out", "--set", "weight=0.5", x=tmp_path / "e").code == 0
    out = state(tmp_path / "out")
    assert out.keys() == plain.keys()
    for name, value in out.items():
        torch.testing.assert_close(value, plain[name] + 0.5 * (expert[name] - plain[name]), atol=1e-7, rtol=1e-6)
    hf.AutoModelForCausalLM.from_pretrained(tmp_path / "out")


@real_file(2, family="Qwen3", option="FP8 blocks, exponents as scales; the hint followed", expected="PEFT, unmerged",
           before="wrong cause named", now="refused, true cause")  # fmt: skip
def test_the_hint_for_fp8_works(tmp_path: Path) -> None:
    base_of(tmp_path, "Qwen3", head_dim=8)
    skip = FP8 | {"modules_to_not_convert": ["lm_head", "self_attn"], "scale_fmt": "ue8m0"}
    quantise(tmp_path / "base", fp8_exponents, skip, "up_proj", "down_proj", "gate_proj")
    model = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32).eval()
    tuned = adapter(model, tmp_path / "a", target_modules=["up_proj"])
    hint = ("quantization_config=FineGrainedFP8Config(dequantize=True)", "save_original_format=False")
    refused(merged(tmp_path / "base", tmp_path / "out", x=tmp_path / "a"), "up_proj.weight", "FP8", *hint)
    plain = hf.AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", dtype=torch.float32, quantization_config=hf.FineGrainedFP8Config(dequantize=True)
    )
    plain.save_pretrained(tmp_path / "plain", save_original_format=False)
    assert merged(tmp_path / "plain", tmp_path / "out", x=tmp_path / "a").code == 0
    torch.testing.assert_close(logits(tmp_path / "out"), logits(tuned), atol=1e-5, rtol=1e-4)


@real_file(2, family="Qwen3", option="FP8 blocks, a learned merge", expected="what to do named",
           before="wrong cause named", now="refused, true cause")  # fmt: skip
def test_learning_on_fp8(tmp_path: Path) -> None:
    fp8_base(tmp_path, head_dim=8)
    model = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32).eval()
    adapter(model, tmp_path / "a", target_modules=["up_proj"])
    rows = tokenised(tmp_path / "base")
    more = ("--method", "adamerging", "--calibration", f"x={rows}")
    refused(merged(tmp_path / "base", tmp_path / "out", *more, x=tmp_path / "a"), "base", "quantised", "linear")


@real_file(2, family="Mistral", option="torchao int8, LoRA on the head", expected="W + scale B A; bytes of the base",
           before="broken output")  # fmt: skip
def test_lora_beside_torchao(tmp_path: Path) -> None:
    model = base_of(tmp_path, "Mistral")
    said = {"quant_method": "torchao", "quant_type": {"default": {"_type": "Int8WeightOnlyConfig"}}}
    names = '["lm_head.weight", "model.layers.0.self_attn.q_proj.weight"]'
    quantise(tmp_path / "base", torchao, said, "proj", tensor_names=names)
    tuned = adapter(model, tmp_path / "a", target_modules=["lm_head"])
    assert merged(tmp_path / "base", tmp_path / "out", x=tmp_path / "a").code == 0
    before, after = state(tmp_path / "base"), state(tmp_path / "out")
    torch.testing.assert_close(after["lm_head.weight"], tuned.merge_and_unload().lm_head.weight)
    assert all(torch.equal(before[name], after[name]) for name in before if name != "lm_head.weight")
    with safe_open(tmp_path / "out/model.safetensors", "pt") as file:
        assert file.metadata()["tensor_names"] == names  # torchao finds its tensors by it
    assert json.loads((tmp_path / "out/config.json").read_text())["quantization_config"] == said


@real_file(2, family="Mistral", option="torchao int8, LoRA on q_proj", expected="its own format named",
           before="wrong cause named", now="refused, true cause")  # fmt: skip
def test_lora_on_torchao(tmp_path: Path) -> None:
    adapter(base_of(tmp_path, "Mistral"), tmp_path / "a", target_modules=["q_proj"])
    quantise(tmp_path / "base", torchao, {"quant_method": "torchao"}, "proj")
    outcome = merged(tmp_path / "base", tmp_path / "out", x=tmp_path / "a")
    refused(outcome, "q_proj.weight", "_weight_qdata", "torchao", "unquantised")
    assert "another base" not in outcome.err


@pytest.mark.parametrize(("pack", "name"), [(hqq, "HQQ"), (quanto, "quanto"), (gptq, "gptq"), (nf4, "bitsandbytes")])
@real_file(2, family="Llama", option="HQQ, quanto, GPTQ, NF4: two full experts of other numbers",
           expected="their own format named", before="silent loss", now="refused, true cause")  # fmt: skip
def test_packed_experts_that_differ(tmp_path: Path, pack: Any, name: str) -> None:
    model = base_of(tmp_path)
    moved(model, 1).save_pretrained(tmp_path / "e")
    for folder in ("base", "e"):
        quantise(tmp_path / folder, pack, {"quant_method": name}, "q_proj")
    edited = state(tmp_path / "e")
    key = next(n for n in edited if "q_proj" in n and edited[n].dtype in (torch.uint8, torch.int8, torch.int32))
    edited[key] = edited[key] ^ 1
    save_file(edited, tmp_path / "e/model.safetensors", metadata={"format": "pt"})
    refused(merged(tmp_path / "base", tmp_path / "out", x=tmp_path / "e"), "q_proj", name.replace("gptq", "GPTQ"),
            "unquantised")  # fmt: skip
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "linear"])
@real_file(2, family="Phi3", option="NF4 frozen, norms trained: two full experts", expected="mean of the norms",
           before="wrongly refused")  # fmt: skip
def test_what_was_trained_beside_nf4(tmp_path: Path, method: str) -> None:
    model = base_of(tmp_path, "Phi3", pad_token_id=0)
    for number in (1, 2):
        moved(model, number, only=lambda name: "norm" in name).save_pretrained(tmp_path / f"e{number}")
    for folder in ("base", "e1", "e2"):
        quantise(tmp_path / folder, nf4, {"quant_method": "bitsandbytes", "load_in_4bit": True}, "proj")
    more = ["--set", "density=1"] if method == "ties" else ["--set", "weight=0.5"]
    experts = {"a": tmp_path / "e1", "b": tmp_path / "e2"}
    assert merged(tmp_path / "base", tmp_path / "out", "--method", method, *more, **experts).code == 0
    base, one, two, out = (state(tmp_path / f) for f in ("base", "e1", "e2", "out"))
    assert all(torch.equal(base[name], out[name]) for name in base if "proj" in name)
    if method != "ties":
        torch.testing.assert_close(out["model.norm.weight"], (one["model.norm.weight"] + two["model.norm.weight"]) / 2)


@real_file(2, family="Gemma2", option="compressed-tensors 4-bit, a norm saved", expected="PEFT's saved tensor",
           before="wrongly refused")  # fmt: skip
def test_a_saved_module_beside_compressed_tensors(tmp_path: Path) -> None:
    model = base_of(tmp_path, "Gemma2", head_dim=8)
    quantise(tmp_path / "base", compressed, {"quant_method": "compressed-tensors", "format": "pack-quantized"}, "mlp")
    tuned = adapter(model, tmp_path / "a", target_modules=["k_proj"], modules_to_save=["norm"])
    assert merged(tmp_path / "base", tmp_path / "out", x=tmp_path / "a").code == 0
    want, out = tuned.merge_and_unload().state_dict(), state(tmp_path / "out")
    assert "model.layers.1.mlp.up_proj.weight_packed" in out
    for name in ("model.norm.weight", "model.layers.1.self_attn.k_proj.weight"):
        torch.testing.assert_close(out[name], want[name])


@real_file(2, family="Llama", option="a GPTQ expert on a plain base", expected="both storages named",
           before="wrong cause named", now="refused, true cause")  # fmt: skip
def test_a_quantised_expert_on_a_plain_base(tmp_path: Path) -> None:
    base_of(tmp_path)
    shutil.copytree(tmp_path / "base", tmp_path / "e")
    quantise(tmp_path / "e", gptq, {"quant_method": "gptq", "bits": 4}, "q_proj")
    outcome = merged(tmp_path / "base", tmp_path / "out", x=tmp_path / "e")
    refused(outcome, "/e:", "GPTQ", "qweight", "q_proj.weight", "F32", "unquantised")
    refused(cli("doctor", recipe(tmp_path, "e")), "GPTQ", "unquantised")


@pytest.mark.parametrize("pack", [nf4, torchao])
@real_file(2, family="Llama", option="NF4, torchao: LoRA saved under a composite model's names",
           expected="its own format named", before="wrong cause named", now="refused, true cause")  # fmt: skip
def test_an_adapter_of_other_names(tmp_path: Path, pack: Any) -> None:
    adapter(base_of(tmp_path), tmp_path / "a", target_modules=["q_proj"])
    quantise(tmp_path / "base", pack, {"quant_method": "any"}, "q_proj")
    path = tmp_path / "a/adapter_model.safetensors"
    renamed = {n.replace("model.layers", "model.language_model.layers"): value for n, value in load_file(path).items()}
    save_file(renamed, path, metadata={"format": "pt"})
    outcome = merged(tmp_path / "base", tmp_path / "out", x=tmp_path / "a")
    refused(outcome, "language_model.layers.0.self_attn.q_proj.weight", "is quantised", "unquantised")


def recipe(tmp_path: Path, *experts: str) -> Path:
    models = "".join(f"  - {{model: {tmp_path / name}, name: {name}}}\n" for name in experts)
    path = tmp_path / "recipe.yaml"
    path.write_text(f"merge_method: task_arithmetic\nbase_model: {tmp_path / 'base'}\nmodels:\n{models}")
    return path


@real_file(2, family="Llama", option="integers beside a scale, of no known format", expected="the tensor named",
           before="silent loss", now="refused, true cause")  # fmt: skip
def test_an_unknown_packing(tmp_path: Path) -> None:
    base_of(tmp_path)

    def pack(name: str, value: torch.Tensor) -> tuple[State, torch.Tensor]:
        numbers = (value / value.abs().max() * 127).to(torch.int8)
        return {f"{name}_bits": numbers, f"{name}_step_scale": value.abs().amax(1)}, value

    shutil.copytree(tmp_path / "base", tmp_path / "e")
    for folder in ("e", "base"):
        quantise(tmp_path / folder, pack, {"quant_method": "mine"}, "q_proj")
    edited = state(tmp_path / "e")
    edited["model.layers.0.self_attn.q_proj.weight_step_scale"] *= 2
    save_file(edited, tmp_path / "e/model.safetensors", metadata={"format": "pt"})
    refused(merged(tmp_path / "base", tmp_path / "out", x=tmp_path / "e"), "q_proj.weight_bits", "mine")


@real_file(2, family="Llama", option="an integer table of 17 M elements", expected="a note", before="silent loss",
           now="warned")  # fmt: skip
def test_a_note_has_no_size_limit(tmp_path: Path) -> None:
    table = torch.zeros(17 << 20, dtype=torch.int16)
    for name in ("base", "e"):
        save_file({"table": table, "w": torch.ones(2)}, tmp_path / f"{name}.safetensors")
        table = table.clone()
        table[-1] = 1
    outcome = merged(tmp_path / "base.safetensors", tmp_path / "out.safetensors", x=tmp_path / "e.safetensors")
    assert outcome.code == 0
    assert "table" in outcome.out
    assert "differ" in outcome.out


@real_file(2, family="Llama", option="stale quantization_config over plain weights", expected="transformers' load",
           before="silent loss")  # fmt: skip
def test_a_stale_config(tmp_path: Path) -> None:
    model = base_of(tmp_path)
    quantise(tmp_path / "base", fp8, {"quant_method": "gptq", "bits": 4})
    tuned = adapter(model, tmp_path / "a", target_modules=["q_proj"])
    outcome = merged(tmp_path / "base", tmp_path / "out", x=tmp_path / "a")
    assert "gptq" in outcome.out
    torch.testing.assert_close(logits(tmp_path / "out"), logits(tuned), atol=1e-5, rtol=1e-4)


def tokenised(folder: Path) -> Path:
    """Give a folder a tokenizer of words; return rows of them."""
    tokenizers = pytest.importorskip("tokenizers")
    words = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{i}" for i in range(60))]
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    hf.PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    ).save_pretrained(folder)
    rows = folder.parent / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return rows


@pytest.mark.parametrize(
    ("config", "words"),
    [(None, ("no quantization_config",)), ({"quant_method": "modelopt"}, ("modelopt", "does not know"))],
)
@real_file(2, family="Qwen3", option="evaluate: FP8 that transformers reads as plain numbers", expected="format named",
           before="wrong numbers", now="refused, true cause")  # fmt: skip
def test_evaluating_what_transformers_misreads(tmp_path: Path, config: Any, words: tuple[str, ...]) -> None:
    fp8_base(tmp_path, head_dim=8)
    said = json.loads((tmp_path / "base/config.json").read_text()) | {"quantization_config": config}
    (tmp_path / "base/config.json").write_text(json.dumps({k: v for k, v in said.items() if v is not None}))
    rows = tokenised(tmp_path / "base")
    refused(cli("evaluate", tmp_path / "base", f"a={rows}", "--no-cache"), "FP8", "_proj.weight", *words)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU reads partial blocks rightly")
@real_file(2, family="Qwen3", option="evaluate: FP8 blocks that do not fill a weight", expected="format named",
           before="wrong cause named", now="refused, true cause")  # fmt: skip
def test_evaluating_partial_blocks(tmp_path: Path) -> None:
    fp8_base(tmp_path, head_dim=8, intermediate_size=40)
    rows = tokenised(tmp_path / "base")
    refused(cli("evaluate", tmp_path / "base", f"a={rows}", "--no-cache"), "[16, 16]", "GPU")


@real_file(
    2, family="gpt-oss", option="evaluate: MXFP4 base with an adapter", expected="PEFT, unmerged", before="right"
)
def test_evaluating_an_adapter_on_mxfp4(tmp_path: Path) -> None:
    tuned = adapter(gpt_oss(tmp_path), tmp_path / "a", target_modules=["q_proj", "v_proj"])
    rows = tokenised(tmp_path / "base")
    outcome = cli("evaluate", f"{tmp_path / 'base'}+{tmp_path / 'a'}", f"a={rows}", "--no-cache", "--json")
    loss = json.loads(outcome.out)["results"][0]["loss"]["value"]
    assert abs(loss - nats(tuned)) < 1e-4


def nats(model: Any) -> float:
    """Mean nats per response token of ``ROWS`` (the words' ids are four behind their numbers)."""
    total, count = 0.0, 0
    for row in ROWS:
        prompt, response = ([4 + int(word[1:]) for word in row[key].split()] for key in ("prompt", "response"))
        said = logits(model, torch.tensor([prompt + response])).log_softmax(-1)[0]
        total -= sum(said[len(prompt) - 1 + i, token].item() for i, token in enumerate(response))
        count += len(response)
    return total / count
