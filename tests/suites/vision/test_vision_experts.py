"""The experts of a miniature experiment: trained once, resumed, and the same whichever way they came about."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from consilience.errors import InputError
from suites.vision import experts, nets, training
from suites.vision.domains import Sizes
from suites.vision.experts import Setting, experiment, folder_name
from suites.vision.images import DataSet, Images

SIZES = Sizes(pretraining=80, experts=300, train=40, validation=40, test=60, least=5)
SETTING = Setting("stripes", "resnet8", delta=0.3, experts=3, width=4, sizes=SIZES, base_epochs=3, expert_epochs=2)


def _part(count: int, seed: int) -> Images:
    """Ten classes: which row of an image is bright."""
    generator = np.random.default_rng(seed)
    labels = generator.permutation(np.arange(count) % 10)
    images = generator.integers(0, 60, (count, 1, 10, 10), np.uint8)
    images[np.arange(count), 0, labels] += 180
    return Images(torch.from_numpy(images), torch.from_numpy(labels))


DATA = DataSet("stripes", tuple("abcdefghij"), _part(500, 0), _part(100, 1))


def _folder() -> str:
    return folder_name(SETTING, nets.spec_for(SETTING.net, DATA, width=SETTING.width))


def _bytes(cache: Path) -> dict[str, bytes]:
    return {str(path.relative_to(cache)): path.read_bytes() for path in sorted(cache.rglob("*.safetensors"))}


def test_an_experiment_is_trained_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = experiment(SETTING, images=DATA, cache=tmp_path)
    assert list(first.experts) == ["expert-0", "expert-1", "expert-2"]
    assert sum(first.shard_sizes.values()) == SIZES.experts
    assert [len(part[1]) for part in (first.target.train, first.target.validation, first.target.test)] == [40, 40, 60]

    def refuse(*_: Any, **__: Any) -> list[float]:
        raise AssertionError("trained again")

    monkeypatch.setattr(experts, "train", refuse)
    again = experiment(SETTING, images=DATA, cache=tmp_path)
    for name, state in (("base", first.base), *first.experts.items()):
        kept = again.base if name == "base" else again.experts[name]
        assert all(torch.equal(state[key], kept[key]) for key in state)
    assert again.cards == first.cards


def test_every_network_says_how_it_was_made(tmp_path: Path) -> None:
    made = experiment(SETTING, images=DATA, cache=tmp_path)
    folder = tmp_path / "experts" / _folder()
    for name in ("base", *made.experts):
        assert {path.name for path in (folder / name).iterdir()} == {"model.safetensors", "net.json", "card.json"}
        card = json.loads((folder / name / "card.json").read_text())
        assert card["images"] == (SIZES.pretraining if name == "base" else made.shard_sizes[name])
        assert sum(card["images_by_class"].values()) == card["images"]
        assert card["setting"]["seed"] == 0
        net = made.network(made.base if name == "base" else made.experts[name])
        inputs, labels = made.target.test
        right = int((net(inputs).argmax(1) == labels).sum())
        assert card["target_test_accuracy"] == pytest.approx(right / 60, abs=1e-5)


@pytest.mark.slow
def test_an_expert_learns_its_own_classes(tmp_path: Path) -> None:
    setting = Setting("stripes", "resnet8", experiment="halves", width=4, sizes=SIZES, base_epochs=2, expert_epochs=80)
    made = experiment(setting, images=DATA, cache=tmp_path)
    inputs, labels = made.target.test
    for name, own in (("expert-0", labels < 5), ("expert-1", labels >= 5)):
        right = made.network(made.experts[name])(inputs).argmax(1) == labels
        assert float(right[own].float().mean()) > 0.8 > float(right[~own].float().mean())


def test_a_run_that_was_stopped_goes_on_to_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    experiment(SETTING, images=DATA, cache=whole)
    calls: list[str] = []
    real = experts.train

    def stop(*arguments: Any, **options: Any) -> list[float]:
        calls.append("train")
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*arguments, **options)

    monkeypatch.setattr(experts, "train", stop)
    with pytest.raises(KeyboardInterrupt):
        experiment(SETTING, images=DATA, cache=broken)
    assert len(_bytes(broken)) == 2
    experiment(SETTING, images=DATA, cache=broken)
    assert len(calls) == 5
    assert _bytes(broken) == _bytes(whole)


def test_whatever_weights_depend_on_changes_the_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = nets.spec_for("resnet8", DATA, width=4)
    names = {folder_name(SETTING, spec), folder_name(SETTING, replace(spec, mean=(0.25,)))}
    changes: list[dict[str, Any]] = [{"seed": 1}, {"delta": 0.5}, {"expert_epochs": 3}, {"sizes": Sizes()}]
    names |= {folder_name(replace(SETTING, **change), spec) for change in changes}
    assert len(names) == 6
    assert all("/" not in name for name in names)
    assert folder_name(SETTING, spec) in names
    schedule = replace(training.SCHEDULES["resnet"][1], learning_rate=0.01)
    monkeypatch.setitem(training.SCHEDULES, "resnet", (schedule, schedule))
    assert folder_name(SETTING, spec) not in names


def test_wrong_settings_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert experts.main(["--data", "imagenet"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: imagenet: no such data set")
    assert said.count("\n") == 1
    wrong: dict[str, dict[str, Any]] = {"no such network": {"net": "alexnet"}, "skewed and": {"experiment": "thirds"}}
    for said, change in wrong.items():
        with pytest.raises(InputError, match=said):
            experiment(replace(SETTING, **change), images=DATA, cache=tmp_path)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_kept_network_that_was_damaged_is_named(tmp_path: Path) -> None:
    experiment(SETTING, images=DATA, cache=tmp_path)
    path = tmp_path / "experts" / _folder() / "expert-1" / "model.safetensors"
    path.write_bytes(b"junk")
    with pytest.raises(InputError, match=r"expert-1/model\.safetensors: cannot be read"):
        experiment(SETTING, images=DATA, cache=tmp_path)
