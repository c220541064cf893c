"""Routed layers in bfloat16 on a CPU: what is not a large product is done by compiled kernels.

A step of a generation is many small operations, each of which takes longer to begin than to do: at hidden size 2048
they were a quarter of the whole step. Gradients and unusual settings go the general way. Watchers are told of the
very weights that the kernels use, so that a pass that is watched is the pass that is not.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from consilience.kernels import routed
from consilience.routing.settings import Local, Settings

Floats, Edges = npt.NDArray[np.float32], npt.NDArray[np.int64]
#: How products with prototypes become local logits (``scores.local_logits``).
WAYS: dict[Local, int] = {
    "none": routed.NONE, "phatgoose": routed.SCALED, "arrow": routed.MAGNITUDE, "average": routed.PLAIN,
}  # fmt: skip
#: Experts used by all tokens together, a token's each counted, over experts there are: up to the first, only used
#: experts' factors are read; up to the second, only their B.
OWN, CHOSEN = 1, 8
#: Where the weights go that nobody asks for.
UNTOLD: Floats = np.empty((0, 0, 0), np.float32)


@dataclass(frozen=True, eq=False)
class Plan:
    """How B sequences of T tokens are routed: what is added to their logits, ``bias`` [B, K], and what kernels take.

    ``known`` [B] is the share of their routed weights, the rest is the experts' mean. What stands before these
    two is what it was made of, for the layers of a pass share it: looking something up in Python costs more here than
    computing it, since the processor's caches hold weights by then.
    """

    settings: Settings
    similarity: Tensor | None
    recognised: Tensor | None
    excluded: Tensor | None
    sequences: int
    tokens: int
    bias: Floats
    known: Floats

    @cached_property
    def rest(self) -> tuple[Floats, Floats, int, np.float32, int]:
        """What kernels take after the products."""
        settings = self.settings
        return self.bias, self.known, WAYS[settings.local], np.float32(settings.temperature), settings.top_k

    @cached_property
    def reads(self) -> Literal["own", "chosen", "all"]:
        """Which factors are read: of the experts that tokens use, of all A but only their B, or of all experts."""
        used = self.sequences * self.tokens
        if self.recognised is None:
            used *= self.settings.top_k / self.bias.shape[1]
        return "own" if used <= OWN else "chosen" if used <= CHOSEN else "all"


def fits(settings: Settings, count: int) -> bool:
    """Whether the kernels know these settings of K experts."""
    return not settings.standardise and not settings.top_p and 0 < settings.top_k < count


def suits(into: Tensor, u: Tensor, y: Tensor) -> bool:
    """Whether these are what the kernels take: bfloat16 on a CPU, and nobody wants gradients."""
    half = torch.bfloat16
    if into.dtype is not half or u.dtype is not half or y.dtype is not half or not u.is_cpu:
        return False
    graded = torch.is_grad_enabled() and (u.requires_grad or y.requires_grad or into.requires_grad)
    recorded = torch.compiler.is_compiling() or torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]
    return not graded and not recorded


def add(u: Tensor, y: Tensor, into: Tensor, out_of: Tensor, edges: Edges, plan: Plan, told: Floats = UNTOLD) -> None:
    """Add weighted factors to tokens, u [B, T, in], y [B, T, out], in the way that takes least time for so many.

    ``told`` [B, T, K] gets the weights, if anybody asks for them.
    """
    if plan.reads == "own":
        routed.add_own(bits(u), bits(into), bits(out_of), edges, *plan.rest, told, bits(y))
        return
    products = F.linear(u, into)
    if plan.reads == "chosen":
        routed.add_chosen(bits(u), bits(products), bits(out_of), edges, *plan.rest, told, bits(y))
        return
    routed.weigh(bits(u), bits(products), edges, *plan.rest, told)
    hidden = products.flatten(0, 1)[:, : out_of.shape[0]]
    y.view(-1, y.shape[-1]).addmm_(hidden, out_of)


def bits(values: Tensor) -> Any:
    """Return a contiguous tensor's bits, uint16: the same memory."""
    return values.view(torch.uint16).numpy()
