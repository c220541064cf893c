"""The language suite: four LoRA experts on SmolLM2-135M-Instruct, with their held-out rows.

The paths below are all this package needs to be read; nothing here imports torch.
"""

from pathlib import Path
from typing import Literal

DOMAINS = ("pronounce", "translate", "code", "sentiment")
"""The four core domains, in the order in which tables print them."""

BASE_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
"""The hub name of the base model that every adapter names in its card."""

Split = Literal["validation", "test"]

_HERE = Path(__file__).resolve().parent
REPOSITORY_ROOT = _HERE.parents[1]
CACHE = REPOSITORY_ROOT / ".cache"
"""Everything that is fetched or rebuilt rather than committed."""

__all__ = [
    "BASE_ID",
    "CACHE",
    "DOMAINS",
    "REPOSITORY_ROOT",
    "Split",
    "adapter_path",
    "calibration_path",
    "heldout_path",
    "train_path",
]


def _checked(domain: str) -> str:
    if domain not in DOMAINS:
        raise ValueError(f"unknown domain {domain!r}; the language suite has {', '.join(DOMAINS)}")
    return domain


def adapter_path(domain: str) -> Path:
    """Folder of the committed PEFT adapter of ``domain``."""
    return _HERE / "adapters" / _checked(domain)


def heldout_path(domain: str, split: Split) -> Path:
    """JSONL file of the committed ``validation`` or ``test`` rows of ``domain``."""
    if split not in ("validation", "test"):
        raise ValueError(f"unknown split {split!r}; held-out rows come as validation or test")
    return _HERE / "heldout" / _checked(domain) / f"{split}.jsonl"


def calibration_path(domain: str) -> Path:
    """JSONL file of the committed prompt-only calibration rows of ``domain`` (drawn from its training rows)."""
    return _HERE / "calibration" / f"{_checked(domain)}.jsonl"


def train_path(domain: str) -> Path:
    """JSONL file of the training rows of ``domain``: not committed, rebuilt by ``python -m suites.language.data``."""
    return CACHE / "language-data" / _checked(domain) / "train.jsonl"
