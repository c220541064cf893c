"""The language suite: LoRA experts on SmolLM2-135M-Instruct, four of them committed, with their held-out rows.

The paths below are all this package needs to be read; nothing here imports torch.
"""

from pathlib import Path
from typing import Literal

DOMAINS = ("pronounce", "translate", "code", "sentiment")
"""The four core domains, in the order in which tables print them; their adapters are committed."""

MORE_DOMAINS = ("arithmetic", "stringops", "glosses", "spam")
"""Four more, for studies of routing; their rows are committed, their adapters are trained into the cache."""

ALL_DOMAINS = DOMAINS + MORE_DOMAINS
"""The core domains and the further ones."""

BASE_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
"""The hub name of the base model that every adapter names in its card."""

Split = Literal["validation", "test"]

_HERE = Path(__file__).resolve().parent
REPOSITORY_ROOT = _HERE.parents[1]
CACHE = REPOSITORY_ROOT / ".cache"
"""Everything that is fetched or rebuilt rather than committed."""

__all__ = [
    "ALL_DOMAINS",
    "BASE_ID",
    "CACHE",
    "DOMAINS",
    "MORE_DOMAINS",
    "REPOSITORY_ROOT",
    "Split",
    "adapter_path",
    "calibration_path",
    "heldout_path",
    "train_path",
]


def _checked(domain: str) -> str:
    if domain not in ALL_DOMAINS:
        raise ValueError(f"unknown domain {domain!r}; the language suite has {', '.join(ALL_DOMAINS)}")
    return domain


def adapter_path(domain: str) -> Path:
    """Folder of the PEFT adapter of ``domain``: committed for a core domain, else trained into the cache."""
    root = _HERE if _checked(domain) in DOMAINS else CACHE / "language"
    return root / "adapters" / domain


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
