"""Through any transformers model: the student is the merge, and its gradient is autograd's."""

import importlib
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from torch.func import functional_call

from consilience.api import build_recipe, plan_recipe
from consilience.errors import InputError
from consilience.learned.run import Data, Run, Workshop, groups_of, open_workshop
from consilience.objectives.alignment import Hidden, Logits
from consilience.objectives.objective import Objective
from consilience.student.calibration import batches
from consilience.student.names import doubtful, match_names
from consilience.student.student import blocks_of, watching

hf: Any = importlib.import_module("transformers")

IMAGES = {"qwen2_vl", "qwen2_vl_tied", "internvl", "llava"}
BLOCKS: dict[str, str] = {
    "llama": "LlamaDecoderLayer",
    "llama_tied": "LlamaDecoderLayer",
    "gpt2": "GPT2Block",
    "t5": "T5Block",
    "gemma2": "Gemma2DecoderLayer",
    "gemma3": "Gemma3DecoderLayer",
    "mamba": "MambaBlock",
    "qwen2_vl": "Qwen2VLDecoderLayer",
    "qwen2_vl_tied": "Qwen2VLDecoderLayer",
    "internvl": "Qwen2DecoderLayer",
    "llava": "LlamaDecoderLayer",
}
EXPERTS = ("math", "code")


@dataclass(frozen=True)
class Family:
    name: str
    folder: Path
    models: dict[str, Any]

    def model(self, name: str) -> Any:
        """One of the models as transformers loads it."""
        return self.models[name]


def _rows(folder: Path, name: str) -> dict[str, Path]:
    prefix = "<image>" if name == "llava" else ""
    seen: dict[str, Any] = {"image": "a.png"} if name in IMAGES else {}
    tiny.write_image(folder / "a.png", (200, 30, 10))
    first = {**seen, "prompt": prefix + "what is it?", "response": "a red thing"}
    return {
        "math": tiny.write_rows(folder / "math.jsonl", first, {"prompt": "count to two"}),
        "code": tiny.write_rows(folder / "code.jsonl", {"prompt": "def f", "response": "(x)"}, {**first}),
    }


QUICK = {"llama", "t5", "qwen2_vl"}


@pytest.fixture(
    scope="module", params=[pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in BLOCKS]
)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Family:
    folder = tmp_path_factory.mktemp(request.param)
    # float64 files of float32 values: what is loaded is exact, and blends have digits to spare.
    make: tiny.Make = getattr(tiny, request.param)
    tiny.save_family(folder, make, EXPERTS, dtype=torch.float64)
    kind = type(make()[0])
    names = ("base", *EXPERTS)
    models = {name: kind.from_pretrained(folder / name, dtype=torch.float64).eval() for name in names}
    return Family(request.param, folder, models)


@contextmanager
def workshop(
    folder: Path,
    rows: dict[str, Path],
    *,
    exclude: Sequence[str] = ("none",),
    precision: Any = "float64",
    **options: Any,
) -> Generator[Workshop]:
    data = {name: {"calibration": str(path)} for name, path in rows.items()}
    experts = {name: str(folder / name) for name in rows}
    plan = plan_recipe(build_recipe("expert_merging", str(folder / "base"), experts, {}, data=data))
    run = Run(plan)
    shop = None
    try:
        groups = groups_of(run, "tensor", exclude, [0.3] * len(rows))
        shop = open_workshop(run, groups, Data(), layers=(1,), precision=precision, **options)
        yield shop
    finally:
        if shop is not None:
            shop.close()
        plan.close()


def test_student_is_the_model_its_coefficients_say(family: Family):
    with workshop(family.folder, _rows(family.folder, family.name), teachers=False) as shop:
        student = shop.student
        assert {type(block).__name__ for block in blocks_of(student.model)} == {BLOCKS[family.name]}
        assert len(blocks_of(student.model)) == 2
        shares = {"math": [1.0, 0.0], "code": [0.0, 1.0], "base": [0.0, 0.0]}
        for name, share in shares.items():
            student.set(np.repeat(np.array(share)[:, None], student.bank.count, 1))
            reference = family.model(name)
            for sample, batch in _alone(shop):
                inputs, where, _ = batch.inputs(student.model)
                assert bool(sample.extra) == ("pixel_values" in inputs) == (sample.row.image is not None)
                with torch.no_grad():
                    expected = reference(**inputs).logits
                    ours = student.model(**inputs).logits
                    read = shop.reader.run(batch)[0]
                torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)
                logits = read.head(read.states)
                torch.testing.assert_close(logits, expected[where], rtol=1e-5, atol=1e-6, check_dtype=False)
        whole = family.name == "gemma2"  # it caps its logits, so its head's inputs do not give them
        assert (shop.reader.head.weight is None) == whole


