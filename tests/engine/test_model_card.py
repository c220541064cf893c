"""Cards link to what the hub has: ids are listed where they are known, and folder names are never taken for ids."""

import json
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import numpy as np
import pytest
import yaml
from safetensors.numpy import save_file

from consilience.api import build_recipe, merge, merge_recipe, plan_recipe
from consilience.engine.adapter_output import write_adapter

SHAPE = (6, 4)
REVISION = "0123456789abcdef0123456789abcdef01234567"
REFERENCES = {"math": "experts/math", "code": "experts/code"}


def make_model(folder: Path, seed: int = 0, card: str | None = None, **config: Any) -> Path:
    folder.mkdir(parents=True)
    weights = np.random.default_rng(seed).standard_normal(SHAPE).astype(np.float32)
    save_file({"layer.up.weight": weights}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "toy", **config}))
    if card is not None:
        (folder / "README.md").write_text(f"---\n{card}\n---\n\n# A model\n")
    return folder


def make_adapter(folder: Path, seed: int, card: str | None = None) -> Path:
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    a, b = rng.standard_normal((2, 4)).astype(np.float32), rng.standard_normal((6, 2)).astype(np.float32)
    stem = "base_model.model.layer.up.lora_"
    save_file({f"{stem}A.weight": a, f"{stem}B.weight": b}, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 2, "target_modules": ["up"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    if card is not None:
        (folder / "README.md").write_text(f"---\n{card}\n---\n")
    return folder


def cached(root: Path, name: str) -> Path:
    """Where the hub's cache below ``root`` keeps a model."""
    folder = root / f"models--{name.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs/main").write_text(REVISION)
    return folder / "snapshots" / REVISION


def read_card(out: Path) -> tuple[dict[str, Any], list[str]]:
    """Return a card's front matter and the rows of its table of models."""
    _, matter, body = (out / "README.md").read_text().split("---\n", 2)
    rows = [line for line in body.splitlines() if line.startswith("| ")]
    return yaml.safe_load(matter), rows[1:]


def merged(base: Any, experts: dict[str, Any], out: Path) -> tuple[dict[str, Any], list[str]]:
    merge(str(base), {name: str(expert) for name, expert in experts.items()}, out)
    return read_card(out)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_local_folders_are_named_in_the_table_and_linked_nowhere(here: Path) -> None:
    make_model(here / "models/base")
    for seed, path in enumerate(REFERENCES.values(), 1):
        make_model(here / path, seed)
    # Relative references have the very form of a hub id.
    matter, rows = merged("models/base", REFERENCES, here / "out")
    assert "base_model" not in matter
    assert "base_model_relation" not in matter
    assert rows == ["| base | base |", "| math | expert `math` |", "| code | expert `code` |"]


def test_references_that_start_from_the_recipe_s_folder_are_no_ids(here: Path) -> None:
    make_model(here / "work/models/base")
    make_model(here / "work/experts/math", 1)
    recipe = {"merge_method": "linear", "base_model": "models/base", "models": [{"model": "experts/math"}]}
    (here / "work/recipe.yaml").write_text(yaml.safe_dump(recipe))
    merge_recipe(here / "work/recipe.yaml", here / "out")
    assert "base_model" not in read_card(here / "out")[0]


def test_what_lies_in_the_hub_s_cache_has_its_own_id(here: Path) -> None:
    base = make_model(cached(here / "hub", "acme/base-1B"))
    math = make_model(cached(here / "hub", "jo/math.v2"), 1, "base_model: acme/base-1B")
    code = make_model(here / "experts/code", 2)
    (here / "linked").symlink_to(math)
    matter, rows = merged(base, {"math": here / "linked", "code": code}, here / "out")
    assert matter["base_model"] == ["acme/base-1B", "jo/math.v2"]
    assert matter["base_model_relation"] == "merge"
    assert rows == ["| acme/base-1B | base |", "| jo/math.v2 | expert `math` |", "| code | expert `code` |"]


def test_a_hub_reference_with_a_revision_is_linked_by_its_id(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(here / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    make_model(cached(here / "hub", "acme/base"))
    make_model(cached(here / "hub", "jo/math"), 1)
    matter, rows = merged("acme/base", {"math": f"jo/math@{REVISION}"}, here / "out")
    assert matter["base_model"] == ["acme/base", "jo/math"]
    assert rows == ["| acme/base | base |", "| jo/math | expert `math` |"]


@pytest.mark.parametrize(
    ("name", "ids"),
    [
        ("acme/base-1B", ["acme/base-1B"]),
        (f"/root/.cache/huggingface/hub/models--acme--base/snapshots/{REVISION}", ["acme/base"]),
        ("/home/jo/models/base", []),
        ("./models/base", []),
        ("models/base", []),  # a folder here
        ("experts/math", []),  # a folder where the model lies
        ("runs/checkpoint-500", []),
        ("acme/base--1B", []),
        ("acme/base.", []),
        ("größe/base", []),
        ("base", []),
        (7, []),
        ("", []),
    ],
)
def test_the_config_s_origin_counts_if_it_is_a_hub_id(here: Path, name: Any, ids: list[str]) -> None:
    make_model(here / "models/base")
    make_model(here / "elsewhere/models/origin", _name_or_path=name)
    make_model(here / "elsewhere/experts/math", 1)
    matter, rows = merged(here / "elsewhere/models/origin", {"math": here / "elsewhere/experts/math"}, here / "out")
    assert matter.get("base_model", []) == ids
    assert rows[0] == "| origin | base |"


@pytest.mark.parametrize(
    ("card", "ids"),
    [
        ("base_model: acme/base", ["acme/base"]),
        ("base_model: [acme/base, jo/math, local-folder, 3]", ["acme/base", "jo/math"]),
        ("base_model:\n- acme/base\n- acme/base", ["acme/base"]),
        ("model_name: acme/mine\nbase_model: acme/base", ["acme/mine"]),
        ("model_name: run 7\nbase_model: acme/base", ["acme/base"]),
        ("base_model: my-folder", []),
        ("base_model: []", []),
        ("base_model: {a: acme/base}", []),
        ("license: mit", []),
    ],
)
@pytest.mark.parametrize("who", ["base", "expert"])
def test_a_card_s_own_origin_counts(here: Path, card: str, ids: list[str], who: str) -> None:
    make_model(here / "base", 0, card if who == "base" else None)
    make_model(here / "math", 1, card if who == "expert" else None)
    matter, rows = merged("base", {"math": "math"}, here / "out")
    assert matter.get("base_model", []) == ids
    assert ("base_model_relation" in matter) == bool(ids)
    assert rows == ["| base | base |", "| math | expert `math` |"]


def test_a_model_and_its_adapter_are_both_linked(here: Path) -> None:
    make_model(here / "base")
    tuned = make_model(cached(here / "hub", "acme/tuned"), 1)
    first = make_adapter(cached(here / "hub", "jo/lora"), 2)
    second = make_adapter(here / "adapters/second", 3, "base_model: acme/tuned")
    experts = {"one": f"{tuned}+{first}", "two": f"base+{second}"}
    matter, rows = merged("base", experts, here / "out")
    assert matter["base_model"] == ["acme/tuned", "jo/lora"]
    assert rows[1:] == [
        "| acme/tuned + jo/lora | expert `one` (LoRA) |",
        "| second | expert `two` (LoRA) |",  # on the base, which has a row of its own
    ]


@pytest.mark.parametrize(
    ("base_card", "fetched", "ids", "relation"),
    [
        (None, False, None, None),
        ("base_model: acme/base", False, ["acme/base"], "adapter"),
        ("base_model: acme/base", True, ["acme/base", "jo/lora"], "merge"),
        (None, True, ["jo/lora"], "merge"),
    ],
)
def test_adapter_cards(
    here: Path, base_card: str | None, fetched: bool, ids: list[str] | None, relation: str | None
) -> None:
    make_model(here / "base", 0, base_card)
    one = make_adapter(cached(here / "hub", "jo/lora") if fetched else here / "adapters/one", 1)
    two = make_adapter(here / "adapters/two", 2)
    plan = plan_recipe(build_recipe("task_arithmetic", "base", {"one": str(one), "two": str(two)}, {}))
    write_adapter(plan, here / "out", "cat")
    matter, rows = read_card(here / "out")
    assert matter["library_name"] == "peft"
    assert (matter.get("base_model"), matter.get("base_model_relation")) == (ids, relation)
    assert rows == [
        "| base | base |",
        f"| {'jo/lora' if fetched else 'one'} | expert `one` (LoRA) |",
        "| two | expert `two` (LoRA) |",
    ]


def test_a_folder_that_is_called_by_a_dot_has_its_own_name(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_model(here / "base")
    make_model(here / "math", 1)
    monkeypatch.chdir(here / "base")
    _, rows = merged(".", {"math": "../math"}, here / "out")
    assert rows == ["| base | base |", "| math | expert `math` |"]


def test_a_merge_of_a_merge_keeps_what_is_known(here: Path) -> None:
    make_model(here / "base", 0, "base_model: acme/base")
    make_model(here / "math", 1, "base_model: jo/math")
    merged("base", {"math": "math"}, here / "first")
    shutil.rmtree(here / "math")
    matter, _ = merged("base", {"first": "first"}, here / "second")
    assert matter["base_model"] == ["acme/base", "jo/math"]
