"""LoRA semantics: merging an adapter with weight 1 in float32 is what PEFT's ``merge_and_unload`` computes."""

import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import consilience as cs
from consilience.checkpoints.adapter import open_adapter
from consilience.errors import InputError

State = dict[str, torch.Tensor]
TOLERANCE = 1e-6


class Convolutions(torch.nn.Module):
    """Convolutions of one to three dimensions and a linear layer, on no forward pass at all."""

    def __init__(self) -> None:
        super().__init__()
        self.one = torch.nn.Conv1d(4, 6, 3)
        self.two = torch.nn.Conv2d(4, 6, (3, 2))
        self.square = torch.nn.Conv2d(4, 4, 1, bias=False)
        self.three = torch.nn.Conv3d(2, 3, 2)
        self.grouped = torch.nn.Conv2d(4, 8, 3, groups=2)
        self.fc = torch.nn.Linear(6, 5)


def llama(**more: Any) -> torch.nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=24,
        hidden_size=16,
        intermediate_size=20,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
        **more,
    )
    return transformers.LlamaForCausalLM(config)


def gpt2() -> torch.nn.Module:
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=24, n_positions=8, n_embd=16, n_layer=2, n_head=2)
    )


MODELS: dict[str, Callable[[], torch.nn.Module]] = {
    "llama": llama,
    "llama with biases": lambda: llama(attention_bias=True, mlp_bias=True),
    "gpt2": gpt2,
    "convolutions": Convolutions,
}
ATTENTION = ["q_proj", "v_proj"]
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama", {"r": 3, "lora_alpha": 6, "target_modules": ATTENTION}),
    "every linear layer": ("llama", {"r": 4, "lora_alpha": 2, "target_modules": "all-linear"}),
    "a pattern of modules": ("llama", {"r": 2, "target_modules": r".*\.1\.mlp\.(up|down)_proj"}),
    "one layer": (
        "llama",
        {"r": 2, "target_modules": LINEAR, "layers_to_transform": [1], "exclude_modules": ["o_proj"]},
    ),
    "rank-stabilised": ("llama", {"r": 4, "lora_alpha": 8, "use_rslora": True, "target_modules": ATTENTION}),
    "ranks and alphas by pattern": (
        "llama",
        {
            "r": 2,
            "lora_alpha": 4,
            "target_modules": LINEAR,
            "rank_pattern": {"q_proj": 5, r"model.layers.1.mlp.up_proj": 3, r".*\.0\.mlp\..*": 1},
            "alpha_pattern": {"layers.1.self_attn.v_proj": 11, "down_proj": 1},
        },
    ),
    "patterns and rank-stabilised": (
        "llama",
        {
            "r": 2,
            "use_rslora": True,
            "target_modules": LINEAR,
            "rank_pattern": {"k_proj": 7},
            "alpha_pattern": {"k_proj": 3},
        },
    ),
    "all biases": ("llama with biases", {"r": 2, "target_modules": ATTENTION, "bias": "all"}),
    "biases of adapted layers": ("llama with biases", {"r": 2, "target_modules": ATTENTION, "bias": "lora_only"}),
    "a head saved whole": ("llama", {"r": 2, "target_modules": ATTENTION, "modules_to_save": ["lm_head"]}),
    "norms and embeddings saved whole": (
        "llama",
        {"r": 2, "target_modules": ATTENTION, "modules_to_save": ["input_layernorm", "embed_tokens"]},
    ),
    "embeddings": ("llama", {"r": 3, "target_modules": ["embed_tokens", "q_proj"]}),
    "the head": ("llama", {"r": 3, "target_modules": ["lm_head"]}),
    "gaussian": ("llama", {"r": 2, "target_modules": ATTENTION, "init_lora_weights": "gaussian"}),
    "orthogonal": ("llama", {"r": 2, "target_modules": ATTENTION, "init_lora_weights": "orthogonal"}),
    "Conv1D": ("gpt2", {"r": 3, "target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
    "Conv1D, unsaid": ("gpt2", {"r": 2, "target_modules": ["c_attn", "c_proj"]}),
    "Conv1D with biases and positions": (
        "gpt2",
        {"r": 2, "target_modules": ["c_attn", "wpe"], "fan_in_fan_out": True, "bias": "all"},
    ),
    "convolutions": (
        "convolutions",
        {"r": 2, "lora_alpha": 3, "target_modules": ["one", "two", "square", "three", "fc"]},
    ),
    "wide rank": ("llama", {"r": 32, "target_modules": ATTENTION}),
}


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """PEFT speaks through warnings about how it saves; they are not about us."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every model with seeded weights, saved as users have them: folders with a config, or one flat file."""
    root = tmp_path_factory.mktemp("bases")
    for name, make in MODELS.items():
        torch.manual_seed(0)
        model: Any = make()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randn_like(parameter))
        if isinstance(model, transformers.PreTrainedModel):
            model.save_pretrained(root / name)
        else:
            save_file(model.state_dict(), root / f"{name}.safetensors")
    return root


