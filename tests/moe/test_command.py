"""What a user types and reads: merge, check and dry runs of a mixture, and one error for each thing that is wrong."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file, save_file

import consilience as cs
from consilience.__main__ import run
from consilience.errors import InputError
from tests.moe.dense import save_dense, write_recipe

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
Change = Callable[[dict[str, Any], Path], None]


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("dense")
    for seed, name in enumerate(("base", "math", "code")):
        save_dense("llama", root / name, seed)
    save_dense("llama", root / "wide", 3, intermediate_size=64)
    save_dense("llama", root / "deep", 3, num_hidden_layers=4)
    save_dense("qwen2", root / "qwen2", 4)
    save_dense("qwen3", root / "qwen3", 4)
    save_dense("llama", root / "biased", 5, mlp_bias=True)
    return root


def given(dense: Path, path: Path, **more: Any) -> Path:
    return write_recipe(path, dense / "base", {"math": dense / "math", "code": dense / "code"}, **more)


def test_merge_says_what_was_built_and_where_prompts_go(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = given(dense, tmp_path / "moe.yaml")
    assert run(["merge", str(recipe), str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"{tmp_path / 'out'}: moe, 42 tensors, ")
    assert "router: of the" in out
    assert "opened by transformers" in out
    stored = yaml.safe_load((tmp_path / "out" / "consilience" / "recipe.yaml").read_text())
    assert stored["gate_mode"] == "mlp_input"
    assert stored["experts_per_token"] == 2
    assert [expert["name"] for expert in stored["experts"]] == ["math", "code"]
    # The recipe that was stored builds the same again.
    assert run(["merge", str(tmp_path / "out" / "consilience" / "recipe.yaml"), str(tmp_path / "again"), "-q"]) == 0
    one, other = (json.loads((tmp_path / f / "consilience" / "lineage.json").read_text()) for f in ("out", "again"))
    assert one["output"] == other["output"]
    assert (tmp_path / "out" / "tokenizer.json").exists()
    assert "mixture" not in json.loads((tmp_path / "out" / "config.json").read_text())


def test_check_and_dry_runs_look_and_touch_nothing(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = given(dense, tmp_path / "moe.yaml", dtype="bfloat16")
    before = sorted(tmp_path.rglob("*"))
    assert run(["check", str(recipe)]) == 0
    assert capsys.readouterr().out == "ok: moe of 2 experts, 42 tensors\n"
    assert run(["check", str(recipe), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["ok"] is True
    assert facts["experts"] == ["math", "code"]
    assert facts["tensors"] == 42
    assert run(["merge", str(recipe), str(tmp_path / "out"), "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sorted(tmp_path.rglob("*")) == before
    assert "  model.layers.0.block_sparse_moe.experts.1.w2.weight  32x48  F32->BF16  copy from code" in lines
    assert "  model.layers.0.block_sparse_moe.gate.weight  2x32  F32->BF16  copy from the prompts" in lines
    assert "  model.norm.weight  32  F32->BF16  copy from base" in lines
    assert "tensors  42" in lines


def test_paths_start_from_the_recipe_and_python_takes_plain_values(dense: Path, tmp_path: Path) -> None:
    value = yaml.safe_load(given(dense, tmp_path / "moe.yaml").read_text())
    for entry in (value, *value["experts"]):
        key = "base_model" if "base_model" in entry else "source_model"
        entry[key] = Path(entry[key]).name
    recipe = dense / "moe.yaml"
    recipe.write_text(yaml.safe_dump(value))
    first = cs.merge_recipe(recipe, tmp_path / "one")
    plain = yaml.safe_load((tmp_path / "moe.yaml").read_text())
    assert cs.merge_recipe(plain, tmp_path / "two").fingerprint == first.fingerprint  # pyright: ignore
    recipe.unlink()


def _set(**changes: Any) -> Change:
    return lambda value, dense: value.update(changes)


def _expert(**changes: Any) -> Change:
    def change(value: dict[str, Any], dense: Path) -> None:
        value["experts"][0].update({k: str(dense / v) if k == "source_model" else v for k, v in changes.items()})

    return change


def _base(name: str) -> Change:
    return lambda value, dense: value.update(base_model=str(dense / name))


def _same_prompts(value: dict[str, Any], dense: Path) -> None:
    for entry in value["experts"]:
        entry.update(positive_prompts=["one"], negative_prompts=[])


def _shared(value: dict[str, Any], dense: Path) -> None:
    value["shared_experts"] = [{"source_model": str(dense / "base"), "positive_prompts": ["x"]}]


WRONG: dict[str, tuple[Change, str]] = {
    "gate mode": (_set(gate_mode="hiden"), "gate_mode 'hiden' is unknown; did you mean 'hidden'?"),
    "key": (_set(gatemode="hidden"), "unknown key 'gatemode'; did you mean 'gate_mode'?"),
    "expert's key": (_expert(postive_prompts=["x"]), "did you mean 'positive_prompts'?"),
    "no experts": (_set(experts=[]), "experts: must name at least one"),
    "no prompts": (_expert(positive_prompts=None, negative_prompts=None), "experts.0: positive_prompts are missing"),
    "no positive prompts": (_expert(positive_prompts=[]), "experts.0: negative_prompts without positive_prompts"),
    "empty prompt": (_expert(positive_prompts=[""]), "experts.0.positive_prompts.0 must not be empty; write"),
    "same prompts": (_same_prompts, "all experts have the same prompts"),
    "no difference": (_expert(negative_prompts=["one"], positive_prompts=["one"]), "are the same to the base"),
    "too many chosen": (_set(experts_per_token=3), "experts_per_token: 3 of 2 experts"),
    "none chosen": (_set(experts_per_token=0), "experts_per_token"),
    "noise": (_expert(noise_scale=0.1), "experts.0.noise_scale: noise is not added"),
    "dtype": (_set(dtype="int3"), "dtype 'int3' is not one of"),
    "architecture": (_set(architecture="jamba"), "architecture 'jamba' is unknown; use one of mixtral, qwen2, qwen3"),
    "other architecture": (_set(architecture="qwen"), "is a llama model, which becomes mixtral"),
    "deepseek": (_set(architecture="deepseek"), "is no architecture of transformers"),
    "shared": (_shared, "shared_experts: mixtral has none"),
    "no shared": (_base("qwen2"), "its model_type is 'llama', and 'qwen2' in"),
    "wider": (_expert(source_model="wide"), "its intermediate_size is 64, and 48 in"),
    "deeper": (_expert(source_model="deep"), "its num_hidden_layers is 4, and 3 in"),
    "other kind": (_expert(source_model="qwen3"), "its model_type is 'qwen3', and 'llama' in"),
    "biases": (_base("biased"), "mlp_bias: it has biases in its MLPs"),
    "absent": (_expert(source_model="nowhere"), "no such"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_one_error_and_leaves_nothing(
    case: str, dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change, expected = WRONG[case]
    value = yaml.safe_load(given(dense, tmp_path / "moe.yaml").read_text())
    change(value, dense)
    (tmp_path / "moe.yaml").write_text(yaml.safe_dump(value))
    before = sorted(tmp_path.rglob("*"))
    assert run(["merge", str(tmp_path / "moe.yaml"), str(tmp_path / "out"), "-q"]) == 2
    lines = capsys.readouterr().err.splitlines()
    errors = [line for line in lines if not line.startswith("consilience: warning")]
    assert expected in errors[0]
    assert len(errors) <= 2
    assert sorted(tmp_path.rglob("*")) == before
    if case != "no difference":
        assert run(["check", str(tmp_path / "moe.yaml")]) == 2


def test_qwen2_needs_a_shared_expert_with_prompts_or_without_output(dense: Path, tmp_path: Path) -> None:
    value = yaml.safe_load(given(dense, tmp_path / "moe.yaml").read_text())
    value["base_model"] = str(dense / "qwen2")
    for entry in value["experts"]:
        entry["source_model"] = str(dense / "qwen2")
    with pytest.raises(InputError, match="qwen2 has exactly one"):
        cs.plan_recipe(value)
    value["shared_experts"] = [{"source_model": str(dense / "qwen2")}]
    with pytest.raises(InputError, match=r"shared_experts.0: positive_prompts are missing"):
        cs.plan_recipe(value)
    value["shared_experts"][0]["residual_scale"] = 0
    cs.merge_recipe(value, tmp_path / "out")
    gate = load_file(tmp_path / "out" / "model.safetensors")["model.layers.0.mlp.shared_expert_gate.weight"]
    assert not gate.any()


def test_options_that_a_mixture_has_no_use_for_are_refused(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = str(given(dense, tmp_path / "moe.yaml"))
    for options, expected in (
        (["--as-adapter", "cat"], "is a model, no adapter"),
        (["--tensorboard", str(tmp_path / "t")], "has no effect"),
        (["--device", "cuda:99"], "torch cannot use it"),
    ):
        assert run(["merge", recipe, str(tmp_path / "out"), *options]) == 2
        assert expected in capsys.readouterr().err
    assert run(["doctor", recipe]) == 2
    assert "the recipe of a mixture of experts" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_broken_expert_is_named(dense: Path, tmp_path: Path) -> None:
    state = load_file(dense / "code" / "model.safetensors")
    save_dense("llama", tmp_path / "broken", 2)
    state["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
    save_file(state, tmp_path / "broken" / "model.safetensors", {"format": "pt"})
    for dtype in ("float32", "bfloat16"):
        value = yaml.safe_load(given(dense, tmp_path / "moe.yaml", dtype=dtype).read_text())
        value["experts"][1]["source_model"] = str(tmp_path / "broken")
        with pytest.raises(InputError, match=r"^code: tensor 'model.layers.1.*experts.1.w3.weight': 1 of its"):
            cs.merge_recipe(value, tmp_path / "out")
    del state["model.layers.1.mlp.up_proj.weight"]
    save_file(state, tmp_path / "broken" / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"broken: tensor 'model.layers.1.mlp.up_proj.weight' of .* is missing"):
        cs.plan_recipe(value)


def test_experts_that_are_one_model_are_said(dense: Path, tmp_path: Path) -> None:
    same = write_recipe(tmp_path / "moe.yaml", dense / "base", {"math": dense / "math", "code": dense / "math"})
    plan = cs.plan_recipe(same)
    assert any("all 2 experts are" in one.text for one in plan.differences)
    with pytest.raises(InputError, match="all 2 experts are"):
        cs.plan_recipe(same, strict=True)


def test_experts_of_other_sizes_elsewhere_give_their_mlps_and_what_else_differs_is_said(
    dense: Path, tmp_path: Path
) -> None:
    other = save_dense("llama", tmp_path / "other", 7, vocab_size=320, rms_norm_eps=1e-5, num_attention_heads=2)
    recipe = write_recipe(tmp_path / "moe.yaml", dense / "base", {"math": other, "code": dense / "code"})
    with pytest.warns(UserWarning, match="math: norm epsilon"):
        summary = cs.merge_recipe(recipe, tmp_path / "out")
    said = [text for text in summary.warnings if "norm epsilon" in text or "attention heads" in text]
    assert len(said) == 2
    assert not any("config: math" in text for text in said)  # a mixture's recipe has no such key
    out, own = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", other))
    assert out["model.embed_tokens.weight"].shape[0] == 310
    w1 = out["model.layers.2.block_sparse_moe.experts.0.w1.weight"]
    assert (w1 == own["model.layers.2.mlp.gate_proj.weight"]).all()


def test_random_routers_need_neither_torch_nor_transformers(dense: Path, tmp_path: Path) -> None:
    value = yaml.safe_load(given(dense, tmp_path / "moe.yaml", gate_mode="random").read_text())
    for entry in value["experts"]:
        entry.update(positive_prompts=None, negative_prompts=None)
    (tmp_path / "moe.yaml").write_text(yaml.safe_dump(value))
    code = (
        "import sys; sys.modules['torch'] = sys.modules['transformers'] = None; import consilience as cs; "
        f"print(cs.merge_recipe({str(tmp_path / 'moe.yaml')!r}, {str(tmp_path / 'out')!r}).loader)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "torch is not installed" in done.stdout
    assert load_file(tmp_path / "out" / "model.safetensors")["model.layers.0.block_sparse_moe.gate.weight"].any()
    recipe = given(dense, tmp_path / "hidden.yaml")
    done = subprocess.run(
        [sys.executable, "-c", code.replace("moe.yaml", "hidden.yaml").replace("/out", "/none")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert f"{recipe}: gate_mode 'mlp_input' of prompts needs torch; install it with" in done.stderr
    assert not (tmp_path / "none").exists()
