"""Fixtures shared by all tests."""

import fcntl
import os
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session")
def real_base() -> Path:
    """The real SmolLM2 base, fetched once per checkout (one test process fetches, the others wait)."""
    from suites.language import CACHE
    from suites.language.base import base_path

    CACHE.mkdir(exist_ok=True)
    with open(CACHE / "base.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return base_path()
