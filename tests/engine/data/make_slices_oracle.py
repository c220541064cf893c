"""Record what mergekit 0.1.5 answers to recipes of slices, modules and stages, for tests/engine/test_slices.py.

Run it by hand in an environment of its own that holds mergekit==0.1.5, transformers and torch (no test imports it):

    python tests/engine/data/make_slices_oracle.py

Only outputs are stored; the inputs come from numpy's legacy generator, whose stream is frozen, and their checksum is
stored beside them.
"""

import hashlib
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

OUT = Path(__file__).with_name("mergekit_0_1_5_slices.npz")
WIDTH, INNER, VOCABULARY = 8, 12, 16
#: model -> (layers, seed, the model it was tuned from, whether embeddings and head are tied).
MODELS: dict[str, tuple[int, int, str, bool]] = {
    "shallow": (3, 1, "", False),
    "deep": (5, 2, "", False),
    "base": (4, 3, "", False),
    "x": (4, 4, "base", False),
    "y": (4, 5, "base", False),
    "tied": (3, 6, "", True),
    "tied-deep": (4, 7, "", True),
}

#: case -> recipe, with models by name.
CASES: dict[str, str] = {
    "stack": """
merge_method: passthrough
slices:
  - sources: [{model: shallow, layer_range: [0, 2], parameters: {scale: [{filter: o_proj, value: 0.5}, {value: 1.25}]}}]
  - sources: [{model: deep, layer_range: [1, 4]}]
  - sources: [{model: shallow, layer_range: [1, 3], parameters: {scale: [1, 3]}}]
""",
    "repeat": """
merge_method: passthrough
slices:
  - sources: [{model: base, layer_range: [0, 3]}]
  - sources: [{model: base, layer_range: [1, 4]}]
""",
    "slerp": """
merge_method: slerp
base_model: base
slices:
  - sources:
      - {model: base, layer_range: [0, 4]}
      - {model: x, layer_range: [0, 4]}
parameters:
  t:
    - {filter: self_attn, value: [0, 0.5, 0.3, 0.7, 1]}
    - {filter: mlp, value: [1, 0.5, 0.7, 0.3, 0]}
    - value: [0.2, 0.8]
""",
    "ties": """
merge_method: ties
base_model: base
slices:
  - sources:
      - {model: base, layer_range: [0, 3]}
      - {model: x, layer_range: [0, 3], parameters: {weight: [0.2, 1.4], density: 0.6}}
      - {model: y, layer_range: [0, 3], parameters: {weight: 0.5}}
  - sources:
      - {model: x, layer_range: [2, 4], parameters: {density: [0.3, 0.9]}}
      - {model: base, layer_range: [2, 4]}
      - {model: y, layer_range: [2, 4]}
    parameters: {weight: [{filter: mlp, value: 0.9}]}
parameters: {weight: 0.7, density: 0.5, normalize: true}
""",
    "task_arithmetic": """
merge_method: task_arithmetic
base_model: base
slices:
  - sources:
      - {model: base, layer_range: [1, 2]}
      - {model: x, layer_range: [0, 1], parameters: {weight: [0.3, 0.9]}}
  - sources:
      - {model: y, layer_range: [1, 4], parameters: {weight: [{filter: layers.2., value: 2}, {value: 0.5}]}}
      - {model: base, layer_range: [0, 3]}
parameters: {lambda: 0.8}
""",
    "own base": """
merge_method: task_arithmetic
base_model: base
slices:
  - sources: [{model: base, layer_range: [0, 2]}, {model: x, layer_range: [0, 2]}]
  - base_model: y
    sources: [{model: y, layer_range: [2, 4]}, {model: x, layer_range: [2, 4]}]
parameters: {weight: 0.4}
""",
    "linear": """
merge_method: linear
slices:
  - sources:
      - {model: base, layer_range: [0, 2], parameters: {weight: [1, 3]}}
      - {model: x, layer_range: [1, 3], parameters: {weight: 2}}
  - sources:
      - {model: x, layer_range: [2, 4]}
      - {model: y, layer_range: [2, 4], parameters: {weight: [0.5, 4]}}
parameters: {weight: 1}
""",
    "modules": """
merge_method: linear
modules:
  default:
    parameters: {weight: 3}
    slices:
      - sources:
          - {model: base, layer_range: [0, 4], parameters: {weight: [{filter: mlp, value: 1}]}}
          - {model: x, layer_range: [0, 4], parameters: {weight: [2, 4]}}
      - sources: [{model: y, layer_range: [3, 4]}]
parameters: {weight: 5}
""",
    "whole modules": """
merge_method: ties
base_model: base
modules:
  default:
    models:
      - {model: x, parameters: {weight: 0.3}}
      - {model: y}
    parameters: {weight: [0.5, 0.9]}
parameters: {density: 0.5, normalize: false}
""",
    "tied": """
merge_method: passthrough
slices:
  - sources: [{model: tied, layer_range: [0, 3]}]
  - sources: [{model: tied, layer_range: [1, 3]}]
""",
    "stages": """
name: low
merge_method: linear
models: [{model: base, parameters: {weight: 1}}, {model: x, parameters: {weight: 3}}]
---
merge_method: passthrough
slices:
  - sources: [{model: low, layer_range: [0, 3]}]
  - sources: [{model: high, layer_range: [1, 4]}]
---
name: high
merge_method: task_arithmetic
base_model: base
models: [{model: low, parameters: {weight: 0.5}}, {model: y, parameters: {weight: [0, 1]}}]
""",
}
#: How mergekit ends on tied models of which the last slice's is another than the first's: the head is dropped.
TIED = """
merge_method: passthrough
slices:
  - sources: [{model: tied, layer_range: [0, 2]}]
  - sources: [{model: tied-deep, layer_range: [2, 4]}]
"""


