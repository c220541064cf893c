"""Nothing is ignored or assumed without a word: settings, defaults, and results that are the base."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import save_file

import consilience as cs
from tests.real_files.support import Outcome, State, adapter, cli, merged, moved, peft, real_file, refused, state, tiny

Q = "model.layers.0.self_attn.q_proj.weight"


def models(folder: Path, family: str = "Llama", *, experts: int = 1, **config: Any) -> tuple[State, list[State]]:
    """Save ``base`` and ``a``, ``b``, ... (all weights moved) in a folder; return their tensors."""
    tiny(family, tie_word_embeddings=False, **config).save_pretrained(folder / "base")
    names = "abc"[:experts]
    for number, name in enumerate(names):
        moved(tiny(family, tie_word_embeddings=False, **config), 7 + number).save_pretrained(folder / name)
    return state(folder / "base"), [state(folder / name) for name in names]


def recipe(folder: Path, **keys: Any) -> Path:
    """Write a recipe of the base and ``a`` (or what ``models`` says) and return its path."""
    value = {"base_model": "base", "models": [{"model": "a"}]} | keys
    (folder / "r.yaml").write_text(yaml.safe_dump(value), encoding="utf-8")
    return folder / "r.yaml"


def share(out: State, base: State, expert: State, name: str) -> float:
    """Return the least-squares weight of an expert's task vector in an output."""
    tau = expert[name] - base[name]
    return float(((out[name] - base[name]) * tau).sum() / (tau * tau).sum())


def said(outcome: Outcome, *words: str) -> None:
    """Assert that a command ended well and said all of these words, in one line, outside its error output."""
    assert outcome.code == 0, outcome.said
    assert any(all(word in line for word in words) for line in outcome.out.splitlines()), outcome.out


def resolved(folder: Path) -> dict[str, Any]:
    """Return the recipe that stands in an output."""
    return yaml.safe_load((folder / "consilience" / "recipe.yaml").read_text(encoding="utf-8"))


# ----------------------------------------------------------------------------------------------------------------------
# Gradients and defaults.

MERGEKIT = "mergekit 0.1.5"
TOLD = "error or one line"


@real_file(10, family="Llama", option="gradient, one layer", expected=MERGEKIT, before="wrong numbers")
def test_the_only_layer_takes_a_gradients_last_value(tmp_path: Path) -> None:
    base, (a,) = models(tmp_path, num_hidden_layers=1)
    path = recipe(
        tmp_path, merge_method="task_arithmetic", models=[{"model": "a", "parameters": {"weight": [0.25, 1]}}]
    )
    assert cli("merge", path, tmp_path / "out", "-q").code == 0
    out = state(tmp_path / "out")
    assert share(out, base, a, Q) == pytest.approx(1.0, abs=1e-4)
    assert share(out, base, a, "lm_head.weight") == pytest.approx(0.25, abs=1e-4)


@real_file(10, family="GPT2", option="gradient of slerp's t, one layer", expected=MERGEKIT, before="wrong numbers")
def test_the_only_layer_of_gpt2_takes_a_gradients_last_value(tmp_path: Path) -> None:
    for name, seed in (("base", None), ("a", 7)):
        model = tiny("GPT2", "LMHeadModel", num_hidden_layers=1)
        (moved(model, seed) if seed else model).save_pretrained(tmp_path / name)
    path = recipe(tmp_path, merge_method="slerp", parameters={"t": [0, 1]})
    assert cli("merge", path, tmp_path / "out", "-q").code == 0
    out, base, a = (state(tmp_path / name) for name in ("out", "base", "a"))
    torch.testing.assert_close(out["transformer.h.0.mlp.c_fc.weight"], a["transformer.h.0.mlp.c_fc.weight"])
    torch.testing.assert_close(out["transformer.wpe.weight"], base["transformer.wpe.weight"])


def trimmed(tau: torch.Tensor, density: float) -> torch.Tensor:
    """Keep the largest entries of a task vector."""
    kept = int(density * tau.numel())
    threshold = tau.abs().flatten().sort(descending=True).values[kept - 1]
    return torch.where(tau.abs() >= threshold, tau, 0.0)


