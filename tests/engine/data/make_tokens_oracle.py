"""Record what mergekit 0.1.5 makes of vocabularies that differ, for tests/engine/test_tokens.py.

Run it by hand in an environment of its own that holds mergekit==0.1.5 (no test imports mergekit), from the root:

    HF_HUB_OFFLINE=1 PYTHONPATH=. python tests/engine/data/make_tokens_oracle.py

Rows are stored by token, in the order of their text: mergekit's ids depend on the order of a set.
"""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from tests.engine.vocabulary_models import checksum, ids, models

OUT = Path(__file__).with_name("mergekit_0_1_5_tokens.npz")
MAP = {
    "<|new|>": {"source": {"kind": "model_token", "model": "x", "token": "c"}},
    "<|nil|>": {"source": {"kind": "zero"}},
    "<|number|>": {"source": {"kind": "model_token", "model": "y", "token_id": 5}},
    "a": {"source": {"kind": "zero"}, "force": True},
    "d": {"source": "y", "force": True},
    "<|both|>": {"source": "y"},
    "k": {"source": {"kind": "model_token", "model": "base", "token": "b"}},
}
#: case -> method, whether there is a base, mergekit's tokenizer keys; the weights are of x and y, and of the base 0.5.
CASES: dict[str, tuple[str, bool, dict[str, Any]]] = {
    "linear union": ("linear", False, {"tokenizer_source": "union"}),
    "linear x": ("linear", False, {"tokenizer_source": "x"}),
    "linear y": ("linear", False, {"tokenizer": {"source": "y"}}),
    "linear map": ("linear", False, {"tokenizer": {"source": "union", "tokens": MAP}}),
    "task_arithmetic union": ("task_arithmetic", True, {"tokenizer_source": "union"}),
    "task_arithmetic base": ("task_arithmetic", True, {"tokenizer_source": "base"}),
    "task_arithmetic y": ("task_arithmetic", True, {"tokenizer_source": "y"}),
    "task_arithmetic map": ("task_arithmetic", True, {"tokenizer": {"source": "union", "tokens": MAP}}),
    "task_arithmetic padded": ("task_arithmetic", True, {"tokenizer": {"source": "y", "pad_to_multiple_of": 8}}),
    "ties union": ("ties", True, {"tokenizer_source": "union"}),
}
WEIGHTS = {"base": 0.5, "x": 0.7, "y": 0.4}


def recipe(case: str, folders: dict[str, Path]) -> dict[str, Any]:
    """Return a case as a recipe with paths."""
    method, based, keys = CASES[case]

    def placed(value: Any, key: str = "") -> Any:
        if isinstance(value, dict):
            return {k: placed(v, k) for k, v in value.items()}
        named = key in ("model", "source", "tokenizer_source") and value in ("x", "y", "base")
        return str(folders[value]) if named and not (key != "model" and value == "base") else value

    names = ["x", "y"] if based else ["base", "x", "y"]
    listed = [{"model": str(folders[name]), "parameters": {"weight": WEIGHTS[name]}} for name in names]
    out: dict[str, Any] = {"merge_method": method, "models": listed, "dtype": "float32", **placed(keys)}
    return out | ({"base_model": str(folders["base"])} if based else {})


def by_token(folder: Path) -> dict[str, Any]:
    """Return a merged folder's tensors outside layers, rows in the order of the tokens' text, then those of none."""
    known = ids(folder)
    order = [known[token] for token in sorted(known)]
    found: dict[str, Any] = {"tokens": np.array(sorted(known))}
    for name, value in load_file(folder / "model.safetensors").items():
        vocabulary = "embed" in name or "lm_head" in name
        if "layers" in name:
            continue  # compared elsewhere
        rest = [row for row in range(len(value)) if row not in set(order)]
        found[name] = value[[*order, *rest]] if vocabulary else value
    return found


def main() -> None:
    """Write the file."""
    from mergekit.config import MergeConfiguration  # pyright: ignore
    from mergekit.merge import MergeOptions, run_merge  # pyright: ignore

    found: dict[str, Any] = {"inputs": np.array(checksum())}
    with tempfile.TemporaryDirectory() as root:
        folders = models(Path(root))
        for case in CASES:
            out = Path(root) / case.replace(" ", "-")
            run_merge(MergeConfiguration.model_validate(recipe(case, folders)), str(out), MergeOptions())
            found |= {f"{case}|{name}": value for name, value in by_token(out).items()}
    np.savez_compressed(OUT, **found)


if __name__ == "__main__":
    main()