def _alone(shop: Workshop) -> Iterator[tuple[Any, Any]]:
    for i, sample in enumerate(shop.samples):
        yield sample, batches(shop.samples, [i], 4096)[0]


def _reference(family: Family, shop: Workshop, alpha: torch.Tensor) -> torch.Tensor:
    """The alignment loss of an explicit merge: KL of logits + mean squared difference of the first block's output."""
    held = {id(value): name for name, value in shop.student.model.named_parameters()}
    states = {name: dict(family.model(name).named_parameters()) for name in ("base", *EXPERTS)}
    merged: dict[str, torch.Tensor] = dict(states["base"])
    for stored, extent in shop.bank.extents.items():
        name = held[id(shop.student.parameters[stored])]
        for k, expert in enumerate(EXPERTS):
            tau = states[expert][name].detach() - states["base"][name].detach()
            merged[name] = merged[name] + alpha[k, int(extent.indices[0])] * tau
    total = torch.zeros((), dtype=torch.float64)
    for k, expert in enumerate(EXPERTS):
        parts: list[torch.Tensor] = []
        # Batches as the student makes them: norms and softmaxes are float32 inside, so padding changes last digits.
        for batch in batches(shop.samples, [i for i, s in enumerate(shop.samples) if s.expert == k], shop.tokens):
            inputs, where, _ = batch.inputs(shop.student.model)
            with watching(shop.student.model, [1]) as seen:
                logits = functional_call(shop.student.model, merged, (), {**inputs, "use_cache": False}).logits[where]
            teacher = family.model(expert)
            with torch.no_grad(), watching(teacher, [1]) as known:
                wanted = teacher(**inputs, use_cache=False).logits[where].log_softmax(-1)
            distance = (seen[1][where] - known[1][where]).square().mean(-1)
            parts.append((wanted.exp() * (wanted - logits.log_softmax(-1))).sum(-1) + distance)
        total = total + torch.cat(parts).mean()
    return total


def test_gradient_is_that_of_an_explicit_merge(family: Family):
    rows = _rows(family.folder, family.name)
    objective = Objective(terms=(Logits(), Hidden(1.0, hidden_distance="mse")))
    with workshop(family.folder, rows) as shop:
        generator = np.random.default_rng(0)
        alpha = generator.uniform(0.1, 0.6, (2, shop.bank.count))
        terms, found = shop.problem(objective).evaluate(alpha, range(len(shop.samples)), gradient=True)
        leaf = torch.tensor(alpha, requires_grad=True)
        loss = _reference(family, shop, leaf)
        (expected,) = torch.autograd.grad(loss, leaf)
        # Mamba makes its logits float32; Llama its norms, and its rows are packed, which sums them in another order.
        digits = {"mamba": 1e-6, "llama": 1e-5, "llama_tied": 1e-5}.get(family.name, 1e-8)
        assert sum(terms.values()) == pytest.approx(float(loss.detach()), rel=digits)
        assert found is not None
        scale = float(expected.abs().max())
        np.testing.assert_allclose(found, expected.numpy(), rtol=digits, atol=0.1 * digits * scale)
        assert (np.abs(found).max(1) > 0).all()
    with workshop(family.folder, rows, checkpoint=True) as again:
        _, recomputed = again.problem(objective).evaluate(alpha, range(len(again.samples)), gradient=True)
        assert recomputed is not None
        np.testing.assert_allclose(recomputed, found, rtol=1e-6, atol=1e-9 * scale)


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe"])
def test_fused_experts_of_a_mixture_are_refused_unless_nothing_changes_them(tmp_path: Path, name: str):
    make: tiny.Make = getattr(tiny, name)
    rows = _rows(tmp_path, name)
    tiny.save_family(tmp_path, make)
    fused = r"base: tensor '.*experts\.0\..*' is not a parameter of the loaded \w+"
    with pytest.raises(InputError, match=fused) as one, workshop(tmp_path, rows, precision="float32"):
        pass
    # Left out they still are what makes an expert: it cannot be run without them.
    changed = r"math: it changes tensor '.*experts.*cannot be run"
    options: dict[str, Any] = {"exclude": ["*.experts.*"], "precision": "float32"}
    with pytest.raises(InputError, match=changed) as two, workshop(tmp_path, rows, **options):
        pass
    assert "\n" not in str(one.value) + str(two.value)
    tiny.save_family(tmp_path, make, changed=lambda held: "self_attn" in held)
    with workshop(tmp_path, rows, **options) as shop:
        count = len(shop.samples)
        alpha = np.full((2, shop.bank.count), 0.3)
        _, gradient = shop.problem(Objective()).evaluate(alpha, range(count), gradient=True)
        assert gradient is not None
        assert np.abs(gradient).max() > 0