def ties(base: State, experts: list[State], name: str, density: float) -> torch.Tensor:
    """TIES of one tensor by its formula."""
    stack = torch.stack([trimmed(expert[name] - base[name], density) for expert in experts])
    sign = torch.where(stack.sum(0) >= 0, 1.0, -1.0)
    agree = (stack.sign() == sign) & (stack != 0)
    return base[name] + (stack * agree).sum(0) / agree.sum(0).clamp(min=1)


@real_file(10, family="Llama", option="merge_method: ties, no density", expected="formula", before="wrong numbers")
def test_a_mergekit_recipe_takes_mergekits_density(tmp_path: Path) -> None:
    base, experts = models(tmp_path, experts=2)
    entries = [{"model": "a"}, {"model": "b"}]
    assert cli("merge", recipe(tmp_path, merge_method="ties", models=entries), tmp_path / "theirs", "-q").code == 0
    assert cli("merge", recipe(tmp_path, method="ties", models=entries), tmp_path / "ours", "-q").code == 0
    for folder, density in (("theirs", 1.0), ("ours", 0.2)):
        expected = ties(base, experts, Q, density)
        torch.testing.assert_close(state(tmp_path / folder)[Q], expected, atol=1e-6, rtol=1e-5)
        assert resolved(tmp_path / folder)["parameters"]["density"] == density
        document = json.loads((tmp_path / folder / "consilience" / "lineage.json").read_text(encoding="utf-8"))
        assert document["defaults"]["density"] == density
        assert document["recipe"] == resolved(tmp_path / folder)
    shutil.copy(tmp_path / "ours" / "consilience" / "recipe.yaml", tmp_path / "r.yaml")
    again = cli("merge", tmp_path / "r.yaml", tmp_path / "again", "-q")
    assert again.code == 0, again.said
    torch.testing.assert_close(state(tmp_path / "again")[Q], state(tmp_path / "ours")[Q], atol=0, rtol=0)


@real_file(10, family="Llama", option="merge_method: ties, filter", expected="formula", before="wrong numbers")
def test_what_filters_leave_takes_mergekits_density(tmp_path: Path) -> None:
    base, experts = models(tmp_path, experts=2)
    density = [{"filter": "q_proj", "value": 0.5}]
    path = recipe(
        tmp_path, merge_method="ties", models=[{"model": "a"}, {"model": "b"}], parameters={"density": density}
    )
    assert cli("merge", path, tmp_path / "out", "-q").code == 0
    up = "model.layers.1.mlp.up_proj.weight"
    for name, kept in ((Q, 0.5), (up, 1.0)):
        torch.testing.assert_close(state(tmp_path / "out")[name], ties(base, experts, name, kept), atol=1e-6, rtol=1e-5)
    assert resolved(tmp_path / "out")["parameters"]["density"] == [*density, {"value": 1.0}]


@real_file(10, family="Llama", option="merge_method: dare_linear", expected="formula", before="wrong numbers")
@pytest.mark.parametrize("rescale", [None, True])
def test_a_mergekit_recipe_takes_mergekits_rescaling(tmp_path: Path, rescale: bool | None) -> None:
    base, (a,) = models(tmp_path)
    more = {} if rescale is None else {"rescale": rescale}
    path = recipe(tmp_path, merge_method="dare_linear", parameters={"density": 0.5, "weight": 1.0} | more)
    assert cli("merge", path, tmp_path / "out", "-q").code == 0
    for name in (Q, "lm_head.weight"):  # mergekit's factor restores the L1 norm of the tensor
        expected = (a[name] - base[name]).abs().sum()
        torch.testing.assert_close(
            (state(tmp_path / "out")[name] - base[name]).abs().sum(), expected, atol=0, rtol=1e-4
        )