def base_path(bases: Path, name: str) -> Path:
    return bases / f"{name}.safetensors" if name == "convolutions" else bases / name


def fresh(bases: Path, name: str) -> torch.nn.Module:
    """The base as PEFT gets it."""
    if name == "convolutions":
        model = Convolutions()
        model.load_state_dict(load_file(base_path(bases, name)))
        return model
    return transformers.AutoModelForCausalLM.from_pretrained(bases / name)


def train(bases: Path, name: str, config: dict[str, Any], out: Path, seed: int = 1, **saving: Any) -> Path:
    """Save an adapter whose every trainable value is random."""
    model = peft.get_peft_model(fresh(bases, name), peft.LoraConfig(**config))  # pyright: ignore[reportArgumentType]
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn_like(parameter))
    model.save_pretrained(str(out), **saving)
    return out


def merged_by_peft(bases: Path, name: str, adapter: Path) -> State:
    model = peft.PeftModel.from_pretrained(fresh(bases, name), str(adapter))  # pyright: ignore[reportArgumentType]
    return {k: v.clone() for k, v in model.merge_and_unload().state_dict().items()}


def merged_by_us(base: Path, experts: Any, out: Path, **options: Any) -> State:
    target = out / "merged.safetensors" if base.is_file() else out / "merged"
    cs.merge(base, experts, target, **options)
    return load_file(target if base.is_file() else target / "model.safetensors")


def same(found: State, wanted: State) -> None:
    """Equal within the tolerance; a tied head is written once by us and twice by PEFT.

    Adapters on a tied pair are another test's (tests/real_files/test_ties.py): PEFT's merge moves both sides.
    """
    assert found.keys() <= wanted.keys()
    assert wanted.keys() - found.keys() <= {"lm_head.weight"}
    for name, value in found.items():
        assert value.dtype == torch.float32
        scale = max(1.0, float(wanted[name].abs().max()))
        torch.testing.assert_close(value, wanted[name], rtol=0, atol=TOLERANCE * scale)


def changed(found: State, base: Path) -> set[str]:
    old = load_file(base if base.is_file() else base / "model.safetensors")
    return {name for name, value in found.items() if not torch.equal(value, old[name])}


PICKLED = ["plain", "all biases", "embeddings", "Conv1D", "convolutions"]


@pytest.mark.parametrize(
    ("case", "suffix"), [*((case, "safetensors") for case in CONFIGS), *((case, "bin") for case in PICKLED)]
)
def test_merging_is_merge_and_unload(bases: Path, tmp_path: Path, case: str, suffix: str) -> None:
    name, config = CONFIGS[case]
    adapter = train(bases, name, config, tmp_path / "adapter", safe_serialization=suffix == "safetensors")
    assert (adapter / f"adapter_model.{suffix}").is_file()
    found = merged_by_us(base_path(bases, name), [adapter], tmp_path)
    same(found, merged_by_peft(bases, name, adapter))
    opened = open_adapter(adapter)
    assert changed(found, base_path(bases, name)) == opened.pairs.keys() | (opened.whole.keys() & found.keys())


