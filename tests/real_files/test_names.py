"""One tensor under several names: transformers' conversions, wrappers, prefixes, for adapters and full models."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.real_files.support import State, adapter, cli, hf, logits, merged, peft, real_file, refused, state, tiny

VISION: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64,
    "image_size": 16, "patch_size": 8,
}  # fmt: skip
TEXT: dict[str, Any] = {
    "vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
    "intermediate_size": 64, "head_dim": 16, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip


def seeded(make: Callable[[], Any], seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return make().eval()


def image_classifier(family: str, seed: int = 0, **more: Any) -> Any:
    config = getattr(hf, f"{family}Config")(**VISION | more)
    return seeded(lambda: getattr(hf, f"{family}ForImageClassification")(config), seed)


def gemma(seed: int = 0) -> Any:
    config = hf.Gemma3Config(
        text_config=TEXT, vision_config=VISION, mm_tokens_per_image=4, image_token_index=299, boi_token_index=297,
        eoi_token_index=298,
    )  # fmt: skip
    return seeded(lambda: hf.Gemma3ForConditionalGeneration(config), seed)


def retold(source: Path, folder: Path, rename: Callable[[str], str]) -> Path:
    """Copy a model with its tensors under other names."""
    folder.mkdir()
    shutil.copy(source / "config.json", folder)
    save_file({rename(name): value for name, value in state(source).items()}, folder / "model.safetensors")
    return folder


def equal(found: State, wanted: State, atol: float = 1e-6) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, atol=atol, rtol=1e-5, msg=name)


def adapter_is_right(tmp_path: Path, base: Any, **config: Any) -> None:
    """Merge an adapter into a saved model and compare with what PEFT merges and transformers saves."""
    base.save_pretrained(tmp_path / "base")
    tuned = adapter(type(base).from_pretrained(tmp_path / "base", dtype=torch.float32), tmp_path / "a", **config)
    tuned.merge_and_unload().save_pretrained(tmp_path / "want")
    outcome = merged(tmp_path / "base", tmp_path / "out", x=tmp_path / "a")
    assert outcome.code == 0, outcome.said
    assert "go by the base's names" in outcome.out
    equal(state(tmp_path / "out"), state(tmp_path / "want"))


@real_file(
    8, family="ViT", option="adapter of transformers 5, saved classifier", expected="PEFT's merge",
    before="wrong cause named",
)  # fmt: skip
def test_a_vit_adapter(tmp_path: Path) -> None:
    base = image_classifier("ViT")
    adapter_is_right(tmp_path, base, target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"])


@real_file(8, family="DINOv2", option="adapter of transformers 5", expected="PEFT's merge", before="wrong cause named")
def test_a_dinov2_adapter(tmp_path: Path) -> None:
    base = seeded(lambda: hf.Dinov2Model(hf.Dinov2Config(**{**VISION, "mlp_ratio": 2})))
    adapter_is_right(tmp_path, base, target_modules=["q_proj", "v_proj"])


@real_file(
    8, family="Segformer", option="adapter of transformers 5; a saved module with counters", expected="PEFT's merge",
    before="wrongly refused",
)  # fmt: skip
def test_a_segformer_adapter(tmp_path: Path) -> None:
    config = hf.SegformerConfig(
        hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1], num_attention_heads=[1, 1, 2, 2], decoder_hidden_size=16
    )
    base = seeded(lambda: hf.SegformerForSemanticSegmentation(config))
    adapter_is_right(tmp_path, base, target_modules=["q_proj", "fc1"], modules_to_save=["decode_head"])


@real_file(
    8, family="Gemma 3", option="adapter on the vision tower, which the file nests deeper", expected="PEFT's merge",
    before="right",
)  # fmt: skip
def test_an_adapter_of_both_towers(tmp_path: Path) -> None:
    adapter_is_right(tmp_path, gemma(), target_modules=["q_proj", "fc1"])


@real_file(
    8, family="DETR", option="adapter on convolution, attention and boxes", expected="PEFT's merge",
    before="wrong cause named",
)  # fmt: skip
def test_a_detr_adapter(tmp_path: Path) -> None:
    backbone = hf.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], out_features=["stage2"])
    config = hf.DetrConfig(
        use_pretrained_backbone=False, backbone=None, backbone_config=backbone, d_model=32, encoder_layers=1,
        decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32,
        num_queries=4,
    )  # fmt: skip
    base = seeded(lambda: hf.DetrForObjectDetection(config))
    modules = ["q_proj", "o_proj", "fc1"]
    adapter_is_right(tmp_path, base, target_modules=modules, modules_to_save=["class_labels_classifier"])


@pytest.mark.parametrize("base_has_new_names", [False, True])
@real_file(
    8, family="DeiT", option="full model saved under module names, either side", expected="the expert's file",
    before="wrong cause named",
)  # fmt: skip
def test_a_full_model_in_the_other_naming(tmp_path: Path, base_has_new_names: bool) -> None:
    image_classifier("DeiT").save_pretrained(tmp_path / "base", save_original_format=not base_has_new_names)
    tuned = image_classifier("DeiT", 1)
    tuned.save_pretrained(tmp_path / "e", save_original_format=base_has_new_names)
    tuned.save_pretrained(tmp_path / "want", save_original_format=not base_has_new_names)
    outcome = merged(tmp_path / "base", tmp_path / "out", x=tmp_path / "e")
    assert outcome.code == 0, outcome.said
    equal(state(tmp_path / "out"), state(tmp_path / "want"))


@real_file(
    8, family="GPT-NeoX", option="full model whose head is called lm_head, not embed_out", expected="the expert's file",
    before="wrong cause named",
)  # fmt: skip
def test_a_renamed_head(tmp_path: Path) -> None:
    tiny("GPTNeoX").save_pretrained(tmp_path / "base")
    tuned = tiny("GPTNeoX", seed=1)
    tuned.save_pretrained(tmp_path / "e", save_original_format=False)
    assert merged(tmp_path / "base", tmp_path / "out", x=tmp_path / "e").code == 0
    torch.testing.assert_close(logits(tmp_path / "out"), logits(tuned), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: f"_orig_mod.{name}",
        lambda name: f"module.{name}",
        lambda name: f"_forward_module.module._orig_mod.{name}",
        lambda name: f"_fsdp_wrapped_module.{name.replace('.self_attn.', '._fsdp_wrapped_module.self_attn.')}",
        lambda name: name.replace("layers.0.", "layers.0._checkpoint_wrapped_module."),
    ],
    ids=["compiled", "ddp", "lightning", "fsdp", "checkpointed"],
)
@pytest.mark.parametrize("wrapped", ["expert", "base"])
@real_file(
    8, family="Qwen2", option="full model of a wrapped module (compile, DDP, FSDP, Lightning), either side",
    expected="the expert's values", before="wrong cause named",
)  # fmt: skip
def test_a_wrapped_full_model(tmp_path: Path, rename: Callable[[str], str], wrapped: str) -> None:
    for name, seed in (("base", 0), ("expert", 1)):
        tiny("Qwen2", seed=seed, tie_word_embeddings=False).save_pretrained(tmp_path / name)
    retold(tmp_path / wrapped, tmp_path / "wrapped", rename)
    base, expert = (tmp_path / ("wrapped" if name == wrapped else name) for name in ("base", "expert"))
    outcome = merged(base, tmp_path / "out", x=expert)
    assert outcome.code == 0, outcome.said
    assert "go by the base's names" in outcome.out
    wanted = state(tmp_path / "expert")
    equal(state(tmp_path / "out"), {rename(k): v for k, v in wanted.items()} if wrapped == "base" else wanted)


@real_file(
    8, family="Gemma 3", option="full model under the other library version's prefixes", expected="the expert's values",
    before="wrong cause named",
)  # fmt: skip
def test_a_full_model_of_another_library_version(tmp_path: Path) -> None:
    new = {
        "language_model.model.": "model.language_model.", "vision_tower.": "model.vision_tower.",
        "multi_modal_projector.": "model.multi_modal_projector.",
    }  # fmt: skip

    def rename(name: str) -> str:
        return next((n + name.removeprefix(o) for o, n in new.items() if name.startswith(o)), name)

    for name, seed in (("base", 0), ("e", 1)):
        gemma(seed).save_pretrained(tmp_path / name)
    retold(tmp_path / "e", tmp_path / "new", rename)
    assert merged(tmp_path / "base", tmp_path / "out", x=tmp_path / "new").code == 0
    equal(state(tmp_path / "out"), state(tmp_path / "e"))


@real_file(
    8, family="BERT", option="adapter of a headed model on the bare encoder's file", expected="PEFT's merge",
    before="wrong cause named",
)  # fmt: skip
def test_an_adapter_with_a_head_s_prefix_on_a_bare_model(tmp_path: Path) -> None:
    """The pooler and embeddings too, whose names are short."""
    bare = tiny("Bert", "Model")
    bare.save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(r=4, init_lora_weights=False, target_modules=["query", "word_embeddings", "pooler.dense"])
    whole = hf.BertForNextSentencePrediction.from_pretrained(tmp_path / "base", dtype=torch.float32)
    tuned = peft.get_peft_model(whole, config)
    tuned.save_pretrained(tmp_path / "a", save_embedding_layers=False)
    wanted = tuned.merge_and_unload().bert.state_dict()
    outcome = merged(tmp_path / "base", tmp_path / "out", x=tmp_path / "a")
    assert outcome.code == 0, outcome.said
    equal(state(tmp_path / "out"), wanted)


@real_file(
    8, family="GPT-2", option="adapter of the bare model on a file with 'transformer.'", expected="PEFT, unmerged",
    before="right",
)  # fmt: skip
def test_an_adapter_without_the_base_s_prefix(tmp_path: Path) -> None:
    base = tiny("GPT2", "LMHeadModel", n_embd=32, n_layer=2, n_head=2, n_positions=32)
    base.save_pretrained(tmp_path / "base")
    bare = hf.GPT2Model.from_pretrained(tmp_path / "base", dtype=torch.float32)
    tuned = adapter(bare, tmp_path / "a", target_modules=["c_attn"], fan_in_fan_out=True)
    assert merged(tmp_path / "base", tmp_path / "out", x=tmp_path / "a").code == 0
    ids = torch.arange(3, 19)[None]
    with torch.no_grad():
        wanted = tuned(ids).last_hidden_state
        found = hf.GPT2Model.from_pretrained(tmp_path / "out", dtype=torch.float32)(ids).last_hidden_state
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)


class Block(torch.nn.Module):
    """An attention of torch's own and a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.attn, self.mlp = torch.nn.MultiheadAttention(32, 2), torch.nn.Linear(32, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mlp(self.attn(x, x, x)[0])


