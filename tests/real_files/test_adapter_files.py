"""Adapter files are adapters however they are named and wherever they lie; factors are never averaged apart."""

import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import consilience as cs
from consilience.errors import InputError
from tests.real_files.support import (
    IDS,
    State,
    adapter,
    cli,
    hf,
    logits,
    merged,
    peft,
    real_file,
    refused,
    state,
    tiny,
)

#: Layers of a UNet as diffusers calls them, with what they map.
BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"
UNET = {
    f"{BLOCK}.attn1.to_q": (32, 32),
    f"{BLOCK}.attn1.to_k": (32, 32),
    f"{BLOCK}.attn1.to_out.0": (32, 32),
    f"{BLOCK}.ff.net.0.proj": (48, 32),
    "down_blocks.0.resnets.0.conv1": (32, 16, 3, 3),
    "down_blocks.0.resnets.0.norm1": (16,),
}


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(hash((shape, seed)) % 2**31))


def unet(path: Path, before: str = "") -> State:
    tensors = {f"{before}{name}.weight": noise(*shape, seed=i) for i, (name, shape) in enumerate(UNET.items())}
    save_file(tensors, path)
    return tensors


def factors(shape: tuple[int, ...], rank: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (down, up) of a linear layer or of a convolution as LoCon has it."""
    down = noise(rank, *shape[1:], seed=seed)
    return down, noise(shape[0], rank, *(1 for _ in shape[2:]), seed=seed + 100)


def kohya(path: Path, seed: int, alpha: float | None = 2.0, before: str = "lora_unet_", rank: int = 4) -> State:
    """Write kohya's file for every layer; return the updates by the layers' names."""
    tensors, updates = State(), State()
    for name, shape in UNET.items():
        if len(shape) == 1:
            continue
        down, up = factors(shape, rank, seed)
        flat = before + (name.replace(".", "_") if before.endswith("_") else name)
        tensors |= {f"{flat}.lora_down.weight": down, f"{flat}.lora_up.weight": up}
        if alpha is not None:
            tensors[f"{flat}.alpha"] = torch.tensor(alpha)
        scale = 1.0 if alpha is None else alpha / rank
        updates[name] = scale * torch.einsum("or,ri->oi", up.flatten(1), down.flatten(1)).view(shape)
    save_file(tensors, path, metadata={"ss_network_module": "networks.lora"})
    return updates


def agree(out: State, base: State, updates: State, before: str = "") -> None:
    for name, value in base.items():
        update = updates.get(name.removeprefix(before).removesuffix(".weight"))
        torch.testing.assert_close(out[name], value if update is None else value + update, atol=1e-5, rtol=1e-5)


def mean(one: State, two: State) -> State:
    return {name: (one[name] + two[name]) / 2 for name in one}


def linear(tmp_path: Path, *files: Path) -> Path:
    models = [{"model": str(file), "parameters": {"weight": 0.5}} for file in files]
    path = tmp_path / "r.yaml"
    path.write_text(json.dumps({"merge_method": "linear", "models": models}))
    return path


def advised(outcome: Any, base: Path, out: Path) -> Any:
    """Run the command that an error advises, with a base and a place for its result."""
    words = shlex.split(outcome.err.split("consilience merge ", 1)[1])
    return cli("merge", *(str(base) if w == "BASE" else str(out) if w == "OUT" else w for w in words))


@real_file(
    5, family="kohya", option="two files in linear, without a base", expected="the command it advises: a formula",
    before="wrong numbers", now="refused, true cause",
)  # fmt: skip
def test_kohya_files_without_a_base(tmp_path: Path) -> None:
    base = unet(tmp_path / "base.safetensors")
    one, two = (kohya(tmp_path / f"l{n}.safetensors", n, alpha=float(n)) for n in (1, 2))
    recipe = linear(tmp_path, tmp_path / "l1.safetensors", tmp_path / "l2.safetensors")
    outcome = cli("merge", recipe, tmp_path / "out.safetensors")
    refused(outcome, "l1.safetensors", "adapter", "base_model", "--as-adapter cat")
    assert advised(outcome, tmp_path / "base.safetensors", tmp_path / "adapter").code == 0
    assert merged(tmp_path / "base.safetensors", tmp_path / "m.safetensors", x=tmp_path / "adapter").code == 0
    agree(state(tmp_path / "m.safetensors"), base, mean(one, two))


@real_file(
    5, family="Qwen2", option="two adapter_model.safetensors in linear, without a base", expected="PEFT's updates",
    before="wrong numbers", now="refused, true cause",
)  # fmt: skip
def test_peft_files_without_a_base(tmp_path: Path) -> None:
    tiny("Qwen2").save_pretrained(tmp_path / "base")
    tuned = [adapter(tiny("Qwen2"), tmp_path / f"a{n}", seed=n, target_modules=["q_proj"]) for n in (1, 2)]
    files = [tmp_path / f"a{n}/adapter_model.safetensors" for n in (1, 2)]
    outcome = cli("merge", linear(tmp_path, *files), tmp_path / "p.safetensors")
    refused(outcome, "a1/adapter_model.safetensors", "adapter", "base_model", "-e a1=", "-e a2=")
    assert advised(outcome, tmp_path / "base", tmp_path / "adapter").code == 0
    both = peft.PeftModel.from_pretrained(tiny("Qwen2"), tmp_path / "adapter")
    name = "base_model.model.model.layers.0.self_attn.q_proj"
    one, two, got = (m.get_submodule(name).get_delta_weight("default") for m in (*tuned, both))
    torch.testing.assert_close(got, (one + two) / 2, atol=1e-6, rtol=1e-4)


@real_file(
    5, family="kohya", option="LoCon: linear layers and a convolution, alpha", expected="a formula",
    before="wrong cause named",
)  # fmt: skip
def test_kohya_on_a_unet(tmp_path: Path) -> None:
    base = unet(tmp_path / "base.safetensors")
    updates = kohya(tmp_path / "l.safetensors", 1)
    assert merged(tmp_path / "base.safetensors", tmp_path / "out.safetensors", x=tmp_path / "l.safetensors").code == 0
    agree(state(tmp_path / "out.safetensors"), base, updates)


@real_file(
    5, family="kohya", option="no alpha, a base whose names have model.diffusion_model. before them",
    expected="a formula (kohya's default alpha = rank)", before="wrong cause named",
)  # fmt: skip
def test_kohya_without_alpha(tmp_path: Path) -> None:
    before = "model.diffusion_model."
    base = unet(tmp_path / "base.safetensors", before)
    updates = kohya(tmp_path / "l.safetensors", 1, alpha=None)
    outcome = merged(tmp_path / "base.safetensors", tmp_path / "out.safetensors", x=tmp_path / "l.safetensors")
    assert outcome.code == 0, outcome.said
    assert "no alpha" in outcome.said
    agree(state(tmp_path / "out.safetensors"), base, updates, before)


@real_file(
    5, family="ComfyUI", option="dotted names under diffusion_model., in bfloat16", expected="a formula",
    before="wrong cause named",
)  # fmt: skip
def test_dotted_names(tmp_path: Path) -> None:
    base = unet(tmp_path / "base.safetensors")
    kohya(tmp_path / "l.safetensors", 1, alpha=3.0, before="diffusion_model.")
    held = {name: tensor.bfloat16() for name, tensor in load_file(tmp_path / "l.safetensors").items()}
    save_file(held, tmp_path / "l.safetensors")
    assert merged(tmp_path / "base.safetensors", tmp_path / "out.safetensors", x=tmp_path / "l.safetensors").code == 0
    updates = State()
    for name, shape in UNET.items():
        down, up = (held.get(f"diffusion_model.{name}.lora_{side}.weight") for side in ("down", "up"))
        if down is not None and up is not None:
            updates[name] = 3 / 4 * (up.float().flatten(1) @ down.float().flatten(1)).view(shape)
    agree(state(tmp_path / "out.safetensors"), base, updates)


@real_file(
    5, family="CLIP", option="kohya's text encoder modules (lora_te_)", expected="a formula",
    before="wrong cause named",
)  # fmt: skip
def test_a_text_encoder(tmp_path: Path) -> None:
    config = hf.CLIPTextConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2
    )
    torch.manual_seed(0)
    hf.CLIPTextModel(config).save_pretrained(tmp_path / "base")
    base = state(tmp_path / "base")
    layer = next(n.removesuffix(".weight") for n in base if n.endswith("layers.1.self_attn.q_proj.weight"))
    flat = "lora_te_text_model_encoder_layers_1_self_attn_q_proj"
    down, up = factors((32, 32), 4, 1)
    tensors = {f"{flat}.lora_down.weight": down, f"{flat}.lora_up.weight": up, f"{flat}.alpha": torch.tensor(1.0)}
    save_file(tensors, tmp_path / "l.safetensors")
    outcome = merged(tmp_path / "base", tmp_path / "out", x=tmp_path / "l.safetensors")
    assert outcome.code == 0, outcome.said
    agree(state(tmp_path / "out"), base, {layer: up @ down / 4})


@real_file(
    5, family="diffusers", option="pytorch_lora_weights.safetensors in a folder, config in the metadata, rank_pattern",
    expected="a formula", before="wrong cause named",
)  # fmt: skip
def test_diffusers_with_metadata(tmp_path: Path) -> None:
    base = unet(tmp_path / "base.safetensors")
    ranks = {f"{BLOCK}.attn1.to_q": 2, f"{BLOCK}.attn1.to_k": 4}
    tensors, updates = State(), State()
    for name, rank in ranks.items():
        down, up = factors(UNET[name], rank, 1)
        tensors |= {f"unet.{name}.lora_A.weight": down, f"unet.{name}.lora_B.weight": up}
        updates[name] = 6 / rank * up @ down
    said = {"unet.r": 4, "unet.lora_alpha": 6, "unet.rank_pattern": {"attn1.to_q": 2}, "unet.lora_bias": False}
    (tmp_path / "lora").mkdir()
    file = tmp_path / "lora/pytorch_lora_weights.safetensors"
    save_file(tensors, file, metadata={"format": "pt", "lora_adapter_metadata": json.dumps(said)})
    outcome = merged(tmp_path / "base.safetensors", tmp_path / "out.safetensors", x=tmp_path / "lora")
    assert outcome.code == 0, outcome.said
    agree(state(tmp_path / "out.safetensors"), base, updates)


@real_file(
    5, family="diffusers", option="attention processors' names of before PEFT, no alpha", expected="a formula",
    before="wrong cause named",
)  # fmt: skip
def test_diffusers_of_before_peft(tmp_path: Path) -> None:
    base = unet(tmp_path / "base.safetensors")
    tensors, updates = State(), State()
    for layer in ("to_q", "to_out"):
        name = f"{BLOCK}.attn1.{layer}" + (".0" if layer == "to_out" else "")
        down, up = factors(UNET[name], 4, 1)
        place = f"unet.{BLOCK}.attn1.processor.{layer}_lora"
        tensors |= {f"{place}.down.weight": down, f"{place}.up.weight": up}
        updates[name] = up @ down
    save_file(tensors, tmp_path / "pytorch_lora_weights.safetensors")
    expert = tmp_path / "pytorch_lora_weights.safetensors"
    outcome = merged(tmp_path / "base.safetensors", tmp_path / "out.safetensors", x=expert)
    assert outcome.code == 0, outcome.said
    agree(state(tmp_path / "out.safetensors"), base, updates)


@real_file(
    5, family="LyCORIS", option="LoHa, LoKr, DoRA and a middle factor, alone and averaged", expected="the message",
    before="wrong numbers", now="refused, true cause",
)  # fmt: skip
@pytest.mark.parametrize(
    ("names", "kind"),
    [
        (["hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "alpha"], "LoHa"),
        (["lokr_w1", "lokr_w2", "alpha"], "LoKr"),
        (["lora_down.weight", "lora_up.weight", "dora_scale", "alpha"], "DoRA"),
        (["lora_down.weight", "lora_up.weight", "lora_mid.weight", "alpha"], "middle factor"),
    ],
)
def test_other_kinds_of_update(tmp_path: Path, names: list[str], kind: str) -> None:
    files = [tmp_path / f"{n}.safetensors" for n in (1, 2)]
    for n, file in enumerate(files):
        save_file({f"lora_unet_x_to_q.{name}": noise(4, 4, seed=n) for name in names}, file)
    refused(cli("merge", linear(tmp_path, *files), tmp_path / "out.safetensors"), "1.safetensors", kind)


@real_file(
    5, family="XLabs", option="factors named in an own way, averaged", expected="the message",
    before="wrong numbers", now="refused, true cause",
)  # fmt: skip
def test_factors_of_an_unknown_naming(tmp_path: Path) -> None:
    files = [tmp_path / f"{n}.safetensors" for n in (1, 2)]
    for n, file in enumerate(files):
        place = "double_blocks.0.processor.qkv_lora1"
        save_file({f"{place}.{side}.weight": noise(4, 4, seed=n) for side in ("down", "up")}, file)
    refused(cli("merge", linear(tmp_path, *files), tmp_path / "o.safetensors"), "qkv_lora1.down.weight", "LoRA factor")


@real_file(
    5, family="PEFT", option="state dict of a whole PEFT model", expected="the message",
    before="wrong numbers", now="refused, true cause",
)  # fmt: skip
def test_the_state_of_a_whole_peft_model(tmp_path: Path) -> None:
    for n in (1, 2):
        tuned = adapter(tiny("Qwen2"), tmp_path / "unused", seed=n, target_modules=["q_proj"])
        torch.save(tuned.state_dict(), tmp_path / f"{n}.pt")
    outcome = cli("merge", linear(tmp_path, tmp_path / "1.pt", tmp_path / "2.pt"), tmp_path / "out.safetensors")
    refused(outcome, "1.pt", "lora_A", "factor", "beside whole weights")


@real_file(
    5, family="PEFT", option="state dicts of adapters in memory", expected="the message",
    before="wrong numbers", now="refused, true cause",
)  # fmt: skip
def test_state_dicts_in_memory(tmp_path: Path) -> None:
    tuned = [adapter(tiny("Qwen2"), tmp_path / "a", seed=n, target_modules=["q_proj"]) for n in (1, 2)]
    states = {f"e{n}": peft.get_peft_model_state_dict(model) for n, model in enumerate(tuned)}
    with pytest.raises(InputError, match=r"lora_A\.weight' is a factor of an adapter"):
        cs.merge(None, states, method="linear")


@real_file(
    5, family="PEFT", option="adapter_model.safetensors without its config", expected="the message",
    before="wrong cause named", now="refused, true cause",
)  # fmt: skip
def test_a_file_without_its_config(tmp_path: Path) -> None:
    tiny("Qwen2").save_pretrained(tmp_path / "base")
    adapter(tiny("Qwen2"), tmp_path / "a", target_modules=["q_proj"])
    (tmp_path / "a/adapter_config.json").unlink()
    file = tmp_path / "a/adapter_model.safetensors"
    for expert in (file, tmp_path / "a"):
        refused(merged(tmp_path / "base", tmp_path / "out", x=expert), str(file), "adapter_config.json", "lora_alpha")


@real_file(
    5, family="Llama", option="adapter_model.bin, as a file", expected="PEFT, unmerged", before="wrong cause named"
)
def test_a_bare_torch_file(tmp_path: Path) -> None:
    base = tiny("Llama")
    base.save_pretrained(tmp_path / "base")
    tuned = adapter(base, tmp_path / "a", target_modules=["q_proj"], save={"safe_serialization": False})
    assert merged(tmp_path / "base", tmp_path / "out", x=tmp_path / "a/adapter_model.bin").code == 0
    torch.testing.assert_close(logits(tmp_path / "out"), logits(tuned), atol=1e-5, rtol=1e-4)


@real_file(
    5, family="Mistral", option="the weights renamed, beside their config", expected="PEFT, unmerged",
    before="wrong cause named",
)  # fmt: skip
def test_renamed_weights(tmp_path: Path) -> None:
    base = tiny("Mistral")
    base.save_pretrained(tmp_path / "base")
    tuned = adapter(base, tmp_path / "a", target_modules=["v_proj"])
    (tmp_path / "a/adapter_model.safetensors").rename(tmp_path / "a/style.safetensors")
    assert merged(tmp_path / "base", tmp_path / "out", x=tmp_path / "a").code == 0
    torch.testing.assert_close(logits(tmp_path / "out"), logits(tuned), atol=1e-5, rtol=1e-4)


@real_file(
    5, family="Qwen2", option="adapter folder with the base's config.json, also as BASE+ADAPTER",
    expected="PEFT, unmerged", before="wrong cause named",
)  # fmt: skip
@pytest.mark.parametrize("form", ["a", "base+a"])
def test_a_config_beside_an_adapter(tmp_path: Path, form: str) -> None:
    base = tiny("Qwen2", tie_word_embeddings=False)
    base.save_pretrained(tmp_path / "base")
    tuned = adapter(base, tmp_path / "a", target_modules=["q_proj"])
    base.config.save_pretrained(tmp_path / "a")
    expert = Path("+".join(str(tmp_path / part) for part in form.split("+")))
    outcome = merged(tmp_path / "base", tmp_path / "out", x=expert)
    assert outcome.code == 0, outcome.said
    torch.testing.assert_close(logits(tmp_path / "out"), logits(tuned), atol=1e-5, rtol=1e-4)
    assert "adapter" in cli("inspect", tmp_path / "a").out


@real_file(
    5, family="Gemma", option="adapter and a whole model in one folder", expected="PEFT, unmerged",
    before="silent loss",
)  # fmt: skip
def test_a_model_beside_an_adapter(tmp_path: Path) -> None:
    base = tiny("Gemma", head_dim=8)
    base.save_pretrained(tmp_path / "base")
    tuned = adapter(base, tmp_path / "a", target_modules=["q_proj"])
    tiny("Gemma", head_dim=8).save_pretrained(tmp_path / "a")
    outcome = merged(tmp_path / "base", tmp_path / "out", x=tmp_path / "a")
    assert outcome.code == 0, outcome.said
    assert "a whole model" in outcome.said
    torch.testing.assert_close(logits(tmp_path / "out"), logits(tuned), atol=1e-5, rtol=1e-4)
    as_base = merged(tmp_path / "a", tmp_path / "out2", x=tmp_path / "a/adapter_model.safetensors")
    assert as_base.code == 0, as_base.said
    torch.testing.assert_close(state(tmp_path / "out2"), state(tmp_path / "out"))


@real_file(
    5, family="Qwen2", option='saved as adapter_name="mine", in its subfolder', expected="PEFT, unmerged",
    before="wrong cause named",
)  # fmt: skip
def test_a_named_adapter(tmp_path: Path) -> None:
    base = tiny("Qwen2", tie_word_embeddings=False)
    base.save_pretrained(tmp_path / "base")
    tuned = adapter(base, tmp_path / "a", target_modules=["q_proj"])
    (tmp_path / "named").mkdir()
    shutil.move(tmp_path / "a", tmp_path / "named/mine")
    (tmp_path / "named/README.md").write_text("---\nlibrary_name: peft\n---\n")
    outcome = merged(tmp_path / "base", tmp_path / "out", x=tmp_path / "named")
    assert outcome.code == 0, outcome.said
    assert "named/mine" in outcome.said
    torch.testing.assert_close(logits(tmp_path / "out"), logits(tuned), atol=1e-5, rtol=1e-4)


@real_file(
    5, family="PEFT", option="several named adapters, or checkpoints of a run, in one folder", expected="the message",
    before="wrong cause named", now="refused, true cause",
)  # fmt: skip
def test_several_named_adapters(tmp_path: Path) -> None:
    base = tiny("Qwen2")
    base.save_pretrained(tmp_path / "base")
    for name in ("checkpoint-10", "checkpoint-20"):
        adapter(tiny("Qwen2"), tmp_path / "run" / name, target_modules=["q_proj"])
    outcome = merged(tmp_path / "base", tmp_path / "out", x=tmp_path / "run")
    refused(outcome, str(tmp_path / "run"), "checkpoint-10", "checkpoint-20", "name one")


def _mlx(folder: Path, scale: float = 20.0) -> State:
    """Write an adapter as mlx_lm does; return its updates."""
    folder.mkdir()
    tensors, updates = State(), State()
    for layer, (name, out, into) in enumerate([("self_attn.q_proj", 32, 32), ("mlp.up_proj", 48, 32)]):
        place = f"model.layers.{layer}.{name}"
        a, b = 0.01 * noise(into, 4, seed=layer), noise(4, out, seed=layer)
        tensors |= {f"{place}.lora_a": a, f"{place}.lora_b": b}
        updates[place] = scale * (a @ b).T
    save_file(tensors, folder / "adapters.safetensors", metadata={"format": "mlx"})
    parameters = {"rank": 4, "scale": scale, "dropout": 0.0}
    config = {"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": parameters}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return updates


@real_file(
    5, family="MLX", option="adapters.safetensors, square and not", expected="a formula", before="wrong cause named"
)
def test_mlx(tmp_path: Path) -> None:
    tiny("Llama", tie_word_embeddings=False).save_pretrained(tmp_path / "base")
    updates = _mlx(tmp_path / "mlx")
    assert merged(tmp_path / "base", tmp_path / "out", x=tmp_path / "mlx").code == 0
    agree(state(tmp_path / "out"), state(tmp_path / "base"), updates)


@real_file(
    5, family="MLX", option="with a PEFT adapter, --as-adapter cat", expected="a formula", before="wrong cause named"
)
def test_mlx_and_peft_as_one_adapter(tmp_path: Path) -> None:
    base = tiny("Llama", tie_word_embeddings=False)
    base.save_pretrained(tmp_path / "base")
    updates = _mlx(tmp_path / "mlx")
    tuned = adapter(base, tmp_path / "a", target_modules=["q_proj"])
    outcome = merged(tmp_path / "base", tmp_path / "out", "--as-adapter", "cat", m=tmp_path / "mlx", a=tmp_path / "a")
    assert outcome.code == 0, outcome.said
    loaded = peft.PeftModel.from_pretrained(tiny("Llama", tie_word_embeddings=False), tmp_path / "out")
    place = "model.layers.0.self_attn.q_proj"
    one, got = (m.get_submodule(f"base_model.model.{place}").get_delta_weight("default") for m in (tuned, loaded))
    torch.testing.assert_close(got, one + updates[place], atol=1e-5, rtol=1e-4)


@real_file(
    5, family="MLX", option="DoRA, or an older scale times alpha / rank", expected="the message",
    before="wrong cause named", now="refused, true cause",
)  # fmt: skip
def test_mlx_of_other_kinds(tmp_path: Path) -> None:
    tiny("Llama").save_pretrained(tmp_path / "base")
    _mlx(tmp_path / "mlx")
    path = tmp_path / "mlx/adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"fine_tune_type": "dora"}))
    refused(merged(tmp_path / "base", tmp_path / "out", x=tmp_path / "mlx"), str(path), "dora", "mlx_lm.fuse")
    config["lora_parameters"]["alpha"] = 16
    path.write_text(json.dumps(config))
    refused(merged(tmp_path / "base", tmp_path / "out", x=tmp_path / "mlx"), str(path), "lora_parameters", "scale")


def _tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(64)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    hf.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", pad_token="w0", eos_token="w2").save_pretrained(
        folder
    )


def _loss(model: Path | str, rows: Path) -> float:
    outcome = cli("evaluate", str(model), f"t={rows}", "--json", "--no-cache")
    assert outcome.code == 0, outcome.said
    return json.loads(outcome.out)["results"][0]["loss"]["value"]


@real_file(
    5, family="Llama", option="evaluate: bare file, subfolder, beside config.json; MLX", expected="transformers' load",
    before="wrongly refused",
)  # fmt: skip
def test_evaluating_adapters_however_they_are_named(tmp_path: Path) -> None:
    base = tiny("Llama", tie_word_embeddings=False)
    base.save_pretrained(tmp_path / "base")
    _tokenizer(tmp_path / "base")
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "w5 w6", "response": " w7 w8 w9"}) + "\n")
    tuned = adapter(base, tmp_path / "named/mine", target_modules=["q_proj"])
    with torch.no_grad():
        ids = torch.tensor([[5, 6, 7, 8, 9]])
        own = -tuned(ids).logits.log_softmax(-1)[0, [1, 2, 3], [7, 8, 9]].mean().item()
    base.config.save_pretrained(tmp_path / "named/mine")
    for form in ("named/mine/adapter_model.safetensors", "named", "named/mine"):
        assert _loss(f"{tmp_path / 'base'}+{tmp_path / form}", rows) == pytest.approx(own, abs=1e-5)
    updates = _mlx(tmp_path / "mlx")
    fresh = tiny("Llama", tie_word_embeddings=False)
    with torch.no_grad():
        for name, update in updates.items():
            fresh.get_submodule(name).weight.add_(update)
        own = -fresh(ids).logits.log_softmax(-1)[0, [1, 2, 3], [7, 8, 9]].mean().item()
    assert _loss(f"{tmp_path / 'base'}+{tmp_path / 'mlx'}", rows) == pytest.approx(own, abs=1e-5)
    refused(cli("evaluate", tmp_path / "named/mine", f"t={rows}"), "holds an adapter", "BASE+")


@real_file(
    5, family="Llama", option="route build: subfolder and bare file; MLX with the command that converts it",
    expected="PEFT, unmerged; a formula", before="wrongly refused",
)  # fmt: skip
def test_routing_adapters_however_they_are_named(tmp_path: Path) -> None:
    base = tiny("Llama", tie_word_embeddings=False)
    base.save_pretrained(tmp_path / "base")
    _tokenizer(tmp_path / "base")
    tuned = adapter(base, tmp_path / "named/mine", target_modules=["q_proj"])
    recipe = tmp_path / "route.yaml"
    for form in ("named", "named/mine/adapter_model.safetensors"):
        models = [{"model": str(tmp_path / form), "name": "x"}]
        recipe.write_text(
            json.dumps({"base_model": str(tmp_path / "base"), "models": models, "routing": {"local": "arrow"}})
        )
        outcome = cli("route", "build", recipe, tmp_path / "out", "--force")
        assert outcome.code == 0, outcome.said
        routed: Any = cs.load_routed(tmp_path / "out")
        torch.testing.assert_close(routed(input_ids=IDS).logits, logits(tuned), atol=1e-5, rtol=1e-4)
    _mlx(tmp_path / "mlx")
    recipe.write_text(recipe.read_text().replace("named/mine/adapter_model.safetensors", "mlx"))
    outcome = cli("route", "build", recipe, tmp_path / "out", "--force")
    refused(outcome, "mlx", "PEFT's form", "--as-adapter cat")
    assert advised(outcome, tmp_path / "base", tmp_path / "converted").code == 0


@real_file(
    5, family="kohya", option="doctor, check and inspect on a bare file", expected="they read it",
    before="wrong cause named",
)  # fmt: skip
def test_other_commands_read_kohya(tmp_path: Path) -> None:
    unet(tmp_path / "base.safetensors")
    kohya(tmp_path / "l.safetensors", 1)
    kohya(tmp_path / "k.safetensors", 2)
    recipe = linear(tmp_path, tmp_path / "l.safetensors", tmp_path / "k.safetensors")
    recipe.write_text(json.dumps(json.loads(recipe.read_text()) | {"base_model": str(tmp_path / "base.safetensors")}))
    for words in (["doctor", recipe], ["check", recipe], ["inspect", tmp_path / "l.safetensors"]):
        outcome = cli(*words)
        assert outcome.code == 0, outcome.said
    assert "adapter" in cli("inspect", tmp_path / "l.safetensors").out


@real_file(
    5, family="kohya", option="unet and text encoder in one file, onto the unet alone", expected="the message",
    before="wrong cause named", now="refused, true cause",
)  # fmt: skip
def test_a_file_for_several_networks(tmp_path: Path) -> None:
    unet(tmp_path / "base.safetensors")
    kohya(tmp_path / "l.safetensors", 1)
    down, up = factors((32, 32), 4, 1)
    flat = "lora_te_text_model_encoder_layers_1_self_attn_q_proj"
    both = load_file(tmp_path / "l.safetensors") | {f"{flat}.lora_down.weight": down, f"{flat}.lora_up.weight": up}
    save_file(both, tmp_path / "l.safetensors")
    outcome = merged(tmp_path / "base.safetensors", tmp_path / "out.safetensors", x=tmp_path / "l.safetensors")
    refused(outcome, flat, "1 of 6 modules", "lora_te")


@real_file(
    11, family="DeepSpeed", option="ZeRO-3: factors of shape [0], a whole model of shape [0]", expected="the message",
    before="wrong cause named", now="refused, true cause",
)  # fmt: skip
def test_files_gathered_wrongly(tmp_path: Path) -> None:
    base = tiny("Qwen2")
    base.save_pretrained(tmp_path / "base")
    adapter(base, tmp_path / "zero", target_modules=["q_proj"])
    file = tmp_path / "zero/adapter_model.safetensors"
    save_file({name: torch.empty(0) for name in load_file(file)}, file)
    refused(merged(tmp_path / "base", tmp_path / "out", x=tmp_path / "zero"), str(file), "shape [0]", "ZeRO-3")
    (tmp_path / "model").mkdir()
    shutil.copy(tmp_path / "base/config.json", tmp_path / "model")
    held = {name: torch.empty(0) if "proj" in name else value for name, value in state(tmp_path / "base").items()}
    save_file(held, tmp_path / "model/model.safetensors", metadata={"format": "pt"})
    refused(merged(tmp_path / "base", tmp_path / "out", x=tmp_path / "model"), "down_proj", "shape [0]", "ZeRO-3")
