"""Fixtures of the merge doctor's tests."""

from pathlib import Path
from typing import Any

import pytest
from doctor_models import Make, Tensors, write_model


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Write a base and experts and return a recipe of them: ``make(base, a=tensors, b=tensors)``."""

    def write(base: Tensors, **experts: Tensors) -> dict[str, Any]:
        models = [{"model": str(write_model(tmp_path / name, value)), "name": name} for name, value in experts.items()]
        origin = str(write_model(tmp_path / "base", base))
        return {"merge_method": "task_arithmetic", "base_model": origin, "models": models}

    return write
