"""Chat templates by name: the formats that their makers give, rendered as transformers renders them."""

import importlib
from pathlib import Path
from typing import Any

import pytest

from consilience.api import merge_recipe
from consilience.errors import InputError
from tests.engine import vocabulary_models as tiny
from tests.engine.test_tokens import made

hf: Any = importlib.import_module("transformers")
TURNS = [
    {"role": "system", "content": "S"}, {"role": "user", "content": " Q "}, {"role": "assistant", "content": "A"},
    {"role": "user", "content": "R"},
]  # fmt: skip
EXPECTED = {
    "chatml": "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\n Q <|im_end|>\n<|im_start|>assistant\nA<|im_end|>\n"
    "<|im_start|>user\nR<|im_end|>\n<|im_start|>assistant\n",
    "llama3": "<s><|start_header_id|>system<|end_header_id|>\n\nS<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n"
    "Q<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nA<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n"
    "R<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    "exaone": "[|system|]S[|endofturn|]\n[|user|] Q \n[|assistant|]A[|endofturn|]\n[|user|]R\n[|assistant|]",
    "mistral": "<s> [INST] S\n\n Q  [/INST] A</s> [INST] R [/INST]",
    "alpaca": "S\n\n### Instruction:\nQ\n\n### Response:\nA\n\n### Instruction:\nR\n\n### Response:\n",
}


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    return tiny.models(tmp_path)


def rendered(out: Path, turns: list[dict[str, str]]) -> str:
    tokenizer = hf.AutoTokenizer.from_pretrained(out)
    return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)


@pytest.mark.parametrize("name", ["alpaca", *(pytest.param(n, marks=pytest.mark.slow) for n in [*EXPECTED][:4])])
def test_a_format_by_name(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    merge_recipe(made(folders, "union", chat_template=name), tmp_path / "out")
    assert rendered(tmp_path / "out", TURNS) == EXPECTED[name]
    assert "<|y|>" in tiny.ids(tmp_path / "out")


def test_exaone_begins_with_a_system_s_turn(folders: dict[str, Path], tmp_path: Path) -> None:
    merge_recipe(made(folders, "base", chat_template="exaone"), tmp_path / "out")
    assert rendered(tmp_path / "out", TURNS[3:]) == "[|system|][|endofturn|]\n[|user|]R\n[|assistant|]"


def test_most_models_template(folders: dict[str, Path], tmp_path: Path) -> None:
    for name, text in (("base", "{{ 'one' }}"), ("x", "{{ 'two' }}"), ("y", "{{ 'two' }}\n")):
        (folders[name] / "chat_template.jinja").write_text(text)
    merge_recipe(made(folders, "union", chat_template="auto"), tmp_path / "out")
    assert rendered(tmp_path / "out", TURNS) == "two"
    (folders["y"] / "chat_template.jinja").write_text("{{ 'three' }}")
    merge_recipe(made(folders, "union", chat_template="auto"), tmp_path / "tie")
    assert rendered(tmp_path / "tie", TURNS) == "one"  # the base's, on a tie
    for folder in folders.values():
        (folder / "chat_template.jinja").unlink()
    merge_recipe(made(folders, "union", chat_template="auto"), tmp_path / "none")
    assert hf.AutoTokenizer.from_pretrained(tmp_path / "none").chat_template is None


def test_a_literal_and_a_model_s_beside_a_union(folders: dict[str, Path], tmp_path: Path) -> None:
    tiny.save_tokenizer(folders["y"], *tiny.VOCABULARIES["y"][:2], chat_template="{{ 'y' }}")
    merge_recipe(made(folders, "union", chat_template="y"), tmp_path / "model")
    assert rendered(tmp_path / "model", TURNS) == "y"
    merge_recipe(made(folders, "union", chat_template="{{ 'own' }}"), tmp_path / "own")
    assert rendered(tmp_path / "own", TURNS) == "own"


def test_a_name_that_means_two_things(folders: dict[str, Path], tmp_path: Path) -> None:
    recipe = made(folders, "base", chat_template="mistral")
    recipe["models"][0]["name"] = "mistral"
    with pytest.raises(InputError, match=r"'mistral' is a format's name and a model's; call the model otherwise"):
        merge_recipe(recipe, tmp_path / "out")
