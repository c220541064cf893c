"""What makes an expert usable travels or is named: tokens, templates, rope and its kin, preprocessors, the base."""

import importlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import consilience as cs
from consilience.errors import InputError
from tests.real_files.support import (
    SIZES,
    Outcome,
    adapter,
    cli,
    hf,
    logits,
    merged,
    moved,
    real_file,
    refused,
    state,
    tiny,
)

tok: Any = importlib.import_module("tokenizers")
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>{% endif %}"
)
WORDS = ["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(45))]


def tokenizer(folder: Path, *added: str, template: str | None = None, words: list[str] = WORDS, **roles: str) -> Any:
    """Save a word tokenizer of 48 tokens and those added to it."""
    core = tok.Tokenizer(tok.models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = tok.pre_tokenizers.WhitespaceSplit()
    made = hf.PreTrainedTokenizerFast(**{"tokenizer_object": core, "bos_token": "<s>", "eos_token": "</s>"} | roles)
    if added:
        made.add_special_tokens({"additional_special_tokens": list(added)})
    made.chat_template = template
    made.save_pretrained(folder)
    return made


def edit(folder: Path, name: str = "config.json", drop: tuple[str, ...] = (), **values: Any) -> None:
    """Change keys of a JSON file."""
    path = folder / name
    held = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({key: value for key, value in held.items() if key not in drop} | values))


def read(folder: Path, name: str = "config.json") -> dict[str, Any]:
    return json.loads((folder / name).read_text())


def pair(tmp_path: Path, family: str = "Llama", head: str = "ForCausalLM", **config: Any) -> tuple[Path, Path]:
    """Save a base and a full fine-tune of it."""
    base, expert = tmp_path / "base", tmp_path / "e"
    model = tiny(family, head, **config)
    model.save_pretrained(base)
    moved(model, 1).save_pretrained(expert)
    return base, expert


def warned(outcome: Outcome, *words: str) -> None:
    """Assert that the merge was done, and that one warning before it has all the words."""
    assert outcome.code == 0, outcome.said
    lines = [line for line in outcome.err.splitlines() if line.startswith("consilience: warning: ")]
    assert any(all(word in line for word in words) for line in lines), outcome.err


def silent(outcome: Outcome) -> None:
    """Assert that the merge was done without a warning."""
    assert outcome.code == 0, outcome.said
    assert "warning" not in outcome.said


# ----------------------------------------------------------------------------------------------------------------------
# Tokens.


def chat_pair(tmp_path: Path, family: str = "Qwen2") -> tuple[Path, Path]:
    """Save a base with padded rows, and a chat expert with tokens in them, a template and another end of turn."""
    base, expert = pair(tmp_path, family)
    tokenizer(base)
    tokenizer(expert, "<|im_start|>", "<|im_end|>", template=CHAT, eos_token="<|im_end|>")
    edit(expert, "generation_config.json", eos_token_id=[48, 2])
    return base, expert


@real_file(
    7,
    family="Qwen2",
    option="two experts' tokens in the same padded rows",
    expected="a formula (the rows)",
    before="wrong numbers",
    now="refused, true cause",
)
def test_tokens_that_share_a_row(tmp_path: Path) -> None:
    base, chat = chat_pair(tmp_path)
    tool = tmp_path / "tool"
    moved(tiny("Qwen2"), 2).save_pretrained(tool)
    tokenizer(tool, "<tool_call>", "</tool_call>")
    outcome = merged(base, tmp_path / "out", chat=chat, tool=tool)
    refused(outcome, "48", "'<|im_end|>' in chat", "'<tool_call>' in tool", "embed_tokens", "private")
    refused(cli("check", base, "-e", f"chat={chat}", "-e", f"tool={tool}"), "'<tool_call>' in tool")
    assert not (tmp_path / "out").exists()
    apart = [word for name in ("model.embed_tokens.weight", "lm_head.weight") for word in ("--private", name)]
    assert merged(base, tmp_path / "out", *apart, chat=chat, tool=tool).code == 0
    rows = [state(folder)["model.embed_tokens.weight"][48] for folder in (tmp_path / "out", base)]
    torch.testing.assert_close(rows[0], rows[1])


@real_file(
    7,
    family="Qwen2",
    option="a chat expert alone: tokenizer: NAME",
    expected="transformers, loading the output",
    before="silent loss",
)
def test_a_chat_expert_s_tokens_travel(tmp_path: Path) -> None:
    base, chat = chat_pair(tmp_path)
    left = merged(base, tmp_path / "left", chat=chat)
    for words in ("adds 2 tokens: '<|im_end|>' (48)", "tokenizer: chat", "chat_template: chat", "eos_token_id [48, 2]"):
        assert words in left.out, left.out
    assert merged(base, tmp_path / "out", "--tokenizer", "chat", chat=chat).code == 0
    own, out = (hf.AutoTokenizer.from_pretrained(folder) for folder in (chat, tmp_path / "out"))
    turns = [{"role": "user", "content": "w1 w2"}]
    assert out.apply_chat_template(turns) == own.apply_chat_template(turns)
    assert (out("w3 <|im_end|>").input_ids, out.eos_token_id) == (own("w3 <|im_end|>").input_ids, 48)
    model = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.generation_config.eos_token_id == [48, 2]
    assert model.config.eos_token_id == 48


@real_file(
    7,
    family="Llama",
    option="a reserved token renamed and trained",
    expected="transformers, loading the output",
    before="silent loss",
)
def test_a_reserved_row_that_an_expert_uses(tmp_path: Path) -> None:
    base, expert = pair(tmp_path)
    spare = [*WORDS[:40], *(f"<|reserved_special_token_{i}|>" for i in range(8))]
    tokenizer(base, words=spare)
    tokenizer(expert, words=[*spare[:41], "<|tool|>", *spare[42:]])
    outcome = merged(base, tmp_path / "out", "--tokenizer", "e", e=expert)
    assert outcome.code == 0, outcome.said
    assert hf.AutoTokenizer.from_pretrained(tmp_path / "out")("<|tool|>").input_ids == [41]
    assert "'<|tool|>', in the" in merged(base, tmp_path / "left", e=expert).out


@real_file(
    7,
    family="Llama",
    option="another vocabulary of the same size",
    expected="a formula (the rows)",
    before="wrong numbers",
    now="refused, true cause",
)
def test_another_vocabulary_of_the_same_size(tmp_path: Path) -> None:
    base, expert = pair(tmp_path)
    tokenizer(base)
    tokenizer(expert, words=[*WORDS[:10], *reversed(WORDS[10:])])
    refused(merged(base, tmp_path / "out", e=expert), "token id 10", "'w7' in base", "'w44' in e", "private")


@real_file(
    7,
    family="Llama",
    option="tokens swapped in rows that the expert left alone",
    expected="a formula (the rows)",
    before="silent loss",
)
def test_tokens_of_rows_that_no_one_changed(tmp_path: Path) -> None:
    base, expert = tmp_path / "base", tmp_path / "e"
    model = tiny("Llama")
    model.save_pretrained(base)
    moved(model, 1, only=lambda name: "proj" in name).save_pretrained(expert)
    tokenizer(base)
    tokenizer(expert, words=[*WORDS[:-1], "<|im_end|>"])
    outcome = merged(base, tmp_path / "out", e=expert)
    assert outcome.code == 0, outcome.said
    assert "47 is '<|im_end|>', in the base 'w44'" in outcome.out
    torch.testing.assert_close(logits(tmp_path / "out"), logits(model), atol=1e-5, rtol=1e-4)


def sentencepiece(path: Path, *pieces: str) -> None:
    """Write a SentencePiece model, byte for byte as the library does: a piece's text and its score."""
    body = b""
    for piece in pieces:
        text = piece.encode()
        inner = b"\x0a" + bytes([len(text)]) + text + b"\x15\x00\x00\x00\x00"
        body += b"\x0a" + bytes([len(inner)]) + inner
    path.write_bytes(body)


@real_file(
    7,
    family="T5",
    option="spiece.model with other pieces",
    expected="the files",
    before="wrong numbers",
    now="refused, true cause",
)
def test_sentencepiece_pieces(tmp_path: Path) -> None:
    base, expert = pair(tmp_path, "T5", "ForConditionalGeneration", decoder_start_token_id=0)
    sentencepiece(base / "spiece.model", "<pad>", "</s>", "<unk>", "▁the", "▁of")
    sentencepiece(expert / "spiece.model", "<pad>", "</s>", "<unk>", "▁of", "▁the")
    refused(merged(base, tmp_path / "out", e=expert), "'▁of' in e", "'▁the' in base", "shared.weight")
    shutil.copy(base / "spiece.model", expert / "spiece.model")
    silent(merged(base, tmp_path / "out", e=expert))


@real_file(
    7, family="GPT2", option="vocab.json, merges.txt and added_tokens.json", expected="the files", before="silent loss"
)
def test_tokens_added_beside_a_slow_tokenizer(tmp_path: Path) -> None:
    base, expert = pair(tmp_path, "GPT2", "LMHeadModel", n_positions=64, n_embd=32, n_layer=2, n_head=4)
    for folder in (base, expert):
        (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(WORDS)}))
        (folder / "merges.txt").write_text("#version: 0.2\nw 1\nw 2\n")
        edit(folder, "tokenizer_config.json", tokenizer_class="GPT2Tokenizer", unk_token="<unk>", bos_token="<s>",
             eos_token="</s>")  # fmt: skip
    (expert / "added_tokens.json").write_text(json.dumps({"<sep>": 48}))
    outcome = merged(base, tmp_path / "out", e=expert)
    assert "e adds 1 token: '<sep>' (48)" in outcome.out, outcome.said
    assert merged(base, tmp_path / "own", "--tokenizer", "e", e=expert).code == 0
    assert read(tmp_path / "own", "added_tokens.json") == {"<sep>": 48}