@real_file(10, family="Llama", option="--method, Python", expected="formula", before="right")
def test_the_command_line_and_python_take_our_defaults(tmp_path: Path) -> None:
    base, experts = models(tmp_path, experts=2)
    words = ["-e", f"a={tmp_path}/a", "-e", f"b={tmp_path}/b", "--method", "ties", "-q"]
    assert cli("merge", tmp_path / "base", tmp_path / "out", *words).code == 0
    cs.merge(tmp_path / "base", [tmp_path / "a", tmp_path / "b"], tmp_path / "python", method="ties")
    for folder in ("out", "python"):
        torch.testing.assert_close(state(tmp_path / folder)[Q], ties(base, experts, Q, 0.2), atol=1e-6, rtol=1e-5)


# ----------------------------------------------------------------------------------------------------------------------
# Settings without effect.


@real_file(
    10, family="Llama", option="--seed 0, recipe", expected=TOLD, before="silent loss", now="refused, true cause"
)
def test_a_seed_beside_a_recipe(tmp_path: Path) -> None:
    models(tmp_path)
    path = recipe(tmp_path, method="dare_linear", seed=0, parameters={"density": 0.5})
    refused(cli("merge", path, tmp_path / "out", "--seed", "0"), "--seed", "r.yaml")
    assert not (tmp_path / "out").exists()


FILTERS = [
    [{"value": 0.3}, {"filter": "mlp", "value": 0.9}],
    [{"filter": "mlp", "value": 0.3}, {"filter": "mlp", "value": 0.9}, {"value": 1.0}],
    [{"filter": "self_attn", "value": 0.3}, {"filter": "re:layers.*q_proj", "value": 0.9}],
]


@real_file(10, family="Llama", option="filter behind a wider one", expected=TOLD, before="silent loss", now="warned")
@pytest.mark.parametrize("weight", FILTERS)
def test_a_filter_that_never_counts(tmp_path: Path, weight: Any) -> None:
    models(tmp_path)
    path = recipe(tmp_path, method="task_arithmetic", models=[{"model": "a", "parameters": {"weight": weight}}])
    said(cli("check", path), "models.0.parameters.weight", "has no effect", repr(weight[1]["filter"]))
    said(cli("merge", path, tmp_path / "out"), "has no effect", repr(weight[1]["filter"]))


@real_file(
    10, family="Llama", option="shared value, all models' own", expected=TOLD, before="silent loss", now="warned"
)
def test_a_shared_value_that_every_model_overrides(tmp_path: Path) -> None:
    models(tmp_path, experts=2)
    own = [{"model": name, "parameters": {"weight": 0.5}} for name in "ab"]
    path = recipe(tmp_path, method="task_arithmetic", models=own, parameters={"weight": 0.1})
    said(cli("merge", path, tmp_path / "out"), "parameters.weight", "no effect", "every model has its own")


@real_file(
    10,
    family="Llama",
    option="int8_mask; density of task_arithmetic",
    expected=TOLD,
    before="silent loss",
    now="warned",
)
def test_what_is_accepted_for_mergekits_sake(tmp_path: Path) -> None:
    models(tmp_path)
    path = recipe(tmp_path, merge_method="task_arithmetic", parameters={"density": 0.5, "int8_mask": True})
    outcome = cli("merge", path, tmp_path / "out")
    said(outcome, "density", "int8_mask", "no effect")


@real_file(10, family="ViT", option="gradient, no such layer", expected=TOLD, before="silent loss", now="warned")
def test_a_gradient_over_no_layers(tmp_path: Path) -> None:
    arrays = {"stem.weight": torch.randn(4, 4), "head.weight": torch.randn(2, 4)}
    save_file(arrays, tmp_path / "base.safetensors")
    save_file({name: value + 1 for name, value in arrays.items()}, tmp_path / "a.safetensors")
    words = ["-e", f"a={tmp_path}/a.safetensors", "--set", "weight=[0.25,1]"]
    outcome = cli("merge", tmp_path / "base.safetensors", tmp_path / "out.safetensors", *words)
    said(outcome, "weight", "gradient over depth", "first value, 0.25")


