"""What mergekit's users ran into, and what happens here: each test is named by the behaviour that they get."""

import contextlib
import importlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from named_models import State, config, state, write
from safetensors.numpy import load_file, save_file

from consilience.__main__ import run

BASE, KESTREL, HERON = "basecamp/Llama-8B", "riverbend/Kestrel-Llama-8B", "quietlab/Heron-Llama-8B"
Q = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a base and two fine-tunes, to be in."""
    monkeypatch.chdir(tmp_path)
    for name in (BASE, KESTREL, HERON):
        write(tmp_path, name)
    return tmp_path


def recipe(**keys: Any) -> str:
    """Write a recipe of the two fine-tunes and return its path."""
    value = {"merge_method": "task_arithmetic", "base_model": BASE, "dtype": "float32"} | keys
    value.setdefault("models", [{"model": name, "parameters": {"weight": 0.5}} for name in (KESTREL, HERON)])
    Path("recipe.yml").write_text(yaml.safe_dump({k: v for k, v in value.items() if v is not None}), encoding="utf-8")
    return "recipe.yml"


def cli(*words: str) -> tuple[int, str]:
    """Run the command line; return its status and all that it said."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        return run(list(words)), said.getvalue()


def refused(path: str, *words: str) -> None:
    """Assert that a merge is refused with these words, and leaves nothing behind."""
    status, said = cli("merge", path, "out")
    assert status == 2, said
    for word in words:
        assert word in said, said
    assert not list(Path().glob("out*"))


def merged(path: str, *options: str) -> State:
    status, said = cli("merge", path, "out", *options)
    assert status == 0, said
    return load_file("out/model.safetensors")


def changed(name: str, **values: Any) -> None:
    """Replace, add or (None) remove tensors of a model."""
    tensors: dict[str, Any] = {**load_file(f"{name}/model.safetensors"), **values}
    save_file(
        {k: v for k, v in tensors.items() if v is not None}, f"{name}/model.safetensors", metadata={"format": "pt"}
    )


def configured(name: str, **values: Any) -> None:
    (Path(name) / "config.json").write_text(json.dumps(config(name) | values), encoding="utf-8")


# ----------------------------------------------------------------------------------------------------------------------
# Numbers.


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "ties", "dare_ties", "slerp"])
def test_one_nan_or_inf_is_an_error_that_names_it(folder: Path, method: str, value: float) -> None:
    tensor = state(HERON)[Q].copy()
    tensor[3, 5] = value
    changed(HERON, **{Q: tensor})
    models = [{"model": HERON}] if method == "slerp" else None
    refused(recipe(merge_method=method, **({"models": models} if models else {})), Q, "Heron", "1 ")


def test_weights_that_sum_to_zero_are_an_error(folder: Path) -> None:
    models = [{"model": KESTREL, "parameters": {"weight": 1}}, {"model": HERON, "parameters": {"weight": -1}}]
    refused(recipe(merge_method="linear", base_model=None, models=models), "sum to zero")


def test_values_beyond_float16_are_an_error(folder: Path) -> None:
    changed(HERON, **{Q: state(HERON)[Q] * 1e6})
    refused(recipe(dtype="float16"), "overflow F16", Q)


def test_bfloat16_output_has_no_error_but_its_rounding(folder: Path) -> None:
    exact = {name: sum(0.5 * state(each)[name].astype(np.float64) for each in (KESTREL, HERON)) for name in state(BASE)}
    status, said = cli("merge", recipe(dtype="bfloat16"), "out")
    assert status == 0, said
    torch_file: Any = importlib.import_module("safetensors.torch")
    for name, value in torch_file.load_file("out/model.safetensors").items():
        nearest = torch.from_numpy(exact[name]).to(torch.bfloat16)
        assert (value != nearest).float().mean() < 0.01, name  # all but what float32 puts on the other side of a tie


@pytest.mark.slow
def test_random_methods_repeat_without_a_seed_whatever_the_hash_seed(folder: Path) -> None:
    path = recipe(merge_method="dare_ties", parameters={"density": 0.5})
    for number in ("1", "2"):
        environment = os.environ | {"PYTHONHASHSEED": number}
        command = [sys.executable, "-m", "consilience", "merge", path, f"out{number}", "-q"]
        subprocess.run(command, check=True, env=environment)
    first, second = (load_file(f"out{number}/model.safetensors") for number in "12")
    assert all((first[name] == second[name]).all() for name in first)


# ----------------------------------------------------------------------------------------------------------------------
# Tensors: none is dropped, made up or left out in silence.


def test_a_missing_tensor_is_an_error_before_any_work(folder: Path) -> None:
    changed(HERON, **{Q: None})
    refused(recipe(), Q, "Heron", "missing")


def test_an_extra_tensor_of_one_model_is_an_error(folder: Path) -> None:
    changed(HERON, **{"model.layers.1.self_attn.extra.weight": np.ones((4, 4), np.float32)})
    refused(recipe(), "model.layers.1.self_attn.extra.weight", "Heron")