@pytest.mark.parametrize("saved", [True, False])
def test_embeddings_saved_or_not(bases: Path, tmp_path: Path, saved: bool) -> None:
    config = {"r": 2, "target_modules": ["embed_tokens"]}
    adapter = train(bases, "llama", config, tmp_path / "adapter", save_embedding_layers=saved)
    assert bool(open_adapter(adapter).whole) == saved
    same(merged_by_us(bases / "llama", [adapter], tmp_path), merged_by_peft(bases, "llama", adapter))


def test_an_embedding_trained_beside_its_factors_counts(bases: Path, tmp_path: Path) -> None:
    """PEFT loads the saved layer and adds the factors to it; so must we."""
    adapter = train(bases, "llama", {"r": 2, "target_modules": ["embed_tokens"]}, tmp_path / "adapter")
    path = adapter / "adapter_model.safetensors"
    state = load_file(path)
    name = next(key for key in state if key.endswith("base_layer.weight"))
    save_file(state | {name: state[name] + 1}, path)
    wanted = merged_by_peft(bases, "llama", adapter)
    assert not torch.allclose(
        wanted["model.embed_tokens.weight"],
        load_file(bases / "llama/model.safetensors")["model.embed_tokens.weight"] + 0.5,
    )
    same(merged_by_us(bases / "llama", [adapter], tmp_path), wanted)


def test_two_adapters_of_different_ranks_and_targets(bases: Path, tmp_path: Path) -> None:
    """sum w_k B_k A_k, never (sum B)(sum A)."""
    first = train(bases, "llama", {"r": 2, "lora_alpha": 4, "target_modules": LINEAR}, tmp_path / "a", 1)
    second = train(
        bases,
        "llama",
        {"r": 7, "lora_alpha": 1, "target_modules": ATTENTION, "modules_to_save": ["lm_head"]},
        tmp_path / "b",
        2,
    )
    weight = {"a": 0.5, "b": -0.25}
    found = merged_by_us(bases / "llama", {"a": first, "b": second}, tmp_path, weight=weight)
    base = load_file(bases / "llama/model.safetensors")
    alone = {name: merged_by_peft(bases, "llama", path) for name, path in (("a", first), ("b", second))}
    wanted = {k: base[k] + sum(weight[n] * (alone[n][k] - base[k]) for n in weight) for k in base}
    same(found, wanted)


@pytest.mark.parametrize("method", ["linear", "ties", "dare_ties", "slerp"])
def test_an_adapter_is_the_model_it_stands_for(bases: Path, tmp_path: Path, method: str) -> None:
    """Every method gives the same for an adapter, for ``base+adapter`` and for the model PEFT makes of them."""
    adapter = train(bases, "llama", {"r": 3, "target_modules": LINEAR}, tmp_path / "adapter")
    model = peft.PeftModel.from_pretrained(fresh(bases, "llama"), str(adapter))  # pyright: ignore[reportArgumentType]
    model.merge_and_unload().save_pretrained(tmp_path / "full")
    base = bases / "llama"
    forms: list[str] = [str(adapter), f"{base}+{adapter}", str(tmp_path / "full")]
    found = [merged_by_us(base, {"e": form}, tmp_path / str(i), method=method, seed=3) for i, form in enumerate(forms)]
    for other in found[1:]:
        for name, value in found[0].items():
            close = torch.isclose(value, other[name], rtol=0, atol=1e-5 * float(value.abs().max()))
            assert close.float().mean() > (0.99 if method in ("ties", "dare_ties") else 0.9999)  # trims may flip