@real_file(10, family="Llama", option="target: for ties", expected=TOLD, before="silent loss", now="warned")
def test_files_that_a_method_does_not_read(tmp_path: Path) -> None:
    models(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n', encoding="utf-8")
    entries = [{"model": "a", "data": {"calibration": "rows.jsonl"}}]
    path = recipe(tmp_path, method="ties", models=entries, target={"train": "rows.jsonl"})
    outcome = cli("merge", path, tmp_path / "out")
    said(outcome, "target", "no effect")
    said(outcome, "data.calibration", "no effect")


UNREAD = [
    ("--calibration", "a=rows.jsonl"), ("--target", "train=rows.jsonl"), ("--tensorboard", "logs"),
    ("--device", "nonsense"), ("--device", "cuda"),
]  # fmt: skip


@real_file(
    10, family="Llama", option="options of learned methods, others'", expected=TOLD, before="silent loss",
    now="refused, true cause",
)  # fmt: skip
@pytest.mark.parametrize(("option", "value"), UNREAD)
def test_options_that_only_learned_methods_use(tmp_path: Path, option: str, value: str) -> None:
    models(tmp_path)
    words = ["-e", f"a={tmp_path}/a", "--method", "ties", option, value]
    for more in ((), ("--dry-run",)):
        refused(cli("merge", tmp_path / "base", tmp_path / "out", *words, *more), option, "leave it out")
    assert not (tmp_path / "out").exists()


@real_file(10, family="Llama", option="--trust-remote-code, no code", expected=TOLD, before="silent loss", now="warned")
def test_trust_in_code_that_is_not_there(tmp_path: Path) -> None:
    models(tmp_path)
    words = ["-e", f"a={tmp_path}/a", "--trust-remote-code"]
    said(cli("merge", tmp_path / "base", tmp_path / "out", *words), "--trust-remote-code", "no effect")


@real_file(
    10, family="PEFT", option="options of models, --as-adapter", expected=TOLD, before="silent loss",
    now="refused, true cause",
)  # fmt: skip
@pytest.mark.parametrize("words", [("--shard-size", "1GB"), ("--stochastic-rounding",), ("--allow-nonfinite",)])
def test_options_that_mean_nothing_for_an_adapter(tmp_path: Path, words: tuple[str, ...]) -> None:
    model = tiny("Llama", tie_word_embeddings=False)
    model.save_pretrained(tmp_path / "base")
    adapter(model, tmp_path / "x", target_modules=["q_proj"])
    outcome = merged(tmp_path / "base", tmp_path / "out", "--as-adapter", "cat", *words, x=tmp_path / "x")
    refused(outcome, words[0], "adapter")


ODD = [
    (("--set", "weight=0.5", "--set", "weight=0.7"), ("--set weight", "twice")),
    (("--set", "a.weight=0.5", "--set", "a.weight=0.5"), ("--set a.weight", "twice")),
    (("--set", "weight=1:30"), ("'1:30'", "finite number")),
    (("--set", "weight=010"), ("'010'", "write 10")),
    (("--set", 'weight=[{filter: "", value: 1}]'), ("weight", "filter '' is empty")),
    (("--set", 'weight=[{filter: "re:", value: 1}]'), ("weight", "filter 're:' is empty")),
    (("--seed", "3", "--dtype", ""), ("dtype", "float32")),
]


@real_file(
    10, family="Llama", option="settings that say something else", expected=TOLD, before="silent loss",
    now="refused, true cause",
)  # fmt: skip
@pytest.mark.parametrize(("words", "told"), ODD)
def test_settings_that_say_something_else(tmp_path: Path, words: tuple[str, ...], told: tuple[str, ...]) -> None:
    models(tmp_path)
    refused(cli("merge", tmp_path / "base", tmp_path / "out", "-e", f"a={tmp_path}/a", *words), *told)


@real_file(10, family="Llama", option="blank names", expected=TOLD, before="silent loss", now="refused, true cause")
@pytest.mark.parametrize("name", [" ", "\t", " a", "a "])
def test_blank_names(tmp_path: Path, name: str) -> None:
    models(tmp_path)
    refused(cli("merge", tmp_path / "base", tmp_path / "out", "-e", f"{name}={tmp_path}/a"), "name", "rename")


@real_file(10, family="Llama", option="shards below a tensor's size", expected=TOLD, before="silent loss", now="warned")
@pytest.mark.parametrize(("size", "shown"), [("5", "5 bytes"), ("1KB", "1000 bytes")])
def test_shards_smaller_than_a_tensor(tmp_path: Path, size: str, shown: str) -> None:
    models(tmp_path)
    outcome = cli("merge", tmp_path / "base", tmp_path / "out", "-e", f"a={tmp_path}/a", "--shard-size", size)
    said(outcome, f"shard size of {shown}", "no tensor is cut")


BAD_THREADS = [0, -1, 2.5, "2", True]


@real_file(
    10, family="numpy", option="threads=0, -1, 2.5", expected=TOLD, before="silent loss", now="refused, true cause"
)
@pytest.mark.parametrize("threads", BAD_THREADS)
def test_threads_that_are_no_count(threads: Any) -> None:
    arrays = {"w": np.ones((2, 2), np.float32)}
    with pytest.raises(cs.InputError, match="threads"):
        cs.merge(arrays, [{"w": arrays["w"] + 1}], threads=threads)


@real_file(
    10, family="numpy", option="experts as a set", expected=TOLD, before="silent loss", now="refused, true cause"
)
def test_experts_without_an_order(tmp_path: Path) -> None:
    models(tmp_path, experts=2)
    experts: Any = {str(tmp_path / "a"), str(tmp_path / "b")}
    with pytest.raises(cs.InputError, match="order"):
        cs.merge(tmp_path / "base", experts, tmp_path / "out")


# ----------------------------------------------------------------------------------------------------------------------
# Results that are the base.

SAME = "the result is the base"


@real_file(10, family="Llama", option="density 0", expected="bytes", before="silent loss", now="warned")
@pytest.mark.parametrize("method", ["ties", "dare_linear"])
def test_a_density_of_nothing(tmp_path: Path, method: str) -> None:
    base, _ = models(tmp_path)
    words = ["-e", f"a={tmp_path}/a", "--method", method, "--set", "density=0"]
    outcome = cli("merge", tmp_path / "base", tmp_path / "out", *words)
    said(outcome, SAME)
    said(outcome, "a: has no part", "density is 0")
    assert all(torch.equal(value, base[name]) for name, value in state(tmp_path / "out").items())


@real_file(10, family="PEFT", option="lora_alpha 0", expected="bytes", before="silent loss", now="warned")
def test_an_adapter_without_a_scale(tmp_path: Path) -> None:
    model = tiny("Qwen2", tie_word_embeddings=False)
    model.save_pretrained(tmp_path / "base")
    adapter(model, tmp_path / "x", target_modules=["q_proj"])
    config = tmp_path / "x" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text(encoding="utf-8")) | {"lora_alpha": 0}), encoding="utf-8")
    outcome = merged(tmp_path / "base", tmp_path / "out", x=tmp_path / "x")
    said(outcome, SAME)
    said(outcome, "x: has no part", "lora_alpha")


