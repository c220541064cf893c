"""Record what mergekit 0.1.5 answers, for tests/engine/test_mergekit_oracle.py.

Run it by hand in an environment of its own that holds mergekit==0.1.5 and torch (no test imports mergekit):

    python tests/engine/data/make_mergekit_oracle.py

Only outputs are stored; the inputs come from numpy's legacy generator, whose stream is frozen, and their checksum is
stored beside them.
"""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np

OUT = Path(__file__).with_name("mergekit_0_1_5.npz")
SHAPES: dict[str, tuple[int, ...]] = {"layers.0.weight": (43, 29), "layers.1.weight": (4, 5, 7), "norm.bias": (101,)}
EXPERTS = ("e0", "e1", "e2")
WEIGHTS = {"e0": 0.7, "e1": 0.25, "e2": 1.6}
SIGNED = {"e0": 0.7, "e1": -0.35, "e2": 1.6}

#: case -> method, per-expert parameters, shared parameters; the names are the same in both programs.
CASES: dict[str, tuple[str, dict[str, dict[str, float]], dict[str, Any]]] = {
    "linear": ("linear", {"weight": WEIGHTS}, {"normalize": True}),
    "linear sum": ("linear", {"weight": SIGNED}, {"normalize": False}),
    "task_arithmetic": ("task_arithmetic", {"weight": SIGNED}, {"lambda": 0.6}),
    "task_arithmetic mean": ("task_arithmetic", {"weight": WEIGHTS}, {"normalize": True}),
    "ties": ("ties", {"weight": WEIGHTS, "density": dict.fromkeys(EXPERTS, 0.3)}, {"lambda": 0.9}),
    "ties sum": (
        "ties",
        {"weight": SIGNED, "density": {"e0": 0.05, "e1": 0.5, "e2": 0.77}},
        {"normalize": False},
    ),
    "ties full": ("ties", {"weight": WEIGHTS, "density": dict.fromkeys(EXPERTS, 1.0)}, {"normalize": True}),
    "slerp": ("slerp", {}, {"t": 0.3}),
    "slerp end": ("slerp", {}, {"t": 1.0}),
    "dare_linear": ("dare_linear", {"weight": SIGNED, "density": dict.fromkeys(EXPERTS, 1.0)}, {"lambda": 0.6}),
    "dare_ties": ("dare_ties", {"weight": WEIGHTS, "density": dict.fromkeys(EXPERTS, 1.0)}, {"normalize": False}),
    "dare_ties mean": ("dare_ties", {"weight": WEIGHTS, "density": dict.fromkeys(EXPERTS, 1.0)}, {"normalize": True}),
}
#: Densities at which DARE's random masks are compared by their statistics.
DENSITIES = (0.1, 0.3, 0.8)
DARE_SIZE = 20_000


def inputs() -> dict[str, dict[str, Any]]:
    """Return a base and three experts in float32, without equal magnitudes in any task vector."""
    random = np.random.RandomState(20260101)
    base = {name: random.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}
    models = {"base": base}
    for expert in EXPERTS:
        models[expert] = {
            name: (array + 0.2 * random.standard_normal(array.shape)).astype(np.float32) for name, array in base.items()
        }
    return models


def dare_input() -> Any:
    """Return the task vector whose drops are counted."""
    random = np.random.RandomState(20260102)
    return random.standard_normal(DARE_SIZE).astype(np.float32)


def checksum() -> str:
    """Return a digest of all inputs."""
    whole = hashlib.sha256(dare_input().tobytes())
    for state in inputs().values():
        for array in state.values():
            whole.update(array.tobytes())
    return whole.hexdigest()


def main() -> None:
    """Write the file."""
    import torch  # pyright: ignore[reportUnusedImport]
    from mergekit.merge_methods.api import merge_state_dicts  # pyright: ignore

    def as_torch(state: dict[str, Any]) -> dict[str, Any]:
        return {name: torch.from_numpy(np.array(array)) for name, array in state.items()}

    found: dict[str, Any] = {"inputs": np.array(checksum())}
    models = inputs()
    for case, (method, own, shared) in CASES.items():
        names = ["base", "e0"] if method == "slerp" else list(EXPERTS) if method == "linear" else ["base", *EXPERTS]
        extra = {"rescale": True} if method.startswith("dare") else {}
        merged = merge_state_dicts(
            {name: as_torch(models[name]) for name in names},
            method,
            parameters=own | shared | extra,
            base=None if method == "linear" else "base",
        )
        found |= {f"{case}|{name}": tensor.numpy() for name, tensor in merged.items()}
    tau = dare_input()
    for density in DENSITIES:
        torch.manual_seed(0)
        states = {"base": {"w": torch.zeros(DARE_SIZE)}, "e0": {"w": torch.from_numpy(tau)}}
        parameters = {"weight": 1.0, "density": density, "rescale": True}
        out = merge_state_dicts(states, "dare_linear", parameters=parameters, base="base")["w"].numpy()
        kept = out != 0
        # share kept, factor of the kept entries, L1 and squared L2 norms of the result
        found[f"dare|{density}"] = np.array(
            [kept.mean(), np.median(out[kept] / tau[kept]), abs(out).sum(dtype=np.float64), np.square(out).sum()]
        )
    np.savez_compressed(OUT, **found)


if __name__ == "__main__":
    main()