def test_blocks_are_the_language_models_where_both_towers_are_in_one_module():
    class Both(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.config = hf.LlamaConfig(num_hidden_layers=2)
            self.tower = torch.nn.ModuleList([torch.nn.Linear(9, 9) for _ in range(3)])
            self.blocks = torch.nn.ModuleList([torch.nn.ModuleList([torch.nn.Linear(2, 2)] * 2) for _ in range(2)])

    model = Both()
    assert blocks_of(model) is model.blocks
    with pytest.raises(InputError, match="set hidden_weight=0"):
        blocks_of(torch.nn.Linear(2, 2))


def test_names_of_two_towers_are_told_apart():
    q, k = "self_attn.q_proj.weight", "norm.weight"
    stored = {
        f"language_model.model.layers.0.{q}": (8, 8),
        f"vision_tower.encoder.layers.0.{q}": (8, 8),
        f"language_model.model.{k}": (8,),
        "language_model.lm_head.weight": (9, 8),
    }
    held = {
        f"model.language_model.layers.0.{q}": (8, 8),
        f"model.vision_tower.encoder.layers.0.{q}": (8, 8),
        f"model.language_model.{k}": (8,),
        "lm_head.weight": (9, 8),
    }
    assert match_names(stored, held) == dict(zip(stored, held, strict=True))
    assert match_names(held, stored) == dict(zip(held, stored, strict=True))


@pytest.mark.parametrize(
    ("stored", "held"),
    [
        ({"a.x.weight": (4,)}, {"b.y.weight": (4,)}),  # nothing but "weight" in common
        ({"l.n.weight": (4,)}, {"a.n.weight": (4,), "b.n.weight": (4,)}),  # two are as good
        ({"a.n.weight": (4,), "b.n.weight": (4,)}, {"l.n.weight": (4,)}),
        ({"l.n.weight": (4,)}, {"a.n.weight": (5,)}),
    ],
)
def test_names_that_may_be_wrong_are_left_out(stored: dict[str, tuple[int, ...]], held: dict[str, tuple[int, ...]]):
    assert match_names(stored, held) == {}


def test_a_prefix_more_or_less_is_found():
    stored = {"h.0.ln.weight": (4,), "wte.weight": (9, 4), "token": (4,)}
    held = {f"transformer.{name}": shape for name, shape in stored.items()}
    assert match_names(stored, held) == {name: f"transformer.{name}" for name in stored}
    assert match_names(held, stored) == {f"transformer.{name}": name for name in stored}


def test_values_that_prove_nothing_need_a_rule_that_is_proved():
    class Two(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = torch.nn.ModuleDict({name: torch.nn.LayerNorm(4) for name in ("a", "b")})
            self.model["c"] = torch.nn.Linear(4, 4)

    model = Two()
    ones = {"old.a.weight": "model.a.weight", "old.b.weight": "model.b.weight"}
    assert doubtful(model, ones, set(ones)) == list(ones)
    proved = ones | {"old.c.weight": "model.c.weight"}
    assert doubtful(model, proved, set(proved)) == []
    assert doubtful(model, proved, set(ones)) == list(proved)
