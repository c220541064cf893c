"""The demo's workers, on a tiny model: what they find, what is printed, and what happens when one fails."""

import io
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from consilience.errors import InputError
from studies import demo
from suites.language import DOMAINS


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    monkeypatch.setenv("CONSILIENCE_CACHE", str(tmp_path / "cache"))
    alphabet = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    letters = Tokenizer(models.BPE(alphabet, []))
    letters.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    own: Any = PreTrainedTokenizerFast
    own(tokenizer_object=letters).save_pretrained(tmp_path / "tiny")
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


def test_every_model_is_measured_and_said_to_be(tiny: Path):
    out = io.StringIO()
    models = [demo.Model(name, str(tiny), seconds) for name, seconds in (("base", None), ("a merge", 1.5))]
    found = demo.measured(Console(file=out, width=110), models)
    assert len(found) == 2
    assert found[0] == pytest.approx(found[1])  # the same weights
    assert set(found[0]) == {*DOMAINS, "mean", "accuracy"}
    assert found[0]["mean"] == pytest.approx(sum(found[0][d] for d in DOMAINS) / 4)
    lines = out.getvalue().splitlines()
    assert [line[:8] for line in lines] == ["[ 1/ 2] ", "[ 2/ 2] "]
    mean = f"{found[0]['mean']:.3f}"
    assert sorted(line[8:].split(":")[0] for line in lines) == ["a merge", "base"]
    assert all(re.fullmatch(rf".*: mean loss {mean} \(\d+ s\)", line) for line in lines)


def test_a_model_that_is_wrong_ends_the_demo_in_one_line(tmp_path: Path):
    with pytest.raises(InputError, match="gone: no such file or folder"):
        demo.measured(Console(file=io.StringIO()), [demo.Model("gone", str(tmp_path / "gone"))])