@real_file(8, family="torch", option="nn.MultiheadAttention", expected="PEFT, unmerged", before="wrong cause named")
def test_multihead_attention(tmp_path: Path) -> None:
    """PEFT calls its weight ``attn.weight``, and adds the update of ``out_proj`` twice."""
    block, x = seeded(Block), torch.randn(5, 2, 32)
    save_file(block.state_dict(), tmp_path / "base.safetensors")
    tuned = adapter(block, tmp_path / "a", target_modules=["attn", "mlp"])
    with torch.no_grad():
        wanted = tuned(x)
    outcome = merged(tmp_path / "base.safetensors", tmp_path / "out.safetensors", x=tmp_path / "a")
    assert outcome.code == 0, outcome.said
    assert "out_proj.weight counts twice" in outcome.out
    found = Block().eval()
    found.load_state_dict(state(tmp_path / "out.safetensors"))
    with torch.no_grad():
        torch.testing.assert_close(found(x), wanted, atol=1e-5, rtol=1e-4)


@real_file(
    8, family="torch", option="--as-adapter on nn.MultiheadAttention", expected="the message",
    before="wrong cause named", now="refused, true cause",
)  # fmt: skip
def test_multihead_attention_as_an_adapter(tmp_path: Path) -> None:
    """It would have to be under names of PEFT's own making, at half its size."""
    save_file(Block().state_dict(), tmp_path / "base.safetensors")
    adapter(Block(), tmp_path / "a", target_modules=["attn"])
    named = ("-e", f"a={tmp_path / 'a'}", "--as-adapter", "cat")
    refused(cli("merge", tmp_path / "base.safetensors", tmp_path / "out", *named), "nn.MultiheadAttention")


