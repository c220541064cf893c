"""How kernels are compiled where nothing can be kept on disk."""

from typing import Any

import numba
import numpy as np
import pytest

from consilience import jit


@pytest.mark.parametrize("kind", ["kernel", "inlined", "reporting"])
def test_without_a_folder_for_a_cache_kernels_are_compiled_anew(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []

    def njit(function: Any, cache: bool = False, **options: Any) -> Any:
        asked.append(cache)
        if cache:
            raise RuntimeError("cannot cache function 'f': no locator available for file 'f.py'")
        return numba.njit(function, **options)

    monkeypatch.setattr(jit, "njit", njit)
    made: Any = getattr(jit, kind)(lambda values: values.sum() + 1.0)
    assert made(np.arange(4.0)) == 7.0
    assert asked == [True, False]
