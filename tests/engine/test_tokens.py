"""Vocabularies that differ are aligned by token: equal to mergekit's stored answers and to a formula, row by row."""

import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file

from consilience.__main__ import run
from consilience.api import merge_recipe
from consilience.engine.plan import make_plan
from consilience.errors import InputError
from consilience.recipe.schema import parse_recipe
from tests.engine import vocabulary_models as tiny
from tests.engine.data.make_tokens_oracle import CASES, by_token, recipe

hf: Any = importlib.import_module("transformers")
ORACLE = np.load(Path(__file__).with_name("data") / "mergekit_0_1_5_tokens.npz")
ROW = {"kind": "model_token"}
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    return tiny.models(tmp_path)


def merged(value: dict[str, Any], out: Path) -> dict[str, Any]:
    """Merge a recipe of plain values and return the tensors."""
    merge_recipe(value, out, force=True)
    return load_file(out / "model.safetensors")


def made(folders: dict[str, Path], tokenizer: Any, method: str = "task_arithmetic", **keys: Any) -> dict[str, Any]:
    """Return a recipe on the base of x and y, with weights 0.7 and 0.4."""
    models = [{"model": str(folders[n]), "name": n, "parameters": {"weight": w}} for n, w in (("x", 0.7), ("y", 0.4))]
    base = {} if method == "linear" else {"base_model": str(folders["base"])}
    chosen = {} if tokenizer is None else {"tokenizer": tokenizer}
    return {"method": method, "models": models, **base, **chosen, **keys}


@pytest.mark.parametrize("case", CASES)
def test_rows_are_mergekit_s(case: str, folders: dict[str, Path], tmp_path: Path) -> None:
    assert str(ORACLE["inputs"]) == tiny.checksum()
    merge_recipe(recipe(case, folders), tmp_path / "out")
    found = by_token(tmp_path / "out")
    assert found["tokens"].tolist() == ORACLE[f"{case}|tokens"].tolist()
    for name in (name for name in found if name != "tokens"):
        expected = ORACLE[f"{case}|{name}"]
        kept = len(found["tokens"]) if "padded" not in case and name in (EMBED, HEAD) else len(expected)
        np.testing.assert_allclose(found[name][:kept], expected[:kept], rtol=1e-5, atol=1e-6)


def test_a_union_opens_in_transformers(folders: dict[str, Path], tmp_path: Path) -> None:
    state = merged(made(folders, "union"), tmp_path / "out")
    ids = hf.AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab()
    own = {name: tiny.ids(folder) for name, folder in folders.items()}
    assert {token: ids[token] for token in own["base"]} == own["base"]
    assert ids.keys() == own["base"].keys() | own["x"].keys() | own["y"].keys()
    assert sorted(ids.values()) == list(range(len(ids)))
    tokenizer = hf.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer("<|y|> a <|x|> k").input_ids == [ids[t] for t in ("<|y|>", "a", "<|x|>", "k")]
    model = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.vocab_size == len(state[EMBED]) == 24  # the base's rows without a token stay
    rows = {name: load_file(folder / "model.safetensors")[EMBED] for name, folder in folders.items()}
    weight = model.get_input_embeddings().weight.detach().numpy()
    np.testing.assert_array_equal(weight[ids["<|y|>"]], rows["y"][own["y"]["<|y|>"]])
    np.testing.assert_array_equal(weight[ids["<|x|>"]], rows["x"][own["x"]["<|x|>"]])
    lineage = json.loads((tmp_path / "out" / "consilience" / "lineage.json").read_text())["vocabulary"]
    assert lineage["models"]["y"] == {"own": 14, "taken": {"base": 3, "x": 1}, "averaged": 0, "zero": 0}
    assert lineage["made"] == {"<|both|>": "mean of x and y"}


def expected_rows(folders: dict[str, Path], name: str, ids: dict[str, int]) -> dict[str, Any]:
    """Return, by token, each model's row as the rule has it, written out token by token."""
    own = {model: tiny.ids(folder) for model, folder in folders.items()}
    held = {
        model: load_file(folder / "model.safetensors")[name].astype(np.float64) for model, folder in folders.items()
    }
    out: dict[str, Any] = {}
    for token in ids:
        have = {model: held[model][own[model][token]] for model in own if token in own[model]}
        if len(have) == 1:
            default = next(iter(have.values()))
        else:
            default = have["base"] if "base" in have else sum(have.values()) / len(have)
        out[token] = {model: have.get(model, default) for model in own}
    return out