@real_file(
    7,
    family="Bert",
    option="vocab.txt whose [unused1] became a token",
    expected="transformers, loading the output",
    before="silent loss",
)
def test_an_unused_wordpiece_that_an_expert_uses(tmp_path: Path) -> None:
    base, expert = pair(tmp_path, "Bert", "ForMaskedLM")
    words = ["[PAD]", "[unused1]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the"]
    for folder, first in ((base, "[unused1]"), (expert, "[ent]")):
        (folder / "vocab.txt").write_text("\n".join([words[0], first, *words[2:]]) + "\n")
        edit(folder, "tokenizer_config.json", tokenizer_class="BertTokenizer")
    outcome = merged(base, tmp_path / "out", "--tokenizer", "e", e=expert)
    assert outcome.code == 0, outcome.said
    assert hf.AutoTokenizer.from_pretrained(tmp_path / "out").convert_tokens_to_ids("[ent]") == 1


@real_file(
    7,
    family="Llama",
    option="chat_template: NAME, a list in tokenizer_config.json",
    expected="transformers, loading the output",
    before="silent loss",
)
def test_a_template_alone(tmp_path: Path) -> None:
    base, expert = pair(tmp_path)
    tokenizer(base, template="{{ 'old' }}")
    tokenizer(expert)
    named = [{"name": "default", "template": "{{ 'new' }}"}, {"name": "tool_use", "template": "{{ 'tool' }}"}]
    edit(expert, "tokenizer_config.json", chat_template=named)
    (base / "chat_template.jinja").unlink(missing_ok=True)
    edit(base, "tokenizer_config.json", chat_template="{{ 'old' }}")
    assert "chat_template: e" in merged(base, tmp_path / "left", e=expert).out
    assert merged(base, tmp_path / "out", "--chat-template", "e", e=expert).code == 0
    out = hf.AutoTokenizer.from_pretrained(tmp_path / "out")
    turns = [{"role": "user", "content": "x"}]
    assert out.apply_chat_template(turns, tokenize=False) == "new"
    assert out.apply_chat_template(turns, tokenize=False, chat_template="tool_use") == "tool"


