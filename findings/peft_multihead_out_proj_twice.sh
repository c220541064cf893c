#!/bin/sh
# peft 0.21.2: LoRA on a torch.nn.MultiheadAttention adds the update of its out_proj twice.
#
# Targeting the attention module adapts its input projection and, without being asked, its out_proj. In the forward
# pass and in merge_and_unload alike the output projection becomes W + 2 scale B A, not W + scale B A: whoever applies
# such an adapter by the formula gets another model.
#
# Exit 0: as described. Exit 1: it has changed. Seen with peft 0.21.2, transformers 5.24.0, torch 2.13.0 (CPU).
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 numpy transformers==5.24.0 peft==0.21.2
"$work/venv/bin/python" - <<'PYTHON'
import sys

import peft
import torch


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = torch.nn.MultiheadAttention(8, 2, bias=False, batch_first=True)

    def forward(self, x):
        return self.attn(x, x, x, need_weights=False)[0]


torch.manual_seed(0)
model = Model()
start = {name: value.detach().clone() for name, value in model.state_dict().items()}
config = peft.LoraConfig(r=2, lora_alpha=2, target_modules=["attn"], init_lora_weights=False)  # scale 1
tuned = peft.get_peft_model(model, config).eval()
factors = {name: value.detach() for name, value in tuned.named_parameters() if "lora_" in name}
update = {
    "out_proj" in name: factors[name.replace("lora_A", "lora_B")] @ value
    for name, value in factors.items()
    if "lora_A" in name
}
x = torch.randn(1, 5, 8)
with torch.no_grad():
    seen, error = tuned(x), {}
    for times in (1, 2):
        plain = Model().eval()
        plain.attn.in_proj_weight.copy_(start["attn.in_proj_weight"] + update[False])
        plain.attn.out_proj.weight.copy_(start["attn.out_proj.weight"] + times * update[True])
        error[times] = (plain(x) - seen).abs().max().item()
    merged = tuned.merge_and_unload().attn.out_proj.weight - start["attn.out_proj.weight"]
    twice = torch.allclose(merged, 2 * update[True], atol=1e-6)
print(f"peft {peft.__version__}: largest difference of the output from W + n B A: n=1 {error[1]:.2g}, n=2 {error[2]:.2g}")
print(f"merged out_proj is W + 2 B A: {twice}")
sys.exit(0 if error[2] < 1e-5 < error[1] and twice else 1)
PYTHON
