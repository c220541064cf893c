"""What all routed layers of a model share: the settings, the query each sequence belongs to, and who watches.

A sequence's query fixes c, the similarity of its instruction to every expert's; a token's local logits are the layer's.
"""

import weakref
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from consilience.errors import InputError
from consilience.routing import scores
from consilience.routing.bfloat16 import Floats, Plan, fits
from consilience.routing.settings import Settings

#: Called with a layer's name and its weights [sequences, tokens, K] at every forward pass.
Watcher = Callable[[str, Tensor], None]


@dataclass(frozen=True, eq=False)
class Similarity:
    """What instructions say of B queries: ``cosines`` [B, K], and the scale a of each query [B].

    ``chosen`` gives the scale anew for other cosines, where it depends on them: those of experts left out are -1.
    """

    cosines: Tensor
    scale: Tensor
    chosen: Callable[[Tensor], Tensor] | None = None


class Semantics(Protocol):
    """The global router: from the queries' texts to their similarity to every expert."""

    def __call__(self, queries: Sequence[str], settings: Settings) -> Similarity:
        """Return the similarity of B queries."""
        ...


@dataclass(eq=False)
class Router:
    """The state that routed layers read.

    Attributes:
        experts: names of the K experts.
        settings: how they are routed; may be replaced at any time.
        said: what instructions say of the sequences; bias and known follow from it.
        bias: added to every token's local logits, [B, K], a row for each sequence; None: nothing.
        known: share of every sequence's routed weights, [B]; the rest is the mean of the experts. None: all.
        fixed: weights [B, K] or [1, K] that replace routing; None: tokens are routed.
        excluded: [K], true where an expert must not be used.
        watchers: told of all weights.
        tokens: how many tokens a pass may have in all, of encoder or decoder; none: not known.
    """

    experts: tuple[str, ...]
    settings: Settings
    said: Similarity | None = None
    bias: Tensor | None = None
    known: Tensor | None = None
    fixed: Tensor | None = None
    excluded: Tensor | None = None
    watchers: list[Watcher] = field(default_factory=list[Watcher])
    tokens: frozenset[int] = frozenset()
    _last: "tuple[weakref.ref[Tensor], tuple[int | None, bool], Tensor] | None" = field(default=None, init=False)
    _plan: Plan | None = field(default=None, init=False)

    def serve(self, experts: tuple[str, ...], settings: Settings) -> None:
        """Go on with other experts or settings; what was said of sequences and found of activations is forgotten."""
        self.experts, self.settings = experts, settings
        self.instruct(None)
        self._plan = self._last = None

    def index(self, name: str) -> int:
        """Return an expert's number.

        Raises:
            InputError: there is no such expert.
        """
        if name not in self.experts:
            raise InputError(f"expert {name!r}: there is none; the experts are {', '.join(self.experts)}")
        return self.experts.index(name)

    def __getstate__(self) -> dict[str, Any]:
        """Return the state without what is remembered of the last pass, which can be neither copied nor stored."""
        return self.__dict__ | {"_last": None, "_plan": None}

    @property
    def used(self) -> Tensor | None:
        """Which experts are not excluded, [K]; None: all."""
        return None if self.excluded is None else ~self.excluded

    def instruct(self, similarity: Similarity | None) -> None:
        """Set what the instructions of the next sequences say; None: nothing."""
        self.said, self.bias, self.known = similarity, None, None
        if similarity is None:
            return
        cosines, scale = similarity.cosines.float(), self.scale_of(similarity)
        if self.settings.standardise:
            cosines = scores.standardised(cosines, self.used)
        self.bias = scale[:, None] * cosines
        if self.settings.fallback == "mean":
            self.known = (scale / self.settings.most_scale).clamp(max=1)

    def scale_of(self, similarity: Similarity) -> Tensor:
        """Return the scale a of each query [B]; experts that are left out have no say in it."""
        if self.excluded is None or similarity.chosen is None:
            return similarity.scale.float()
        cosines = similarity.cosines.float()
        return similarity.chosen(cosines.masked_fill(self.excluded.to(cosines.device), -1.0)).float()

    def choose(self, products: Tensor, u: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return weights of activations u [sequences, tokens, d] and their products with the prototypes [.., K].

        Either of all experts, [.., K] and None, or of the k that a token uses, [.., k], and whose they are, [.., k].
        """
        self._follow(u.device)
        if self.fixed is not None:
            return self._rows(self.fixed, u).to(torch.float32).expand(*u.shape[:-1], len(self.experts)), None
        values, where = scores.choose(self.settings, self._logits(products, u))
        if self.known is None:
            return values, where
        weights = values if where is None else scores.spread(values, where, len(self.experts))
        return scores.with_mean(weights, self._rows(self.known[:, None], u), self.used), None

    def _follow(self, device: torch.device) -> None:
        """Take what is set of sequences and experts to the activations' device, once for all layers there."""
        for name in ("bias", "known", "fixed", "excluded"):
            value = getattr(self, name)
            if value is not None and value.device != device:
                setattr(self, name, value.to(device))

    def plan(self, u: Tensor) -> Plan | None:
        """Return how compiled kernels route activations [sequences, tokens, d]; None: they go the general way."""
        if self.fixed is not None:
            return None
        plan, settings, shape = self._plan, self.settings, u.shape
        if (
            plan is None or plan.settings is not settings or plan.similarity is not self.bias
            or plan.recognised is not self.known or plan.excluded is not self.excluded
            or plan.sequences != shape[0] or plan.tokens != shape[1]
        ):  # fmt: skip
            plan = self._plan = self._planned(u) if fits(settings, len(self.experts)) else None
        return plan

    def _planned(self, u: Tensor) -> Plan:
        self._follow(u.device)
        known = self._rows((torch.ones(1) if self.known is None else self.known)[:, None], u)
        shares = known[:, 0, 0].float().expand(len(u)).contiguous().numpy()
        added, (sequences, tokens, _) = self._added(u), u.shape
        return Plan(self.settings, self.bias, self.known, self.excluded, sequences, tokens, added, shares)

    def _added(self, u: Tensor) -> Floats:
        """Return what is added to the logits of every sequence, [B, K]."""
        rows = torch.zeros(1, 1, len(self.experts)) if self.bias is None else self._rows(self.bias, u).float()
        if self.excluded is not None:
            rows = rows.masked_fill(self.excluded, -torch.inf)
        return rows[:, 0].expand(len(u), -1).contiguous().numpy()

    def _logits(self, products: Tensor, u: Tensor) -> Tensor:
        settings = self.settings
        if settings.local == "none":
            logits = products.new_zeros(products.shape, dtype=torch.float32)
        else:
            scale = self._inverse_deviation(u) if settings.local == "phatgoose" else None
            logits = scores.local_logits(settings, products, scale)
            if settings.standardise:
                logits = scores.standardised(logits, self.used)
        if self.bias is not None:
            logits = logits + self._rows(self.bias, u)
        if self.excluded is not None:
            logits = logits.masked_fill(self.excluded, -torch.inf)
        return logits

    def _inverse_deviation(self, u: Tensor) -> Tensor:
        """Return the activations' inverse deviation; modules that read the same activations share it."""
        state = (None if u.is_inference() else u._version, torch.is_grad_enabled())
        if self._last is None or self._last[0]() is not u or self._last[1] != state:
            self._last = weakref.ref(u), state, scores.inverse_deviation(u)
        return self._last[2]

    def _rows(self, values: Tensor, u: Tensor) -> Tensor:
        """Return values [B, K] as [sequences, 1, K]: beams and returned samples of a query follow one another."""
        if len(values) not in (1, len(u)):
            times, rest = divmod(len(u), len(values))
            if rest:
                raise InputError(
                    f"routing: {len(values)} queries are set and the batch has {len(u)} sequences; give one a sequence"
                )
            values = values.repeat_interleave(times, 0)
        return values[:, None, :]

    def watch(self, name: str, weights: Tensor) -> None:
        """Tell the watchers."""
        for watcher in self.watchers:
            watcher(name, weights)

    @contextmanager
    def only(self, weights: Tensor | Sequence[float]) -> Generator[None]:
        """Use fixed weights [K] or [B, K] within, instead of routing: one expert's, or a mixture's.

        Raises:
            InputError: they are not a finite number for each expert.
        """
        before = self.fixed
        values = torch.as_tensor(weights, dtype=torch.float32)
        if values.ndim not in (1, 2) or values.shape[-1] != len(self.experts) or not bool(values.isfinite().all()):
            raise InputError(
                f"weights: of shape {tuple(values.shape)}; give a finite number for each of {len(self.experts)} experts"
            )
        self.fixed = values[None] if values.ndim == 1 else values
        try:
            yield
        finally:
            self.fixed = before

    @contextmanager
    def without(self, *names: str) -> Generator[None]:
        """Leave experts out within: their logits are -inf.

        Raises:
            InputError: no such expert, or none would be left.
        """
        before = self.excluded
        mask = torch.zeros(len(self.experts), dtype=torch.bool) if before is None else before.clone()
        for name in names:
            mask[self.index(name)] = True
        if bool(mask.all()):
            raise InputError("routing: every expert is left out; keep one")
        self._exclude(mask)
        try:
            yield
        finally:
            self._exclude(before)

    def _exclude(self, mask: Tensor | None) -> None:
        self.excluded = mask
        if self.said is not None:
            self.instruct(self.said)

    @contextmanager
    def watched(self, watcher: Watcher) -> Generator[None]:
        """Tell ``watcher`` of every layer's weights within."""
        self.watchers.append(watcher)
        try:
            yield
        finally:
            self.watchers.remove(watcher)