@real_file(10, family="PEFT", option="adapter as initialised", expected="bytes", before="silent loss", now="warned")
@pytest.mark.parametrize("words", [(), ("--as-adapter", "cat")])
def test_an_adapter_that_was_never_trained(tmp_path: Path, words: tuple[str, ...]) -> None:
    model = tiny("Gemma", tie_word_embeddings=False, head_dim=8)
    model.save_pretrained(tmp_path / "base")
    peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["v_proj"])).save_pretrained(tmp_path / "x")
    outcome = merged(tmp_path / "base", tmp_path / "out", *words, x=tmp_path / "x")
    said(outcome, "x: has no part", "never trained")
    said(outcome, "the result changes nothing" if words else SAME)


@real_file(10, family="Llama", option="private: ['*']", expected="bytes", before="silent loss", now="warned")
def test_nothing_left_to_merge(tmp_path: Path) -> None:
    models(tmp_path)
    said(cli("merge", recipe(tmp_path, method="linear", private=["*"]), tmp_path / "out"), SAME, "private")


@real_file(
    10, family="Llama", option="an expert that is the base", expected="bytes", before="silent loss", now="warned"
)
def test_an_expert_that_is_a_copy_of_the_base(tmp_path: Path) -> None:
    models(tmp_path)
    shutil.copytree(tmp_path / "base", tmp_path / "copy")
    words = ["-e", f"a={tmp_path}/a", "-e", f"b={tmp_path}/copy", "--method", "ties", "--set", "density=0.5"]
    said(cli("merge", tmp_path / "base", tmp_path / "out", *words), "b: is the base, byte for byte")


