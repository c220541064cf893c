"""Routed layers in bfloat16 on a CPU: what is not a large product is done by compiled kernels.

A step of a generation is many small operations, each of which takes longer to begin than to do: at hidden size 2048
they were a quarter of the whole step. Gradients, watchers and unusual settings go the general way.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from consilience.engine.kernels import routed
from consilience.routing.scores import NORM_EPSILON
from consilience.routing.settings import Local, Settings

Floats, Edges = npt.NDArray[np.float32], npt.NDArray[np.int64]
#: How products with prototypes become local logits (``scores.local_logits``).
WAYS: dict[Local, int] = {
    "none": routed.NONE, "phatgoose": routed.SCALED, "arrow": routed.MAGNITUDE, "average": routed.PLAIN,
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Plan:
    """How T tokens are routed: what is added to their logits, [T, K], what their products are scaled by, [T]."""

    bias: Floats
    scales: Floats
    settings: Settings

    @property
    def rest(self) -> tuple[int, np.float32, int]:
        """What kernels take after these."""
        return WAYS[self.settings.local], np.float32(self.settings.temperature), self.settings.top_k


def fits(settings: Settings, count: int) -> bool:
    """Whether the kernels know these settings of K experts."""
    return not settings.standardise and not settings.top_p and 0 < settings.top_k < count


def suits(*values: Tensor) -> bool:
    """Whether these are what the kernels take: bfloat16 on a CPU, and nobody wants gradients."""
    if any(one.dtype is not torch.bfloat16 or not one.is_cpu for one in values):
        return False
    graded = torch.is_grad_enabled() and any(one.requires_grad for one in values)
    return not graded and not torch.compiler.is_compiling()


def add_own(u: Tensor, y: Tensor, into: Tensor, out_of: Tensor, edges: Edges, plan: Plan) -> None:
    """Add the factors of their own experts to few tokens, u [T, in], y [T, out]: nothing else is read."""
    routed.add_own(bits(u), bits(into), bits(out_of), edges, plan.bias, plan.scales, *plan.rest, bits(y))


def add_all(u: Tensor, y: Tensor, into: Tensor, out_of: Tensor, edges: Edges, plan: Plan) -> None:
    """Add weighted factors to many tokens: two large products, and the weights between them."""
    products = F.linear(u, into)
    routed.weigh(bits(products), edges, plan.bias, plan.scales, *plan.rest)
    y.addmm_(products[:, : len(out_of)], out_of)


def inverse_deviations(u: Tensor) -> Tensor:
    """Return ``scores.inverse_deviation`` of activations [..., d], [..., 1], in float32: torch's own rounds it."""
    found = torch.empty(*u.shape[:-1], 1)
    flat = u.reshape(-1, u.shape[-1]).contiguous()
    routed.inverse_deviations(bits(flat), NORM_EPSILON, found.view(-1).numpy())
    return found


def bits(values: Tensor) -> Any:
    """Return a contiguous tensor's bits, uint16: the same memory."""
    return values.detach().view(torch.uint16).numpy()