@pytest.mark.parametrize("kind", ["cat", "svd"])
@real_file(
    8, family="ViT", option="--as-adapter of two adapters of transformers 5", expected="a sum of PEFT's merges",
    before="wrong cause named",
)  # fmt: skip
def test_adapters_of_other_names_as_an_adapter(tmp_path: Path, kind: str) -> None:
    """The file has the module names, which PEFT loads."""
    image_classifier("ViT").save_pretrained(tmp_path / "base")
    full = image_classifier("ViT")
    total = {name: value.clone() for name, value in full.state_dict().items()}
    for name, seed in (("a", 1), ("b", 2)):
        model = image_classifier("ViT")
        tuned = adapter(model, tmp_path / name, seed=seed, target_modules=["q_proj", "fc1"])
        for key, value in tuned.merge_and_unload().state_dict().items():
            total[key] += value - full.state_dict()[key]
    full.load_state_dict(total)
    named = [word for name in "ab" for word in ("-e", f"{name}={tmp_path / name}")]
    more = ["--rank", "8"] if kind == "svd" else []
    outcome = cli("merge", tmp_path / "base", tmp_path / "out", *named, "--as-adapter", kind, *more)
    assert outcome.code == 0, outcome.said
    base = hf.ViTForImageClassification.from_pretrained(tmp_path / "base", dtype=torch.float32)
    merge = peft.PeftModel.from_pretrained(base, tmp_path / "out").eval()
    pixels = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(merge(pixels).logits, full(pixels).logits, atol=1e-4, rtol=1e-3)


