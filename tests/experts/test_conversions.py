"""The table of transformers' renamings is the installed library's, and does what the library does with it."""

import importlib
from typing import Any

import pytest

from consilience.experts.conversions import rules_for
from tools.conversions import PATH, render, table

hf: Any = importlib.import_module("transformers")


def test_the_table_is_the_installed_library_s() -> None:
    assert PATH.read_text(encoding="utf-8") == render(table()), "python -m tools.conversions rewrites it"


@pytest.mark.parametrize("family", ["ViT", "Dinov2", "Swin", "Segformer"])
def test_renamings_are_those_of_the_library(family: str) -> None:
    """Stored and loaded names alike become the loaded ones, by one of the sets that the config asks for."""
    loading: Any = importlib.import_module("transformers.core_model_loading")
    mapping: Any = importlib.import_module("transformers.conversion_mapping")
    small = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    config = getattr(hf, f"{family}Config")(**small if family in ("ViT", "Dinov2") else {})
    with importlib.import_module("torch").device("meta"):
        model = getattr(hf, f"{family}Model")(config)
    transforms = mapping.get_model_conversion_mapping(model)
    loaded = list(model.state_dict())
    stored = list(loading.revert_weight_conversion(model, dict(model.state_dict())))
    assert stored != loaded
    renamings = [transform for transform in transforms if not hasattr(transform, "operations")]
    wanted = [loading.apply_renamings(name, renamings) for name in (*stored, *loaded)]
    assert set(wanted) == set(loaded)
    assert wanted in [[rules(name) for name in (*stored, *loaded)] for rules in rules_for(config.to_dict())]


def test_a_change_of_form_is_named() -> None:
    rules = rules_for({"model_type": "mixtral"})[0]
    assert "gate_up_proj" in str(rules.converted("model.layers.0.block_sparse_moe.experts.7.w1.weight"))
    assert rules.converted("model.layers.0.mlp.experts.gate_up_proj") is not None
    assert rules.converted("model.layers.0.self_attn.q_proj.weight") is None
