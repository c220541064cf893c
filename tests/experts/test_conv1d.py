"""The table of Conv1D layers, against transformers' classes."""

import importlib
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers.pytorch_utils import Conv1D

from consilience.experts.conv1d import CONV1D, is_conv1d, model_types

hf: Any = transformers
SMALL: dict[str, Any] = {"n_embd": 32, "n_layer": 1, "n_head": 2, "vocab_size": 64, "n_positions": 32}
CLVP: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 64}


def clvp() -> Any:
    encoder = CLVP | {"intermediate_size": 32, "projection_dim": 32}
    config = hf.ClvpConfig(
        text_config=encoder,
        speech_config=encoder,
        decoder_config=CLVP | {"n_inner": 32, "feature_size": 32},
        projection_dim=32,
    )
    return hf.ClvpModelForConditionalGeneration(config)


def decision_transformer() -> Any:
    config = hf.DecisionTransformerConfig(
        hidden_size=32, n_layer=1, n_head=2, state_dim=3, act_dim=2, add_cross_attention=True
    )
    return hf.DecisionTransformerModel(config)


def encoder_decoder() -> Any:
    bert = hf.BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64
    )
    gpt2 = hf.GPT2Config(add_cross_attention=True, is_decoder=True, bos_token_id=0, eos_token_id=1, **SMALL)
    return hf.EncoderDecoderModel(hf.EncoderDecoderConfig.from_encoder_decoder_configs(bert, gpt2))


MODELS = {
    "gpt2": lambda: hf.GPT2DoubleHeadsModel(hf.GPT2Config(add_cross_attention=True, **SMALL)),
    "openai-gpt": lambda: hf.OpenAIGPTDoubleHeadsModel(hf.OpenAIGPTConfig(**SMALL)),
    "imagegpt": lambda: hf.ImageGPTForCausalImageModeling(hf.ImageGPTConfig(add_cross_attention=True, **SMALL)),
    "decision_transformer": decision_transformer,
    "clvp": clvp,
    "encoder-decoder": encoder_decoder,
    "starcoder2": lambda: hf.Starcoder2ForCausalLM(  # GPT-2's names on Linear layers
        hf.Starcoder2Config(
            vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
            intermediate_size=32,
        )
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", MODELS)
def test_the_table_says_what_the_classes_are(kind: str) -> None:
    model = MODELS[kind]()
    config = model.config.to_dict()
    assert config["model_type"] == kind
    for name, module in model.named_modules():
        if isinstance(module, Conv1D | torch.nn.Linear):
            assert is_conv1d(config, name) is isinstance(module, Conv1D), name


def test_no_other_architecture_has_them() -> None:
    """Every modeling file that imports Conv1D is in the table."""
    assert hf.__file__ is not None
    folder = Path(hf.__file__).parent / "models"
    uses = re.compile(
        r"^from \.\.\.pytorch_utils import .*\bConv1D\b|^from transformers\.pytorch_utils.*\bConv1D\b", re.M
    )
    held = {p.parent.name for p in folder.glob("*/modeling_*.py") if uses.search(p.read_text(encoding="utf-8"))}
    assert held == {kind.replace("openai-gpt", "openai") for kind in CONV1D} - {"clvp_decoder"}


def test_every_model_type_is_known() -> None:
    known = importlib.import_module("transformers.models.auto.configuration_auto").CONFIG_MAPPING_NAMES
    assert set(known) <= model_types()


@pytest.mark.parametrize("config", [None, {}, {"model_type": "my_gpt"}, {"model_type": "gpt2", "auto_map": {}}])
def test_own_code_may_do_anything(config: dict[str, Any] | None) -> None:
    assert is_conv1d(config, "transformer.h.0.attn.c_proj") is None