@real_file(
    7,
    family="Qwen2",
    option="LoRA folder with tokenizer, template and eos: tokenizer: NAME, --as-adapter",
    expected="transformers, loading the output",
    before="silent loss",
)
def test_an_adapter_s_tokenizer_travels(tmp_path: Path) -> None:
    base = tiny("Qwen2", tie_word_embeddings=False)
    base.save_pretrained(tmp_path / "base")
    tokenizer(tmp_path / "base")
    adapter(base, tmp_path / "a", target_modules=["q_proj"])
    tokenizer(tmp_path / "a", "<|im_start|>", "<|im_end|>", template=CHAT, eos_token="<|im_end|>")
    for out, more in (("full", ()), ("lora", ("--as-adapter", "cat"))):
        outcome = cli(
            "merge", tmp_path / "base", tmp_path / out, "-e", f"a={tmp_path / 'a'}", "--tokenizer", "a", *more
        )
        assert outcome.code == 0, outcome.said
        found = hf.AutoTokenizer.from_pretrained(tmp_path / out)
        assert (found.eos_token_id, found.chat_template) == (48, CHAT)
    assert hf.AutoModelForCausalLM.from_pretrained(tmp_path / "full").generation_config.eos_token_id == 48


@real_file(
    7,
    family="Mistral",
    option="evaluate BASE+ADAPTER with the adapter's own template",
    expected="PEFT, unmerged",
    before="wrong numbers",
)
def test_an_adapter_is_evaluated_on_its_own_template(tmp_path: Path) -> None:
    base = tiny("Mistral")
    base.save_pretrained(tmp_path / "base")
    tokenizer(tmp_path / "base")
    tuned = adapter(base, tmp_path / "a", target_modules=["q_proj"])
    own = tokenizer(tmp_path / "a", "<|im_start|>", "<|im_end|>", template=CHAT)
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "w5 w6", "response": " w7 w8"}) + "\n")
    outcome = cli("evaluate", f"{tmp_path / 'base'}+{tmp_path / 'a'}", f"t={rows}", "--json", "--no-cache")
    assert outcome.code == 0, outcome.said
    ids = own("<|im_start|> w5 w6 <|im_end|> <|im_start|> w7 w8 <|im_end|>").input_ids
    scores = logits(tuned, torch.tensor([ids])).log_softmax(-1)[0]
    expected = -sum(scores[i - 1, ids[i]].item() for i in range(5, len(ids))) / (len(ids) - 5)
    assert json.loads(outcome.out)["results"][0]["loss"]["value"] == pytest.approx(expected, abs=1e-4)


@real_file(
    7,
    family="Llama",
    option="BPE merges written as pairs, and as texts",
    expected="transformers, loading both",
    before="wrong cause named",
)
def test_one_tokenizer_written_in_two_ways(tmp_path: Path) -> None:
    base, expert = pair(tmp_path)
    core = tok.Tokenizer(tok.models.BPE({"a": 0, "b": 1, "c": 2, "ab": 3, "abc": 4}, [("a", "b"), ("ab", "c")]))
    for folder in (base, expert):
        hf.PreTrainedTokenizerFast(tokenizer_object=core).save_pretrained(folder)
    held = read(expert, "tokenizer.json")
    merges = [m if isinstance(m, str) else " ".join(m) for m in held["model"]["merges"]]
    edit(expert, "tokenizer.json", model=held["model"] | {"merges": merges, "ignore_merges": False}, padding=None)
    (expert / "tokenizer.json").write_text(json.dumps(read(expert, "tokenizer.json"), indent=7))
    assert "rules" not in cli("doctor", base, "-e", f"e={expert}", "-q").out
    assert "note" not in merged(base, tmp_path / "out", "--strict", e=expert).said
    edit(expert, "tokenizer.json", model=held["model"] | {"merges": merges[:1]})
    assert "cuts text by other rules" in merged(base, tmp_path / "other", e=expert).out


