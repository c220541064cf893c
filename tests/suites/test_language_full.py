"""The suite's full experts and mixtures: which rows they may learn from, and the committed mixture adapter."""

import json
from pathlib import Path
from typing import Any

import pytest

from consilience.checkpoints.adapter import open_adapter
from consilience.training import TrainingRecord, read_record
from suites.language import BASE_ID, DOMAINS, adapter_path, heldout_path, train_full, train_mixture
from suites.language.data import read_jsonl

MIXTURE = train_mixture.LORA_PATH


@pytest.fixture(scope="module")
def record() -> TrainingRecord:
    return read_record(MIXTURE / "training.json")


@pytest.fixture(scope="module")
def scores() -> dict[str, dict[str, float]]:
    return json.loads((MIXTURE / "scores.json").read_text(encoding="utf-8"))


def _use_rows(monkeypatch: pytest.MonkeyPatch, place: Path, rows: list[dict[str, Any]]) -> None:
    path = place / "pronounce" / "train.jsonl"
    path.parent.mkdir()
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    monkeypatch.setattr(train_full, "REPOSITORY_ROOT", place)
    monkeypatch.setattr(train_full, "train_path", lambda _: path)
    monkeypatch.setattr(train_full, "train_rows", lambda _: rows)


def test_training_rows_are_named_by_their_path_in_the_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    _use_rows(monkeypatch, tmp_path, [{"prompt": "a row of its own", "response": "yes"}])
    task = train_full.training_task("pronounce")
    assert (task.name, task.path) == ("pronounce", Path("pronounce/train.jsonl"))


@pytest.mark.parametrize("split", ["validation", "test"])
def test_a_held_out_row_is_never_learned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, split: Any):
    held_out = read_jsonl(heldout_path("pronounce", split))[3]
    _use_rows(monkeypatch, tmp_path, [{"prompt": "a row of its own", "response": "yes"}, held_out])
    with pytest.raises(RuntimeError, match=f"1 rows are also in .*{split}"):
        train_full.training_task("pronounce")


def test_a_domain_without_a_full_expert_is_refused():
    with pytest.raises(ValueError, match="unknown domain 'code'; the full experts are pronounce, sentiment"):
        train_full.full_path("code")


def test_the_mixture_adapter_has_the_experts_form():
    ours, expert = open_adapter(MIXTURE), open_adapter(adapter_path("code"))
    assert {name: (p.a.shape, p.b.shape, p.scale) for name, p in ours.pairs.items()} == {
        name: (p.a.shape, p.b.shape, p.scale) for name, p in expert.pairs.items()
    }
    assert ours.whole == expert.whole == {}
    for key in ("base_model_name_or_path", "target_modules", "r", "lora_alpha"):
        assert ours.config[key] == expert.config[key]
    assert sum(path.stat().st_size for path in MIXTURE.iterdir()) < 5.2e6


def test_the_mixture_learned_from_all_domains_alike(record: TrainingRecord):
    assert tuple(share.name for share in record.tasks) == DOMAINS
    assert {share.drawn for share in record.tasks} == {record.steps * record.batch_size // 4}
    assert record.base == BASE_ID
    assert (record.steps, record.learning_rate, record.seed) == (
        train_mixture.LORA_STEPS,
        train_mixture.LORA_LEARNING_RATE,
        train_full.SEED,
    )


def test_the_mixture_beats_the_base_on_every_domain(scores: dict[str, dict[str, float]]):
    assert set(scores["base"]) == set(scores["mixture"]) == set(scores["expert"])
    for domain in DOMAINS:
        assert scores["mixture"][domain] < scores["base"][domain]


def test_the_card_is_made_from_the_record_and_the_scores(record: TrainingRecord, scores: dict[str, dict[str, float]]):
    said = (MIXTURE / "README.md").read_text(encoding="utf-8")
    assert said == train_mixture.card(record, scores)
    for licence in ("BSD-like", "public domain", "PSF licence", "MIT package"):
        assert licence in said


def test_no_file_of_the_mixture_names_a_place_on_a_machine():
    for path in MIXTURE.glob("*.[jm][sd]*"):
        assert "/work" not in path.read_text(encoding="utf-8")
        assert str(Path.home()) not in path.read_text(encoding="utf-8")
