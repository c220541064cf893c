"""Vocabularies that were resized or trained in part, and PEFT's spellings of what is saved whole."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.real_files.support import adapter, cli, hf, logits, merged, moved, peft, real_file, refused, state, tiny
from tests.real_files.test_ties import with_bytes

BOTH = ["embed_tokens", "lm_head"]


def base_of(tmp_path: Path, **config: Any) -> Path:
    tiny("Qwen2", tie_word_embeddings=False, **config).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def loaded(base: Path, rows: int | None = None, family: str = "Qwen2ForCausalLM", seed: int = 0) -> Any:
    """Load a base in float32, with its vocabulary resized and every added row another."""
    model = getattr(hf, family).from_pretrained(base, dtype=torch.float32).eval()
    if rows is not None:
        torch.manual_seed(seed)
        model.resize_token_embeddings(rows, mean_resizing=False)
    return model


def is_right(tmp_path: Path, tuned: Any, *words: str) -> None:
    outcome = merged(tmp_path / "base", tmp_path / "out", *words, x=tmp_path / "a")
    assert outcome.code == 0, outcome.said
    torch.testing.assert_close(logits(tmp_path / "out"), logits(tuned), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("rows", [68, 60])
@real_file(
    8, family="Qwen2", option="resized vocabulary, embedding and head saved whole", expected="PEFT, unmerged",
    before="wrong cause named",
)  # fmt: skip
def test_a_resized_vocabulary(tmp_path: Path, rows: int) -> None:
    base = base_of(tmp_path)
    tuned = adapter(loaded(base, rows), tmp_path / "a", target_modules=["q_proj"], modules_to_save=BOTH)
    is_right(tmp_path, tuned)
    assert hf.AutoConfig.from_pretrained(tmp_path / "out").vocab_size == rows


@real_file(
    8, family="Qwen2", option="resized vocabulary, LoRA on embedding and head", expected="PEFT, unmerged",
    before="wrong cause named",
)  # fmt: skip
def test_factors_on_a_resized_vocabulary(tmp_path: Path) -> None:
    tuned = adapter(loaded(base_of(tmp_path), 68), tmp_path / "a", target_modules=["q_proj", *BOTH])
    is_right(tmp_path, tuned)


@real_file(
    8, family="Llama", option="resized vocabulary that nothing adapts, saved because it was resized",
    expected="PEFT, unmerged", before="wrong cause named",
)  # fmt: skip
def test_a_resized_vocabulary_beside_plain_factors(tmp_path: Path) -> None:
    tiny("Llama", tie_word_embeddings=False).save_pretrained(tmp_path / "base")
    model = loaded(tmp_path / "base", 72, "LlamaForCausalLM")
    is_right(tmp_path, adapter(model, tmp_path / "a", target_modules=["v_proj"]))


@real_file(
    8, family="Qwen2", option="resized vocabulary, added rows trained alone", expected="PEFT, unmerged",
    before="wrongly refused",
)  # fmt: skip
def test_added_rows_trained_alone(tmp_path: Path) -> None:
    indices = [66, 64, 1]
    model = loaded(base_of(tmp_path), 68)
    is_right(tmp_path, adapter(model, tmp_path / "a", target_modules=["q_proj"], trainable_token_indices=indices))


@pytest.mark.parametrize("indices", [[7, 2, 5], {"embed_tokens": [7, 2], "lm_head": [5]}], ids=["list", "modules"])
@real_file(
    8, family="Qwen2", option="trainable_token_indices, of one module or several", expected="PEFT, unmerged",
    before="wrongly refused",
)  # fmt: skip
def test_rows_trained_alone(tmp_path: Path, indices: Any) -> None:
    model = loaded(base_of(tmp_path))
    is_right(tmp_path, adapter(model, tmp_path / "a", target_modules=["q_proj"], trainable_token_indices=indices))


@real_file(8, family="Qwen2", option="TRAINABLE_TOKENS adapter", expected="PEFT, unmerged", before="wrongly refused")
def test_an_adapter_of_rows_alone(tmp_path: Path) -> None:
    config = peft.TrainableTokensConfig(token_indices=[9, 3, 12], target_modules=["embed_tokens"])
    tuned = moved(peft.get_peft_model(loaded(base_of(tmp_path)), config).eval(), 1)
    tuned.save_pretrained(tmp_path / "a")
    is_right(tmp_path, tuned)


@real_file(
    8,
    family="Qwen2",
    option="rows trained alone, bf16, weight 0.5",
    expected="a formula",
    before="wrongly refused",
)
def test_rows_trained_alone_are_weighted(tmp_path: Path) -> None:
    base = base_of(tmp_path)
    hf.AutoModelForCausalLM.from_pretrained(base).to(torch.bfloat16).save_pretrained(base)
    adapter(loaded(base), tmp_path / "a", target_modules=["q_proj"], trainable_token_indices=[7, 2])
    assert merged(base, tmp_path / "out", "--set", "weight=0.5", x=tmp_path / "a").code == 0
    name = "model.embed_tokens.weight"
    wanted = state(base)[name].float()
    trained = next(v for k, v in load_file(tmp_path / "a/adapter_model.safetensors").items() if "tokens_delta" in k)
    wanted[[7, 2]] = 0.5 * wanted[[7, 2]] + 0.5 * trained
    torch.testing.assert_close(state(tmp_path / "out")[name], wanted, atol=1e-6, rtol=1e-6)


@real_file(
    8, family="Qwen2", option="two adapters of one resized vocabulary, weights 0.5 and 0.3", expected="a formula",
    before="wrong cause named",
)  # fmt: skip
def test_two_experts_of_one_size(tmp_path: Path) -> None:
    base = base_of(tmp_path)
    for name, seed in (("a", 1), ("b", 2)):
        adapter(loaded(base, 68), tmp_path / name, seed=seed, target_modules=["q_proj"], modules_to_save=BOTH)
    out = tmp_path / "out"
    weights = ["--set", "a.weight=0.5", "--set", "b.weight=0.3"]
    assert merged(base, out, *weights, a=tmp_path / "a", b=tmp_path / "b").code == 0
    one, two = (load_file(tmp_path / n / "adapter_model.safetensors")["base_model.model.lm_head.weight"] for n in "ab")
    start = torch.cat([state(base)["lm_head.weight"], (one[64:] + two[64:]) / 2])
    wanted = start + 0.5 * (one - start) + 0.3 * (two - start)
    torch.testing.assert_close(state(out)["lm_head.weight"], wanted, atol=1e-6, rtol=1e-5)


@real_file(
    8, family="Qwen2", option="two adapters of vocabularies of different sizes", expected="the message",
    before="wrong cause named", now="refused, true cause",
)  # fmt: skip
def test_two_experts_of_different_sizes(tmp_path: Path) -> None:
    base = base_of(tmp_path)
    for name, rows in (("a", 68), ("b", 72)):
        adapter(loaded(base, rows), tmp_path / name, target_modules=["q_proj"], modules_to_save=BOTH)
    outcome = merged(base, tmp_path / "out", a=tmp_path / "a", b=tmp_path / "b")
    refused(outcome, "72 rows", "68", "vocabularies differ")
    assert "another base" not in outcome.err


@real_file(
    8, family="Qwen2", option="resized embedding without its head", expected="the message",
    before="wrong cause named", now="refused, true cause",
)  # fmt: skip
def test_a_resized_embedding_without_its_head(tmp_path: Path) -> None:
    model = loaded(base_of(tmp_path), 68)
    save = {"save_embedding_layers": False}
    adapter(model, tmp_path / "a", save=save, target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    outcome = merged(tmp_path / "base", tmp_path / "out", x=tmp_path / "a")
    refused(outcome, "embed_tokens", "lm_head.weight", "give the resized base")


@real_file(
    8, family="Llama", option="full model with added tokens", expected="the expert's file", before="wrongly refused"
)
def test_a_full_model_with_added_tokens(tmp_path: Path) -> None:
    tiny("Llama", tie_word_embeddings=False).save_pretrained(tmp_path / "base")
    expert = tiny("Llama", seed=1, tie_word_embeddings=False, vocab_size=80)
    expert.save_pretrained(tmp_path / "a")
    is_right(tmp_path, expert)


@pytest.mark.parametrize("layers", [True, False], ids=["thrice", "once"])
@real_file(
    8, family="Qwen2", option="modules_to_save with save_embedding_layers: each written three times",
    expected="PEFT, unmerged", before="wrong cause named",
)  # fmt: skip
def test_a_saved_module_written_thrice(tmp_path: Path, layers: bool) -> None:
    save = {"save_embedding_layers": layers}
    model = loaded(base_of(tmp_path))
    is_right(tmp_path, adapter(model, tmp_path / "a", save=save, target_modules=["q_proj"], modules_to_save=BOTH))


def respelled(folder: Path, rename: Any) -> None:
    path = folder / "adapter_model.safetensors"
    save_file({rename(name): value for name, value in load_file(path).items()}, path)


@pytest.mark.parametrize(
    "rename",
    [
        lambda n: n.replace("lora_A.", "lora_A.math.").replace("lora_B.", "lora_B.math.").replace(
            "lm_head.", "lm_head.modules_to_save.math."),
        lambda n: n.replace("lm_head.", "lm_head.modules_to_save.default."),
        lambda n: f"module.{n}",
        lambda n: n.replace("base_model.model.", "base_model.model._orig_mod."),
        lambda n: n.replace("layers.0.", "layers.0._fsdp_wrapped_module._checkpoint_wrapped_module."),
        lambda n: n.removeprefix("base_model.model."),
        lambda n: n.replace("base_model.model.", "base_model.model.base_model.model."),
    ],
    ids=["named", "default", "ddp", "compiled", "fsdp", "bare", "twice"],
)  # fmt: skip
@real_file(
    8, family="Qwen2", option="adapters' state dicts as DDP, FSDP, compile and trainers' own code write them",
    expected="PEFT, unmerged", before="wrong cause named",
)  # fmt: skip
def test_spellings_of_an_adapter(tmp_path: Path, rename: Any) -> None:
    model = loaded(base_of(tmp_path))
    tuned = adapter(model, tmp_path / "a", target_modules=["q_proj", "gate_proj"], modules_to_save=["lm_head"])
    respelled(tmp_path / "a", rename)
    is_right(tmp_path, tuned)


TIED: dict[str, tuple[int | None, dict[str, Any]]] = {
    "rows of the embedding": (None, {"trainable_token_indices": [7, 2, 5]}),
    "rows of the head alone": (None, {"trainable_token_indices": {"lm_head": [3]}}),
    "rows of both": (None, {"trainable_token_indices": {"embed_tokens": [1, 2], "lm_head": [3]}}),
    "resized, added rows": (68, {"trainable_token_indices": [1, 66]}),
    "resized, factors on the embedding": (68, {"target_modules": ["q_proj", "embed_tokens"]}),
    "resized, a saved embedding": (68, {"modules_to_save": ["embed_tokens"]}),
    "cut, both saved": (60, {"modules_to_save": BOTH}),
}


@pytest.mark.parametrize("option", TIED)
@real_file(
    8, family="Qwen2", option="rows trained alone and resized vocabularies on a tied base", expected="PEFT, unmerged",
    before="wrongly refused",
)  # fmt: skip
def test_vocabularies_of_a_tied_base(tmp_path: Path, option: str) -> None:
    rows, more = TIED[option]
    tiny("Qwen2", tie_word_embeddings=True).save_pretrained(tmp_path / "base")
    model = loaded(tmp_path / "base", rows)
    config: dict[str, Any] = {"target_modules": ["q_proj"], **more}
    is_right(tmp_path, adapter(model, tmp_path / "a", **config))


def loss_of(model: Any, ids: list[int]) -> float:
    likely = logits(model, torch.tensor([ids]))[0].log_softmax(-1)
    return -sum(likely[i - 1, ids[i]].item() for i in range(1, len(ids))) / (len(ids) - 1)


EVALUATED: dict[str, tuple[int | None, dict[str, Any], Any]] = {
    "resized": (270, {"modules_to_save": BOTH}, None),
    "resized and untouched": (280, {}, None),
    "rows": (None, {"trainable_token_indices": [97, 98]}, None),
    "compiled": (None, {"modules_to_save": ["lm_head"]}, lambda n: n.replace(".model.", ".model._orig_mod.", 1)),
    "ddp": (None, {"modules_to_save": ["lm_head"]}, lambda n: f"module.{n}"),
    "named": (None, {}, lambda n: n.replace(".weight", ".mine.weight")),
}


@pytest.mark.parametrize("option", EVALUATED)
@real_file(
    8, family="Qwen2", option="evaluate BASE+ADAPTER: resized, wrapped, another name", expected="PEFT, unmerged",
    before="wrongly refused",
)  # fmt: skip
def test_evaluating_an_adapter(tmp_path: Path, option: str) -> None:
    rows, config, rename = EVALUATED[option]
    base = base_of(tmp_path, vocab_size=256)
    ids = with_bytes(base)
    tuned = adapter(loaded(base, rows), tmp_path / "a", target_modules=["q_proj"], **config)
    if rename is not None:
        respelled(tmp_path / "a", rename)
    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": "abcdefgh"}), encoding="utf-8")
    outcome = cli("evaluate", f"{base}+{tmp_path / 'a'}", tmp_path / "rows.jsonl", "--json", "--no-cache")
    assert outcome.code == 0, outcome.said
    assert json.loads(outcome.out)["results"][0]["loss"]["value"] == pytest.approx(loss_of(tuned, ids), abs=2e-5)


@real_file(
    8, family="Qwen2", option="route build of an adapter that trains rows alone", expected="the message",
    before="wrongly refused", now="refused, true cause",
)  # fmt: skip
def test_rows_cannot_be_routed(tmp_path: Path) -> None:
    base = base_of(tmp_path)
    for name in "ab":
        adapter(loaded(base), tmp_path / name, target_modules=["q_proj"], trainable_token_indices=[7])
    refused(routed(tmp_path), "trains rows of", "embed_tokens")


def routed(tmp_path: Path) -> Any:
    models = "".join(f"  - {{model: {tmp_path / name}, name: {name}}}\n" for name in "ab")
    recipe = f"base_model: {tmp_path / 'base'}\nmodels:\n{models}routing: {{local: arrow, top_k: 2}}\n"
    (tmp_path / "r.yaml").write_text(recipe, encoding="utf-8")
    return cli("route", "build", tmp_path / "r.yaml", tmp_path / "out", "-q")


@real_file(
    8, family="Qwen2", option="route build of adapters of compiled and distributed modules", expected="it builds",
    before="wrongly refused",
)  # fmt: skip
def test_routing_wrapped_adapters(tmp_path: Path) -> None:
    base = base_of(tmp_path, vocab_size=256)
    with_bytes(base)
    for name, seed in (("a", 1), ("b", 2)):
        adapter(loaded(base), tmp_path / name, seed=seed, target_modules=["q_proj"])
    respelled(tmp_path / "a", lambda n: n.replace(".model.", ".model._orig_mod.", 1))
    respelled(tmp_path / "b", lambda n: f"module.{n}")
    outcome = routed(tmp_path)
    assert outcome.code == 0, outcome.said


@real_file(
    8, family="Qwen2", option="the doctor on adapters of a resized vocabulary", expected="it reads them",
    before="wrong cause named",
)  # fmt: skip
def test_the_doctor_on_a_resized_vocabulary(tmp_path: Path) -> None:
    base = base_of(tmp_path)
    for name, seed in (("a", 1), ("b", 2)):
        adapter(loaded(base, 68), tmp_path / name, seed=seed, target_modules=["q_proj"], modules_to_save=BOTH)
    experts = [word for name in "ab" for word in ("-e", f"{name}={tmp_path / name}")]
    outcome = cli("doctor", base, *experts)
    assert outcome.code == 0, outcome.said


@real_file(8, family="Qwen2", option="inspect an adapter of rows", expected="the file", before="wrongly refused")
def test_inspecting_rows(tmp_path: Path) -> None:
    adapter(loaded(base_of(tmp_path)), tmp_path / "a", target_modules=["q_proj"], trainable_token_indices=[7, 9])
    outcome = cli("inspect", tmp_path / "a", "--json")
    assert outcome.code == 0, outcome.said
    assert json.loads(outcome.out)["adapter"]["rows"] == {"model.embed_tokens.weight": 2}


@real_file(
    8, family="Qwen2", option="--as-adapter of rows trained alone", expected="the message", before="wrongly refused",
    now="refused, true cause",
)  # fmt: skip
def test_rows_as_an_adapter(tmp_path: Path) -> None:
    base = base_of(tmp_path)
    adapter(loaded(base), tmp_path / "a", target_modules=["q_proj"], trainable_token_indices=[7])
    outcome = cli("merge", base, tmp_path / "out", "-e", f"a={tmp_path / 'a'}", "--as-adapter", "cat")
    refused(outcome, "trains rows of 'model.embed_tokens.weight'", "--as-adapter")


@real_file(
    8, family="Qwen2", option="a learned merge of adapters of a resized vocabulary", expected="the message",
    before="wrong cause named", now="refused, true cause",
)  # fmt: skip
def test_learning_on_a_resized_vocabulary(tmp_path: Path) -> None:
    base = base_of(tmp_path, vocab_size=258)
    with_bytes(base)
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "abcd", "response": "efgh"}), encoding="utf-8")
    named: list[str] = []
    for name, seed in (("a", 1), ("b", 2)):
        adapter(loaded(base, 264), tmp_path / name, seed=seed, target_modules=["q_proj"], modules_to_save=BOTH)
        named += ["-e", f"{name}={tmp_path / name}", "--calibration", f"{name}={tmp_path / 'rows.jsonl'}"]
    outcome = cli("merge", base, tmp_path / "out", *named, "--method", "expert_merging")
    refused(outcome, "258 rows", "264", "resize the base")


STACKED: dict[str, tuple[int | None, bool, dict[str, Any]]] = {
    "grown, both saved": (70, False, {"modules_to_save": BOTH}),
    "cut, both saved": (60, False, {"modules_to_save": BOTH}),
    "tied, grown, untouched": (70, True, {}),
    "tied, grown, LoRA on the embeddings": (70, True, {"target_modules": ["embed_tokens"]}),
    "tied, grown, embeddings trained": (70, True, {"modules_to_save": ["embed_tokens"]}),
    "tied, rows": (None, True, {"trainable_token_indices": [5, 9]}),
    "tied, grown, rows": (70, True, {"trainable_token_indices": [5, 66]}),
}


def stacked(tmp_path: Path, option: str) -> tuple[str, Any]:
    rows, tied, config = STACKED[option]
    tiny("Qwen2", tie_word_embeddings=tied).save_pretrained(tmp_path / "base")
    settings: dict[str, Any] = {"target_modules": ["q_proj"], **config}
    tuned = adapter(loaded(tmp_path / "base", rows), tmp_path / "a", **settings)
    return f"{tmp_path / 'base'}+{tmp_path / 'a'}", tuned


@pytest.mark.parametrize("option", STACKED)
@real_file(
    8, family="Qwen2", option="BASE+ADAPTER as expert, its vocabulary resized or trained in part",
    expected="PEFT, unmerged", before="wrongly refused",
)  # fmt: skip
def test_an_expert_with_an_adapter_that_resized(tmp_path: Path, option: str) -> None:
    both, tuned = stacked(tmp_path, option)
    outcome = cli("merge", tmp_path / "base", tmp_path / "out", "-e", f"x={both}", "--dtype", "float32")
    assert outcome.code == 0, outcome.said
    torch.testing.assert_close(logits(tmp_path / "out"), logits(tuned), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("option", STACKED)
@real_file(
    8, family="Qwen2", option="BASE+ADAPTER as base, its vocabulary resized or trained in part",
    expected="PEFT, unmerged", before="wrongly refused",
)  # fmt: skip
def test_a_base_with_an_adapter_that_resized(tmp_path: Path, option: str) -> None:
    both, tuned = stacked(tmp_path, option)
    adapter(loaded(tmp_path / "base"), tmp_path / "b", seed=2, target_modules=["v_proj"])
    words = ("-e", f"x={tmp_path / 'b'}", "--set", "weight=0", "--dtype", "float32")
    outcome = cli("merge", both, tmp_path / "out", *words)
    assert outcome.code == 0, outcome.said
    torch.testing.assert_close(logits(tmp_path / "out"), logits(tuned), atol=1e-5, rtol=1e-4)
    assert hf.AutoConfig.from_pretrained(tmp_path / "out").vocab_size == logits(tuned).shape[-1]


@pytest.mark.parametrize("command", ["merge", "evaluate"])
@real_file(
    8, family="Qwen2, tied", option="resized, embeddings trained and saved alone: the head's new rows are in no file",
    expected="the message", before="wrong cause named", now="refused, true cause",
)  # fmt: skip
def test_resized_embeddings_trained_apart_from_a_tied_head(tmp_path: Path, command: str) -> None:
    tiny("Qwen2", tie_word_embeddings=True, vocab_size=256).save_pretrained(tmp_path / "base")
    with_bytes(tmp_path / "base")
    model, save = loaded(tmp_path / "base", 264), {"save_embedding_layers": False}
    adapter(model, tmp_path / "a", save=save, target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": "abcdefgh"}), encoding="utf-8")
    if command == "merge":
        outcome = merged(tmp_path / "base", tmp_path / "out", x=tmp_path / "a")
    else:
        outcome = cli("evaluate", f"{tmp_path / 'base'}+{tmp_path / 'a'}", tmp_path / "rows.jsonl", "--no-cache")
    refused(outcome, "lm_head", "in no file", "give the resized base")


@pytest.mark.parametrize("target", BOTH)
@pytest.mark.parametrize("rows", [60, 70])
@real_file(
    8, family="Qwen2", option="resized, LoRA on embedding or head, the matrix not saved", expected="the message",
    before="wrong cause named", now="refused, true cause",
)  # fmt: skip
def test_factors_of_a_resized_matrix_that_is_not_saved(tmp_path: Path, rows: int, target: str) -> None:
    model, save = loaded(base_of(tmp_path), rows), {"save_embedding_layers": False}
    adapter(model, tmp_path / "a", save=save, target_modules=["q_proj", target])
    outcome = merged(tmp_path / "base", tmp_path / "out", x=tmp_path / "a")
    refused(outcome, f"trained on a vocabulary of {rows} rows", "base resized as in training")
    assert "another base" not in outcome.err


@pytest.mark.filterwarnings("ignore")
def test_an_adapter_of_another_size_names_its_base(tmp_path: Path) -> None:
    tiny("Mistral").save_pretrained(tmp_path / "base")
    tiny("Mistral", hidden_size=64).save_pretrained(tmp_path / "wide")
    adapter(hf.AutoModelForCausalLM.from_pretrained(tmp_path / "wide"), tmp_path / "a", target_modules=["q_proj"])
    refused(merged(tmp_path / "base", tmp_path / "out", x=tmp_path / "a"), "other sizes", repr(str(tmp_path / "wide")))


@pytest.mark.parametrize("command", ["evaluate", "expert_merging", "generate"])
@real_file(
    8, family="Qwen2", option="tokens added to the tokenizer, the model not resized", expected="the message",
    before="wrong cause named", now="refused, true cause",
)  # fmt: skip
def test_tokens_without_a_row(tmp_path: Path, command: str) -> None:
    base = base_of(tmp_path, vocab_size=256)
    with_bytes(base)
    tokenizer = hf.AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(["<call>"])
    tokenizer.save_pretrained(base)
    row = {"prompt": "ab<call>"} if command == "generate" else {"prompt": "ab", "response": "c<call>d"}
    (tmp_path / "rows.jsonl").write_text("\n".join([json.dumps(row)] * 4), encoding="utf-8")
    adapter(loaded(base), tmp_path / "a", target_modules=["q_proj"])
    if command == "evaluate":
        outcome = cli("evaluate", base, tmp_path / "rows.jsonl", "--no-cache")
    else:
        data = "generate" if command == "generate" else "given"
        words = ("--calibration", f"a={tmp_path / 'rows.jsonl'}", "--set", "steps=1", "--set", f"responses={data}")
        outcome = cli(
            "merge", base, tmp_path / "out", "-e", f"a={tmp_path / 'a'}", "--method", "expert_merging", *words
        )
    refused(outcome, "'<call>'", "256 tokens", "resized to its tokenizer")