@pytest.mark.parametrize(
    ("method", "dtype"), [("task_arithmetic", "float32"), ("task_arithmetic", "bfloat16"), ("ties", "float32")]
)
def test_a_method_sees_rows_by_token(method: str, dtype: str, folders: dict[str, Path], tmp_path: Path) -> None:
    parameters = {"density": 1.0, "normalize": False} if method == "ties" else {}
    merge_recipe(made(folders, "union", method, parameters=parameters, out_dtype=dtype), tmp_path / "out")
    ids = tiny.ids(tmp_path / "out")
    model = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    for name, weight in ((EMBED, model.model.embed_tokens.weight), (HEAD, model.lm_head.weight)):
        values = weight.detach().float().numpy()
        for token, rows in expected_rows(folders, name, ids).items():
            parts = np.array([w * (rows[m] - rows["base"]) for m, w in (("x", 0.7), ("y", 0.4))])
            if method == "ties":  # elect a sign, keep what agrees
                parts = np.where(np.sign(parts) == np.sign(parts.sum(axis=0)), parts, 0)
            tolerance = 1e-5 if dtype == "float32" else 1e-2
            expected = rows["base"] + parts.sum(axis=0)
            np.testing.assert_allclose(values[ids[token]], expected, rtol=tolerance, atol=tolerance)