def config(layers: int, *, tied: bool) -> dict[str, Any]:
    """Return a config.json."""
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": WIDTH, "intermediate_size": INNER,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": WIDTH // 2, "num_hidden_layers": layers,
        "vocab_size": VOCABULARY, "max_position_embeddings": 64, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
        "hidden_act": "silu", "tie_word_embeddings": tied, "torch_dtype": "float32", "bos_token_id": 1,
        "eos_token_id": 2,
    }  # fmt: skip


def shapes(layers: int, *, tied: bool) -> dict[str, tuple[int, ...]]:
    """Return the tensors of a model."""
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, WIDTH)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        found |= {f"{prefix}.{name}.weight": (WIDTH,) for name in ("input_layernorm", "post_attention_layernorm")}
        found |= {f"{prefix}.self_attn.{name}_proj.weight": (WIDTH, WIDTH) for name in "qo"}
        found |= {f"{prefix}.self_attn.{name}_proj.weight": (WIDTH // 2, WIDTH) for name in "kv"}
        found |= {f"{prefix}.mlp.{name}_proj.weight": (INNER, WIDTH) for name in ("gate", "up")}
        found[f"{prefix}.mlp.down_proj.weight"] = (WIDTH, INNER)
    found["model.norm.weight"] = (WIDTH,)
    return found if tied else found | {"lm_head.weight": (VOCABULARY, WIDTH)}


def inputs() -> dict[str, dict[str, Any]]:
    """Return every model's tensors, float32."""
    models: dict[str, dict[str, Any]] = {}
    for name, (layers, seed, parent, tied) in MODELS.items():
        random = np.random.RandomState(20260200 + seed)
        drawn = {key: random.standard_normal(shape) for key, shape in shapes(layers, tied=tied).items()}
        before = models.get(parent)
        models[name] = {
            key: (value if before is None else before[key] + 0.2 * value).astype(np.float32)
            for key, value in drawn.items()
        }
    return models


def checksum() -> str:
    """Return a digest of all inputs."""
    whole = hashlib.sha256()
    for state in inputs().values():
        for array in state.values():
            whole.update(array.tobytes())
    return whole.hexdigest()


def write_models(folder: Path) -> None:
    """Write every model into a folder of its name."""
    from safetensors.numpy import save_file

    for name, tensors in inputs().items():
        layers, _, _, tied = MODELS[name]
        (folder / name).mkdir(parents=True)
        save_file(tensors, folder / name / "model.safetensors", {"format": "pt"})
        (folder / name / "config.json").write_text(json.dumps(config(layers, tied=tied)))


def recipe_in(folder: Path, text: str) -> str:
    """Return a recipe with the paths of its models."""
    for name in sorted(MODELS, key=len, reverse=True):
        for end in (",", "}", "\n"):
            text = text.replace(f"model: {name}{end}", f"model: {folder / name}{end}")
    return text


def main() -> None:
    """Write the file."""
    import os
    import subprocess
    import sys

    from safetensors.numpy import load_file

    found: dict[str, Any] = {"inputs": np.array(checksum())}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_models(folder)
        for case, text in (CASES | {"tied apart": TIED}).items():
            out, path = folder / "out" / case.replace(" ", "-"), folder / "recipe.yaml"
            path.write_text(recipe_in(folder, text))
            more = ["-I", str(out) + "-stages", "--out-path", str(out)] if "\n---\n" in text else [str(out)]
            program = Path(sys.executable).with_name("mergekit-multi" if "\n---\n" in text else "mergekit-yaml")
            environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
            subprocess.run([str(program), str(path), *more, "--no-copy-tokenizer"], check=True, env=environment)
            written: dict[str, Any] = {}
            for file in sorted(out.glob("*.safetensors")):
                written |= load_file(file)
            found |= {f"{case}|{key}": value for key, value in written.items()}
            own = json.loads((out / "config.json").read_text())
            found[f"{case}|config"] = np.array([own["num_hidden_layers"], own["tie_word_embeddings"]])
    np.savez_compressed(OUT, **found)


if __name__ == "__main__":
    main()
