"""Fixtures shared by all tests."""

import fcntl
import os
from pathlib import Path

import pytest
from hypothesis import settings

from consilience import progress

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Tests run side by side: several OpenMP threads in each on busy cores are many times slower than one.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Short jobs print no progress, but on a busy machine they are not short; tests/test_progress.py looks at the lines.
progress.SILENCE = progress.INTERVAL = 600.0
# A clean clone is judged by the same examples every time; HYPOTHESIS_PROFILE=random looks for new ones. How long one
# example takes on a busy machine is no defect.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.register_profile("random", deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of the real base take longest: begun first, they leave no core idle at the end."""
    items.sort(key=lambda item: item.get_closest_marker("real") is None)


@pytest.fixture(scope="session")
def real_base() -> Path:
    """The real SmolLM2 base, fetched once per checkout (one test process fetches, the others wait)."""
    from suites.language import CACHE
    from suites.language.base import base_path

    CACHE.mkdir(exist_ok=True)
    with open(CACHE / "base.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return base_path()