def test_a_base_with_an_adapter_on_it(bases: Path, tmp_path: Path) -> None:
    """The base may be ``model+adapter`` too: the task vectors start from there."""
    below = train(bases, "llama", {"r": 2, "target_modules": ATTENTION}, tmp_path / "below", 1)
    above = train(bases, "llama", {"r": 3, "target_modules": LINEAR}, tmp_path / "above", 2)
    cs.merge(f"{bases / 'llama'}+{below}", [above], tmp_path / "out")
    found = load_file(tmp_path / "out/model.safetensors")
    base = load_file(bases / "llama/model.safetensors")
    one, two = (merged_by_peft(bases, "llama", path) for path in (below, above))
    same(found, {k: base[k] + (one[k] - base[k]) + (two[k] - base[k]) for k in base})


def test_paths_may_hold_a_plus(bases: Path, tmp_path: Path) -> None:
    adapter = train(bases, "llama", {"r": 2, "target_modules": ATTENTION}, tmp_path / "x+y" / "a+b")
    (tmp_path / "x+y" / "base").symlink_to(bases / "llama")
    found = merged_by_us(bases / "llama", {"e": f"{tmp_path / 'x+y' / 'base'}+{adapter}"}, tmp_path)
    same(found, merged_by_peft(bases, "llama", adapter))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_factors_of_any_float_type(bases: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    adapter = train(bases, "llama", {"r": 2, "target_modules": ATTENTION}, tmp_path / "adapter")
    path = adapter / "adapter_model.safetensors"
    save_file({k: v.to(dtype) for k, v in load_file(path).items()}, path)
    same(merged_by_us(bases / "llama", [adapter], tmp_path), merged_by_peft(bases, "llama", adapter))


def test_a_named_adapter_keeps_its_name_out_of_the_weights(bases: Path, tmp_path: Path) -> None:
    config = peft.LoraConfig(r=2, target_modules=ATTENTION, init_lora_weights=False)
    model = peft.get_peft_model(fresh(bases, "llama"), config, adapter_name="maths")  # pyright: ignore[reportArgumentType]
    model.save_pretrained(str(tmp_path / "saved"))
    adapter = tmp_path / "saved" / "maths"
    same(merged_by_us(bases / "llama", [adapter], tmp_path), merged_by_peft(bases, "llama", adapter))


def test_old_names_of_factors(bases: Path, tmp_path: Path) -> None:
    """Early PEFT wrote the adapter's name into the tensors' names."""
    adapter = train(bases, "llama", {"r": 2, "target_modules": ATTENTION}, tmp_path / "adapter")
    wanted = merged_by_peft(bases, "llama", adapter)
    path = adapter / "adapter_model.safetensors"
    save_file({k.replace(".weight", ".default.weight"): v for k, v in load_file(path).items()}, path)
    same(merged_by_us(bases / "llama", [adapter], tmp_path), wanted)


def test_rank_and_scale_are_read_from_the_config(bases: Path, tmp_path: Path) -> None:
    adapter = train(bases, "llama", CONFIGS["ranks and alphas by pattern"][1], tmp_path / "adapter")
    pairs = open_adapter(adapter).pairs
    assert (
        pairs["model.layers.1.self_attn.q_proj.weight"].rank,
        pairs["model.layers.1.self_attn.q_proj.weight"].scale,
    ) == (5, 4 / 5)
    assert (pairs["model.layers.1.mlp.up_proj.weight"].rank, pairs["model.layers.1.mlp.up_proj.weight"].scale) == (
        3,
        4 / 3,
    )
    assert (pairs["model.layers.0.mlp.gate_proj.weight"].rank, pairs["model.layers.0.mlp.gate_proj.weight"].scale) == (
        1,
        4,
    )
    assert pairs["model.layers.1.self_attn.v_proj.weight"].scale == 11 / 2
    assert pairs["model.layers.0.self_attn.v_proj.weight"].scale == 4 / 2
    assert pairs["model.layers.1.mlp.down_proj.weight"].scale == 1 / 2


def test_an_embedding_is_stored_the_other_way_round(bases: Path, tmp_path: Path) -> None:
    pair = open_adapter(train(bases, "llama", {"r": 3, "target_modules": ["embed_tokens"]}, tmp_path / "a")).pairs
    assert (pair["model.embed_tokens.weight"].transposed, pair["model.embed_tokens.weight"].delta_shape) == (
        True,
        (24, 16),
    )


def test_a_state_dict_in_memory_takes_what_peft_merged(bases: Path, tmp_path: Path) -> None:
    adapter = train(bases, "convolutions", CONFIGS["convolutions"][1], tmp_path / "adapter")
    base, expert = load_file(base_path(bases, "convolutions")), merged_by_peft(bases, "convolutions", adapter)
    found = cs.merge(base, {"e": expert})
    assert isinstance(found, dict)
    same(found, expert)


REFUSED: dict[str, dict[str, Any]] = {
    "DoRA": {"use_dora": True},
    "biases on B": {"lora_bias": True},
    "PiSSA": {"init_lora_weights": "pissa"},
    "OLoRA": {"init_lora_weights": "olora"},
    "layer replication": {"layer_replication": [(0, 2), (0, 1)]},
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_not_a_plain_sum_is_refused(bases: Path, tmp_path: Path, kind: str) -> None:
    adapter = train(bases, "llama", {"r": 2, "target_modules": ATTENTION} | REFUSED[kind], tmp_path / "adapter")
    key = next(iter(REFUSED[kind]))
    with pytest.raises(InputError, match=key):
        merged_by_us(bases / "llama", [adapter], tmp_path)
    assert not (tmp_path / "merged").exists()


def test_a_grouped_convolution_is_refused(bases: Path, tmp_path: Path) -> None:
    adapter = train(bases, "convolutions", {"r": 2, "target_modules": ["grouped"]}, tmp_path / "adapter")
    with pytest.raises(InputError, match="grouped: adapts a grouped convolution; merge it into its base with PEFT"):
        merged_by_us(base_path(bases, "convolutions"), [adapter], tmp_path)


def test_every_key_of_peft_s_config_is_known_or_refused_when_on(bases: Path, tmp_path: Path) -> None:
    """A key this version of PEFT writes by default must not stop a plain adapter; any other that is on must."""
    adapter = train(bases, "llama", {"r": 2, "target_modules": ATTENTION}, tmp_path / "adapter")
    path = adapter / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    open_adapter(adapter)
    path.write_text(json.dumps(config | {"a_key_of_the_future": {"x": 1}}), encoding="utf-8")
    with pytest.raises(InputError, match="a_key_of_the_future"):
        open_adapter(adapter)
    path.write_text(json.dumps(config | {"a_key_of_the_future": None}), encoding="utf-8")
    open_adapter(adapter)


def test_the_update_is_exact_in_float64(bases: Path, tmp_path: Path) -> None:
    """Against numpy, not PEFT: W + alpha/r B A, in double precision."""
    adapter = train(bases, "llama", {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj"]}, tmp_path / "adapter")
    found = merged_by_us(bases / "llama", [adapter], tmp_path, out_dtype="float64")
    base, state = load_file(bases / "llama/model.safetensors"), load_file(adapter / "adapter_model.safetensors")

    def double(tensor: torch.Tensor) -> npt.NDArray[np.float64]:
        return tensor.double().numpy()

    for layer in (0, 1):
        stem = f"model.layers.{layer}.self_attn.q_proj"
        a, b = (double(state[f"base_model.model.{stem}.lora_{side}.weight"]) for side in "AB")
        wanted = double(base[f"{stem}.weight"]) + 5 / 3 * (b @ a)
        np.testing.assert_allclose(found[f"{stem}.weight"].numpy(), wanted, rtol=1e-13, atol=1e-13)
