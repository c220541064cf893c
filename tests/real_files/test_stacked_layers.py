"""Slices of models as transformers writes them, against the same layers put together as modules."""

import json
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.real_files.support import IDS, cli, hf, logits, refused, state, tiny

#: family -> (head's class, the layers, what follows them).
FAMILIES: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "Llama": ("ForCausalLM", "model.layers", ("model.norm", "lm_head")),
    "GPT2": ("LMHeadModel", "transformer.h", ("transformer.ln_f", "lm_head")),
    "GPTNeoX": ("ForCausalLM", "gpt_neox.layers", ("gpt_neox.final_layer_norm", "lm_head")),
    "Gemma2": ("ForCausalLM", "model.layers", ("model.norm", "lm_head")),
    "Mixtral": ("ForCausalLM", "model.layers", ("model.norm", "lm_head")),
    "Bert": ("ForMaskedLM", "bert.encoder.layer", ("cls",)),
}
MORE: dict[str, dict[str, Any]] = {
    "Mixtral": {"num_local_experts": 3, "num_experts_per_tok": 2},
    "Gemma2": {"head_dim": 8, "sliding_window": 3},
}
PIECES = (("a", 0, 2), ("b", 1, 4), ("b", 1, 3))


def write(family: str, folder: Path) -> dict[str, Any]:
    """Write models of 3 and 4 layers and return them."""
    head = FAMILIES[family][0]
    models: dict[str, Any] = {}
    for seed, (name, layers) in enumerate((("a", 3), ("b", 4)), 1):
        models[name] = tiny(family, head, seed=seed, num_hidden_layers=layers, **MORE.get(family, {}))
        with torch.no_grad():
            for parameter in models[name].parameters():  # norms of ones and biases of zeros would hide whose they are
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)))
        models[name].save_pretrained(folder / name)
    return models


def stacked(family: str, models: dict[str, Any]) -> Any:
    """Return the same layers put together as modules: ``a`` with layers, and what follows them, of ``b``."""
    _, layers, after = FAMILIES[family]
    found, last = models["a"], models["b"]
    taken = [(models[name], i) for name, first, stop in PIECES for i in range(first, stop)]
    modules = [attrgetter(layers)(model)[i] for model, i in taken]
    if hasattr(found.config, "layer_types"):
        found.config.layer_types = [model.config.layer_types[i] for model, i in taken]
    found.config.num_hidden_layers = len(taken)
    holder, _, name = layers.rpartition(".")
    setattr(attrgetter(holder)(found), name, torch.nn.ModuleList(modules))
    for place in after:
        holder, _, name = place.rpartition(".")
        setattr(attrgetter(holder)(found) if holder else found, name, attrgetter(place)(last))
    return found


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", FAMILIES)
def test_stacked_layers_compute_what_the_modules_do(family: str, tmp_path: Path) -> None:
    models = write(family, tmp_path)
    lines = [
        f"  - sources: [{{model: {tmp_path / name}, layer_range: [{first}, {stop}]}}]" for name, first, stop in PIECES
    ]
    (tmp_path / "recipe.yaml").write_text("\n".join(["merge_method: passthrough", "slices:", *lines, ""]))
    outcome = cli("merge", tmp_path / "recipe.yaml", tmp_path / "out", "--check-load")
    assert outcome.code == 0, outcome.said
    head = FAMILIES[family][0]
    loaded = getattr(hf, f"{family}{head}").from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    assert loaded.config.num_hidden_layers == 7
    expected = stacked(family, models)
    with torch.no_grad():
        difference = (loaded(IDS, use_cache=False).logits - expected(IDS, use_cache=False).logits).abs().max()
    assert difference < 1e-5
    assert (logits(models["b"]) - loaded(IDS).logits).abs().max() > 0.01


@pytest.mark.filterwarnings("ignore")
def test_encoder_and_decoder_are_modules(tmp_path: Path) -> None:
    sizes = {"num_layers": 2, "num_decoder_layers": 3, "d_kv": 8, "d_ff": 24}
    for seed, name in enumerate("ab", 1):
        tiny("T5", "ForConditionalGeneration", seed=seed, **sizes).save_pretrained(tmp_path / name)
    a, b = tmp_path / "a", tmp_path / "b"
    text = f"""
merge_method: linear
modules:
  encoder:
    slices:
      - sources: [{{model: {a}, layer_range: [0, 2]}}]
      - sources: [{{model: {b}, layer_range: [1, 2]}}]  # layer 0 alone holds the biases by position
  decoder:
    models: [{{model: {a}}}, {{model: {b}}}]
"""
    (tmp_path / "recipe.yaml").write_text(text)
    outcome = cli("merge", tmp_path / "recipe.yaml", tmp_path / "out", "--check-load")
    assert outcome.code == 0, outcome.said
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["num_layers"], config["num_decoder_layers"]) == (3, 3)
    ours, one, other = state(tmp_path / "out"), state(a), state(b)
    name = "encoder.block.{}.layer.1.DenseReluDense.wi.weight"
    assert torch.equal(ours[name.format(1)], one[name.format(1)])
    assert torch.equal(ours[name.format(2)], other[name.format(1)])
    assert torch.equal(ours["encoder.final_layer_norm.weight"], other["encoder.final_layer_norm.weight"])
    assert torch.equal(ours["shared.weight"], one["shared.weight"])
    name = "decoder.block.2.layer.2.DenseReluDense.wo.weight"
    torch.testing.assert_close(ours[name], (one[name] + other[name]) / 2)


@pytest.mark.filterwarnings("ignore")
def test_slices_of_an_encoder_and_decoder_ask_for_modules(tmp_path: Path) -> None:
    tiny("T5", "ForConditionalGeneration", d_kv=8, d_ff=24).save_pretrained(tmp_path / "a")
    text = f"merge_method: passthrough\nslices: [{{sources: [{{model: {tmp_path / 'a'}, layer_range: [0, 1]}}]}}]\n"
    (tmp_path / "recipe.yaml").write_text(text)
    refused(cli("merge", tmp_path / "recipe.yaml", tmp_path / "out"), "slices", "encoder", "decoder", "modules")