@real_file(
    7,
    family="Qwen2",
    option="doctor, of experts whose tokens share rows",
    expected="a formula (the rows)",
    before="silent loss",
)
def test_the_doctor_names_tokens_that_share_a_row(tmp_path: Path) -> None:
    base, chat = chat_pair(tmp_path)
    tool = tmp_path / "tool"
    moved(tiny("Qwen2"), 2).save_pretrained(tool)
    tokenizer(tool, "<tool_call>")
    outcome = cli("doctor", base, "-e", f"chat={chat}", "-e", f"tool={tool}", "-q", "--json")
    assert outcome.code == 0, outcome.said
    found = {one["kind"]: one for one in json.loads(outcome.out)["findings"]}
    assert found["token-rows"]["severity"] == "stop"
    assert "'<tool_call>' in tool" in found["token-rows"]["what"]
    assert found["chat-template"]["experts"] == ["chat"]


@real_file(
    7,
    family="Llama",
    option="a chosen tokenizer with more tokens than rows",
    expected="the files",
    before="silent loss",
    now="refused, true cause",
)
def test_tokens_without_rows(tmp_path: Path) -> None:
    base, expert = pair(tmp_path)
    tokenizer(base)
    tokenizer(expert, *(f"<t{i}>" for i in range(20)))
    assert merged(base, tmp_path / "out", e=expert).code == 0
    refused(merged(base, tmp_path / "no", "--tokenizer", "e", e=expert), "'<t19>' (67)", "64 rows")


@real_file(
    7,
    family="Mistral",
    option="evaluate with chat_template.jinja alone in the adapter's folder",
    expected="PEFT, unmerged",
    before="wrong numbers",
)
def test_an_adapter_with_a_template_alone(tmp_path: Path) -> None:
    base = tiny("Mistral")
    base.save_pretrained(tmp_path / "base")
    own = tokenizer(tmp_path / "base")
    tuned = adapter(base, tmp_path / "a", target_modules=["q_proj"])
    (tmp_path / "a" / "chat_template.jinja").write_text("{% for m in messages %}w9 {{ m.content }} {% endfor %}")
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "w5 w6", "response": "w7 w8"}) + "\n")
    outcome = cli("evaluate", f"{tmp_path / 'base'}+{tmp_path / 'a'}", f"t={rows}", "--json", "--no-cache")
    assert outcome.code == 0, outcome.said
    ids = own("w9 w5 w6 w9 w7 w8").input_ids
    scores = logits(tuned, torch.tensor([ids])).log_softmax(-1)[0]
    expected = -sum(scores[i - 1, ids[i]].item() for i in range(3, 6)) / 3  # what the template writes for the turn
    assert json.loads(outcome.out)["results"][0]["loss"]["value"] == pytest.approx(expected, abs=1e-4)


@real_file(
    7,
    family="Llama",
    option="experts that were resized for tokens of their own: the same ids, other tokens",
    expected="transformers, loading the output",
    before="wrongly refused",
)
def test_rows_that_experts_added(tmp_path: Path) -> None:
    base = tiny("Llama")
    base.save_pretrained(tmp_path / "base")
    words = [*WORDS, *(f"v{i}" for i in range(16))]
    tokenizer(tmp_path / "base", words=words)
    for seed, (name, token) in enumerate(
        {"chat": "<|im_start|>", "twin": "<|im_start|>", "tool": "<tool_call>"}.items()
    ):
        model = tiny("Llama")
        model.resize_token_embeddings(65)
        moved(model, seed + 1).save_pretrained(tmp_path / name)
        tokenizer(tmp_path / name, token, words=words)
    both = {"chat": tmp_path / "chat", "tool": tmp_path / "tool"}
    refused(merged(tmp_path / "base", tmp_path / "no", **both), "token id 64", "'<tool_call>' in tool", "private")
    agreed = {"chat": tmp_path / "chat", "twin": tmp_path / "twin"}
    outcome = merged(tmp_path / "base", tmp_path / "out", "--tokenizer", "chat", **agreed)
    assert outcome.code == 0, outcome.said
    assert hf.AutoTokenizer.from_pretrained(tmp_path / "out")("<|im_start|>").input_ids == [64]
    assert hf.AutoModelForCausalLM.from_pretrained(tmp_path / "out").get_input_embeddings().weight.shape[0] == 65


# ----------------------------------------------------------------------------------------------------------------------
# What the model computes.