@real_file(
    8, family="DINOv2", option="adapter on layers that the file holds as one (SwiGLU)", expected="the message",
    before="wrong cause named", now="refused, true cause",
)  # fmt: skip
def test_an_adapter_on_half_a_stored_tensor(tmp_path: Path) -> None:
    config = hf.Dinov2Config(**{**VISION, "mlp_ratio": 2, "use_swiglu_ffn": True})
    seeded(lambda: hf.Dinov2Model(config)).save_pretrained(tmp_path / "base")
    adapter(hf.Dinov2Model.from_pretrained(tmp_path / "base"), tmp_path / "a", target_modules=["gate_proj"])
    outcome = merged(tmp_path / "base", tmp_path / "out", x=tmp_path / "a")
    refused(outcome, "gate_proj", "transformers converts", "mlp.weights_in.weight", "merge the adapter")
    assert "another base" not in outcome.err


@real_file(
    8, family="two towers", option="adapter name that fits two tensors alike", expected="the message",
    before="wrong cause named", now="refused, true cause",
)  # fmt: skip
def test_an_ambiguous_name_is_no_guess(tmp_path: Path) -> None:
    tensor = torch.randn(8, 8)
    names = ("left.layers.0.attn.q.weight", "right.layers.0.attn.q.weight")
    save_file({name: tensor.clone() for name in names}, tmp_path / "base.safetensors")
    (tmp_path / "a").mkdir()
    (tmp_path / "a/adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 2}', encoding="utf-8")
    factors = {
        "base_model.model.enc.layers.0.attn.q.lora_A.weight": torch.randn(2, 8),
        "base_model.model.enc.layers.0.attn.q.lora_B.weight": torch.randn(8, 2),
    }
    save_file(factors, tmp_path / "a/adapter_model.safetensors")
    outcome = merged(tmp_path / "base.safetensors", tmp_path / "out.safetensors", x=tmp_path / "a")
    refused(outcome, *names, "rename it")


@real_file(
    8, family="ViT", option="an adapter and a full model of other names, in both orders", expected="a formula",
    before="wrong cause named",
)  # fmt: skip
def test_several_experts_of_other_names(tmp_path: Path) -> None:
    base = image_classifier("ViT")
    base.save_pretrained(tmp_path / "base")
    tuned = adapter(image_classifier("ViT"), tmp_path / "a", target_modules=["q_proj"])
    tuned.merge_and_unload().save_pretrained(tmp_path / "merged")
    image_classifier("ViT", 1).save_pretrained(tmp_path / "plain")
    image_classifier("ViT", 1).save_pretrained(tmp_path / "e", save_original_format=False)
    for number, order in enumerate((("a", "e"), ("e", "a"))):
        experts = {name: tmp_path / name for name in order}
        out = tmp_path / f"out{number}"
        assert merged(tmp_path / "base", out, "--set", "weight=0.5", **experts).code == 0
        start, one, two = (state(tmp_path / name) for name in ("base", "merged", "plain"))
        equal(state(out), {k: v + 0.5 * (one[k] - v) + 0.5 * (two[k] - v) for k, v in start.items()})


@real_file(
    8, family="ViT", option="the doctor on adapters of transformers 5", expected="it reads them",
    before="wrong cause named",
)  # fmt: skip
def test_the_doctor_reads_other_names(tmp_path: Path) -> None:
    image_classifier("ViT").save_pretrained(tmp_path / "base")
    for name, seed in (("a", 1), ("b", 2)):
        adapter(image_classifier("ViT"), tmp_path / name, seed=seed, target_modules=["q_proj"])
    named = [word for name in "ab" for word in ("-e", f"{name}={tmp_path / name}")]
    outcome = cli("doctor", tmp_path / "base", *named)
    assert outcome.code == 0, outcome.said
