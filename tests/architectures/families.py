"""Tiny random models of the architectures that are merged: each function makes one, and what to feed it."""

import importlib
from collections.abc import Callable
from typing import Any

import torch

hf: Any = importlib.import_module("transformers")
Made = tuple[Any, dict[str, Any]]

TEXT: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
ENCODER = {k: v for k, v in TEXT.items() if k not in ("num_key_value_heads", "bos_token_id", "eos_token_id")}
VISION = {k: v for k, v in ENCODER.items() if k not in ("vocab_size", "max_position_embeddings", "pad_token_id")}
SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
IMAGE = 60  # the image token of the multimodal models


def token_inputs() -> dict[str, Any]:
    return {"input_ids": torch.arange(3, 11).reshape(1, 8)}


def image_inputs(size: int) -> dict[str, Any]:
    return {"pixel_values": torch.linspace(0, 1, 3 * size * size).reshape(1, 3, size, size)}


def image_tokens(count: int, before: int = 1) -> torch.Tensor:
    return torch.tensor([[before] + [IMAGE] * count + [2]])


# ----------------------------------------------------------------------------------------------------------------------
# Decoders.


def llama() -> Made:
    return hf.LlamaForCausalLM(hf.LlamaConfig(**TEXT)), token_inputs()


def mistral() -> Made:
    return hf.MistralForCausalLM(hf.MistralConfig(**TEXT, sliding_window=4)), token_inputs()


def qwen2() -> Made:
    return hf.Qwen2ForCausalLM(hf.Qwen2Config(**TEXT, tie_word_embeddings=True)), token_inputs()


def qwen3() -> Made:
    return hf.Qwen3ForCausalLM(hf.Qwen3Config(**TEXT, head_dim=8)), token_inputs()


def gemma2() -> Made:
    return hf.Gemma2ForCausalLM(hf.Gemma2Config(**TEXT, head_dim=8, query_pre_attn_scalar=8)), token_inputs()


def gemma3() -> Made:
    return hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**TEXT, head_dim=8)), token_inputs()


def phi3() -> Made:
    return hf.Phi3ForCausalLM(hf.Phi3Config(**TEXT)), token_inputs()


def gpt2() -> Made:
    config = hf.GPT2Config(vocab_size=64, n_positions=64, n_embd=32, n_layer=2, n_head=4, **SPECIAL)
    return hf.GPT2LMHeadModel(config), token_inputs()


def gpt_neox() -> Made:
    config = {k: v for k, v in TEXT.items() if k != "num_key_value_heads"}
    return hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**config)), token_inputs()


def falcon() -> Made:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_kv_heads": 2}
    config = hf.FalconConfig(vocab_size=64, new_decoder_architecture=True, **sizes, **SPECIAL)
    return hf.FalconForCausalLM(config), token_inputs()


def bloom() -> Made:
    config = hf.BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4, **SPECIAL)
    return hf.BloomForCausalLM(config), token_inputs()


def olmo2() -> Made:
    return hf.Olmo2ForCausalLM(hf.Olmo2Config(**TEXT)), token_inputs()


def cohere() -> Made:
    return hf.CohereForCausalLM(hf.CohereConfig(**TEXT, use_qk_norm=True)), token_inputs()


def granite() -> Made:
    multipliers = {"embedding_multiplier": 2.0, "logits_scaling": 2.0, "residual_multiplier": 0.5}
    return hf.GraniteForCausalLM(hf.GraniteConfig(**TEXT, **multipliers)), token_inputs()


def smollm3() -> Made:
    return hf.SmolLM3ForCausalLM(hf.SmolLM3Config(**TEXT, no_rope_layer_interval=2)), token_inputs()


def glm4() -> Made:
    return hf.Glm4ForCausalLM(hf.Glm4Config(**TEXT, head_dim=8)), token_inputs()


# ----------------------------------------------------------------------------------------------------------------------
# Encoders with decoders.


def t5() -> Made:
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    config = hf.T5Config(vocab_size=64, decoder_start_token_id=0, **sizes)
    return hf.T5ForConditionalGeneration(config), token_inputs() | {"labels": torch.arange(4).reshape(1, 4)}


HALVES = {
    f"{side}_{key}": value
    for side in ("encoder", "decoder")
    for key, value in {"layers": 2, "attention_heads": 4, "ffn_dim": 48}.items()
}