@real_file(
    7,
    family="Qwen2",
    option="rope, context and eps of an expert",
    expected="transformers, loading the output",
    before="silent loss",
    now="warned",
)
def test_configs_that_disagree(tmp_path: Path) -> None:
    base, expert = pair(tmp_path, "Qwen2")
    edit(
        expert,
        rope_parameters={"rope_theta": 1e6, "rope_type": "default"},
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
    )
    outcome = merged(base, tmp_path / "out", e=expert)
    warned(outcome, "e: rope", "rope_theta 1e+06", "in the base 10000", "config: e")
    warned(outcome, "context length", "max_position_embeddings 4096")
    warned(outcome, "norm epsilon", "rms_norm_eps 1e-05")
    assert "rope_theta" in (tmp_path / "out" / "README.md").read_text()
    kinds = {one["kind"]: one["level"] for one in read(tmp_path / "out", "consilience/lineage.json")["differences"]}
    assert kinds == {"rope": "warning", "context": "warning", "eps": "warning"}
    for command in (("check", base), ("merge", base, tmp_path / "no")):
        refused(cli(*command, "-e", f"e={expert}", "--strict"), "rope_theta 1e+06", "config: e")
    assert "rope_theta" in cli("merge", base, tmp_path / "no", "-e", f"e={expert}", "--dry-run").out
    assert "rope_theta" in cli("doctor", base, "-e", f"e={expert}", "-q").out
    silent(merged(base, tmp_path / "meant", "--strict", "--config", "base", e=expert))
    silent(merged(base, tmp_path / "own", "--strict", "--config", "e", e=expert))
    theirs, taken = (hf.AutoConfig.from_pretrained(folder) for folder in (expert, tmp_path / "own"))
    assert (taken.rope_parameters, taken.rms_norm_eps) == (theirs.rope_parameters, 1e-5)
    values = ("--config", "rope_theta=1e6", "--config", "rms_norm_eps=1e-5", "--config", "max_position_embeddings=4096")
    silent(merged(base, tmp_path / "values", "--strict", *values, e=expert))
    torch.testing.assert_close(logits(tmp_path / "values"), logits(expert), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(logits(tmp_path / "own"), logits(expert), atol=1e-5, rtol=1e-4)


@real_file(
    7,
    family="Mistral",
    option="sliding_window 4, and none",
    expected="transformers, loading the output",
    before="silent loss",
    now="warned",
)
def test_a_window_that_an_expert_gave_up(tmp_path: Path) -> None:
    base, expert = pair(tmp_path, "Mistral", sliding_window=4)
    edit(expert, drop=("layer_types",), sliding_window=None)
    warned(merged(base, tmp_path / "out", e=expert), "sliding_window not set, in the base 4")
    silent(merged(base, tmp_path / "own", "--config", "e", e=expert))
    torch.testing.assert_close(logits(tmp_path / "own"), logits(expert), atol=1e-5, rtol=1e-4)


@real_file(
    7,
    family="Gemma3",
    option="rope of both kinds of layer, in the older spelling",
    expected="transformers, reading both configs",
    before="silent loss",
)
def test_two_spellings_of_one_rope(tmp_path: Path) -> None:
    base, expert = tmp_path / "base", tmp_path / "e"
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8,
             "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}  # fmt: skip
    model = hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**sizes))
    model.save_pretrained(base)
    moved(model, 1).save_pretrained(expert)
    edit(expert, drop=("rope_parameters",), rope_theta=1000000, rope_local_base_freq=10000.0, rope_scaling=None)
    silent(merged(base, tmp_path / "out", "--strict", e=expert))
    edit(expert, rope_local_base_freq=5000.0)
    warned(merged(base, tmp_path / "other", e=expert), "sliding_attention.rope_theta 5000")


@real_file(
    7,
    family="GPTNeoX",
    option="rotary_pct and rotary_emb_base",
    expected="transformers, reading both configs",
    before="silent loss",
)
def test_the_older_spelling_of_a_part_of_rope(tmp_path: Path) -> None:
    base, expert = pair(tmp_path, "GPTNeoX")
    edit(expert, drop=("rope_parameters",), rotary_pct=0.25, rotary_emb_base=10000)
    silent(merged(base, tmp_path / "out", "--strict", e=expert))
    edit(expert, rotary_pct=0.5)
    warned(merged(base, tmp_path / "other", e=expert), "partial_rotary_factor 0.5, in the base 0.25")


@real_file(
    7,
    family="Llama",
    option="llama3 rope scaling, older spelling against rope_parameters; set by config: {...}",
    expected="transformers, loading the output",
    before="silent loss",
    now="warned",
)
def test_scaled_rope_is_set_in_the_spelling_that_counts(tmp_path: Path) -> None:
    base, expert = pair(tmp_path)
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
    edit(expert, drop=("rope_parameters",), rope_theta=5e5, rope_scaling={"rope_type": "llama3", **scaling})
    warned(merged(base, tmp_path / "left", e=expert), "rope_type llama3, in the base default")
    recipe = tmp_path / "r.yaml"
    recipe.write_text(json.dumps({
        "method": "task_arithmetic", "base_model": str(base), "models": [{"model": str(expert)}],
        "config": {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **scaling}},
    }))  # fmt: skip
    silent(cli("merge", recipe, tmp_path / "out", "--strict"))
    torch.testing.assert_close(logits(tmp_path / "out"), logits(expert), atol=1e-5, rtol=1e-4)


