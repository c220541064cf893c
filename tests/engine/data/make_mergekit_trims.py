"""Record what mergekit 0.1.5 answers in its trimming methods, for tests/engine/test_mergekit_trims.py.

Run it by hand as its neighbour, make_mergekit_oracle.py, whose inputs these are; some cases shrink the task vectors.
"""

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
OUT = HERE / "mergekit_0_1_5_trims.npz"
EXPERTS = ("e0", "e1", "e2")
WEIGHTS = {"e0": 0.7, "e1": 0.25, "e2": 1.6}
SIGNED = {"e0": 0.7, "e1": -0.35, "e2": 1.6}
DENSITIES = {"e0": 0.05, "e1": 0.5, "e2": 0.77}
GAMMAS = {"e0": 0.02, "e1": 0.1, "e2": 0.3}

#: case -> method, factor of the task vectors, per-expert parameters, shared parameters, experts.
CASES: dict[str, tuple[str, float, dict[str, dict[str, float]], dict[str, Any], int]] = {
    "breadcrumbs": ("breadcrumbs", 1, {"weight": SIGNED, "density": DENSITIES, "gamma": GAMMAS}, {"lambda": 0.6}, 3),
    "breadcrumbs full": ("breadcrumbs", 1, {"weight": SIGNED, "density": dict.fromkeys(EXPERTS, 0.995)}, {}, 3),
    "breadcrumbs l1": (
        "breadcrumbs", 1, {"weight": SIGNED, "density": DENSITIES, "gamma": GAMMAS}, {"rescale": True}, 3,
    ),
    "ties l1": ("ties", 1, {"weight": WEIGHTS, "density": DENSITIES}, {"rescale": True}, 3),
    "breadcrumbs_ties": (
        "breadcrumbs_ties", 1, {"weight": SIGNED, "density": DENSITIES, "gamma": GAMMAS}, {"lambda": 0.6}, 3,
    ),
    "breadcrumbs_ties mean": (
        "breadcrumbs_ties", 1, {"weight": WEIGHTS, "density": DENSITIES, "gamma": GAMMAS},
        {"normalize": True, "rescale": True}, 3,
    ),
    "breadcrumbs_ties defaults": ("breadcrumbs_ties", 1, {"weight": WEIGHTS}, {}, 3),
    "sce": ("sce", 1, {}, {"select_topk": 0.3}, 3),
    "sce defaults": ("sce", 1, {}, {}, 3),
    "sce two": ("sce", 1, {}, {"select_topk": 0.6}, 2),
    "sce small": ("sce", 1e-3, {}, {"select_topk": 0.3}, 3),
    "ram": ("ram", 1, {}, {"epsilon": 0.15}, 3),
    "ram defaults": ("ram", 1e-4, {}, {}, 3),
    "ramplus_tl": ("ramplus_tl", 1, {}, {"epsilon": 0.3, "r": 0.4, "alpha": 5.0}, 3),
    "ramplus_tl defaults": ("ramplus_tl", 1e-4, {}, {}, 3),
    "arcee_fusion": ("arcee_fusion", 1, {}, {}, 1),
    "arcee_fusion large": ("arcee_fusion", 5, {}, {}, 1),
    "della": ("della", 1, {"weight": WEIGHTS, "density": dict.fromkeys(EXPERTS, 1.0)}, {"lambda": 0.9}, 3),
    "della defaults": ("della", 1, {"weight": SIGNED}, {}, 3),
    "della_linear": (
        "della_linear", 1, {"weight": SIGNED, "density": {"e0": 1.0, "e1": 0.0, "e2": 1.0}}, {"normalize": True}, 3,
    ),
}  # fmt: skip
#: (density, epsilon) at which DELLA's random masks are compared by their statistics, over (rows, columns).
LAWS = ((0.5, 0.3), (0.3, 0.15), (0.7, 0.25))
LAW_SHAPE = (500, 64)


def neighbour() -> Any:
    """Return the module that has the inputs."""
    spec = importlib.util.spec_from_file_location("make_mergekit_oracle", HERE / "make_mergekit_oracle.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def inputs(factor: float) -> dict[str, dict[str, Any]]:
    """Return a base and three experts, their task vectors times ``factor``."""
    models = neighbour().inputs()
    base = models["base"]
    return {
        name: {
            key: (base[key] + np.float32(factor) * (array - base[key])).astype(np.float32) for key, array in s.items()
        }
        for name, s in models.items()
    }


def law_input() -> Any:
    """Return the task vector whose drops are counted."""
    return np.random.RandomState(20260103).standard_normal(LAW_SHAPE).astype(np.float32)


def by_rank(tau: Any, out: Any) -> Any:
    """Return the share of entries kept at each rank within the rows (0: smallest magnitude)."""
    order = np.argsort(np.abs(tau), axis=1)
    return np.take_along_axis(out != 0, order, axis=1).mean(axis=0)


def main() -> None:
    """Write the file."""
    import torch  # pyright: ignore[reportUnusedImport]
    from mergekit.merge_methods.api import merge_state_dicts  # pyright: ignore

    def as_torch(state: dict[str, Any]) -> dict[str, Any]:
        return {name: torch.from_numpy(np.array(array)) for name, array in state.items()}

    found: dict[str, Any] = {"inputs": np.array(neighbour().checksum())}
    for case, (method, factor, own, shared, count) in CASES.items():
        models = inputs(factor)
        states = {name: as_torch(models[name]) for name in ("base", *EXPERTS[:count])}
        merged = merge_state_dicts(states, method, parameters=own | shared, base="base")
        found |= {f"{case}|{name}": tensor.numpy() for name, tensor in merged.items()}
    tau = law_input()
    for density, epsilon in LAWS:
        torch.manual_seed(0)
        states = {"base": {"w": torch.zeros(LAW_SHAPE)}, "e0": {"w": torch.from_numpy(tau)}}
        parameters = {"weight": 1.0, "density": density, "epsilon": epsilon, "rescale": True}
        out = merge_state_dicts(states, "della_linear", parameters=parameters, base="base")["w"].numpy()
        factor = np.median(out[out != 0] / tau[out != 0])
        found[f"law|{density}"] = np.array([factor, abs(out).sum(dtype=np.float64), *by_rank(tau, out)])
    np.savez_compressed(OUT, **found)


if __name__ == "__main__":
    main()
