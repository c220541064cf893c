"""Adapters whose vocabularies are aligned by token, against PEFT unmerged; BASE+ADAPTER stays factored."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from consilience.api import merge_recipe
from consilience.engine.plan import make_plan
from consilience.errors import InputError
from consilience.recipe.schema import parse_recipe
from tests.engine import vocabulary_models as tiny
from tests.real_files.support import adapter, hf, moved
from tests.real_files.support import tiny as seeded

pytestmark = pytest.mark.filterwarnings("ignore")  # of the libraries that make the files
WORDS = [*tiny.ROLES, *(f"w{i}" for i in range(45))]
BOTH = ["embed_tokens", "lm_head"]


def base_and_other(tmp_path: Path, *, tied: bool = False) -> tuple[Path, Path]:
    """Save a base of 48 tokens in 64 rows, and a full model of 50 tokens in another order."""
    base, other = tmp_path / "base", tmp_path / "other"
    seeded("Llama", tie_word_embeddings=tied).save_pretrained(base)
    tiny.save_tokenizer(base, WORDS, [])
    moved(seeded("Llama", tie_word_embeddings=tied, vocab_size=50), 5).save_pretrained(other)
    tiny.save_tokenizer(other, [*tiny.ROLES, *reversed(WORDS[5:]), "v1", "v2"], ["<|o|>", "<|p|>"])
    return base, other


def resized(base: Path, rows: int | None) -> Any:
    model = hf.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    torch.manual_seed(3)
    if rows is not None:
        model.resize_token_embeddings(rows, mean_resizing=False)
    return model


def same_on_its_tokens(tuned: Any, own: dict[str, int], out: Path) -> None:
    """Assert that a merge computes what a model does, on text of its own tokens and for each of them."""
    ids = tiny.ids(out)
    tokens = sorted(own)
    text = [token for token in tokens if not token.startswith("<s")][::3]
    merged = hf.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = tuned(torch.tensor([[own[t] for t in text]])).logits[..., [own[t] for t in tokens]]
        found = merged(torch.tensor([[ids[t] for t in text]])).logits[..., [ids[t] for t in tokens]]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


KINDS: dict[str, tuple[int | None, dict[str, Any]]] = {
    "saved whole": (66, {"modules_to_save": BOTH}),
    "factors on both": (66, {"target_modules": ["q_proj", *BOTH]}),
    "saved since it was resized": (66, {}),
    "added rows alone": (66, {"trainable_token_indices": [65, 64, 1]}),
    "rows of the padding alone": (None, {"trainable_token_indices": [49, 48, 4]}),
    "factors, not resized": (None, {"target_modules": ["q_proj", "embed_tokens"]}),
    "elsewhere": (None, {}),
}


@pytest.mark.parametrize(
    "kind",
    [
        "saved whole",
        "added rows alone",
        *(pytest.param(k, marks=pytest.mark.slow) for k in [*KINDS][1:3] + [*KINDS][4:]),
    ],
)
def test_an_adapter_with_tokens_of_its_own(kind: str, tmp_path: Path) -> None:
    rows, settings = KINDS[kind]
    base, other = base_and_other(tmp_path)
    given: dict[str, Any] = {"target_modules": ["q_proj"]} | settings
    tuned = adapter(resized(base, rows), tmp_path / "a", **given)
    words = [*WORDS, *(f"u{i}" for i in range(16))] if rows else WORDS
    tiny.save_tokenizer(tmp_path / "a", words, ["<|a|>", "<|o|>"])
    models = [{"model": str(tmp_path / "a"), "name": "a", "parameters": {"weight": 1.0}},
              {"model": str(other), "name": "other", "parameters": {"weight": 0.0}}]  # fmt: skip
    recipe = {"method": "task_arithmetic", "base_model": str(base), "models": models}
    for number, source in enumerate(("union", "a")):
        merge_recipe(recipe | {"tokenizer": source}, tmp_path / str(number))
        same_on_its_tokens(tuned, tiny.ids(tmp_path / "a"), tmp_path / str(number))
    models[0]["parameters"], models[1]["parameters"] = {"weight": 0.0}, {"weight": 1.0}
    for source in ("union", "other"):
        merge_recipe(recipe | {"tokenizer": source}, tmp_path / f"own-{source}")
        model = hf.AutoModelForCausalLM.from_pretrained(other, dtype=torch.float32).eval()
        same_on_its_tokens(model, tiny.ids(other), tmp_path / f"own-{source}")


def test_a_tied_model_that_an_adapter_resized(tmp_path: Path) -> None:
    base, other = base_and_other(tmp_path, tied=True)
    tuned = adapter(resized(base, 66), tmp_path / "a", target_modules=["q_proj"])
    tiny.save_tokenizer(tmp_path / "a", [*WORDS, *(f"u{i}" for i in range(16))], ["<|a|>", "<|o|>"])
    models = [
        {"model": str(tmp_path / "a"), "parameters": {"weight": 1.0}},
        {"model": str(other), "parameters": {"weight": 0.0}},
    ]
    recipe = {"method": "task_arithmetic", "base_model": str(base), "models": models, "tokenizer": "union"}
    merge_recipe(recipe, tmp_path / "out")
    same_on_its_tokens(tuned, tiny.ids(tmp_path / "a"), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"]


def test_a_model_resized_in_part_is_refused(tmp_path: Path) -> None:
    base, other = base_and_other(tmp_path)
    model = resized(base, None)
    model.set_input_embeddings(torch.nn.Embedding(66, 32))
    adapter(model, tmp_path / "a", target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    models = [{"model": str(tmp_path / "a")}, {"model": str(other)}]
    recipe = {"method": "task_arithmetic", "base_model": str(base), "models": models, "tokenizer": "union"}
    with pytest.raises(InputError, match=r"64 rows.*66 rows.*resized in part"):
        merge_recipe(recipe, tmp_path / "out")


def test_what_an_adapter_cannot_hold_is_refused(tmp_path: Path) -> None:
    base, other = base_and_other(tmp_path)
    adapter(resized(base, None), tmp_path / "a", target_modules=["q_proj"])
    tiny.save_tokenizer(tmp_path / "a", *([*tiny.ROLES, *reversed(WORDS[3:])], ["<|a|>"]))
    recipe = {"method": "task_arithmetic", "base_model": str(base), "models": [{"model": str(tmp_path / "a")}]}
    with pytest.raises(InputError, match="another vocabulary than its base's"):
        merge_recipe(recipe | {"tokenizer": "a"}, tmp_path / "out", as_adapter="cat")
    assert other.exists()


@pytest.mark.parametrize("method", ["ties", *(pytest.param(m, marks=pytest.mark.slow) for m in ("linear", "tsv_m"))])
def test_an_adapter_on_the_base_stays_factored(method: str, tmp_path: Path) -> None:
    base, _ = base_and_other(tmp_path)
    for seed, name in enumerate("ab"):
        adapter(resized(base, None), tmp_path / name, seed=seed, target_modules=["q_proj", "up_proj"])
    link = tmp_path / "link"
    link.symlink_to(base)
    outs: list[bytes] = []
    for number, prefix in enumerate(("", f"{base}+", f"{link}+")):
        models = [{"model": f"{prefix}{tmp_path / name}", "name": name} for name in "ab"]
        value = {"method": method, "base_model": str(base), "models": models}
        plan = make_plan(parse_recipe(value, "r"))
        assert all(row.dense is None for tensor in plan.tensors for row in tensor.rows)
        merge_recipe(value, tmp_path / f"out{number}")
        outs.append((tmp_path / f"out{number}" / "model.safetensors").read_bytes())
    assert outs[0] == outs[1] == outs[2]


def test_an_adapter_on_another_model_is_that_model(tmp_path: Path) -> None:
    base, _ = base_and_other(tmp_path)
    fine = tmp_path / "fine"
    moved(seeded("Llama"), 7).save_pretrained(fine)
    adapter(hf.AutoModelForCausalLM.from_pretrained(fine), tmp_path / "a", target_modules=["q_proj"])
    value = {"method": "ties", "base_model": str(base), "models": [{"model": f"{fine}+{tmp_path / 'a'}"}]}
    plan = make_plan(parse_recipe(value, "r"))
    assert all(row.dense is not None for tensor in plan.tensors for row in tensor.rows)