@real_file(
    7,
    family="T5",
    option="feed_forward_proj and layer_norm_epsilon",
    expected="the files",
    before="silent loss",
    now="warned",
)
def test_an_encoder_decoder_with_another_activation(tmp_path: Path) -> None:
    base, expert = pair(tmp_path, "T5", "ForConditionalGeneration", decoder_start_token_id=0)
    edit(expert, feed_forward_proj="gelu", dense_act_fn="gelu", layer_norm_epsilon=1e-5)
    outcome = merged(base, tmp_path / "out", e=expert)
    warned(outcome, "activation", "dense_act_fn gelu, in the base relu")
    warned(outcome, "norm epsilon")
    assert merged(base, tmp_path / "own", "--config", "e", e=expert).code == 0
    assert hf.AutoConfig.from_pretrained(tmp_path / "own").dense_act_fn == "gelu"


@real_file(
    7,
    family="Bert",
    option="gelu by two names, and another function",
    expected="transformers' functions",
    before="silent loss",
    now="warned",
)
def test_names_of_one_activation(tmp_path: Path) -> None:
    base, expert = pair(tmp_path, "Bert", "ForMaskedLM")
    edit(expert, hidden_act="gelu_python")
    silent(merged(base, tmp_path / "out", "--strict", e=expert))
    edit(expert, hidden_act="relu", dtype="bfloat16", transformers_version="4.40.0", hidden_dropout_prob=0.3)
    outcome = merged(base, tmp_path / "other", e=expert)
    warned(outcome, "hidden_act relu, in the base gelu")
    assert outcome.err.count("warning") == 1


@real_file(
    7,
    family="Llama",
    option="heads cut otherwise in weights of one shape; Mistral's name",
    expected="the files",
    before="silent loss",
    now="warned",
)
def test_heads_and_architecture(tmp_path: Path) -> None:
    base, expert = pair(tmp_path, num_key_value_heads=4)
    edit(expert, num_attention_heads=2, num_key_value_heads=2, head_dim=16)
    warned(merged(base, tmp_path / "out", e=expert), "attention heads", "num_attention_heads 2, in the base 4")
    edit(expert, num_attention_heads=4, num_key_value_heads=4, head_dim=8, model_type="mistral")
    warned(merged(base, tmp_path / "other", e=expert), "architecture", "model_type mistral, in the base llama")


@real_file(
    7,
    family="Gemma2",
    option="soft caps and query_pre_attn_scalar",
    expected="the files",
    before="silent loss",
    now="warned",
)
def test_caps_and_scales(tmp_path: Path) -> None:
    base, expert = pair(tmp_path, "Gemma2", head_dim=8)
    edit(expert, attn_logit_softcapping=20.0, query_pre_attn_scalar=64)
    outcome = merged(base, tmp_path / "out", e=expert)
    warned(outcome, "attn_logit_softcapping 20, in the base 50", "query_pre_attn_scalar 64")
    assert merged(base, tmp_path / "own", "--config", "attn_logit_softcapping=20.0", e=expert).code == 0
    assert hf.AutoConfig.from_pretrained(tmp_path / "own").attn_logit_softcapping == 20.0


@real_file(
    7,
    family="ViT",
    option="preprocessor_config.json: other mean, size as a number",
    expected="transformers, loading the output",
    before="silent loss",
    now="warned",
)
def test_an_image_preprocessor(tmp_path: Path) -> None:
    base, expert = pair(tmp_path, "ViT", "ForImageClassification", image_size=32, patch_size=8)
    size = {"height": 32, "width": 32}
    for folder, mean in ((base, 0.5), (expert, 0.5)):
        hf.ViTImageProcessor(size=size, image_mean=[mean] * 3).save_pretrained(folder)
    edit(expert, "preprocessor_config.json", size=32)
    silent(merged(base, tmp_path / "out", "--strict", e=expert))
    edit(expert, "preprocessor_config.json", image_mean=[0.48, 0.45, 0.4])
    warned(merged(base, tmp_path / "left", e=expert), "preprocessor", "image_mean [0.48, 0.45, 0.4]")
    assert merged(base, tmp_path / "own", "--config", "e", e=expert).code == 0
    assert list(hf.AutoImageProcessor.from_pretrained(tmp_path / "own").image_mean) == [0.48, 0.45, 0.4]


