"""Stacks of layers in names and configs: which there are, what they are called, and what lies before and after."""

from typing import Any

import pytest

from consilience.experts.layers import comes_first, modules_of


def layers(prefix: str, count: int, *rest: str) -> list[str]:
    return [f"{prefix}.{i}.{name}" for i in range(count) for name in rest or ("mlp.weight",)]


VISION = {"text_config": {"num_hidden_layers": 3}, "vision_config": {"num_hidden_layers": 3}}
STACKS: dict[str, tuple[list[str], dict[str, Any] | None, dict[str, tuple[str, int, tuple[str, ...]]]]] = {
    "llama": (
        layers("model.layers", 3), {"num_hidden_layers": 3}, {"default": ("model.layers.", 3, ("num_hidden_layers",))},
    ),
    "gpt2": (layers("transformer.h", 3), {"n_layer": 3}, {"default": ("transformer.h.", 3, ("n_layer",))}),
    "two keys": (
        layers("h", 2), {"n_layer": 2, "num_hidden_layers": 2, "n_head": 2},
        {"default": ("h.", 2, ("num_hidden_layers", "n_layer"))},
    ),
    "bert": (
        layers("encoder.layer", 2), {"num_hidden_layers": 2},
        {"default": ("encoder.layer.", 2, ("num_hidden_layers",))},
    ),
    "no config": (layers("blocks", 4) + layers("head", 2), None, {"default": ("blocks.", 4, ())}),
    "experts": (
        layers("model.layers", 2, "mlp.experts.0.w", "mlp.experts.1.w"), {"num_hidden_layers": 2, "num_experts": 2},
        {"default": ("model.layers.", 2, ("num_hidden_layers",))},
    ),
    "a list as long as the layers": (
        [*layers("model.layers", 2), *layers("projector", 2)], {"num_hidden_layers": 2},
        {"default": ("model.layers.", 2, ("num_hidden_layers",))},
    ),
    "a gap": ([f"model.layers.{i}.w" for i in (0, 2)], {"num_hidden_layers": 3}, {}),
    "another count": (layers("model.layers", 4), {"num_hidden_layers": 3}, {}),
    "t5": (
        layers("encoder.block", 2, "layer.0.w") + layers("decoder.block", 3, "layer.0.w"),
        {"num_layers": 2, "num_decoder_layers": 3},
        {"encoder": ("encoder.block.", 2, ("num_layers",)), "decoder": ("decoder.block.", 3, ("num_decoder_layers",))},
    ),
    "t5 of equal sides": (
        layers("encoder.block", 2, "layer.0.w") + layers("decoder.block", 2, "layer.0.w"),
        {"num_layers": 2, "num_decoder_layers": 2},
        {"encoder": ("encoder.block.", 2, ("num_layers",)), "decoder": ("decoder.block.", 2, ("num_decoder_layers",))},
    ),
    "bart": (
        layers("model.encoder.layers", 2) + layers("model.decoder.layers", 2),
        {"encoder_layers": 2, "decoder_layers": 2, "num_hidden_layers": 2},
        {
            "encoder": ("model.encoder.layers.", 2, ("encoder_layers", "num_hidden_layers")),
            "decoder": ("model.decoder.layers.", 2, ("decoder_layers",)),
        },
    ),
    "gemma3": (
        layers("language_model.model.layers", 3) + layers("vision_tower.vision_model.encoder.layers", 3), VISION,
        {
            "text_decoder": ("language_model.model.layers.", 3, ("num_hidden_layers",)),
            "vision_tower": ("vision_tower.vision_model.encoder.layers.", 3, ("num_hidden_layers",)),
        },
    ),
    "qwen2-vl": (
        [*layers("model.layers", 3), *layers("visual.blocks", 2), *(f"visual.merger.mlp.{i}.weight" for i in (0, 2))],
        {"num_hidden_layers": 3, "vision_config": {"depth": 2}},
        {
            "text_decoder": ("model.layers.", 3, ("num_hidden_layers",)),
            "vision_tower": ("visual.blocks.", 2, ("depth",)),
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", STACKS)
def test_stacks(case: str) -> None:
    names, config, expected = STACKS[case]
    found = modules_of(names, config).stacks
    assert {module: (stack.prefix, stack.count, stack.keys) for module, stack in found.items()} == expected


def test_tensors_outside_layers_belong_to_the_module_whose_beginning_they_share() -> None:
    prefixes = ("model.language_model.layers", "model.visual.blocks")
    config = {"text_config": {"num_hidden_layers": 3}, "vision_config": {"depth": 2}}
    modules = modules_of(layers(prefixes[0], 3) + layers(prefixes[1], 2), config)
    expected = {
        "model.language_model.embed_tokens.weight": "text_decoder",
        "model.language_model.layers.2.mlp.weight": "text_decoder",
        "lm_head.weight": "text_decoder",
        "model.visual.patch_embed.proj.weight": "vision_tower",
        "model.visual.blocks.1.mlp.weight": "vision_tower",
        "model.visual.merger.norm.weight": "multi_modal_projector",
    }
    assert {name: modules.owner(name) for name in expected} == expected
    assert {modules.names[name] for name in ("language_model", "text_decoder")} == {"text_decoder"}
    assert {modules.names[name] for name in ("visual", "vision_tower", "vision_model")} == {"vision_tower"}


FIRST = (
    "model.embed_tokens.weight", "transformer.wte.weight", "transformer.wpe.weight", "gpt_neox.embed_in.weight",
    "bert.embeddings.LayerNorm.weight", "transformer.word_embeddings_layernorm.weight", "model.tok_embeddings.weight",
    "model.encoder.embed_positions.weight", "transformer.rotary_pos_emb.inv_freq", "vision_tower.ln_pre.weight",
)  # fmt: skip
LAST = (
    "model.norm.weight", "lm_head.weight", "transformer.ln_f.bias", "embed_out.weight", "backbone.norm_f.weight",
    "model.final_layernorm.weight", "cls.predictions.decoder.weight", "bert.pooler.dense.weight", "score.weight",
    "classifier.out_proj.bias", "model.embedding_norm.weight", "transformer.output_layer.weight", "output.weight",
    "lm_head.decoder.weight", "lm_head.layer_norm.weight",
)  # fmt: skip


@pytest.mark.parametrize(
    ("name", "first"),
    [*((name, True) for name in FIRST), *((name, False) for name in LAST), ("model.extra.weight", None)],
)
def test_what_acts_before_layers(name: str, first: bool | None) -> None:
    assert comes_first(name) is first
