"""Heads that an adapter brings to a base without one."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.real_files.support import IDS, adapter, cli, hf, merged, real_file, refused, state, tiny


def scores(model: Any, family: str = "SequenceClassification", inputs: dict[str, Any] | None = None) -> torch.Tensor:
    if isinstance(model, Path):
        auto = getattr(hf, f"AutoModelFor{family}")
        model, seen = auto.from_pretrained(model, dtype=torch.float32, output_loading_info=True)
        assert not seen["missing_keys"], seen
        assert not seen["mismatched_keys"], seen
    with torch.no_grad():
        return model.eval()(**(inputs or {"input_ids": IDS})).logits


def is_right(tmp_path: Path, base: Any, head: str, task: str, labels: int, **config: Any) -> None:
    """Save a base, train an adapter with a head of its own on it, merge, and compare the scores."""
    base.save_pretrained(tmp_path / "base")
    auto = getattr(hf, f"AutoModelFor{head}")
    model = auto.from_pretrained(tmp_path / "base", num_labels=labels, dtype=torch.float32)
    tuned = adapter(model, tmp_path / "a", task_type=task, **config)
    outcome = merged(tmp_path / "base", tmp_path / "out", x=tmp_path / "a")
    assert outcome.code == 0, outcome.said
    assert "the base has none" in outcome.out
    torch.testing.assert_close(scores(tmp_path / "out", head), scores(tuned), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("labels", [1, 3])
@real_file(
    8, family="Qwen2", option="sequence classification or reward on a causal base", expected="PEFT, unmerged",
    before="wrong cause named",
)  # fmt: skip
def test_a_score(tmp_path: Path, labels: int) -> None:
    base = tiny("Qwen2", tie_word_embeddings=False)
    is_right(tmp_path, base, "SequenceClassification", "SEQ_CLS", labels, target_modules=["q_proj"])


@real_file(
    8, family="GPT-2", option="sequence classification on a tied causal base", expected="PEFT, unmerged",
    before="wrong cause named",
)  # fmt: skip
def test_a_score_of_conv1d(tmp_path: Path) -> None:
    base = tiny("GPT2", "LMHeadModel", n_embd=32, n_layer=2, n_head=2, n_positions=32)
    is_right(tmp_path, base, "SequenceClassification", "SEQ_CLS", 4, target_modules=["c_attn", "c_proj"])


@real_file(
    8, family="BERT", option="sequence classification on a bare encoder", expected="PEFT, unmerged",
    before="wrong cause named",
)  # fmt: skip
def test_a_classifier_on_a_bare_encoder(tmp_path: Path) -> None:
    is_right(tmp_path, tiny("Bert", "Model"), "SequenceClassification", "SEQ_CLS", 3, target_modules=["query", "value"])


@real_file(
    8, family="RoBERTa", option="sequence classification (two layers) on a masked model", expected="PEFT, unmerged",
    before="wrong cause named",
)  # fmt: skip
def test_a_classifier_of_two_layers(tmp_path: Path) -> None:
    base = tiny("Roberta", "ForMaskedLM")
    is_right(tmp_path, base, "SequenceClassification", "SEQ_CLS", 5, target_modules=["query", "dense"])


@real_file(
    8, family="Llama", option="token classification on a causal base", expected="PEFT, unmerged",
    before="wrong cause named",
)  # fmt: skip
def test_a_tagger(tmp_path: Path) -> None:
    base = tiny("Llama", tie_word_embeddings=True)
    is_right(tmp_path, base, "TokenClassification", "TOKEN_CLS", 7, target_modules=["v_proj"])


@real_file(
    8, family="BERT", option="question answering on a masked model", expected="PEFT, unmerged",
    before="wrong cause named",
)  # fmt: skip
def test_a_span_head(tmp_path: Path) -> None:
    tiny("Bert", "ForMaskedLM").save_pretrained(tmp_path / "base")
    model = hf.AutoModelForQuestionAnswering.from_pretrained(tmp_path / "base", dtype=torch.float32)
    tuned = adapter(model, tmp_path / "a", task_type="QUESTION_ANS", target_modules=["query"])
    assert merged(tmp_path / "base", tmp_path / "out", x=tmp_path / "a").code == 0
    found = hf.AutoModelForQuestionAnswering.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    with torch.no_grad():
        torch.testing.assert_close(found(IDS).start_logits, tuned(IDS).start_logits, atol=1e-5, rtol=1e-4)


@real_file(
    8, family="ViT", option="a classifier on a headless base, no task type", expected="PEFT, unmerged",
    before="wrong cause named",
)  # fmt: skip
def test_an_image_classifier(tmp_path: Path) -> None:
    config = hf.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=16, patch_size=8
    )
    torch.manual_seed(0)
    hf.ViTModel(config, add_pooling_layer=False).save_pretrained(tmp_path / "base")
    model = hf.ViTForImageClassification.from_pretrained(tmp_path / "base", num_labels=6, dtype=torch.float32)
    tuned = adapter(model, tmp_path / "a", target_modules=["q_proj"], modules_to_save=["classifier"])
    outcome = merged(tmp_path / "base", tmp_path / "out", x=tmp_path / "a")
    assert outcome.code == 0, outcome.said
    pixels = {"pixel_values": torch.randn(2, 3, 16, 16)}
    found = scores(tmp_path / "out", "ImageClassification", pixels)
    torch.testing.assert_close(found, scores(tuned, inputs=pixels), atol=1e-5, rtol=1e-4)


@real_file(
    8, family="Qwen2", option="two adapters with a head each", expected="the message", before="wrong cause named",
    now="refused, true cause",
)  # fmt: skip
def test_two_heads(tmp_path: Path) -> None:
    tiny("Qwen2", tie_word_embeddings=False).save_pretrained(tmp_path / "base")
    for name, seed in (("a", 1), ("b", 2)):
        model = hf.Qwen2ForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3)
        adapter(model, tmp_path / name, seed=seed, task_type="SEQ_CLS", target_modules=["q_proj"])
    experts = {name: tmp_path / name for name in "ab"}
    outcome = merged(tmp_path / "base", tmp_path / "out", **experts)
    refused(outcome, "'score.weight'", "private: ['score.*']")
    assert "another base" not in outcome.err
    recipe = tmp_path / "r.yaml"
    models = "".join(f"  - model: {path}\n" for path in experts.values())
    text = f"merge_method: task_arithmetic\nbase_model: {tmp_path / 'base'}\nprivate: ['score.*']\nmodels:\n{models}"
    recipe.write_text(text, encoding="utf-8")
    assert cli("merge", recipe, tmp_path / "out").code == 0
    for name, folder in experts.items():
        kept = load_file(tmp_path / f"out/consilience/heads/{name}.safetensors")
        own = load_file(folder / "adapter_model.safetensors")
        torch.testing.assert_close(kept["score.weight"], own["base_model.model.score.weight"])


@real_file(
    8, family="Qwen2", option="a head beside an adapter without one", expected="a formula", before="wrong cause named"
)
def test_a_head_beside_another_adapter(tmp_path: Path) -> None:
    tiny("Qwen2", tie_word_embeddings=False).save_pretrained(tmp_path / "base")
    model = hf.Qwen2ForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3)
    one = adapter(model, tmp_path / "a", task_type="SEQ_CLS", target_modules=["q_proj"])
    other = hf.Qwen2ForCausalLM.from_pretrained(tmp_path / "base")
    adapter(other, tmp_path / "b", seed=2, task_type="CAUSAL_LM", target_modules=["v_proj"])
    outcome = merged(tmp_path / "base", tmp_path / "out", "--set", "weight=0.5", a=tmp_path / "a", b=tmp_path / "b")
    assert outcome.code == 0, outcome.said
    found = state(tmp_path / "out")
    torch.testing.assert_close(found["score.weight"], one.merge_and_unload().score.weight.detach())
