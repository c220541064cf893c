"""A PHATGOOSE gate while it is trained: a vector that opens one frozen expert's update of a linear layer.

    y = W u + sigmoid(v . u) B A u          (the adapter's scale is in B)

Only v takes gradients. At its start, 0, every token has half of the update. Source: PHATGOOSE (arXiv:2402.05859); its
code takes u as it comes in training, and layer normalisation of u and v only where tokens are routed.
"""

from collections.abc import Generator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from consilience.routing.expert import Expert
from consilience.routing.install import check_fit
from consilience.routing.layer import LowRank, sharing
from consilience.routing.local.borrowed import borrowed


class GatedLinear(nn.Linear):
    """A frozen linear layer with one frozen expert behind a gate; ``gate`` [in] is v."""

    gate: nn.Parameter
    a: Tensor
    b: Tensor

    @classmethod
    def around(cls, linear: nn.Linear, factors: LowRank) -> "GatedLinear":
        """Return a gated layer that shares a linear layer's parameters."""
        made, weight = sharing(cls, linear), linear.weight
        made.register_buffer("a", factors.a.to(weight), persistent=False)
        made.register_buffer("b", factors.b.to(weight), persistent=False)
        # In half precision the steps of an optimizer would be lost in rounding.
        kind = torch.promote_types(weight.dtype, torch.float32)
        made.gate = nn.Parameter(torch.zeros(linear.in_features, dtype=kind, device=weight.device))
        return made

    def opening(self, u: Tensor) -> Tensor:
        """Return sigmoid(v . u) [..., 1] of activations u [..., in], in v's precision."""
        return torch.sigmoid(F.linear(u, self.gate[None].to(u.dtype)).to(self.gate.dtype))

    def forward(self, input: Tensor) -> Tensor:
        """Map [..., in] to [..., out]."""
        y = F.linear(input, self.weight, self.bias)
        # One product for A and v, and one pass over y: small products and passes are half of what a gate costs.
        products = F.linear(input, torch.cat([self.a, self.gate[None].to(self.a.dtype)]))
        hidden = products[..., :-1] * torch.sigmoid(products[..., -1:].to(self.gate.dtype)).to(products.dtype)
        added = torch.addmm(y.reshape(-1, y.shape[-1]), hidden.reshape(-1, hidden.shape[-1]), self.b.t())
        return added.view(y.shape)


@contextmanager
def gated(model: nn.Module, expert: Expert) -> Generator[dict[str, GatedLinear]]:
    """Put gates, at 0, before an expert in a frozen model, and give the gated layers by module.

    Raises:
        InputError: the expert does not fit the model.
    """
    check_fit(model, expert)
    with borrowed(model) as replace:
        layers: dict[str, GatedLinear] = {}
        for name, factors in expert.factors.items():
            linear = model.get_submodule(name)
            assert isinstance(linear, nn.Linear)
            layers[name] = GatedLinear.around(linear, factors)
            replace(name, layers[name])
        yield layers
