"""What the real-file tests share: the table they register in, tiny seeded models, PEFT adapters, the command line.

Expected values come from outside the product: PEFT's unmerged forward, transformers' load of the output, a formula.
"""

import contextlib
import importlib
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from safetensors.torch import load_file

from consilience.__main__ import run

hf: Any = importlib.import_module("transformers")
peft: Any = importlib.import_module("peft")
State = dict[str, torch.Tensor]
Test = TypeVar("Test", bound=Callable[..., Any])

SIZES: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
IDS = torch.arange(3, 19)[None]


@dataclass(frozen=True)
class RealFile:
    """One row of docs/real-files.md. ``before`` is the result at e1e4e04, ``now`` what the test holds."""

    kind: int
    test: str
    family: str
    option: str
    expected: str
    before: str
    now: str


TABLE: list[RealFile] = []


def real_file(
    kind: int, *, family: str, option: str, expected: str, before: str, now: str = "right"
) -> Callable[[Test], Test]:
    """Register a test as a row of the table.

    Args:
        kind: the kind of fault, 1 to 12 (see ``table.KINDS``).
        family: the model family or library whose files they are.
        option: what is special about them: the save option, the tensor, the setting.
        expected: where the right value comes from.
        before: what e1e4e04 made of them, as measured: "right", "wrong numbers", "broken output", "silent loss",
            "wrongly refused", "wrong cause named".
        now: "right", "refused, true cause", or "warned".
    """

    def register(test: Test) -> Test:
        TABLE.append(RealFile(kind, test.__name__, family, option, expected, before, now))
        return pytest.mark.filterwarnings("ignore")(test)  # of the libraries that make the files

    return register


@dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def said(self) -> str:
        """Everything it printed."""
        return self.out + self.err


def cli(*words: str | Path) -> Outcome:
    """Run the command line in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run([str(word) for word in words])
    return Outcome(code, out.getvalue(), err.getvalue())


def merged(base: Path, out: Path, *words: str | Path, **experts: Path) -> Outcome:
    """Merge ``experts`` into ``base`` at float32 and return how it ended."""
    named = [word for name, path in experts.items() for word in ("-e", f"{name}={path}")]
    return cli("merge", base, out, *named, "--dtype", "float32", *words)


def refused(outcome: Outcome, *words: str) -> None:
    """Assert that the input was refused with every one of ``words`` in the message, and without a traceback."""
    assert outcome.code == 2, outcome.said
    assert "Traceback" not in outcome.said
    missing = [word for word in words if word not in outcome.err]
    assert not missing, (missing, outcome.err)


def tiny(family: str, head: str = "ForCausalLM", *, seed: int = 0, **config: Any) -> Any:
    """Return a seeded model of a family, such as Llama, Qwen2, GPT2, T5."""
    made = getattr(hf, f"{family}Config")(**SIZES | config)
    torch.manual_seed(seed)
    return getattr(hf, f"{family}{head}")(made).eval()


def moved(model: Any, seed: int, size: float = 0.1, only: Callable[[str], bool] = lambda name: True) -> Any:
    """Move every parameter that is trained (and ``only`` names) by seeded noise, in place."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and only(name):
                parameter.add_(size * torch.randn(parameter.shape, generator=draw))
    return model


def adapter(model: Any, folder: Path, *, seed: int = 1, save: dict[str, Any] | None = None, **config: Any) -> Any:
    """Save a LoRA adapter on ``model`` whose every trained weight has moved; return PEFT's model, unmerged."""
    tuned = moved(peft.get_peft_model(model, peft.LoraConfig(**{"r": 4, "lora_alpha": 8} | config)).eval(), seed)
    tuned.save_pretrained(folder, **save or {})
    return tuned


def logits(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    """Return a language model's logits; ``model`` may be a folder, which transformers loads in float32."""
    if isinstance(model, str | Path):
        model = hf.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(ids).logits


def state(folder: Path) -> State:
    """Return a folder's (or file's) tensors."""
    return load_file(folder if folder.is_file() else folder / "model.safetensors")
