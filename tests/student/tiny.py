"""Tiny random models with tokenizers and processors on disk: a base, and experts that differ from it everywhere."""

import importlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from tests.tasks.tiny_models import CHAT, make_tokenizer

hf: Any = importlib.import_module("transformers")

TEXT: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
#: Vision towers that are wider than the language models: whoever looks for the largest list of blocks finds them.
VISION: dict[str, Any] = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32, "intermediate_size": 64}
IMAGE_CHAT = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for part in m['content'] %}"
    "{% if part['type'] == 'image' %}{{ 'PLACE' }}{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def _tokenizer(**special: str) -> Any:
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=make_tokenizer().backend_tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens={"turn_token": "<|im_start|>", **special},
    )


def _without_video(kind: Any) -> Any:
    parts = [part for part in kind.get_attributes() if part != "video_processor"]
    return type(kind.__name__, (kind,), {"get_attributes": classmethod(lambda cls: list(parts))})


def _pil(module: str, name: str) -> Any:
    return getattr(importlib.import_module(f"transformers.models.{module}.image_processing_pil_{module}"), name)


def qwen2_vl() -> tuple[Any, Any]:
    marks = {"vision_start": "<|vision_start|>", "vision_end": "<|vision_end|>"}
    tokenizer = _tokenizer(image_token="<|image_pad|>", video_token="<|video_pad|>", **marks)
    ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in marks.items()}
    rope = {"rope_type": "default", "mrope_section": [1, 1, 0], "rope_theta": 1e4}
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 16, "num_heads": 4, "mlp_ratio": 2, "patch_size": 4}
    config = hf.Qwen2VLConfig(
        text_config=TEXT | {"rope_parameters": rope},
        vision_config=vision,
        image_token_id=tokenizer.image_token_id,
        video_token_id=tokenizer.video_token_id,
        vision_start_token_id=ids["vision_start"],
        vision_end_token_id=ids["vision_end"],
        tie_word_embeddings=False,
    )
    images = _pil("qwen2_vl", "Qwen2VLImageProcessorPil")(patch_size=4, min_pixels=64, max_pixels=256)
    chat = IMAGE_CHAT.replace("PLACE", "<|vision_start|><|image_pad|><|vision_end|>")
    processor = _without_video(hf.Qwen2VLProcessor)(images, tokenizer, chat_template=chat)
    return hf.Qwen2VLForConditionalGeneration(config), processor


def qwen2_vl_tied() -> tuple[Any, Any]:
    model, processor = qwen2_vl()
    model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = True
    return type(model)(model.config), processor


def internvl() -> tuple[Any, Any]:
    marks = {"start_image_token": "<img>", "end_image_token": "</img>"}
    tokenizer = _tokenizer(context_image_token="<IMG_CONTEXT>", video_token="<video>", **marks)
    config = hf.InternVLConfig(
        text_config=hf.Qwen2Config(**TEXT).to_dict(),
        vision_config=VISION | {"image_size": [8, 8], "patch_size": [2, 2]},
        image_token_id=tokenizer.context_image_token_id,
        downsample_ratio=0.5,
        tie_word_embeddings=False,
    )
    size = {"height": 8, "width": 8}
    images = _pil("got_ocr2", "GotOcr2ImageProcessorPil")(size=size, crop_to_patches=False, max_patches=2)
    processor = _without_video(hf.InternVLProcessor)(
        images, tokenizer, image_seq_length=4, chat_template=IMAGE_CHAT.replace("PLACE", "<IMG_CONTEXT>\n")
    )
    return hf.InternVLForConditionalGeneration(config), processor


def llava() -> tuple[Any, Any]:
    tokenizer = _tokenizer(image_token="<image>")
    vision = VISION | {"model_type": "clip_vision_model", "image_size": 8, "patch_size": 4}
    config = hf.LlavaConfig(
        text_config=hf.LlamaConfig(**TEXT | {"hidden_size": 32, "num_key_value_heads": 4}).to_dict(),
        vision_config=vision,
        image_token_index=tokenizer.image_token_id,
        vision_feature_layer=-1,
        tie_word_embeddings=False,
    )
    size = {"height": 8, "width": 8}
    images = _pil("clip", "CLIPImageProcessorPil")(size={"shortest_edge": 8}, crop_size=size)
    processor = hf.LlavaProcessor(
        images, tokenizer, patch_size=4, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )
    return hf.LlavaForConditionalGeneration(config), processor


