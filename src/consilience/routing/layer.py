"""A linear layer that adds a mixture of low-rank experts to its output, token by token.

    y = W u + sum_k w_k(u) B_k A_k u          (the adapters' scales are in B)

The A of all experts and the vectors that score them are rows of one matrix, and the B columns of another: a pass is two
products and little else, whatever the number of experts, and no activation is gathered. Where the factors of all
experts would cost more than a part of the base's own product, only those that some token uses are multiplied; where
there are few tokens, as when a sequence is generated, only theirs are read.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from consilience.errors import InputError
from consilience.routing import bfloat16, scores
from consilience.routing.router import Router

#: Up to this share of the base's product all experts are computed, beyond it only those that are used. In half
#: precision a product takes so little and a call so long, on a CPU too, that computing all of them is the quicker.
DENSE_SHARE = 0.5
#: Up to one in so many experts used by all tokens together, only theirs are read: what a step of a generation takes.
FEW = 2


class LowRank(Protocol):
    """One expert at one module: ``a`` [r, in], ``b`` [out, r] with the adapter's scale in it, held or read when asked.

    ``shape`` is (out, in), as the module's weight has it.
    """

    @property
    def a(self) -> Tensor:
        """A."""
        ...

    @property
    def b(self) -> Tensor:
        """B, scaled."""
        ...

    @property
    def rank(self) -> int:
        """r."""
        ...

    @property
    def shape(self) -> tuple[int, int]:
        """Outputs and inputs."""
        ...


@dataclass(frozen=True, eq=False)
class Factors:
    """Factors in memory."""

    a: Tensor
    b: Tensor

    @property
    def rank(self) -> int:
        """r."""
        return self.a.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """Outputs and inputs."""
        return self.b.shape[0], self.a.shape[1]


class Experts(nn.Module):
    """All experts at one module, and the vectors that score them.

    ``into`` [R + K, in] holds the A of all experts, then the K prototypes; ``out_of`` [R, out] the B, transposed.
    An expert that leaves the module alone has no rows, and a prototype of 0: a neutral local logit.
    """

    into: Tensor
    out_of: Tensor
    owner: Tensor

    def __init__(
        self, name: str, factors: Sequence[LowRank | None], prototypes: Tensor, like: Tensor, router: Router
    ) -> None:
        """Stack factors and prototypes [K, in] in the dtype and on the device of ``like``.

        One expert after the other, so that no more than one is in memory beside the stack.
        """
        super().__init__()
        self.name, self.router, self.count = name, router, len(factors)
        ranks = [0 if one is None else one.rank for one in factors]
        self.edges = [sum(ranks[:k]) for k in range(len(ranks) + 1)]
        self.total, self.rank = self.edges[-1], ranks[0] if len(set(ranks)) == 1 else 0
        height, width = next(one.shape for one in factors if one is not None)
        into, out_of = like.new_empty(self.total + self.count, width), like.new_empty(self.total, height)
        into[self.total :] = prototypes
        for k, one in enumerate(factors):
            if one is not None:
                span = slice(self.edges[k], self.edges[k + 1])
                into[span], out_of[span] = one.a, one.b.t()
        owner = torch.repeat_interleave(torch.arange(len(ranks)), torch.tensor(ranks))
        self.register_buffer("into", into, persistent=False)
        self.register_buffer("out_of", out_of, persistent=False)
        self.register_buffer("owner", owner.to(like.device), persistent=False)
        self._bounds = np.array(self.edges, np.int64)
        self._share = self.total * (1 / width + 1 / height)

    @property
    def dense(self) -> bool:
        """Whether all experts' products are computed, used or not.

        Elsewhere than on a CPU they are: to learn which are used is to wait for the device.
        """
        return self._share <= DENSE_SHARE or self.into.element_size() < 4 or not self.into.is_cpu

    def add(self, u: Tensor, y: Tensor) -> Tensor:
        """Return y + sum_k w_k B_k A_k u: u [..., in], y [..., out], which is written to."""
        if not u.numel():
            return y
        tokens, into = u if u.ndim == 3 else self._sequences(u), self.into
        plan = self.router.plan(tokens) if bfloat16.suits(into, u, y) else None
        if plan is None:
            return self._add(tokens, y)
        found = y if y.ndim == 3 else y.view(*tokens.shape[:2], -1)
        if not self.router.watchers:
            bfloat16.add(tokens.contiguous(), found, into, self.out_of, self._bounds, plan)
            return y
        weights = torch.empty(*tokens.shape[:2], self.count)
        bfloat16.add(tokens.contiguous(), found, into, self.out_of, self._bounds, plan, weights.numpy())
        self.router.watch(self.name, weights)
        return y

    def _add(self, tokens: Tensor, y: Tensor) -> Tensor:
        """Do so for tokens [sequences, tokens, in], wherever and in whatever dtype they are."""
        flat, found = tokens.reshape(-1, tokens.shape[-1]), y.view(-1, y.shape[-1])
        few = self.rank > 0 and FEW * len(flat) * max(1, self.router.settings.top_k) <= self.count
        if self.dense and not few:
            products = F.linear(flat, self.into)
            scored, hidden = products[:, self.total :], products[:, : self.total]
        else:
            scored, hidden = _products(flat, self.into[self.total :]), None
        values, where = self.router.choose(scored.view(*tokens.shape[:-1], self.count), tokens)
        weights = None
        if where is None or not few or self.router.watchers:
            weights = values if where is None else scores.spread(values, where, self.count)
            if self.router.watchers:
                self.router.watch(self.name, weights)
            weights = weights.reshape(-1, self.count)
        if few and where is not None:
            self._gathered(flat, values.view(len(flat), -1), where.view(len(flat), -1), found)
        elif hidden is not None and weights is not None:
            found.addmm_(self._weighted(hidden, weights).to(found.dtype), self.out_of.to(found.dtype))
        elif weights is not None:
            self._sparse(flat, weights, found)
        return y

    def _sequences(self, u: Tensor) -> Tensor:
        """Return tokens as [sequences, tokens, in]: some models flatten a batch.

        Raises:
            InputError: these are not all tokens of a batch of several queries.
        """
        if u.ndim == 2:
            bias = self.router.bias if self.router.fixed is None else self.router.fixed
            count = 1 if bias is None else len(bias)
            if count > 1 and self.router.tokens and u.shape[0] not in self.router.tokens:
                # Gathered by the model's own router, say: whose they are is not known here.
                raise InputError(
                    f"{self.name}: is given {u.shape[0]} tokens of {count} queries, and which are whose is not known; "
                    "give the model one sequence at a time, or adapters that leave this module alone"
                )
            return u.reshape(1 if u.shape[0] % count else count, -1, u.shape[-1])
        return u.reshape(u.shape[0], -1, u.shape[-1]) if u.ndim > 3 else u[None, None]

    def _weighted(self, hidden: Tensor, weights: Tensor) -> Tensor:
        """Multiply A u of all experts [T, R] by their weights [T, K]."""
        weights = weights.to(hidden.dtype)
        if not self.rank:
            return hidden * weights.index_select(1, self.owner)
        return (hidden.unflatten(1, (self.count, self.rank)) * weights[:, :, None]).flatten(1)

    def _gathered(self, flat: Tensor, values: Tensor, where: Tensor, found: Tensor) -> None:
        """Add to each of few tokens the factors of its own experts [T, k]: nothing else is read."""
        count, k = where.shape
        chosen = where.flatten()
        a = self.into[: self.total].view(self.count, -1).index_select(0, chosen).view(count, k * self.rank, -1)
        b = self.out_of.view(self.count, -1).index_select(0, chosen).view(count, k * self.rank, -1)
        if count == 1:
            hidden = _products(flat, a[0]).view(k, self.rank)
            own = (hidden * values.view(k, 1).to(hidden.dtype)).view(1, -1)
            if own.dtype == found.dtype:
                found.addmm_(own, b[0].to(found.dtype))
            else:
                found.add_(own @ b[0].to(own.dtype))
            return
        hidden = torch.bmm(a, flat[:, :, None]).view(count, k, self.rank) * values[:, :, None].to(flat.dtype)
        found[:, None].baddbmm_(hidden.view(count, 1, -1).to(found.dtype), b.to(found.dtype))

    def _sparse(self, flat: Tensor, weights: Tensor, found: Tensor) -> None:
        """Add the experts that are used, each to the tokens that use it."""
        for k in torch.nonzero(weights.amax(0)).flatten().tolist():
            span = slice(self.edges[k], self.edges[k + 1])
            if span.start == span.stop:
                continue
            own = weights[:, k]
            rows = torch.nonzero(own).flatten()
            if len(rows) == len(flat):
                hidden = F.linear(flat, self.into[span]) * own[:, None].to(flat.dtype)
                found.addmm_(hidden.to(found.dtype), self.out_of[span].to(found.dtype))
                continue
            hidden = F.linear(flat[rows], self.into[span]) * own[rows, None].to(flat.dtype)
            found.index_add_(0, rows, (hidden @ self.out_of[span]).to(found.dtype))


def _products(flat: Tensor, rows: Tensor) -> Tensor:
    """Return products of few tokens [N, in] with rows [R, in], [N, R]; on a CPU one token's are at least in float32.

    There a product in bfloat16 takes several times as long to begin as the whole of such a product in float32.
    """
    if len(flat) == 1 and flat.element_size() < 4 and flat.device.type == "cpu":
        flat, rows = flat.float(), rows.float()
    return F.linear(flat, rows)


L = TypeVar("L", bound=nn.Linear)


def sharing(kind: type[L], linear: nn.Linear) -> L:
    """Return a layer of a kind that has a linear layer's own parameters, under the same names."""
    made = kind.__new__(kind)
    nn.Module.__init__(made)
    made.in_features, made.out_features = linear.in_features, linear.out_features
    made.weight, made.bias = linear.weight, linear.bias
    return made.train(linear.training)


def put(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module in the place of the one with a name."""
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)


class RoutedLinear(nn.Linear):
    """A linear layer with experts; its own parameters are the layer's it was made from, under the same names."""

    experts: Experts

    @classmethod
    def around(cls, linear: nn.Linear, experts: Experts) -> "RoutedLinear":
        """Return a routed layer that shares a linear layer's parameters."""
        made = sharing(cls, linear)
        made.experts = experts
        return made

    def plain(self) -> nn.Linear:
        """Return the layer it was made from."""
        return sharing(nn.Linear, self)

    def forward(self, input: Tensor) -> Tensor:
        """Map [..., in] to [..., out]."""
        return self.experts.add(input, F.linear(input, self.weight, self.bias))


def routed(module: nn.Module, experts: Experts) -> Any:
    """Return the routed form of a layer, or None if its kind has none."""
    if isinstance(module, RoutedLinear):
        module = module.plain()
    # Subclasses compute something else (quantised layers unpack their weights), and what that is is not known here.
    return RoutedLinear.around(module, experts) if type(module) is nn.Linear else None
