#!/bin/sh
# mergekit 0.1.5: SCE weighs models equally, whatever their energies, where changes are as small as fine-tuning's.
#
# SCE weighs each task vector of a tensor by its mean square. mergekit compares the sum of those mean squares with 1e-6
# before it divides, and below that takes equal weights: task vectors whose entries have a size of 0.001, of which one is
# ten times as long as the other, get one half each, where the same two scaled up get 0.99 and 0.01. Fine-tunes of
# language models in small steps are below that limit in most tensors, so the merge is another method there.
#
# Exit 0: as described. Exit 1: it has changed. Seen with mergekit 0.1.5, torch 2.13.0 (CPU), transformers 5.24.0.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 numpy transformers==5.24.0 mergekit==0.1.5
"$work/venv/bin/python" - <<'PYTHON'
import importlib.metadata
import sys

import torch
from mergekit.merge_methods.api import merge_state_dicts

torch.manual_seed(0)
base, noise = torch.zeros(64, 64), torch.randn(2, 64, 64)
shares = {}
for size in (0.1, 0.001):
    models = [{"w": base + size * noise[0]}, {"w": base + 0.1 * size * noise[1]}]
    inputs = {"base": {"w": base}, "one": models[0], "other": models[1]}
    merged = merge_state_dicts(inputs, "sce", base="base")["w"]
    change = merged[(noise[0] > 0) == (noise[1] > 0)]  # where the signs agree nothing is erased
    columns = torch.stack([model["w"][(noise[0] > 0) == (noise[1] > 0)] for model in models], 1)
    shares[size] = torch.linalg.lstsq(columns.double(), change.double()[:, None]).solution.flatten().tolist()
    print(f"entries of size {size}: weights {shares[size][0]:.3f} and {shares[size][1]:.3f}, by energy 0.990 and 0.010")
print("mergekit", importlib.metadata.version("mergekit"))
large, small = shares[0.1], shares[0.001]
sys.exit(0 if abs(large[0] - 0.99) < 0.01 and abs(small[0] - 0.5) < 0.01 and abs(small[1] - 0.5) < 0.01 else 1)
PYTHON
