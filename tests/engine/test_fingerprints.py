"""Every method's bytes on one set of models: what a faster engine must give again, to the last bit.

``data/fingerprints.json`` was written by the first engine (``python tests/engine/test_fingerprints.py`` writes it). A
change of arithmetic on purpose writes it anew, and says in its commit why the new rounding is no worse.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest

import consilience as cs

State = dict[str, npt.NDArray[Any]]
GOLDEN = Path(__file__).parent / "data" / "fingerprints.json"
SHAPES: dict[str, tuple[tuple[int, ...], str]] = {
    "a.weight": ((157, 211), "bfloat16"),
    "b.weight": ((64, 129), "float32"),
    "c.weight": ((5, 7, 3, 3), "float16"),
    "d.weight": ((4099,), "float64"),
    "e.bias": ((3,), "bfloat16"),
    "f.running_mean": ((9,), "float32"),
}
WEIGHTS = {"x": 0.3, "y": 0.45, "z": -0.2}
RUNS: dict[str, dict[str, Any]] = {
    "linear": {"method": "linear", "weight": {"x": 0.3, "y": 0.5, "z": 0.7}},
    "linear, not normalised": {"method": "linear", "weight": WEIGHTS, "normalize": False},
    "task_arithmetic": {"method": "task_arithmetic", "weight": WEIGHTS, "lambda": 1.3},
    "task_arithmetic, float16": {"method": "task_arithmetic", "weight": WEIGHTS, "out_dtype": "float16"},
    "task_arithmetic, float32": {"method": "task_arithmetic", "weight": WEIGHTS, "out_dtype": "float32"},
    "task_arithmetic, stochastic": {"method": "task_arithmetic", "stochastic_rounding": True, "seed": 3},
    "ties": {"method": "ties", "density": {"x": 0.1, "y": 0.37, "z": 1.0}, "lambda": 0.7},
    "ties, sum": {"method": "ties", "density": 0.2, "normalize": False, "weight": WEIGHTS},
    "ties, model": {"method": "ties", "density": 0.23, "trim": "model"},
    "dare_linear": {"method": "dare_linear", "density": 0.3, "seed": 5, "weight": WEIGHTS},
    "dare_linear, l1": {"method": "dare_linear", "density": 0.3, "rescale": "l1"},
    "dare_ties": {"method": "dare_ties", "density": {"x": 0.1, "y": 0.5, "z": 0.9}, "weight": WEIGHTS},
    "slerp": {"method": "slerp", "t": 0.3},
}


def make_states() -> dict[str, State]:
    """A base and three experts of a thousandth to a tenth of its size."""
    rng = np.random.default_rng(7)
    kinds: Any = {"bfloat16": np.dtype(ml_dtypes.bfloat16)}
    base = {n: 0.05 * rng.standard_normal(shape) for n, (shape, _) in SHAPES.items()}
    models = {"base": base}
    for name, size in (("x", 1e-4), ("y", 1e-3), ("z", 5e-3)):
        models[name] = {n: values + size * rng.standard_normal(values.shape) for n, values in base.items()}
    return {
        model: {n: values.astype(kinds.get(SHAPES[n][1], SHAPES[n][1])) for n, values in state.items()}
        for model, state in models.items()
    }


def fingerprint(name: str) -> str:
    """Merge as ``RUNS`` says and return a digest of names, types and bytes."""
    states, run = make_states(), RUNS[name]
    experts = {n: states[n] for n in (("x",) if run["method"] == "slerp" else ("x", "y", "z"))}
    merged: Any = cs.merge(states["base"], experts, **run)
    whole = hashlib.sha256()
    for tensor, values in sorted(merged.items()):
        whole.update(f"{tensor} {values.dtype} {values.shape}".encode() + values.tobytes())
    return whole.hexdigest()


@pytest.mark.parametrize("name", RUNS)
def test_bytes_are_the_first_engines(name: str) -> None:
    assert fingerprint(name) == json.loads(GOLDEN.read_text())[name]


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps({name: fingerprint(name) for name in RUNS}, indent=1) + "\n")
