"""What watching a routed model shows is what runs: bfloat16, top 2, adapters that PEFT wrote."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from consilience.routing import load_routed
from tests.learned.tiny_experts import WORDS, write_tokenizer
from tests.real_files.support import adapter, cli, real_file, tiny

Change = Callable[[int], dict[str, Any]]
#: 96 words, and wide enough for the kernels' roundings to differ from torch's.
WIDE: dict[str, Any] = {"vocab_size": len(WORDS) + 3, "hidden_size": 64, "intermediate_size": 96, "eos_token_id": 1}


def routed(tmp_path: Path, family: str, config: Change, local: str = "arrow", **settings: Any) -> Any:
    """Build a routed model of five PEFT adapters on a tiny bfloat16 base, by the command line, and load it."""
    model = tiny(family, **WIDE, tie_word_embeddings=False).bfloat16()
    model.save_pretrained(tmp_path / "base")
    write_tokenizer(tmp_path / "base")
    for k in range(5):
        adapter(tiny(family, **WIDE, tie_word_embeddings=False), tmp_path / f"x{k}", seed=k, **config(k))
    recipe = {
        "base_model": "base", "models": [{"model": f"x{k}"} for k in range(5)],
        "routing": {"local": local, "top_k": 2, **settings},
    }  # fmt: skip
    (tmp_path / "routed.yaml").write_text(yaml.safe_dump(recipe))
    assert (built := cli("route", "build", tmp_path / "routed.yaml", tmp_path / "routed")).code == 0, built.said
    return load_routed(tmp_path / "routed", base=str(tmp_path / "base"), dtype="bfloat16")


def passes(model: Any, tokens: int) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Return logits of a plain pass and of a watched one, and the weights [tokens, K] that the watcher saw."""
    ids = torch.arange(3, 3 + tokens)[None]
    seen: dict[str, torch.Tensor] = {}
    with torch.no_grad():
        plain = model(ids).logits
        with model.routing.watched(lambda name, weights: seen.__setitem__(name, weights[0])):
            watched = model(ids).logits
    return plain, watched, seen


@pytest.mark.parametrize("tokens", [1, 3, 40])
@real_file(12, family="Llama, PEFT ranks 1 to 9", option="route, bfloat16, top 2, watched", expected="a formula",
           before="wrong numbers")  # fmt: skip
def test_weights_that_are_watched_are_those_that_ran(tmp_path: Path, tokens: int) -> None:
    model = routed(tmp_path, "Llama", lambda k: {"r": 2 * k + 1, "target_modules": ["q_proj", "down_proj"]})
    inputs: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def listening(name: str) -> Callable[..., None]:
        def hook(_: Any, args: Any, out: torch.Tensor) -> None:
            inputs[name] = (args[0][0].clone(), out[0].clone())

        return hook

    for name, module in model.named_modules():
        if hasattr(module, "experts"):
            module.register_forward_hook(listening(name))
    plain, watched, seen = passes(model, tokens)
    assert torch.equal(plain, watched)
    factors = [load_file(tmp_path / f"x{k}" / "adapter_model.safetensors") for k in range(5)]
    for name, (u, y) in inputs.items():
        weights, stem = seen[name], f"base_model.model.{name}"
        assert ((weights > 0).sum(-1) == 2).all()
        linear = model.get_submodule(name).weight
        added = torch.zeros_like(y, dtype=torch.float64)
        for k, own in enumerate(factors):
            a, b = (own[f"{stem}.lora_{side}.weight"].bfloat16().double() for side in "AB")
            added += weights[:, [k]] * (8 / (2 * k + 1)) * (u.double() @ a.T @ b.T)
        effect = y.double() - torch.nn.functional.linear(u, linear).double()
        assert (effect - added).norm() < 0.02 * added.norm()


@real_file(12, family="Qwen2, PEFT", option="route, bfloat16, top 2 of some, a layer untouched by one, watched",
           expected="the plain pass", before="wrong numbers")  # fmt: skip
def test_watching_changes_nothing_where_experts_leave_modules_alone(tmp_path: Path) -> None:
    targets = (["q_proj"], ["q_proj", "v_proj"], ["v_proj", "up_proj"], ["up_proj"], ["q_proj", "up_proj"])
    model = routed(tmp_path, "Qwen2", lambda k: {"target_modules": targets[k]}, temperature=0.1)
    for tokens in (1, 2, 24):
        plain, watched, seen = passes(model, tokens)
        assert torch.equal(plain, watched)
        assert len(seen) == 2 * 3


@real_file(12, family="Mistral, PEFT rsLoRA", option="route generate, bfloat16, top 2, watched",
           expected="the plain answer", before="wrong numbers")  # fmt: skip
def test_a_generation_that_is_watched_is_the_one_that_is_not(tmp_path: Path) -> None:
    model = routed(tmp_path, "Mistral", lambda k: {"use_rslora": True, "target_modules": ["o_proj", "gate_proj"]})
    options: dict[str, Any] = {
        "max_new_tokens": 8, "do_sample": False, "output_scores": True, "return_dict_in_generate": True,
    }  # fmt: skip
    ids = torch.arange(3, 9)[None]
    plain = model.generate(ids, **options)
    with model.routing.watched(lambda name, weights: None):
        watched = model.generate(ids, **options)
    assert torch.equal(plain.sequences, watched.sequences)
    assert all(torch.equal(one, other) for one, other in zip(plain.scores, watched.scores, strict=True))