def bart() -> Made:
    config = hf.BartConfig(vocab_size=64, d_model=32, max_position_embeddings=64, **HALVES, **SPECIAL)
    return hf.BartForConditionalGeneration(config), token_inputs() | {"labels": torch.arange(4).reshape(1, 4)}


def whisper() -> Made:
    sizes = {"d_model": 32, "num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 16}
    tokens = {"decoder_start_token_id": 1, "suppress_tokens": None, "begin_suppress_tokens": None}
    config = hf.WhisperConfig(vocab_size=64, **sizes, **HALVES, **SPECIAL, **tokens)
    inputs = {"input_features": torch.linspace(-1, 1, 256).reshape(1, 8, 32), "labels": torch.arange(4).reshape(1, 4)}
    return hf.WhisperForConditionalGeneration(config), inputs


# ----------------------------------------------------------------------------------------------------------------------
# Mixtures of experts.


def mixtral() -> Made:
    return hf.MixtralForCausalLM(hf.MixtralConfig(**TEXT, num_local_experts=3, num_experts_per_tok=2)), token_inputs()


def qwen3_moe() -> Made:
    sizes = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8}
    return hf.Qwen3MoeForCausalLM(hf.Qwen3MoeConfig(**TEXT, **sizes, decoder_sparse_step=1)), token_inputs()


def olmoe() -> Made:
    return hf.OlmoeForCausalLM(hf.OlmoeConfig(**TEXT, num_experts=4, num_experts_per_tok=2)), token_inputs()


def gpt_oss() -> Made:
    config = hf.GptOssConfig(**TEXT, head_dim=8, num_local_experts=4, num_experts_per_tok=2, sliding_window=4)
    return hf.GptOssForCausalLM(config), token_inputs()


LATENT = {"kv_lora_rank": 8, "q_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8}
ROUTED = {
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 16,
    "n_group": 1,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "topk_group": 1,
}


def deepseek_v2() -> Made:
    sizes = TEXT | {"num_key_value_heads": 4} | LATENT | ROUTED
    return hf.DeepseekV2ForCausalLM(hf.DeepseekV2Config(**sizes)), token_inputs()


def deepseek_v3() -> Made:
    sizes = TEXT | {"num_key_value_heads": 4} | LATENT | ROUTED
    return hf.DeepseekV3ForCausalLM(hf.DeepseekV3Config(**sizes)), token_inputs()


# ----------------------------------------------------------------------------------------------------------------------
# State spaces.


def mamba() -> Made:
    config = hf.MambaConfig(vocab_size=64, hidden_size=32, state_size=4, num_hidden_layers=2, **SPECIAL)
    return hf.MambaForCausalLM(config), token_inputs()


def mamba2() -> Made:
    sizes = {"hidden_size": 32, "state_size": 8, "num_hidden_layers": 2, "num_heads": 8, "head_dim": 8, "n_groups": 2}
    return hf.Mamba2ForCausalLM(hf.Mamba2Config(vocab_size=64, **sizes, **SPECIAL, chunk_size=8)), token_inputs()


# ----------------------------------------------------------------------------------------------------------------------
# Encoders of text.


def bert() -> Made:
    return hf.BertForSequenceClassification(hf.BertConfig(**ENCODER)), token_inputs()


def roberta() -> Made:
    return hf.RobertaForMaskedLM(hf.RobertaConfig(**ENCODER, bos_token_id=1, eos_token_id=2)), token_inputs()


def modernbert() -> Made:
    tokens = SPECIAL | {"cls_token_id": 1, "sep_token_id": 2}
    return hf.ModernBertForMaskedLM(hf.ModernBertConfig(**ENCODER | tokens)), token_inputs()


def embedding() -> Made:
    """A bare encoder, as sentence embedders keep it."""
    return hf.BertModel(hf.BertConfig(**ENCODER)), token_inputs()


# ----------------------------------------------------------------------------------------------------------------------
# Vision, and vision with language.


def vit() -> Made:
    config = hf.ViTConfig(**VISION, image_size=16, patch_size=8)
    return hf.ViTForImageClassification(config), image_inputs(16)


def resnet() -> Made:
    config = hf.ResNetConfig(embedding_size=8, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic", num_labels=3)
    return hf.ResNetForImageClassification(config), image_inputs(32)


def convnext() -> Made:
    config = hf.ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, num_labels=3)
    return hf.ConvNextForImageClassification(config), image_inputs(32)


def siglip() -> Made:
    text = {k: v for k, v in ENCODER.items() if k != "pad_token_id"} | SPECIAL
    config = hf.SiglipConfig(text_config=text, vision_config=VISION | {"image_size": 16, "patch_size": 8})
    return hf.SiglipModel(config), token_inputs() | image_inputs(16)


def qwen2_vl() -> Made:
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "mlp_ratio": 2, "patch_size": 4}
    tokens = {"video_token_id": 61, "vision_start_token_id": 62, "vision_end_token_id": 63}
    config = hf.Qwen2VLConfig(
        text_config=TEXT | {"rope_parameters": rope}, vision_config=vision, image_token_id=IMAGE, **tokens
    )
    ids = image_tokens(2, before=62)
    inputs = {
        "input_ids": ids,
        "mm_token_type_ids": (ids == IMAGE).long(),
        "pixel_values": torch.linspace(0, 1, 8 * 96).reshape(8, 96),
        "image_grid_thw": torch.tensor([[1, 4, 2]]),
    }
    return hf.Qwen2VLForConditionalGeneration(config), inputs


