#!/bin/sh
# torch 2.13.0: autocast's cache of converted weights leaves frozen weights out.
#
# Within one torch.autocast context a float32 weight that requires grad is converted to bfloat16 once, also under
# no_grad. One with requires_grad=False is converted again at every call: generating n tokens with a frozen (or merely
# evaluated, requires_grad_(False)) float32 model under autocast converts every weight n times. Holding such weights in
# bfloat16 gives the same products without it.
#
# Exit 0: as described. Exit 1: it has changed. Seen with torch 2.13.0 (CPU).
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 numpy
"$work/venv/bin/python" - <<'PYTHON'
import sys

import torch
from torch.profiler import ProfilerActivity, profile

layer = torch.nn.Linear(64, 64, bias=False)
x = torch.randn(1, 64, dtype=torch.bfloat16)
found = {}
for trainable in (True, False):
    layer.requires_grad_(trainable)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16), profile(activities=[ProfilerActivity.CPU]) as seen:
        for _ in range(10):
            layer(x)
    found[trainable] = sum(event.count for event in seen.key_averages() if event.key == "aten::_to_copy")
print(f"torch {torch.__version__}: conversions in ten calls: trainable {found[True]}, frozen {found[False]}")
sys.exit(0 if found == {True: 1, False: 10} else 1)
PYTHON