@real_file(
    7,
    family="Whisper",
    option="feature extractor, generation config",
    expected="transformers, loading the output",
    before="silent loss",
    now="warned",
)
def test_a_speech_model_s_files(tmp_path: Path) -> None:
    sizes = {"vocab_size": 64, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
             "decoder_attention_heads": 4, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "num_mel_bins": 8,
             "max_source_positions": 32, "max_target_positions": 32, "decoder_start_token_id": 1}  # fmt: skip
    base, expert = pair(tmp_path, "Whisper", "ForConditionalGeneration", **sizes)
    for folder in (base, expert):
        hf.WhisperFeatureExtractor(feature_size=8).save_pretrained(folder)
    edit(expert, "preprocessor_config.json", hop_length=80)
    edit(expert, "generation_config.json", suppress_tokens=[3, 4])
    outcome = merged(base, tmp_path / "out", e=expert)
    warned(outcome, "hop_length 80, in the base 160")
    assert "suppress_tokens [3, 4]" in outcome.out
    assert merged(base, tmp_path / "own", "--config", "e", e=expert).code == 0
    assert hf.GenerationConfig.from_pretrained(tmp_path / "own").suppress_tokens == [3, 4]
    assert hf.AutoFeatureExtractor.from_pretrained(tmp_path / "own").hop_length == 80


@real_file(
    7,
    family="Llava",
    option="rope inside text_config, set by config: {text_config: ...}",
    expected="transformers, loading the output",
    before="silent loss",
    now="warned",
)
def test_a_config_inside(tmp_path: Path) -> None:
    text = hf.LlamaConfig(**SIZES)
    vision = hf.CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
    )
    torch.manual_seed(0)
    model = hf.LlavaForConditionalGeneration(hf.LlavaConfig(text_config=text, vision_config=vision, image_token_id=60))
    base, expert = tmp_path / "base", tmp_path / "e"
    model.save_pretrained(base)
    moved(model, 1).save_pretrained(expert)
    inner = read(expert)["text_config"]
    edit(expert, text_config=inner | {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}})
    outcome = merged(base, tmp_path / "out", e=expert)
    warned(outcome, "text_config.rope_theta 500000, in the base 10000")
    assert outcome.err.count("warning") == 1
    recipe = tmp_path / "r.yaml"
    values = {"text_config": {"rope_theta": 5e5}}
    models = [{"model": str(expert)}]
    recipe.write_text(json.dumps({"method": "ties", "base_model": str(base), "models": models, "config": values}))
    silent(cli("merge", recipe, tmp_path / "own", "--strict"))
    assert hf.AutoConfig.from_pretrained(tmp_path / "own").text_config.rope_parameters["rope_theta"] == 5e5


@real_file(
    7,
    family="Llama",
    option="Python, mergekit's tokenizer keys, no base, and choices that are not there",
    expected="the files",
    before="silent loss",
)
def test_choices_of_recipes_and_of_python(tmp_path: Path) -> None:
    one, two = pair(tmp_path)
    tokenizer(one)
    tokenizer(two, "<sep>")
    edit(two, rms_norm_eps=1e-5)
    models = [{"model": str(one), "name": "one"}, {"model": str(two), "name": "two"}]
    recipe = tmp_path / "r.yaml"

    def made(**keys: Any) -> Outcome:
        recipe.write_text(json.dumps({"merge_method": "linear", "models": models, "parameters": {"weight": 1}} | keys))
        return cli("merge", recipe, tmp_path / "out", "--force")

    warned(made(), "two: norm epsilon", "rms_norm_eps 1e-05, in one 1e-06", "computes with one's")
    for keys in ({"tokenizer_source": "two"}, {"tokenizer": {"source": str(two)}}):
        assert made(**keys).code == 0
        assert "<sep>" in hf.AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab()
    assert made(tokenizer="union").code == 0
    assert "<sep>" in hf.AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab()
    refused(made(tokenizer="onion"), "no model 'onion'")
    refused(made(config="tow"), "no model 'tow'", "did you mean 'two'")
    refused(made(chat_template="two"), "no chat template")
    assert "did you mean 'rms_norm_eps'" in made(config={"rms_norm_epz": 1e-5}).out
    with pytest.warns(UserWarning, match="rms_norm_eps"):
        cs.merge(one, {"two": two}, tmp_path / "python")
    with pytest.raises(InputError, match="rms_norm_eps"):
        cs.merge(one, {"two": two}, tmp_path / "no", strict=True)
    cs.merge(one, {"two": two}, tmp_path / "own", strict=True, config={"rms_norm_eps": 1e-5}, tokenizer="two")
    torch.testing.assert_close(logits(tmp_path / "own"), logits(two), atol=1e-5, rtol=1e-4)


# ----------------------------------------------------------------------------------------------------------------------
# The base that an adapter names.


def on_base(tmp_path: Path, folder: str, seed: int = 0) -> Path:
    """Save a base and an adapter on it that names it by its path."""
    place = tmp_path / folder
    model = tiny("Llama", seed=seed)
    model.save_pretrained(place)
    adapter(
        hf.LlamaForCausalLM.from_pretrained(place),
        tmp_path / f"a-{folder.replace('/', '-')}",
        target_modules=["q_proj"],
    )
    return place


@real_file(
    7,
    family="PEFT",
    option="base_model_name_or_path: another base whose folder has the same name",
    expected="the weights",
    before="silent loss",
    now="warned",
)
def test_an_adapter_of_another_base(tmp_path: Path) -> None:
    base, other = on_base(tmp_path, "one/base"), on_base(tmp_path, "two/base", seed=5)
    silent(merged(base, tmp_path / "out", "--strict", a=tmp_path / "a-one-base"))
    outcome = merged(base, tmp_path / "wrong", a=tmp_path / "a-two-base")
    warned(outcome, str(other), str(base))
    refused(merged(base, tmp_path / "no", "--strict", a=tmp_path / "a-two-base"), str(other), str(base))
    assert str(other) in cli("doctor", base, "-e", f"a={tmp_path / 'a-two-base'}", "-q").out