def internvl() -> Made:
    vision = VISION | {"image_size": [16, 16], "patch_size": [4, 4]}
    text = hf.Qwen2Config(**TEXT).to_dict()
    config = hf.InternVLConfig(text_config=text, vision_config=vision, image_token_id=IMAGE, downsample_ratio=0.5)
    return hf.InternVLForConditionalGeneration(config), {"input_ids": image_tokens(4)} | image_inputs(16)


def llava() -> Made:
    vision = hf.CLIPVisionConfig(**VISION, image_size=16, patch_size=8, projection_dim=32)
    config = hf.LlavaConfig(vision_config=vision, text_config=hf.LlamaConfig(**TEXT), image_token_id=IMAGE)
    return hf.LlavaForConditionalGeneration(config), {"input_ids": image_tokens(4)} | image_inputs(16)


def gemma3_vl() -> Made:
    vision = VISION | {"image_size": 16, "patch_size": 4}
    config = hf.Gemma3Config(
        text_config=TEXT | {"head_dim": 8}, vision_config=vision, mm_tokens_per_image=4, image_token_id=IMAGE,
        boi_token_index=61, eoi_token_index=62,
    )  # fmt: skip
    ids = image_tokens(4)
    inputs = {"input_ids": ids, "token_type_ids": (ids == IMAGE).long()} | image_inputs(16)
    return hf.Gemma3ForConditionalGeneration(config), inputs


# ----------------------------------------------------------------------------------------------------------------------
# Audio.


def wav2vec2() -> Made:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    convolutions = {"conv_dim": [16, 16], "conv_kernel": [5, 3], "conv_stride": [3, 2], "num_feat_extract_layers": 2}
    positions = {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
    config = hf.Wav2Vec2Config(vocab_size=32, **sizes, **convolutions, **positions, **SPECIAL)
    return hf.Wav2Vec2ForCTC(config), {"input_values": torch.linspace(-1, 1, 128).sin().reshape(1, 128)}


DECODERS = (
    llama, mistral, qwen2, qwen3, gemma2, gemma3, phi3, gpt2, gpt_neox, falcon, bloom, olmo2, cohere, granite, smollm3,
    glm4,
)  # fmt: skip
BOTH = (t5, bart, whisper)
MIXTURES = (mixtral, qwen3_moe, olmoe, gpt_oss, deepseek_v2, deepseek_v3)
STATE_SPACES = (mamba, mamba2)
ENCODERS = (bert, roberta, modernbert, embedding)
IMAGES = (vit, resnet, convnext, siglip)
IMAGES_AND_TEXT = (qwen2_vl, internvl, llava, gemma3_vl)
AUDIO = (wav2vec2,)
FAMILIES: tuple[Callable[[], Made], ...] = (
    *DECODERS, *BOTH, *MIXTURES, *STATE_SPACES, *ENCODERS, *IMAGES, *IMAGES_AND_TEXT, *AUDIO,
)  # fmt: skip
#: Families whose models generate.
GENERATING = {*DECODERS, *BOTH, *MIXTURES, *STATE_SPACES, *IMAGES_AND_TEXT}