def test_tensors_of_an_architecture_that_nobody_knows_are_all_merged(folder: Path) -> None:
    for number, name in enumerate((BASE, KESTREL, HERON)):
        changed(name, **{"model.layers.1.linear_attn.gate": np.full((4, 4), float(number), np.float32)})
        configured(name, model_type="brand_new", architectures=["BrandNewForCausalLM"])
    out = merged(recipe())
    assert out.keys() == load_file(f"{BASE}/model.safetensors").keys()
    np.testing.assert_allclose(out["model.layers.1.linear_attn.gate"], np.full((4, 4), 1.5))


def test_different_numbers_of_layers_are_an_error_from_the_headers(folder: Path) -> None:
    changed(HERON, **{name: None for name in state(HERON) if ".layers.3." in name})
    configured(HERON, num_hidden_layers=3)
    refused(recipe(), "layers.3", "Heron")


def test_integer_buffers_are_copied_from_the_base(folder: Path) -> None:
    for number, name in enumerate((BASE, KESTREL, HERON)):
        changed(name, count=np.array([7 + number]))
    status, said = cli("merge", recipe(), "out")
    assert status == 0
    assert "count" in said
    assert load_file("out/model.safetensors")["count"] == [7]


def test_a_tied_model_stays_tied(folder: Path) -> None:
    for name in ("basecamp/Llama-1B", "riverbend/Kestrel-Llama-1B"):
        write(folder, name)
    out = merged(recipe(base_model="basecamp/Llama-1B", models=[{"model": "riverbend/Kestrel-Llama-1B"}]))
    assert "lm_head.weight" not in out
    assert json.loads(Path("out/config.json").read_text(encoding="utf-8"))["tie_word_embeddings"] is True


def tie(name: str) -> None:
    changed(name, **{"lm_head.weight": None})
    configured(name, tie_word_embeddings=True)