@real_file(
    10, family="Llama", option="update below bfloat16's unit", expected="bytes", before="silent loss", now="warned"
)
def test_an_update_that_rounding_swallows(tmp_path: Path) -> None:
    model = tiny("Llama", tie_word_embeddings=False).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "base")
    shutil.copytree(tmp_path / "base", tmp_path / "a")
    grown = {name: value * 1.0078125 for name, value in state(tmp_path / "base").items()}
    save_file(grown, tmp_path / "a" / "model.safetensors", {"format": "pt"})
    words = ["-e", f"a={tmp_path}/a", "--set", "weight=0.001"]
    outcome = cli("merge", tmp_path / "base", tmp_path / "out", *words)
    said(outcome, SAME)
    assert "has no part" not in outcome.out


@real_file(10, family="Llama", option="slerp, t = 0", expected="bytes", before="silent loss", now="warned")
def test_slerp_at_its_beginning(tmp_path: Path) -> None:
    models(tmp_path)
    words = ["-e", f"a={tmp_path}/a", "--method", "slerp", "--set", "t=0"]
    said(cli("merge", tmp_path / "base", tmp_path / "out", *words), SAME)


@real_file(10, family="numpy", option="state dicts, weight 0", expected="bytes", before="silent loss", now="warned")
def test_state_dicts_log(caplog: pytest.LogCaptureFixture) -> None:
    base = {"w": np.arange(6, dtype=np.float32).reshape(2, 3)}
    out = cs.merge(base, [{"w": base["w"] + 1}], weight=0.0)
    assert isinstance(out, dict)
    np.testing.assert_array_equal(out["w"], base["w"])
    assert SAME in caplog.text


@real_file(
    10, family="BERT", option="integer buffer of 17 M elements", expected="bytes", before="silent loss", now="warned"
)
def test_large_integers_that_differ(tmp_path: Path) -> None:
    big = torch.zeros((1 << 24) + 8, dtype=torch.int8)
    tensors = {"layer.0.weight": torch.ones(4, 4), "positions": big}
    save_file(tensors, tmp_path / "base.safetensors")
    big = big.clone()
    big[-1] = 1
    save_file({"layer.0.weight": torch.zeros(4, 4), "positions": big}, tmp_path / "a.safetensors")
    words = ["-e", f"a={tmp_path}/a.safetensors"]
    outcome = cli("merge", tmp_path / "base.safetensors", tmp_path / "out.safetensors", *words)
    said(outcome, "positions", "integer values of a differ")


@real_file(10, family="Llama", option="parameters of the base, listed among the models", expected=TOLD,
           before="silent loss", now="warned")  # fmt: skip
def test_parameters_of_the_base(tmp_path: Path) -> None:
    models(tmp_path)
    listed = [{"model": "base", "parameters": {"weight": 0.3}}, {"model": "a", "parameters": {"weight": 1.0}}]
    path = recipe(tmp_path, merge_method="task_arithmetic", models=listed)
    said(cli("check", path), "models.0.parameters", "no effect", "the base")
    quiet = recipe(tmp_path, merge_method="task_arithmetic", models=[{"model": "base"}, listed[1]])
    assert "note" not in cli("check", quiet).out