def test_tied_embeddings_stay_tied(tmp_path: Path) -> None:
    folders = tiny.models(tmp_path, tied=True)
    state = merged(made(folders, {"source": "union", "pad_to_multiple_of": 16}), tmp_path / "out")
    assert HEAD not in state
    model = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.tie_word_embeddings
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert len(state[EMBED]) == 32
    used = sorted(tiny.ids(tmp_path / "out").values())
    # Rows 18 to 23 are the base's and x's own, as y has none there; those beyond the base's 24 are means.
    base, x = (load_file(folders[name] / "model.safetensors")[EMBED] for name in ("base", "x"))
    np.testing.assert_allclose(state[EMBED][18:24], (base + 0.7 * (x - base))[18:24], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
        state[EMBED][24:], np.tile(state[EMBED][used].mean(axis=0), (8, 1)), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize(("tokenizer", "rows"), [
    ("union", 24), ("base", 24), ("x", 24), ("y", 14), ({"source": "union", "pad_to_multiple_of": 8}, 24),
    ({"source": "union", "pad_to_multiple_of": 5}, 20), ({"source": "y", "tokens": {"<|n|>": {}}}, 15),
])  # fmt: skip
def test_the_number_of_rows(tokenizer: Any, rows: int, folders: dict[str, Path], tmp_path: Path) -> None:
    assert len(merged(made(folders, tokenizer), tmp_path / "out")[HEAD]) == rows
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == rows
    assert hf.AutoModelForCausalLM.from_pretrained(tmp_path / "out").lm_head.weight.shape[0] == rows


def test_the_same_vocabulary_changes_no_byte(folders: dict[str, Path], tmp_path: Path) -> None:
    tiny.save_tokenizer(folders["x"], *tiny.VOCABULARIES["base"][:2])
    alike = {"base": folders["base"], "x": folders["x"], "y": folders["x"]}
    for number, tokenizer in enumerate((None, "union", "base", "x")):
        merge_recipe(made(alike, tokenizer), tmp_path / str(number))
    bytes_of = {(tmp_path / str(number) / "model.safetensors").read_bytes() for number in range(4)}
    assert len(bytes_of) == 1


def test_ids_of_the_chosen_model_are_translated(folders: dict[str, Path], tmp_path: Path) -> None:
    tiny.save(folders["base"], load_file(folders["base"] / "model.safetensors"), pad_token_id=3, forced_eos_token_id=12)
    tiny.save_tokenizer(folders["y"], ["</s>", "<s>", "<unk>", *"jihgfedkl"], ["<|y|>"])
    tiny.save(folders["y"], load_file(folders["y"] / "model.safetensors"), eos_token_id=0)
    held = {"eos_token_id": [2, 4], "suppress_tokens": [5, 10]}
    (folders["base"] / "generation_config.json").write_text(json.dumps(held))
    merge_recipe(made(folders, "y"), tmp_path / "out")
    config, generation = (
        json.loads((tmp_path / "out" / name).read_text()) for name in ("config.json", "generation_config.json")
    )
    assert (config["eos_token_id"], config["bos_token_id"]) == (0, 1)
    assert config["pad_token_id"] is None  # y has no "a"
    assert config["forced_eos_token_id"] == 3  # "j"
    assert generation["suppress_tokens"] == [5]  # "h"; y has no "c"
    assert generation["eos_token_id"] == 0


def test_text_that_is_cut_by_pieces(tmp_path: Path) -> None:
    """Byte-pair vocabularies: a union keeps the base's merges, and adds what others have as tokens of their own."""
    tok: Any = importlib.import_module("tokenizers")
    pieces = {"base": (["a", "b", "ab"], [("a", "b")]), "x": (["b", "a", "c", "bc"], [("b", "c")])}
    folders: dict[str, Path] = {}
    for seed, (name, (vocabulary, merges)) in enumerate(pieces.items()):
        folders[name] = tiny.save(tmp_path / name, tiny.weights(seed, len(vocabulary)))
        made_of = tok.Tokenizer(tok.models.BPE({piece: i for i, piece in enumerate(vocabulary)}, merges))
        made_of.save(str(folders[name] / "tokenizer.json"))
        (folders[name] / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    recipe = {"method": "linear", "models": [{"model": str(path)} for path in folders.values()], "tokenizer": "union"}
    state = merged(recipe, tmp_path / "out")
    ids = hf.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert ids.get_vocab() == {"a": 0, "b": 1, "ab": 2, "c": 3, "bc": 4}
    assert ids("abc").input_ids == [2, 3] or ids("abc").input_ids == [0, 4]
    one, two = (load_file(path / "model.safetensors")[EMBED] for path in folders.values())
    np.testing.assert_allclose(
        state[EMBED], [(one[0] + two[1]) / 2, (one[1] + two[0]) / 2, one[2], two[2], two[3]], rtol=1e-6
    )


@pytest.mark.parametrize(("keys", "words"), [
    ({"tokenizer": "z"}, "there is no model 'z'"),
    ({"tokenizer": 5}, "tokenizer must be union, base, a model's name"),
    ({"tokenizer": {"sauce": "union"}}, "unknown key 'sauce'; did you mean 'source'?"),
    ({"tokenizer": {"source": ["x"]}}, "source must be union, base or a model's name"),
    ({"tokenizer": {"tokens": ["a"]}}, "tokens must be a mapping"),
    ({"tokenizer": {"tokens": {"a": "x"}}}, "'a' must be a mapping"),
    ({"tokenizer": {"tokens": {"a": {"sauce": "x"}}}}, "'a' has an unknown key 'sauce'"),
    ({"tokenizer": {"tokens": {"a": {"source": "z"}}}}, "tokens: 'a': there is no model 'z'"),
    ({"tokenizer": {"tokens": {"a": {"force": True}}}}, "'a' is forced without a source"),
    ({"tokenizer": {"tokens": {"a": {"source": "x", "force": 1}}}}, "force: 1; write true or false"),
    ({"tokenizer": {"tokens": {"<|n|>": {"source": "x"}}}}, "x has no token '<|n|>'"),
    ({"tokenizer": {"tokens": {"a": {"source": {"kind": "one"}}}}}, "kind 'one'; it is zero (alone), or model_token"),
    ({"tokenizer": {"tokens": {"a": {"source": {**ROW, "token": "b"}}}}}, "names no model"),
    ({"tokenizer": {"tokens": {"a": {"source": {**ROW, "model": "x"}}}}}, "either a token or a token_id"),
    ({"tokenizer": {"tokens": {"a": {"source": {**ROW, "model": "x", "token": "q"}}}}}, "no token 'q'"),
    ({"tokenizer": {"tokens": {"a": {"source": {**ROW, "model": "y", "token_id": 14}}}}}, "14 rows of y"),
    ({"tokenizer": {"tokens": {"a": {"source": {**ROW, "model": "y", "token_id": -1}}}}}, "whole number"),
    ({"tokenizer": {"pad_to_multiple_of": 0}}, "pad_to_multiple_of must be a whole number from 1"),
    ({"tokenizer": "union", "tokenizer_source": "base"}, "say the same thing"),
    ({"tokenizer": "union", "private": ["lm_head.weight"]}, "'lm_head.weight' is aligned by token"),
    ({"tokenizer": "base", "chat_template": "chatlm"}, "there is no model 'chatlm'; did you mean 'chatml'?"),
])  # fmt: skip
def test_bad_input(
    keys: dict[str, Any], words: str, folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(made(folders, None) | keys))
    assert run(["merge", str(path), str(tmp_path / "out")]) == 2
    said = capsys.readouterr()
    assert words in said.err
    assert len(said.err.strip().splitlines()) <= 2
    assert not list(tmp_path.glob("out*"))


def without(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()


def test_models_without_a_tokenizer(folders: dict[str, Path], tmp_path: Path) -> None:
    without(folders["x"])
    merge_recipe(made(folders, "union"), tmp_path / "out")
    assert "x: has no tokenizer, and is taken to have base's" in (tmp_path / "out" / "README.md").read_text()
    assert "<|x|>" not in tiny.ids(tmp_path / "out")
    without(folders["y"])
    with pytest.raises(InputError, match=r"y has no tokenizer.*its 14 rows are not base's 24"):
        merge_recipe(made(folders, "union"), tmp_path / "no")
    without(folders["base"])
    tiny.save_tokenizer(folders["y"], *tiny.VOCABULARIES["y"][:2])
    with pytest.raises(InputError, match=r"base.*has no tokenizer"):
        merge_recipe(made(folders, "union"), tmp_path / "no")


def test_without_the_key_sizes_that_differ_are_an_error(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"24 rows and 14 in .*tokenizer: union"):
        merge_recipe(made(folders, None), tmp_path / "out")


def test_an_interrupted_run_does_not_go_on_with_other_tokens(folders: dict[str, Path]) -> None:
    recipe = parse_recipe(made(folders, "union"), "r")
    first = make_plan(recipe).digest
    assert make_plan(recipe).digest == first
    tiny.save_tokenizer(folders["y"], list(reversed(tiny.VOCABULARIES["y"][0])), tiny.VOCABULARIES["y"][1])
    assert make_plan(recipe).digest != first


def slow(folder: Path, words: list[str], **config: Any) -> Path:
    """Write a GPT-2 whose tokenizer is vocab.json and merges.txt."""
    random = np.random.RandomState(len(words))
    hf.GPT2LMHeadModel(
        hf.GPT2Config(vocab_size=len(words), n_positions=32, n_embd=16, n_layer=1, n_head=2)
    ).save_pretrained(folder)
    state = {
        name: (0.1 * random.standard_normal(array.shape)).astype(np.float32)
        for name, array in load_file(folder / "model.safetensors").items()
    }
    tiny.save_file(state, folder / "model.safetensors", {"format": "pt"})
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\na b\n")
    roles = {"tokenizer_class": "GPT2Tokenizer", "unk_token": words[0], "bos_token": words[0], "eos_token": words[0]}
    (folder / "tokenizer_config.json").write_text(json.dumps(roles))
    return folder


@pytest.mark.filterwarnings("ignore")
def test_a_tokenizer_without_its_fast_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = slow(tmp_path / "base", ["<|endoftext|>", "a", "b", "ab"])
    other = slow(tmp_path / "other", ["<|endoftext|>", "b", "a", "c", "ab"])
    recipe = {"method": "linear", "models": [{"model": str(base)}, {"model": str(other)}], "tokenizer": "union"}
    state = merged(recipe, tmp_path / "out")
    assert hf.AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab() == {
        "<|endoftext|>": 0,
        "a": 1,
        "b": 2,
        "ab": 3,
        "c": 4,
    }
    one, two = (load_file(path / "model.safetensors")["transformer.wte.weight"] for path in (base, other))
    np.testing.assert_allclose(
        state["transformer.wte.weight"], [*(one + two[[0, 2, 1, 4]]) / 2, two[3]], rtol=1e-5, atol=1e-7
    )
    assert not (tmp_path / "out" / "vocab.json").exists()
    monkeypatch.setattr("consilience.engine.tokenizer_files.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"without tokenizer.json.*pip install 'consilience\[hf\]'"):
        merge_recipe(recipe, tmp_path / "no")
    merge_recipe(recipe | {"tokenizer": "other"}, tmp_path / "own")  # ids of vocab.json are read as they are
    assert hf.AutoTokenizer.from_pretrained(tmp_path / "own").get_vocab()["c"] == 3


def test_a_tokenizer_that_nothing_can_read(folders: dict[str, Path], tmp_path: Path) -> None:
    without(folders["y"])
    (folders["y"] / "tokenizer.model").write_bytes(b"no pieces")
    with pytest.raises(InputError, match=r"y: its tokenizer has no tokenizer.json, and transformers makes none of it"):
        merge_recipe(made(folders, "union"), tmp_path / "out")
    (folders["y"] / "tokenizer.json").write_text("{")
    with pytest.raises(InputError, match=r"tokenizer\.json"):
        merge_recipe(made(folders, "union"), tmp_path / "out")


def test_what_a_run_says_and_repeats(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = {"source": "union", "pad_to_multiple_of": 8, "tokens": {
        "<|n|>": {"source": {"kind": "zero"}}, "b": {"source": "x"}, "c": {},
        "<|m|>": {"source": {"kind": "model_token", "model": "x", "token": "b"}},
        "<|i|>": {"source": {"kind": "model_token", "model": "x", "token_id": 3}, "force": True}}}  # fmt: skip
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(made(folders, tokenizer)))
    assert run(["merge", str(path), str(tmp_path / "no"), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert not (tmp_path / "no").exists()
    assert run(["merge", str(path), str(tmp_path / "out")]) == 0
    summary = capsys.readouterr().out
    lines = [
        "vocabulary (union): 21 tokens in 24 rows, 3 without a token; base has 24",
        "vocabulary of y: 14 of the output's tokens are its own, 2 taken from base, 4 taken from x, 1 zero",
        "'<|n|>' (zero)", "'<|m|>' (x's 'b')", "'<|i|>' (x's 'a')", "'<|both|>' (mean of x and y)",
    ]  # fmt: skip
    for text in (said, summary, (tmp_path / "out" / "README.md").read_text()):
        assert all(line in text for line in lines), text
    assert run(["merge", str(tmp_path / "out" / "consilience" / "recipe.yaml"), str(tmp_path / "again")]) == 0
    names = ("model.safetensors", "tokenizer.json", "config.json")
    assert all((tmp_path / "out" / n).read_bytes() == (tmp_path / "again" / n).read_bytes() for n in names)
    assert (
        run(["merge", str(folders["base"]), str(tmp_path / "cli"), "-e", f"y={folders['y']}", "--tokenizer", "union"])
        == 0
    )
    assert "<|y|>" in tiny.ids(tmp_path / "cli")
    assert (
        run(["merge", str(folders["base"]), str(tmp_path / "left"), "-e", f"y={folders['y']}", "--tokenizer", "base"])
        == 0
    )
    assert "y has 4 tokens that the output lacks: 'k' (10), 'l' (11), '<|y|>' (12)" in capsys.readouterr().out
    assert run(["doctor", str(path), "-q"]) == 0


def test_a_tokenizer_that_transformers_opens_otherwise_is_not_delivered(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CONSILIENCE_CACHE", str(tmp_path / "cache"))
    answer = {"missing": [], "mismatched": ["k"], "unexpected": [], "error": ""}
    monkeypatch.setattr("consilience.engine.load_check.LOADER.ask", lambda request: answer)
    with pytest.raises(InputError, match=r"transformers would not open the output's tokenizer.*'k' has another id"):
        merge_recipe(made(folders, "union"), tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_what_is_known_of_own_rows_is_not_used(folders: dict[str, Path], tmp_path: Path) -> None:
    for method in ("fisher", "regmean_pp"):
        with pytest.raises(InputError, match=rf"tokenizer: union gives models other rows.*{method!r}"):
            merge_recipe(made(folders, "union", method), tmp_path / "out")
