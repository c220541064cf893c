"""PEFT adapters of image-text models, whose modules go by other names than the files' tensors."""

import importlib
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file

from consilience.api import build_recipe, merge_recipe, plan_recipe
from consilience.coefficients import load_coefficients
from consilience.engine.adapter_output import write_adapter
from consilience.errors import InputError

hf: Any = importlib.import_module("transformers")
peft: Any = importlib.import_module("peft")
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
TARGETS = ["q_proj", "down_proj"]
IDS = torch.tensor([[5, 9, 3, 17, 11]])


def loaded(folder: Path) -> Any:
    return hf.AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(
    scope="module", params=["qwen2_vl", *(pytest.param(name, marks=pytest.mark.slow) for name in ("internvl", "llava"))]
)
def zoo(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny.save_family(tmp_path_factory.mktemp(request.param), getattr(tiny, request.param), ())
    for seed, name in enumerate(("math", "code")):
        torch.manual_seed(seed)
        model = peft.get_peft_model(
            loaded(folder / "base"), peft.LoraConfig(r=1 + seed, lora_alpha=3, target_modules=TARGETS)
        )
        for key, value in model.named_parameters():
            if "lora_" in key:
                torch.nn.init.normal_(value, std=0.3)
        model.save_pretrained(folder / name)
    return folder


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def test_a_merged_adapter_is_what_peft_makes_of_it(zoo: Path, tmp_path: Path) -> None:
    experts = {name: str(zoo / name) for name in ("math", "code")}
    alone = {"math": experts["math"]}
    recipe = build_recipe("task_arithmetic", str(zoo / "base"), alone, {"weight": 1.0})
    merge_recipe(recipe, tmp_path / "out")
    expected = peft.PeftModel.from_pretrained(loaded(zoo / "base"), zoo / "math").eval()
    assert not torch.allclose(logits(expected), logits(loaded(zoo / "base")), atol=1e-2)
    torch.testing.assert_close(logits(loaded(tmp_path / "out")), logits(expected), rtol=1e-4, atol=1e-5)
    # As an adapter it goes by the adapters' own names, for PEFT to load it.
    recipe = build_recipe("task_arithmetic", str(zoo / "base"), experts, {"weight": 0.5})
    merge_recipe(recipe, tmp_path / "both")
    plan = plan_recipe(recipe)
    write_adapter(plan, tmp_path / "adapter", "cat")
    plan.close()
    own = peft.PeftModel.from_pretrained(loaded(zoo / "base"), tmp_path / "adapter").eval()
    torch.testing.assert_close(logits(own), logits(loaded(tmp_path / "both")), rtol=1e-4, atol=1e-5)


def test_adapters_learn_from_images(zoo: Path, tmp_path: Path) -> None:
    tiny.write_image(tmp_path / "red.png", (200, 30, 10))
    template = (zoo / "base" / "chat_template.jinja").exists()
    row = {"image": "red.png", "prompt": "what colour?" if template else "<image> what colour?", "response": "red"}
    data = {
        name: {"calibration": str(tiny.write_rows(tmp_path / f"{name}.jsonl", row, {"prompt": f"say {name}"}))}
        for name in ("math", "code")
    }
    parameters = {"steps": 12, "precision": "float32", "learning_rate": 0.1, "gamma": 0.0, "batch": 0}
    experts = {name: str(zoo / name) for name in data}
    merge_recipe(build_recipe("expert_merging", str(zoo / "base"), experts, parameters, data=data), tmp_path / "out")
    losses = [line["loss"] for line in load_coefficients(tmp_path / "out").facts["history"]]
    assert losses[-1] < 0.99 * losses[0]
    base, out = (load_file(folder / "model.safetensors") for folder in (zoo / "base", tmp_path / "out"))
    changed = {name for name in base if not torch.equal(base[name], out[name])}
    assert changed
    assert all(any(f".{target}." in name for target in TARGETS) for name in changed)


def test_an_adapter_of_other_shapes_is_refused_by_the_base_s_name(zoo: Path, tmp_path: Path) -> None:
    state = load_file(zoo / "math" / "adapter_model.safetensors")
    for name, value in state.items():
        state[name] = value[:, :-1].contiguous() if "lora_A" in name else value
    (tmp_path / "odd").mkdir()
    from safetensors.torch import save_file

    save_file(state, tmp_path / "odd" / "adapter_model.safetensors")
    (tmp_path / "odd" / "adapter_config.json").write_text((zoo / "math" / "adapter_config.json").read_text())
    recipe = build_recipe("linear", str(zoo / "base"), {"odd": str(tmp_path / "odd")}, {})
    with pytest.raises(InputError, match=r"odd: its update of '[\w.]*layers\.0\..*has shape"):
        plan_recipe(recipe)
