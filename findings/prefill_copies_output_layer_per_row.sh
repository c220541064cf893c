#!/bin/sh
# torch 2.13.0 with transformers 5.24.0, on a CPU: the first step of a batched generation in bfloat16 copies the output
# layer once for every row of the batch, if its weight is frozen.
#
# A causal model gives its head the last position of every prompt, a view [B, 1, H] of [B, T, H] that is not contiguous.
# torch.nn.functional.linear makes a batched product of such a view: the weight [V, H] is expanded to [B, H, V], and the
# bfloat16 kernel of aten::bmm copies what it is given, B V H 2 bytes. For 64 prompts of SmolLM2-135M that is 3.6 GB and
# 4.8 s, a third of the time that 60 tokens of 64 answers took. Where the weight requires a gradient, one plain product
# is made instead, although generate() records none (torch's matmul asks the tensor, not the mode): so freezing a model
# makes it slower. A contiguous copy of the view, 74 kB, avoids it. Later tokens are not affected: their states are
# [B, 1, H] to begin with.
#
# Exit 0: as described. Exit 1: it has changed. Seen with torch 2.13.0, transformers 5.24.0.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.24.0
cat > "$work/prefill.py" <<'PYTHON'
import time

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

ROWS, PROMPT, HIDDEN, VOCABULARY = 64, 12, 256, 16384


class Products(TorchDispatchMode):
    """Notes the shapes of the right sides of matrix products that are as wide as the vocabulary."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in (torch.ops.aten.mm.default, torch.ops.aten.bmm.default) and args[1].shape[-1] == VOCABULARY:
            self.seen.append(tuple(args[1].shape))
        return function(*args, **(kwargs or {}))


def seconds(call):
    call()
    times = []
    for _ in range(3):
        begun = time.perf_counter()
        call()
        times.append(time.perf_counter() - begun)
    return min(times)


torch.set_num_threads(1)
config = LlamaConfig(
    vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=2, bos_token_id=None, eos_token_id=None, pad_token_id=0,
)
model = LlamaForCausalLM(config).to(torch.bfloat16).eval()
plain = (HIDDEN, VOCABULARY)
ids = torch.ones(ROWS, PROMPT, dtype=torch.long)
ask = dict(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False)
with Products() as trained:
    model.generate(max_new_tokens=2, **ask)
print("a weight that requires a gradient:", trained.seen)
model.requires_grad_(False)
with Products() as products:
    model.generate(max_new_tokens=2, **ask)
print("a frozen one:                     ", products.seen)
as_it_is = seconds(lambda: model.generate(max_new_tokens=1, **ask))
model.lm_head.register_forward_pre_hook(lambda module, inputs: (inputs[0].contiguous(),))
with Products() as again:
    model.generate(max_new_tokens=2, **ask)
print("a frozen one, contiguous states:  ", again.seen)
contiguous = seconds(lambda: model.generate(max_new_tokens=1, **ask))
print(f"first token of {ROWS} answers: {as_it_is:.2f} s, from contiguous states {contiguous:.2f} s")
assert trained.seen == [plain, plain], trained.seen
assert products.seen == [(ROWS, *plain), plain], products.seen
assert again.seen == [plain, plain], again.seen
assert as_it_is > 3 * contiguous
PYTHON
cd "$work"
"$work/venv/bin/python" prefill.py
