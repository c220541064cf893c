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


def suits(into: Tensor, u: Tensor, y: Tensor) -> bool:
    """Whether a layer's stack, its activations and its outputs are what the kernels take."""
    kinds = {into.dtype, u.dtype, y.dtype} == {torch.bfloat16} and {into.device.type, u.device.type} == {"cpu"}
    graded = torch.is_grad_enabled() and (u.requires_grad or y.requires_grad)
    return kinds and not graded and not torch.compiler.is_compiling()


def add_own(u: Tensor, y: Tensor, into: Tensor, out_of: Tensor, edges: Edges, plan: Plan) -> None:
    """Add the factors of their own experts to few tokens, u [T, in], y [T, out]: nothing else is read."""
    routed.add_own(bits(u), bits(into), bits(out_of), edges, plan.bias, plan.scales, *plan.rest, bits(y))


def add_all(u: Tensor, y: Tensor, into: Tensor, out_of: Tensor, edges: Edges, plan: Plan) -> None:
    """Add weighted factors to many tokens: two large products, and the weights between them."""
    products = F.linear(u, into)
    routed.weigh(bits(products), edges, plan.bias, plan.scales, *plan.rest)
    y.addmm_(products[:, : len(out_of)], out_of)


def bits(values: Tensor) -> Any:
    """Return a contiguous tensor's bits, uint16: the same memory."""
    return values.detach().view(torch.int16).numpy().view(np.uint16)