@real_file(
    7,
    family="PEFT",
    option="base_model_name_or_path: the same weights by another path",
    expected="the weights",
    before="wrong cause named",
)
def test_a_copy_of_the_base(tmp_path: Path) -> None:
    base = on_base(tmp_path, "base")
    shutil.copytree(base, tmp_path / "renamed")
    outcome = cli("doctor", tmp_path / "renamed", "-e", f"a={tmp_path / 'a-base'}", "-q")
    assert "trained on" not in outcome.out
    silent(merged(tmp_path / "renamed", tmp_path / "out", "--strict", a=tmp_path / "a-base"))
    shutil.rmtree(base)
    outcome = merged(tmp_path / "renamed", tmp_path / "unknown", "--strict", a=tmp_path / "a-base")
    assert "cannot be told" in outcome.out


@real_file(
    7,
    family="PEFT",
    option="hub id against a snapshot folder and _name_or_path",
    expected="the hub's names",
    before="wrong cause named",
    now="warned",
)
def test_hub_names_of_the_base(tmp_path: Path) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot = on_base(tmp_path, f"models--org--model/snapshots/{commit}")
    expert = tmp_path / f"a-models--org--model-snapshots-{commit}"

    def named(name: str, **more: Any) -> Outcome:
        edit(expert, "adapter_config.json", base_model_name_or_path=name, **more)
        return merged(snapshot, tmp_path / "out", "--force", a=expert)

    silent(named("org/model"))
    silent(named("Org/Model-bnb-4bit"))
    silent(named("org/model", revision=commit))
    assert "trained on org/model" not in cli("doctor", snapshot, "-e", f"a={expert}", "-q").out
    warned(named("org/model", revision="f" * 40), "org/model@ffff")
    warned(named("other/model", revision=None), "other/model", str(snapshot))
    local = tmp_path / "local"
    shutil.copytree(snapshot, local)
    edit(local, _name_or_path="org/model")
    warned(merged(local, tmp_path / "out", "--force", a=expert), "other/model")
    edit(expert, "adapter_config.json", base_model_name_or_path="org/model")
    silent(merged(local, tmp_path / "out", "--force", a=expert))


@real_file(
    7,
    family="PEFT",
    option="MODEL+ADAPTER whose adapter names that model, or the merge's base",
    expected="the weights",
    before="silent loss",
    now="warned",
)
def test_an_adapter_on_a_model_of_its_own(tmp_path: Path) -> None:
    base, tuned = on_base(tmp_path, "base"), on_base(tmp_path, "tuned", seed=5)
    silent(merged(base, tmp_path / "out", "--strict", a=Path(f"{tuned}+{tmp_path / 'a-tuned'}")))
    warned(merged(base, tmp_path / "wrong", a=Path(f"{tuned}+{tmp_path / 'a-base'}")), str(base), str(tuned))


@real_file(
    7,
    family="PEFT",
    option="an adapter trained on a merge of ours, moved with its lineage",
    expected="the weights",
    before="wrong cause named",
)
def test_a_base_that_is_described_by_its_lineage(tmp_path: Path) -> None:
    base, other = on_base(tmp_path, "base"), tmp_path / "e"
    moved(tiny("Llama"), 1).save_pretrained(other)
    assert merged(base, tmp_path / "one", e=other).code == 0
    assert merged(base, tmp_path / "two", "--set", "weight=0.5", e=other).code == 0
    shutil.copytree(tmp_path / "one", tmp_path / "copy")
    adapter(hf.LlamaForCausalLM.from_pretrained(tmp_path / "one"), tmp_path / "a", target_modules=["q_proj"])
    silent(merged(tmp_path / "copy", tmp_path / "out", "--strict", a=tmp_path / "a"))
    warned(merged(tmp_path / "two", tmp_path / "wrong", a=tmp_path / "a"), str(tmp_path / "one"), str(tmp_path / "two"))


@real_file(7, family="Unsloth", option="an adapter that names Unsloth's copy of its base", expected="the hub's names",
           before="silent loss")  # fmt: skip
def test_copies_of_a_base(tmp_path: Path) -> None:
    snapshot = on_base(tmp_path, "models--meta-llama--Llama-3.2-1B/snapshots/0123456789abcdef0123456789abcdef01234567")
    expert = next(tmp_path.glob("a-*"))
    edit(expert, "adapter_config.json", base_model_name_or_path="unsloth/llama-3.2-1b-unsloth-bnb-4bit")
    outcome = merged(snapshot, tmp_path / "out", "--strict", a=expert)
    silent(outcome)
    assert "cannot be told" in outcome.out
    edit(expert, "adapter_config.json", base_model_name_or_path="unsloth/Llama-3.2-3B")
    refused(merged(snapshot, tmp_path / "other", "--strict", a=expert), "is another model")