@pytest.mark.slow
def test_a_merged_head_counts_when_the_base_was_tied(folder: Path) -> None:
    tie(BASE)
    out = merged(recipe())
    hf: Any = importlib.import_module("transformers")
    model = hf.AutoModelForCausalLM.from_pretrained("out")
    assert not model.config.tie_word_embeddings
    np.testing.assert_array_equal(model.lm_head.weight.detach().numpy(), out["lm_head.weight"])
    starts = state(BASE)["model.embed_tokens.weight"]
    expected = starts + sum(0.5 * (state(each)["lm_head.weight"] - starts) for each in (KESTREL, HERON))
    np.testing.assert_allclose(out["lm_head.weight"], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("tied", [KESTREL, HERON])
def test_tied_and_untied_models_average_alike_in_any_order(folder: Path, tied: str) -> None:
    tie(tied)
    other = HERON if tied == KESTREL else KESTREL
    out = merged(recipe(merge_method="linear", base_model=None))
    heads = state(tied)["model.embed_tokens.weight"] / 2 + state(other)["lm_head.weight"] / 2
    np.testing.assert_allclose(out["lm_head.weight"], heads, rtol=0, atol=1e-6)
    assert json.loads(Path("out/config.json").read_text(encoding="utf-8"))["tie_word_embeddings"] is False


def test_adapters_are_read_again_by_every_run(folder: Path) -> None:
    adapter = "riverbend/Poet-Llama-8B-lora"
    write(folder, adapter)
    path = recipe(models=[{"model": adapter}])
    first = merged(path)
    file = Path(adapter) / "adapter_model.safetensors"
    save_file({name: 2 * value if "lora_B" in name else value for name, value in load_file(file).items()}, file)
    second = merged(path, "--force")
    start = state(BASE)[Q]
    np.testing.assert_allclose(second[Q] - start, 2 * (first[Q] - start), rtol=0, atol=1e-6)


def test_adapters_merge_as_an_adapter(folder: Path) -> None:
    adapter = "riverbend/Poet-Llama-8B-lora"
    write(folder, adapter)
    assert cli("merge", recipe(models=[{"model": adapter}]), "out", "--as-adapter", "cat")[0] == 0
    assert Path("out/adapter_model.safetensors").exists()
    assert not Path("out/model.safetensors").exists()


def test_flat_state_dicts_need_no_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for number, name in enumerate(("base", "a", "b")):
        torch.save({"conv.weight": torch.full((2, 3, 1, 1), float(number))}, f"{name}.pt")
    assert cli("merge", "base.pt", "out.safetensors", "-e", "a=a.pt", "-e", "b=b.pt", "--method", "linear")[0] == 0
    assert (load_file("out.safetensors")["conv.weight"] == 1.5).all()


# ----------------------------------------------------------------------------------------------------------------------
# Files.


def test_a_truncated_file_is_named(folder: Path) -> None:
    file = Path(HERON) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    refused(recipe(), "Heron-Llama-8B/model.safetensors")


def test_code_in_a_pickle_is_not_run(folder: Path) -> None:
    class Code:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, ("ran",)

    (Path(HERON) / "model.safetensors").unlink()
    torch.save({"lm_head.weight": Code()}, Path(HERON) / "pytorch_model.bin")
    refused(recipe(), "Heron-Llama-8B/pytorch_model.bin")
    assert not Path("ran").exists()


def test_an_output_is_never_mixed_with_an_older_one(folder: Path) -> None:
    first = merged(recipe())
    status, said = cli("merge", recipe(parameters={"lambda": 0.5}), "out", "--shard-size", "20kB")
    assert status == 2, said
    assert "--force" in said
    assert (load_file("out/model.safetensors")[Q] == first[Q]).all()
    assert cli("merge", "recipe.yml", "out", "--shard-size", "20kB", "--force")[0] == 0
    assert not Path("out/model.safetensors").exists()
    assert sorted(path.name for path in Path("out").glob("model*.safetensors"))[0].startswith("model-00001-of-")


def test_shards_are_as_large_as_was_asked_in_bytes(folder: Path) -> None:
    assert cli("merge", recipe(), "out", "--shard-size", "20kB")[0] == 0
    sizes = [sum(value.nbytes for value in load_file(path).values()) for path in Path("out").glob("*.safetensors")]
    assert len(sizes) > 1
    assert max(sizes) <= 20_000


def test_the_output_opens_with_its_tokenizer_and_as_many_rows_as_its_config_says(folder: Path) -> None:
    out = merged(recipe(tokenizer_source="base"))
    hf: Any = importlib.import_module("transformers")
    rows = json.loads(Path("out/config.json").read_text(encoding="utf-8"))["vocab_size"]
    assert out["model.embed_tokens.weight"].shape[0] == rows
    assert len(hf.AutoTokenizer.from_pretrained("out")) <= rows


def test_padded_rows_stay_when_a_tokenizer_is_chosen(folder: Path) -> None:
    for number, name in enumerate((BASE, KESTREL, HERON)):
        padding = np.full((8, 16), float(number), np.float32)
        tensors = {
            each: np.concatenate((state(name)[each], padding))
            for each in ("lm_head.weight", "model.embed_tokens.weight")
        }
        changed(name, **tensors)
        configured(name, vocab_size=48)
    out = merged(recipe(tokenizer_source="base"))
    assert out["lm_head.weight"].shape == (48, 16)
    assert json.loads(Path("out/config.json").read_text(encoding="utf-8"))["vocab_size"] == 48


def test_vocabularies_of_different_sizes_are_an_error_before_any_work(folder: Path) -> None:
    write(folder, "quietlab/Heron-ChatML-Llama-8B")
    models = [{"model": KESTREL}, {"model": "quietlab/Heron-ChatML-Llama-8B"}]
    refused(recipe(models=models), "vocabular", "42")


# ----------------------------------------------------------------------------------------------------------------------
# What is asked for, and what is said of it.


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"parameters": {"densty": 0.1}}, ("densty", "did you mean 'density'")),
        ({"parameters": {"normalise": True}}, ("normalise", "did you mean 'normalize'")),
        ({"out_dtpye": "float16"}, ("out_dtpye", "did you mean 'out_dtype'")),
        ({"base_modle": BASE}, ("base_modle", "did you mean 'base_model'")),
        ({"parameters": {"weight": [{"filter": "self_atn", "value": 1}]}}, ("self_atn", "did you mean 'self_attn'")),
        ({"merge_method": "dare-ties"}, ("dare-ties", "did you mean 'dare_ties'")),
    ],
)
def test_a_typo_is_an_error_with_a_suggestion(folder: Path, keys: dict[str, Any], words: tuple[str, ...]) -> None:
    models = [{"model": KESTREL}, {"model": HERON}]
    refused(recipe(**{"merge_method": "ties", "models": models} | keys), *words)


def test_a_dry_run_shows_what_every_tensor_gets_and_the_memory(folder: Path) -> None:
    path = recipe(models=[{"model": KESTREL, "parameters": {"weight": [0, 0.3, 1]}}, {"model": HERON}])
    status, said = cli("merge", path, "out", "--dry-run")
    assert status == 0
    assert not list(Path().glob("out*"))
    assert "memory" in said
    lines = [line for line in said.splitlines() if Q in line]
    assert lines, said
    assert "0.2" in lines[0]  # a third of the way over [0, 0.3, 1]


def test_a_check_finds_what_a_merge_would_not_get_through(folder: Path) -> None:
    changed(HERON, **{Q: None})
    status, said = cli("check", recipe())
    assert status == 2
    assert Q in said


def test_unread_keys_of_a_model_card_are_told_once(folder: Path) -> None:
    models = [{"model": name, "parameters": {"weight": 0.5, "density": 0.5}} for name in (KESTREL, HERON)]
    status, said = cli("merge", recipe(merge_method="linear", models=models, license="mit"), "out")
    assert status == 0
    assert sum("density" in line for line in said.splitlines()) == 1
    assert sum("license" in line for line in said.splitlines()) == 1
