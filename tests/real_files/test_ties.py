"""A tie is a fact of the model: whatever changes one side of a tied pair gives what PEFT gives unmerged.

Expected logits come from PEFT's model before merging, or from transformers' load of the expert itself.
"""

import importlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import consilience as cs
from consilience.api import build_recipe, plan_recipe
from consilience.coefficients.groups import make_groups
from consilience.student.bank import Bank, mergeable
from consilience.student.student import Settings, make_student
from tests.real_files.support import (
    IDS,
    Outcome,
    Test,
    adapter,
    cli,
    hf,
    logits,
    merged,
    moved,
    peft,
    real_file,
    refused,
    state,
    tiny,
)

T5: dict[str, Any] = {
    "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 64,
    "decoder_start_token_id": 0,
}  # fmt: skip
BART: dict[str, Any] = {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "vocab_size": 64, "max_position_embeddings": 64,
    "decoder_start_token_id": 2, "forced_eos_token_id": 2,
}  # fmt: skip
WHISPER: dict[str, Any] = BART | {
    "num_mel_bins": 8, "max_source_positions": 12, "max_target_positions": 32, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
SOUND = torch.randn(1, 8, 24, generator=torch.Generator().manual_seed(0))
HEAD, EMBED = "lm_head.weight", "model.embed_tokens.weight"


@dataclass(frozen=True)
class Input:
    """A row of the table: whose file, what is special, what e1e4e04 made of it, and how it is built."""

    family: str
    option: str
    before: str
    options: dict[str, Any]
    build: Callable[[], Any] = lambda: tiny("Qwen2", tie_word_embeddings=True)


def inputs(*rows: Input, expected: str = "PEFT, unmerged") -> Callable[[Test], Test]:
    """Run a test on each of several inputs, every one a row of the table."""

    def register(test: Test) -> Test:
        for row in rows:
            test = real_file(1, family=row.family, option=row.option, expected=expected, before=row.before)(test)
        return pytest.mark.parametrize("given", [pytest.param(r, id=f"{r.family}: {r.option}") for r in rows])(test)

    return register


def outputs(model: Any) -> torch.Tensor:
    """Return the logits of any model: PEFT's, or a bare one."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    inputs: dict[str, Any] = {"input_ids": IDS}
    if "Whisper" in type(base).__name__:
        inputs = {"input_features": SOUND, "decoder_input_ids": IDS}
    elif base.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = IDS.flip(1)
    with torch.no_grad():
        return model(**inputs).logits


def loaded(folder: Path) -> Any:
    """Load a folder by the class its config names; nothing may be missing or left over."""
    architecture = json.loads((folder / "config.json").read_text(encoding="utf-8"))["architectures"][0]
    model, report = getattr(hf, architecture).from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not report["missing_keys"], report
    assert not report["unexpected_keys"], report
    return model.eval()


def same(folder: Path, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(outputs(loaded(folder)), wanted, atol=2e-5, rtol=1e-4)


def config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


def edit_config(folder: Path, **keys: Any) -> None:
    """Write keys of config.json; None removes one."""
    content = {key: value for key, value in (config(folder) | keys).items() if value is not None}
    (folder / "config.json").write_text(json.dumps(content), encoding="utf-8")


def tuned(base: Any, root: Path, **options: Any) -> tuple[torch.Tensor, Outcome]:
    """Save a base and an adapter on it, merge them, and return PEFT's logits before merging and how ours ended."""
    base.save_pretrained(root / "base")
    expected = outputs(adapter(base, root / "a", **options))
    outcome = merged(root / "base", root / "out", x=root / "a")
    assert outcome.code == 0, outcome.said
    return expected, outcome


def lora(*modules: str, **more: Any) -> dict[str, Any]:
    return {"target_modules": list(modules), **more}


def saved(*modules: str, target: str = "q_proj", **more: Any) -> dict[str, Any]:
    return {"target_modules": [target], "modules_to_save": list(modules), **more}


WRONG, REFUSED, RIGHT = "wrong numbers", "wrongly refused", "right"


@inputs(
    Input("Qwen2, tied", "LoRA on embed_tokens", WRONG, lora("q_proj", "embed_tokens")),
    Input("Qwen2, tied", "LoRA on embed_tokens, save_embedding_layers=False", WRONG,
          lora("q_proj", "embed_tokens", save={"save_embedding_layers": False})),
    Input("Qwen2, tied", "LoRA on lm_head", REFUSED, lora("q_proj", "lm_head")),
    Input("Qwen2, tied", "LoRA on both sides", REFUSED, lora("q_proj", "lm_head", "embed_tokens")),
    Input("Qwen2, tied", "modules_to_save embed_tokens", WRONG, saved("embed_tokens")),
    Input("Qwen2, tied", "modules_to_save lm_head", REFUSED, saved("lm_head")),
    Input("Qwen2, tied", "modules_to_save both sides", REFUSED, saved("embed_tokens", "lm_head")),
    Input("Qwen2, tied", "modules_to_save embed_tokens, LoRA on lm_head", REFUSED,
          lora("q_proj", "lm_head", modules_to_save=["embed_tokens"])),
)  # fmt: skip
def test_an_adapter_on_one_side(tmp_path: Path, given: Input) -> None:
    expected, outcome = tuned(given.build(), tmp_path, **given.options)
    same(tmp_path / "out", expected)
    assert config(tmp_path / "out")["tie_word_embeddings"] is False
    assert f"{HEAD} is untied from {EMBED}" in outcome.out


@inputs(
    Input("Qwen2, tied", "LoRA on embed_tokens, ensure_weight_tying", REFUSED,
          lora("q_proj", "embed_tokens", ensure_weight_tying=True)),
    Input("Qwen2, tied", "modules_to_save embed_tokens, ensure_weight_tying", REFUSED,
          saved("embed_tokens", ensure_weight_tying=True)),
    Input("Qwen2, tied", "save_embedding_layers=True, nothing trained there", REFUSED,
          lora("q_proj", save={"save_embedding_layers": True})),
)  # fmt: skip
def test_ties_that_nobody_undoes_stay(tmp_path: Path, given: Input) -> None:
    expected, outcome = tuned(given.build(), tmp_path, **given.options)
    same(tmp_path / "out", expected)
    assert HEAD not in state(tmp_path / "out")
    assert config(tmp_path / "out")["tie_word_embeddings"] is True
    assert "untied" not in outcome.out


def gemma() -> Any:
    return tiny("Gemma", head_dim=8)


@inputs(
    Input("Gemma, no flag in config.json", "LoRA on lm_head", REFUSED, lora("q_proj", "lm_head"), gemma),
    Input("Gemma, no flag in config.json", "modules_to_save embed_tokens", WRONG, saved("embed_tokens"), gemma),
)
def test_tied_by_its_class_s_default(tmp_path: Path, given: Input) -> None:
    base = given.build()
    base.save_pretrained(tmp_path / "base")
    edit_config(tmp_path / "base", tie_word_embeddings=None)
    expected = outputs(adapter(base, tmp_path / "a", **given.options))
    assert merged(tmp_path / "base", tmp_path / "out", x=tmp_path / "a").code == 0
    same(tmp_path / "out", expected)


def gpt2(vocabulary: int = 64) -> Any:
    return tiny("GPT2", "LMHeadModel", n_embd=32, n_head=4, n_layer=2, n_positions=64, vocab_size=vocabulary)


def t5(family: str = "T5") -> Callable[[], Any]:
    return lambda: tiny(family, "ForConditionalGeneration", **T5)


def bart(family: str = "Bart", head: str = "ForConditionalGeneration") -> Callable[[], Any]:
    return lambda: tiny(family, head, **BART)


def unshared() -> Any:
    return tiny("Marian", "MTModel", **BART, share_encoder_decoder_embeddings=False)


def whisper() -> Any:
    return tiny("Whisper", "ForConditionalGeneration", **WHISPER)


def bert() -> Any:
    return tiny("Bert", "ForMaskedLM")


@inputs(
    Input("GPT-2", "LoRA on wte", WRONG, lora("wte"), gpt2),
    Input("GPT-2", "LoRA on lm_head", REFUSED, lora("lm_head"), gpt2),
    Input("T5", "LoRA on lm_head", REFUSED, lora("q", "lm_head"), t5()),
    Input("T5", "LoRA on the encoder's embed_tokens", REFUSED, lora("q", "encoder.embed_tokens"), t5()),
    Input("T5", "modules_to_save shared", WRONG, saved("shared", target="q"), t5()),
    Input("mT5", "LoRA on shared", WRONG, lora("q", "shared"), t5("MT5")),
    Input("UMT5", "modules_to_save lm_head", REFUSED, saved("lm_head", target="q"), t5("UMT5")),
    Input("LongT5", "LoRA on both embed_tokens", REFUSED, lora("q", "embed_tokens"), t5("LongT5")),
    Input("Switch Transformers", "LoRA on lm_head", REFUSED, lora("q", "lm_head"), t5("SwitchTransformers")),
    Input("BART", "LoRA on lm_head", REFUSED, lora("q_proj", "lm_head"), bart()),
    Input("BART", "LoRA on the encoder's embed_tokens", REFUSED, lora("q_proj", "encoder.embed_tokens"), bart()),
    Input("mBART", "LoRA on shared", WRONG, lora("q_proj", "shared"), bart("MBart")),
    Input("Pegasus", "modules_to_save lm_head", REFUSED, saved("lm_head"), bart("Pegasus")),
    Input("Marian", "LoRA on lm_head", REFUSED, lora("q_proj", "lm_head"), bart("Marian", "MTModel")),
    Input("Marian, two vocabularies", "LoRA on lm_head", REFUSED, lora("q_proj", "lm_head"), unshared),
    Input("Marian, two vocabularies", "LoRA elsewhere", RIGHT, lora("q_proj"), unshared),
    Input("Whisper", "LoRA on proj_out", REFUSED, lora("q_proj", "proj_out"), whisper),
    Input("Whisper", "modules_to_save embed_tokens", WRONG, saved("embed_tokens"), whisper),
    Input("BERT, masked LM", "LoRA on the decoder", REFUSED, lora("query", "decoder"), bert),
    Input("BERT, masked LM", "LoRA on word_embeddings", WRONG, lora("query", "word_embeddings"), bert),
)  # fmt: skip
def test_families(tmp_path: Path, given: Input) -> None:
    expected, _ = tuned(given.build(), tmp_path, **given.options)
    same(tmp_path / "out", expected)


def ends(
    family: str, head: str = "ForCausalLM", *, embeddings: bool = False, before: str = "", **settings: Any
) -> Input:
    """Return a row of a family whose output layer, or input embeddings, an adapter is on."""

    def build() -> Any:
        return tiny(family, head, **settings)

    return Input(family, "LoRA on the input embeddings" if embeddings else "LoRA on the output layer",
                 before or (WRONG if embeddings else REFUSED), {"embeddings": embeddings}, build)  # fmt: skip


@inputs(
    ends("Bloom", n_layer=2, n_head=4),
    ends("Falcon", embeddings=True),
    ends("OPT", ffn_dim=48, word_embed_proj_dim=32),
    ends("Mamba"),
    ends("Cohere", embeddings=True),
    ends("GPTNeoX", tie_word_embeddings=True),
    ends("Lfm2", layer_types=["full_attention", "full_attention"]),
    ends("Qwen3", tie_word_embeddings=True, head_dim=8, embeddings=True),
    ends("Roberta", "ForMaskedLM", max_position_embeddings=80, type_vocab_size=1),
    ends("DistilBert", "ForMaskedLM", dim=32, n_layers=2, n_heads=4, hidden_dim=48),
    ends("Electra", "ForMaskedLM", embedding_size=16, embeddings=True),
    ends("ModernBert", "ForMaskedLM", cls_token_id=1, sep_token_id=2),
    ends("M2M100", "ForConditionalGeneration", **BART),
    ends("FSMT", "ForConditionalGeneration", **BART, src_vocab_size=64, tgt_vocab_size=64, langs=["en", "de"],
         tie_word_embeddings=True, embeddings=True, before=REFUSED),
)  # fmt: skip
def test_further_families(tmp_path: Path, given: Input) -> None:
    base = given.build()
    end = base.get_input_embeddings() if given.options["embeddings"] else base.get_output_embeddings()
    name = next(name for name, module in base.named_modules() if module is end)
    expected, _ = tuned(base, tmp_path, target_modules=[name])
    same(tmp_path / "out", expected)


# ----------------------------------------------------------------------------------------------------------------------
# Full fine-tunes.


def full(root: Path, name: str, build: Callable[[], Any], change: Callable[[Any], None]) -> torch.Tensor:
    """Save a model whose weights were changed and return its logits."""
    model = build()
    change(model)
    model.save_pretrained(root / name)
    return outputs(model)


def apart(model: Any) -> None:
    """Give a model's head a value of its own under a config that ties it, as a DPO run with a reference head may."""
    head = model.get_output_embeddings()
    head.weight = torch.nn.Parameter(head.weight.detach() + 0.1)
    model._tied_weights_keys, model.all_tied_weights_keys = {}, {}
    moved(model, 3)


def tied() -> Any:
    return tiny("Qwen2", tie_word_embeddings=True)


@real_file(1, family="Qwen2, tied", option="fine-tune with a head of its own, tie_word_embeddings true",
           expected="transformers' load of the expert", before=REFUSED)  # fmt: skip
def test_a_fine_tune_with_a_head_of_its_own(tmp_path: Path) -> None:
    tied().save_pretrained(tmp_path / "base")
    expected = full(tmp_path, "e", tied, apart)
    same(tmp_path / "e", expected)
    outcome = merged(tmp_path / "base", tmp_path / "out", e=tmp_path / "e")
    assert outcome.code == 0, outcome.said
    same(tmp_path / "out", expected)
    lineage = json.loads((tmp_path / "out/consilience/lineage.json").read_text(encoding="utf-8"))
    assert lineage["untied"] == {HEAD: EMBED}


@real_file(1, family="Qwen2, tied", option="average of two fine-tunes, one with a head of its own",
           expected="a formula: the mean of what transformers loads", before=REFUSED)  # fmt: skip
def test_an_average_without_a_base(tmp_path: Path) -> None:
    full(tmp_path, "a", tied, lambda model: moved(model, 1))
    full(tmp_path, "b", tied, apart)
    a, b = (loaded(tmp_path / name).state_dict() for name in "ab")
    for first, second in ("ab", "ba"):
        out = tmp_path / f"out-{first}"
        recipe = "\n".join(f"  - {{model: {tmp_path / name}, parameters: {{weight: 1}}}}" for name in (first, second))
        (tmp_path / "r.yaml").write_text(f"merge_method: linear\ndtype: float32\nmodels:\n{recipe}\n", encoding="utf-8")
        outcome = cli("merge", tmp_path / "r.yaml", out)
        assert outcome.code == 0, outcome.said
        found = loaded(out).state_dict()
        for name in (HEAD, EMBED, "model.layers.0.mlp.up_proj.weight"):
            torch.testing.assert_close(found[name], (a[name] + b[name]) / 2, atol=1e-6, rtol=1e-5)


@real_file(1, family="Qwen2", option="base untied in its data, tie_word_embeddings true",
           expected="transformers' load of the expert", before=REFUSED)  # fmt: skip
def test_a_base_with_a_head_of_its_own(tmp_path: Path) -> None:
    full(tmp_path, "base", tied, apart)
    expected = full(tmp_path, "e", tied, lambda model: (apart(model), moved(model, 5))[0])
    assert merged(tmp_path / "base", tmp_path / "out", e=tmp_path / "e").code == 0
    same(tmp_path / "out", expected)
    assert config(tmp_path / "out")["tie_word_embeddings"] is False


@real_file(1, family="Qwen2, tied", option="base file with both names of one matrix, LoRA on embed_tokens",
           expected="PEFT, unmerged", before=WRONG)  # fmt: skip
def test_a_base_that_writes_both_names(tmp_path: Path) -> None:
    base = tied()
    base.save_pretrained(tmp_path / "base")
    tensors = state(tmp_path / "base")
    save_file(tensors | {HEAD: tensors[EMBED].clone()}, tmp_path / "base/model.safetensors", {"format": "pt"})
    expected = outputs(adapter(base, tmp_path / "a", target_modules=["q_proj", "embed_tokens"]))
    assert merged(tmp_path / "base", tmp_path / "out", x=tmp_path / "a").code == 0
    same(tmp_path / "out", expected)


@real_file(1, family="GPT-2", option="base .bin with two names of one storage, LoRA on lm_head",
           expected="PEFT, unmerged", before=REFUSED)  # fmt: skip
def test_a_torch_file_with_two_names_of_one_storage(tmp_path: Path) -> None:
    base = gpt2()
    base.save_pretrained(tmp_path / "base")
    (tmp_path / "base/model.safetensors").unlink()
    torch.save(base.state_dict(), tmp_path / "base/pytorch_model.bin")
    expected = outputs(adapter(base, tmp_path / "a", target_modules=["lm_head"]))
    assert merged(tmp_path / "base", tmp_path / "out", x=tmp_path / "a").code == 0
    same(tmp_path / "out", expected)


@real_file(1, family="Qwen2, tied", option="base file with lm_head alone (save_model), LoRA on embed_tokens",
           expected="PEFT, unmerged", before=REFUSED)  # fmt: skip
def test_a_base_that_kept_the_other_name(tmp_path: Path) -> None:
    from safetensors.torch import save_model

    base = tied()
    base.save_pretrained(tmp_path / "base")
    save_model(base, str(tmp_path / "base/model.safetensors"), {"format": "pt"})
    assert EMBED not in state(tmp_path / "base")
    expected = outputs(adapter(base, tmp_path / "a", target_modules=["q_proj", "embed_tokens"]))
    assert merged(tmp_path / "base", tmp_path / "out", x=tmp_path / "a").code == 0
    same(tmp_path / "out", expected)


@real_file(1, family="T5 v1.1", option="old .bin with three names of the embedding, and what is written now",
           expected="transformers' load of the expert", before=REFUSED)  # fmt: skip
def test_t5_v1_1_embedding_copies(tmp_path: Path) -> None:
    for seed, name in enumerate(("old", "new")):
        moved(t5()(), seed).save_pretrained(tmp_path / name)
        edit_config(tmp_path / name, tie_word_embeddings=False, scale_decoder_outputs=None)
        head = torch.randn(64, 32, generator=torch.Generator().manual_seed(seed))
        save_file(state(tmp_path / name) | {HEAD: head}, tmp_path / name / "model.safetensors", {"format": "pt"})
    tensors = state(tmp_path / "old")
    (tmp_path / "old/model.safetensors").unlink()
    copies = {f"{side}.embed_tokens.weight": tensors["shared.weight"] for side in ("encoder", "decoder")}
    torch.save(tensors | copies, tmp_path / "old/pytorch_model.bin")
    for base, expert in (("old", "new"), ("new", "old")):
        outcome = merged(tmp_path / base, tmp_path / f"out-{base}", e=tmp_path / expert)
        assert outcome.code == 0, outcome.said
        same(tmp_path / f"out-{base}", outputs(loaded(tmp_path / expert)))
        assert "untied" not in outcome.out


# ----------------------------------------------------------------------------------------------------------------------
# Several experts, other ways through.


def three(root: Path) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Save a tied base, an adapter on its head, one elsewhere, a tied fine-tune; return embedding and head of each."""
    base = tied()
    base.save_pretrained(root / "base")
    table = base.model.embed_tokens.weight.detach().clone()
    head = adapter(tied(), root / "head", target_modules=["lm_head"]).get_base_model().lm_head
    adapter(tied(), root / "other", seed=2, target_modules=["q_proj"])
    tune = moved(tied(), 5)
    tune.save_pretrained(root / "full")
    update = head.get_delta_weight("default").detach()
    new = tune.model.embed_tokens.weight.detach()
    return {"base": (table, table), "head": (table, table + update), "other": (table, table), "full": (new, new)}


@real_file(1, family="Qwen2, tied", option="three experts, one of which separates the pair",
           expected="a formula: base + sum of weighted task vectors on each side", before=REFUSED)  # fmt: skip
def test_one_of_several_experts_separates_the_pair(tmp_path: Path) -> None:
    pairs = three(tmp_path)
    experts = {name: tmp_path / name for name in ("head", "other", "full")}
    outcome = merged(tmp_path / "base", tmp_path / "out", "--set", "weight=0.5", **experts)
    assert outcome.code == 0, outcome.said
    assert "differ in head\n" in outcome.out.replace(";", "\n")
    found, model = state(tmp_path / "out"), loaded(tmp_path / "out")
    for side, name in enumerate((EMBED, HEAD)):
        start = pairs["base"][side]
        wanted = start + sum(0.5 * (pairs[e][side] - start) for e in experts)
        torch.testing.assert_close(found[name], wanted, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(model.lm_head.weight, found[HEAD])


@real_file(1, family="Qwen2, tied", option="slerp of a tied fine-tune and one with a head of its own",
           expected="a formula: slerp of each side", before=REFUSED)  # fmt: skip
def test_slerp(tmp_path: Path) -> None:
    full(tmp_path, "a", tied, lambda model: moved(model, 1))
    full(tmp_path, "b", tied, apart)
    outcome = cli(
        "merge", tmp_path / "a", tmp_path / "out", "-e", f"b={tmp_path / 'b'}", "--method", "slerp", "--set", "t=0.3"
    )
    assert outcome.code == 0, outcome.said
    a, b = (loaded(tmp_path / name).state_dict() for name in "ab")
    for name in (EMBED, HEAD):
        one, other = a[name].double().flatten(), b[name].double().flatten()
        angle = torch.arccos(one @ other / (one.norm() * other.norm()))
        wanted = (torch.sin(0.7 * angle) * one + torch.sin(0.3 * angle) * other) / torch.sin(angle)
        torch.testing.assert_close(state(tmp_path / "out")[name].flatten(), wanted.float(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", [["cat"], ["svd", "--rank", "8"]], ids=" ".join)
@pytest.mark.parametrize("names", [[EMBED], [EMBED, HEAD]], ids=len)
@real_file(1, family="Qwen2, tied", option="--as-adapter of two adapters with ensure_weight_tying",
           expected="a formula: half of PEFT's updates, unmerged", before="wrongly refused")  # fmt: skip
def test_an_adapter_keeps_both_sides_of_a_tie(tmp_path: Path, names: list[str], kind: list[str]) -> None:
    base = tiny("Qwen2", tie_word_embeddings=True)
    base.save_pretrained(tmp_path / "base")
    held = state(tmp_path / "base")
    save_file(held | {name: held[EMBED].clone() for name in names}, tmp_path / "base/model.safetensors")
    config: dict[str, Any] = {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True}
    experts = {f"x{n}": tmp_path / f"x{n}" for n in (1, 2)}

    def sides(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.no_grad():
            embedded = model.get_input_embeddings()(torch.arange(64))
            return embedded, model.get_output_embeddings()(torch.eye(32)).T

    plain = sides(base)
    tuned = [
        sides(adapter(tiny("Qwen2", tie_word_embeddings=True), path, seed=n, **config).get_base_model())
        for n, path in enumerate(experts.values())
    ]
    outcome = merged(tmp_path / "base", tmp_path / "out", "--as-adapter", *kind, "--set", "weight=0.5", **experts)
    assert outcome.code == 0, outcome.said
    loaded = peft.PeftModel.from_pretrained(tiny("Qwen2", tie_word_embeddings=True), tmp_path / "out")
    for got, was, one, two in zip(sides(loaded.get_base_model()), plain, *tuned, strict=True):
        torch.testing.assert_close(got, was + ((one - was) + (two - was)) / 2, atol=1e-5, rtol=1e-4)


@real_file(1, family="Qwen2, tied", option="--as-adapter cat of LoRA on lm_head and LoRA on embed_tokens",
           expected="PEFT, both adapters active, unmerged", before=REFUSED)  # fmt: skip
def test_an_adapter_of_both_sides(tmp_path: Path) -> None:
    tied().save_pretrained(tmp_path / "base")
    adapter(tied(), tmp_path / "h", target_modules=["q_proj", "lm_head"])
    adapter(tied(), tmp_path / "e", seed=2, target_modules=["q_proj", "embed_tokens"])
    both = peft.PeftModel.from_pretrained(tied(), tmp_path / "h", adapter_name="h")
    both.load_adapter(tmp_path / "e", adapter_name="e")
    both.base_model.set_adapter(["h", "e"])
    outcome = merged(tmp_path / "base", tmp_path / "out", "--as-adapter", "cat", h=tmp_path / "h", e=tmp_path / "e")
    assert outcome.code == 0, outcome.said
    model = peft.PeftModel.from_pretrained(tied(), tmp_path / "out").eval()
    torch.testing.assert_close(outputs(model), outputs(both.eval()), atol=1e-5, rtol=1e-4)


@real_file(1, family="Qwen2, tied", option="BASE+ADAPTER as an expert, LoRA on embed_tokens of a fine-tune",
           expected="PEFT, unmerged", before=WRONG)  # fmt: skip
def test_an_adapter_on_a_tied_fine_tune(tmp_path: Path) -> None:
    tied().save_pretrained(tmp_path / "base")
    tune = moved(tied(), 5)
    tune.save_pretrained(tmp_path / "e")
    expected = outputs(adapter(tune, tmp_path / "a", target_modules=["q_proj", "embed_tokens"]))
    outcome = cli(
        "merge", tmp_path / "base", tmp_path / "out", "-e", f"x={tmp_path / 'e'}+{tmp_path / 'a'}", "--dtype", "float32"
    )
    assert outcome.code == 0, outcome.said
    same(tmp_path / "out", expected)


def wide() -> Any:
    return tiny("Qwen2", tie_word_embeddings=True, vocab_size=320)


def with_bytes(folder: Path) -> list[int]:
    """Give a model folder a tokenizer of one byte a token and return the ids of a text."""
    tokenizers: Any = importlib.import_module("tokenizers")
    level: Any = tokenizers.pre_tokenizers.ByteLevel
    own = tokenizers.Tokenizer(tokenizers.models.BPE({c: i for i, c in enumerate(sorted(level.alphabet()))}, []))
    own.pre_tokenizer, own.decoder = level(add_prefix_space=False), tokenizers.decoders.ByteLevel()
    tokenizer = hf.PreTrainedTokenizerFast(tokenizer_object=own, eos_token="<|endoftext|>")
    tokenizer.save_pretrained(folder)
    return tokenizer("abcdefgh").input_ids


@inputs(
    Input("Qwen2, tied", "evaluate BASE+ADAPTER, LoRA on lm_head", WRONG, lora("q_proj", "lm_head"), wide),
    Input("Qwen2, tied", "evaluate BASE+ADAPTER, LoRA on embed_tokens", WRONG, lora("q_proj", "embed_tokens"), wide),
    Input("Qwen2, tied", "evaluate BASE+ADAPTER, ensure_weight_tying", WRONG,
          lora("q_proj", "embed_tokens", ensure_weight_tying=True), wide),
    Input("Qwen2, tied", "evaluate BASE+ADAPTER, modules_to_save lm_head", RIGHT, saved("lm_head"), wide),
    Input("GPT-2", "evaluate BASE+ADAPTER, LoRA on wte", WRONG, lora("wte"), lambda: gpt2(320)),
)  # fmt: skip
def test_evaluate(tmp_path: Path, given: Input) -> None:
    base = given.build()
    base.save_pretrained(tmp_path / "base")
    ids = with_bytes(tmp_path / "base")
    model = adapter(base, tmp_path / "a", **given.options)
    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": "abcdefgh"}), encoding="utf-8")
    likely = logits(model, torch.tensor([ids]))[0].log_softmax(-1)
    expected = -sum(likely[i - 1, ids[i]].item() for i in range(1, len(ids))) / (len(ids) - 1)
    outcome = cli("evaluate", f"{tmp_path / 'base'}+{tmp_path / 'a'}", tmp_path / "rows.jsonl", "--json", "--no-cache")
    assert outcome.code == 0, outcome.said
    assert json.loads(outcome.out)["results"][0]["loss"]["value"] == pytest.approx(expected, abs=2e-5)


@real_file(
    1, family="Gemma, no flag in config.json", option="inspect", expected="transformers' class", before="wrong numbers"
)
def test_inspect_knows_the_class_s_default(tmp_path: Path) -> None:
    gemma().save_pretrained(tmp_path / "base")
    edit_config(tmp_path / "base", tie_word_embeddings=None)
    assert json.loads(cli("inspect", tmp_path / "base", "--json").out)["tied_embeddings"] is True


# ----------------------------------------------------------------------------------------------------------------------
# Image-text models, whose flag may lie in the text part of the config; learning; routing; the doctor.

SIGHT: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16,
    "patch_size": 8,
}  # fmt: skip


def qwen2_vl() -> Any:
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
    text = tied().config.to_dict() | {"model_type": "qwen2_vl_text", "rope_parameters": rope}
    sight = {"depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2}
    return built(hf.Qwen2VLConfig(text_config=text, vision_config=sight, tie_word_embeddings=True))


def gemma3() -> Any:
    text = tiny("Gemma3Text", "Model", head_dim=8).config.to_dict() if hasattr(hf, "Gemma3TextModel") else {}
    sight = SIGHT | {"model_type": "siglip_vision_model"}
    marks = {"mm_tokens_per_image": 4, "image_token_id": 63, "boi_token_index": 62, "eoi_token_index": 61}
    return built(hf.Gemma3Config(text_config=text, vision_config=sight, **marks))


def llava() -> Any:
    sight = SIGHT | {"model_type": "clip_vision_model", "projection_dim": 16}
    return built(hf.LlavaConfig(text_config=tied().config.to_dict(), vision_config=sight, image_token_id=63))


def built(settings: Any) -> Any:
    """Return a seeded model of a config."""
    torch.manual_seed(0)
    family = type(settings).__name__.removesuffix("Config")
    return getattr(hf, f"{family}ForConditionalGeneration")(settings).eval()


TEXT_EMBEDDINGS = {"target_modules": r".*language_model.*(q_proj|embed_tokens)"}


@inputs(
    Input("Qwen2-VL", "LoRA on lm_head", REFUSED, lora("q_proj", "lm_head"), qwen2_vl),
    Input("Gemma 3, image-text", "LoRA on the text embeddings", REFUSED, TEXT_EMBEDDINGS, gemma3),
    Input("LLaVA", "modules_to_save lm_head", REFUSED, saved("lm_head"), llava),
    Input("LLaVA", "LoRA on the text embeddings", REFUSED, TEXT_EMBEDDINGS, llava),
)
def test_image_text_models(tmp_path: Path, given: Input) -> None:
    expected, _ = tuned(given.build(), tmp_path, **given.options)
    same(tmp_path / "out", expected)
    content = config(tmp_path / "out")
    assert content["tie_word_embeddings"] is content["text_config"]["tie_word_embeddings"] is False


@inputs(
    Input("Qwen2, tied", "learning: LoRA on lm_head and LoRA on embed_tokens", REFUSED,
          {"a": lora("q_proj", "lm_head"), "b": lora("q_proj", "embed_tokens")}),
    Input("T5", "learning: LoRA on lm_head and LoRA on both embed_tokens", REFUSED,
          {"a": lora("q", "lm_head"), "b": lora("q", "embed_tokens")}, t5()),
    Input("BART", "learning: modules_to_save lm_head and LoRA elsewhere", REFUSED,
          {"a": saved("lm_head"), "b": lora("q_proj")}, bart()),
)  # fmt: skip
def test_the_student_plays_each_expert(tmp_path: Path, given: Input) -> None:
    given.build().save_pretrained(tmp_path / "base")
    expected = [outputs(adapter(given.build(), tmp_path / name, **given.options[name])) for name in "ab"]
    experts = {name: str(tmp_path / name) for name in "ab"}
    plan = plan_recipe(build_recipe("task_arithmetic", str(tmp_path / "base"), experts, {}))
    bank = Bank(plan, make_groups(mergeable(plan, lambda name: False), "block"), threads=1)
    student = make_student(plan, bank, Settings(precision="float32"))
    for number, wanted in enumerate(expected):
        student.become(number)
        torch.testing.assert_close(outputs(student.model), wanted, atol=2e-5, rtol=1e-4)
    bank.close()
    plan.close()


@real_file(1, family="Qwen2, tied", option="route build: LoRA on lm_head, the head's own weight saved beside it",
           expected="PEFT, unmerged", before=REFUSED)  # fmt: skip
def test_route(tmp_path: Path) -> None:
    wide().save_pretrained(tmp_path / "base")
    ids = torch.tensor([with_bytes(tmp_path / "base")])
    expected = logits(adapter(wide(), tmp_path / "x", target_modules=["q_proj", "lm_head"]), ids)
    adapter(wide(), tmp_path / "y", seed=2, target_modules=["q_proj"])
    models = "".join(f"  - {{name: {name}, model: {tmp_path / name}}}\n" for name in "xy")
    recipe = f"base_model: {tmp_path / 'base'}\nrouting: {{local: arrow, scale: 0}}\nmodels:\n{models}"
    (tmp_path / "r.yaml").write_text(recipe, encoding="utf-8")
    outcome = cli("route", "build", tmp_path / "r.yaml", tmp_path / "routed")
    assert outcome.code == 0, outcome.said
    model = cs.load_routed(tmp_path / "routed")
    with model.routing.only("x"):
        torch.testing.assert_close(logits(model, ids), expected, atol=1e-5, rtol=1e-4)


@real_file(1, family="Qwen2, tied", option="route build: adapter of another head", expected="the files differ",
           before="wrong cause named", now="refused, true cause")  # fmt: skip
def test_route_refuses_another_head(tmp_path: Path) -> None:
    wide().save_pretrained(tmp_path / "base")
    with_bytes(tmp_path / "base")
    adapter(moved(wide(), 9), tmp_path / "x", target_modules=["q_proj", "lm_head"])
    recipe = f"base_model: {tmp_path / 'base'}\nrouting: {{local: arrow, scale: 0}}\nmodels:\n  - {tmp_path / 'x'}\n"
    (tmp_path / "r.yaml").write_text(recipe.replace("  - ", "  - model: "), encoding="utf-8")
    refused(cli("route", "build", tmp_path / "r.yaml", tmp_path / "routed"), "lm_head", "not the base's")


@real_file(1, family="Qwen2, tied", option="doctor: LoRA on lm_head and a tied fine-tune",
           expected="a formula: norms of PEFT's update and of the differences", before=REFUSED)  # fmt: skip
def test_doctor(tmp_path: Path) -> None:
    pairs = three(tmp_path)
    experts = [word for name in ("head", "full") for word in ("-e", f"{name}={tmp_path / name}")]
    outcome = cli("doctor", tmp_path / "base", *experts, "--json")
    assert outcome.code == 0, outcome.said
    lengths = [row["norm"] for row in json.loads(outcome.out)["experts"]]
    start, end = pairs["head"]
    base, full = (state(tmp_path / name) for name in ("base", "full"))
    squares = sum(float((full[name] - base[name]).double().square().sum()) for name in base)
    squares += float((full[EMBED] - base[EMBED]).double().square().sum())  # the head moves with the embeddings
    assert lengths == pytest.approx([float((end - start).double().norm()), squares**0.5], rel=1e-5)