def _text(kind: Any, config: Any) -> tuple[Any, Any]:
    tokenizer = make_tokenizer(CHAT)
    return kind(config), tokenizer


def llama() -> tuple[Any, Any]:
    return _text(hf.LlamaForCausalLM, hf.LlamaConfig(**TEXT))


def llama_tied() -> tuple[Any, Any]:
    return _text(hf.LlamaForCausalLM, hf.LlamaConfig(**TEXT | {"tie_word_embeddings": True}))


def gpt2() -> tuple[Any, Any]:
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 256, "bos_token_id": 3, "eos_token_id": 2}
    return _text(hf.GPT2LMHeadModel, hf.GPT2Config(vocab_size=320, **sizes))


def t5() -> tuple[Any, Any]:
    sizes = {"d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 3, "num_decoder_layers": 2, "num_heads": 4}
    config = hf.T5Config(vocab_size=320, decoder_start_token_id=0, pad_token_id=0, eos_token_id=2, **sizes)
    return _text(hf.T5ForConditionalGeneration, config)


def gemma2() -> tuple[Any, Any]:
    # A window that padding alone can fill is NaN in float64 (transformers takes its softmax in float32).
    caps = {"final_logit_softcapping": 5.0, "attn_logit_softcapping": 5.0, "sliding_window": 32, "head_dim": 4}
    return _text(hf.Gemma2ForCausalLM, hf.Gemma2Config(**TEXT | caps | {"tie_word_embeddings": True}))


def gemma3() -> tuple[Any, Any]:
    return _text(hf.Gemma3ForCausalLM, hf.Gemma3TextConfig(**TEXT | {"head_dim": 4, "tie_word_embeddings": True}))


def mamba() -> tuple[Any, Any]:
    config = hf.MambaConfig(vocab_size=320, hidden_size=16, state_size=4, num_hidden_layers=2)
    return _text(hf.MambaForCausalLM, config)


def mixtral() -> tuple[Any, Any]:
    return _text(hf.MixtralForCausalLM, hf.MixtralConfig(**TEXT, num_local_experts=2, num_experts_per_tok=1))


def qwen2_moe() -> tuple[Any, Any]:
    sizes = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 8}
    more = {"shared_expert_intermediate_size": 8}
    return _text(hf.Qwen2MoeForCausalLM, hf.Qwen2MoeConfig(**TEXT | sizes | more))


Make = Callable[[], tuple[Any, Any]]


def _shake(model: Any, seed: int, size: float, changed: Callable[[str], bool]) -> None:
    generator = torch.Generator().manual_seed(seed)
    done: set[int] = set()
    with torch.no_grad():
        for name, value in model.named_parameters():
            if changed(name) and id(value) not in done:
                value += torch.randn(value.shape, generator=generator) * size
                done.add(id(value))


def save_family(
    folder: Path,
    make: Make,
    experts: Sequence[str] = ("math", "code"),
    *,
    dtype: torch.dtype = torch.float32,
    size: float = 0.05,
    changed: Callable[[str], bool] = lambda name: True,
) -> Path:
    """Write FOLDER/base and FOLDER/EXPERT, whose every (changed) weight differs from the base's; return FOLDER."""
    hf.utils.logging.disable_progress_bar()
    hf.utils.logging.set_verbosity_error()
    torch.manual_seed(0)
    model, reader = make()
    _shake(model, 1, 0.2, lambda name: name.endswith("weight") and "norm" not in name)
    _shake(model, 2, 0.05, lambda name: True)  # biases, norms and other parameters: neither zeros nor ones
    for seed, name in enumerate(("base", *experts)):
        held = {key: value.clone() for key, value in model.state_dict().items()}
        if name != "base":
            _shake(model, 3 + seed, size, changed)
        # The weights are float32 values whatever they are stored as.
        model.to(dtype).save_pretrained(folder / name)
        model.float().load_state_dict(held)
        reader.save_pretrained(folder / name)
    return folder


def write_image(path: Path, colour: tuple[int, int, int], size: tuple[int, int] = (16, 12)) -> None:
    """Write a picture of one colour with a dark corner."""
    from PIL import Image

    image = Image.new("RGB", size, colour)
    image.paste((0, 0, 0), (0, 0, size[0] // 2, size[1] // 2))
    image.save(path)


def write_rows(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
