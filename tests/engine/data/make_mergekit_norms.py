"""Record what mergekit 0.1.5 answers for its methods of norms and angles, for tests/engine/test_mergekit_norms.py.

Run it by hand in an environment of its own that holds mergekit==0.1.5 and torch (no test imports mergekit):

    python tests/engine/data/make_mergekit_norms.py

Only outputs are stored; see make_mergekit_oracle.py. The experts' task vectors have a part in common, so that their
cosines are far from 0, where float32 would lose them.
"""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np

OUT = Path(__file__).with_name("mergekit_norms_0_1_5.npz")
SHAPES: dict[str, tuple[int, ...]] = {"layers.0.weight": (23, 17), "layers.1.weight": (9, 31), "norm.bias": (101,)}
TWO = {"e0": 0.7, "e1": 1.1}
THREE = {"e0": 0.7, "e1": 0.25, "e2": 1.6}
Case = tuple[str, list[str], dict[str, Any]]

#: case -> method, experts, parameters; the names are the same in both programs. Each is merged with and without a base.
EITHER: dict[str, Case] = {
    "nuslerp": ("nuslerp", ["e0", "e1"], {"weight": TWO}),
    "nuslerp negative": ("nuslerp", ["e0", "e1"], {"weight": {"e0": 0.7, "e1": -0.2}}),
    "nuslerp last": ("nuslerp", ["e0", "e1"], {"weight": TWO, "nuslerp_flatten": False}),
    "nuslerp first": ("nuslerp", ["e0", "e1"], {"weight": TWO, "nuslerp_flatten": False, "nuslerp_row_wise": True}),
    "multislerp": ("multislerp", ["e0", "e1", "e2"], {"weight": THREE}),
    "multislerp sum": ("multislerp", ["e0", "e1", "e2"], {"weight": THREE, "normalize_weights": False}),
    "multislerp two": ("multislerp", ["e0", "e1"], {"weight": TWO}),
    "karcher": ("karcher", ["e0", "e1", "e2"], {}),
    "karcher short": ("karcher", ["e0", "e1", "e2"], {"max_iter": 1, "tol": 1e-3}),
}
#: Those that need a base, and those that refuse one.
BASED: dict[str, Case] = {
    "model_stock": ("model_stock", ["e0", "e1", "e2"], {}),
    "model_stock two": ("model_stock", ["e0", "e1"], {}),
    "model_stock filters": ("model_stock", ["e0", "e1", "e2"], {"filter_wise": True}),
}
ALONE: dict[str, Case] = {
    "passthrough": ("passthrough", ["e0"], {}),
    "passthrough scaled": ("passthrough", ["e0"], {"scale": 1.7}),
}
CASES: dict[str, tuple[str, list[str], dict[str, Any], bool]] = {
    f"{case}, {'base' if base else 'no base'}": (*what, base)
    for cases, bases in ((EITHER, (True, False)), (BASED, (True,)), (ALONE, (False,)))
    for case, what in cases.items()
    for base in bases
}


def inputs() -> dict[str, dict[str, Any]]:
    """Return a base and three experts in float32, of different norms."""
    random = np.random.RandomState(20261201)
    base = {name: random.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}
    shared = {name: 0.1 * random.standard_normal(shape) for name, shape in SHAPES.items()}
    models = {"base": base}
    for number, expert in enumerate(("e0", "e1", "e2")):
        models[expert] = {
            name: ((1 + 0.2 * number) * array + shared[name] + 0.1 * random.standard_normal(array.shape)).astype(
                np.float32
            )
            for name, array in base.items()
        }
    return models


def checksum() -> str:
    """Return a digest of all inputs."""
    whole = hashlib.sha256()
    for state in inputs().values():
        for array in state.values():
            whole.update(array.tobytes())
    return whole.hexdigest()


def main() -> None:
    """Write the file."""
    import torch  # pyright: ignore[reportUnusedImport]
    from mergekit.merge_methods.api import merge_state_dicts  # pyright: ignore

    found: dict[str, Any] = {"inputs": np.array(checksum())}
    models = inputs()
    for case, (method, names, parameters, based) in CASES.items():
        states = {
            name: {key: torch.from_numpy(np.array(array)) for key, array in models[name].items()}
            for name in [*(["base"] if based else []), *names]
        }
        merged = merge_state_dicts(states, method, parameters=parameters, base="base" if based else None)
        found |= {f"{case}|{name}": tensor.numpy() for name, tensor in merged.items()}
    np.savez_compressed(OUT, **found)


if __name__ == "__main__":
    main()
