"""Which expert took which token at which layer, as data: the weights of one pass, and what they add up to."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, get_args

import numpy as np
import numpy.typing as npt

from consilience.routing.explaining import explain_page, explain_text
from consilience.routing.explaining.explain_tokens import Role, Token
from consilience.routing.settings import Settings

FORMAT = 1
Weights = npt.NDArray[np.float32]
Shares = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Layer:
    """A routed layer: its module's ``name``, the ``block`` it lies in, and its ``kind`` within, such as ``q_proj``."""

    name: str
    block: str
    kind: str


@dataclass(frozen=True, eq=False)
class Part:
    """One sequence of tokens, and the layers it went through: ``text``, or a model's ``encoder`` and ``decoder``.

    ``weights`` [layers, tokens, K] is float32; those of a token at a layer sum to 1, up to 1e-6.
    """

    name: str
    tokens: tuple[Token, ...]
    layers: tuple[Layer, ...]
    weights: Weights

    @cached_property
    def by_token(self) -> Shares:
        """Weights [tokens, K], the mean over layers."""
        return self.weights.mean(0, dtype=np.float64)


@dataclass(frozen=True, eq=False)
class Explanation:
    """How one prompt and its answer were routed. A *cell* is a token at a layer; shares are mean weights over cells.

    Attributes:
        prompt: what was asked.
        query: what the instructions were compared with.
        answer: what was said, or given.
        experts: the K experts' names.
        settings: how tokens were routed.
        parts: the text, or what the encoder and what the decoder saw.
        cosines: [K], the query's with the experts' instructions; None: instructions do not count.
        scale: what cosines were multiplied with; None as well.
        threshold: the largest cosine at which an adaptive scale is half of its most; None: it is a number.
        left_out: layers whose tokens are not the text's (a layer of a mixture gets a part of them).
    """

    prompt: str
    query: str
    answer: str
    experts: tuple[str, ...]
    settings: Settings
    parts: tuple[Part, ...]
    cosines: Shares | None = None
    scale: float | None = None
    threshold: float | None = None
    left_out: tuple[str, ...] = ()

    @property
    def recognised(self) -> float | None:
        """Share of the weights that is routed, the rest being the experts' mean; None: all of it."""
        if self.scale is None or self.settings.fallback != "mean":
            return None
        return self.scale / self.settings.most_scale

    @cached_property
    def shares(self) -> Shares:
        """Every expert's share [K] of all cells."""
        return _means(("", part.weights.reshape(-1, len(self.experts))) for part in self.parts)[""]

    @cached_property
    def by_block(self) -> dict[str, Shares]:
        """Shares [K] of the cells of each block, in the order they run."""
        return _means((layer.block, cells) for layer, cells in self._layers())

    @cached_property
    def by_kind(self) -> dict[str, Shares]:
        """Shares [K] of the cells of each kind of layer."""
        return _means((layer.kind, cells) for layer, cells in self._layers())

    @cached_property
    def by_role(self) -> dict[Role, Shares]:
        """Shares [K] of the cells of the template's, the prompt's and the answer's tokens, where there are any."""
        cells = ((token.role, part.weights[:, t]) for part in self.parts for t, token in enumerate(part.tokens))
        found = _means(cells)
        return {role: found[role] for role in get_args(Role) if role in found}

    @cached_property
    def entropy(self) -> float:
        """Mean entropy of a cell's weights in nats, H = - sum_k w_k ln w_k: exp(H) experts share a token."""
        total, cells = 0.0, 0
        for part in self.parts:
            used = part.weights[part.weights > 0].astype(np.float64)
            total -= float((used * np.log(used)).sum())
            cells += part.weights[..., 0].size
        return total / cells

    @cached_property
    def ranking(self) -> tuple[int, ...]:
        """The experts' indices, the one with the largest share first."""
        return tuple(np.argsort(-self.shares, kind="stable").tolist())

    @cached_property
    def numbers(self) -> tuple[int, ...]:
        """Every expert's place in the ranking, from 1: what pages and texts call it."""
        return tuple((np.argsort(self.ranking) + 1).tolist())

    def _layers(self) -> Iterator[tuple[Layer, Weights]]:
        for part in self.parts:
            yield from zip(part.layers, part.weights, strict=True)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON, rounded to four digits; docs/routing-explained.md lists the keys."""
        cosines = None if self.cosines is None else self._named(self.cosines)
        return {
            "format": FORMAT,
            "prompt": self.prompt,
            "query": self.query,
            "answer": self.answer,
            "experts": list(self.experts),
            "settings": self.settings.to_dict(),
            "instructions": None
            if cosines is None
            else {"scale": self.scale, "threshold": self.threshold, "cosines": cosines},
            "entropy": round(self.entropy, 4),
            "shares": {
                "all": self._named(self.shares),
                "by_role": {name: self._named(values) for name, values in self.by_role.items()},
                "by_block": {name: self._named(values) for name, values in self.by_block.items()},
                "by_kind": {name: self._named(values) for name, values in self.by_kind.items()},
            },
            "parts": [self._part(part) for part in self.parts],
            "left_out": list(self.left_out),
        }

    def _named(self, values: Shares) -> dict[str, float]:
        return dict(zip(self.experts, _rounded(values), strict=True))

    def _part(self, part: Part) -> dict[str, Any]:
        tokens: list[dict[str, Any]] = []
        for token, weights in zip(part.tokens, part.by_token, strict=True):
            top = int(weights.argmax())
            found = {"text": token.text, "role": token.role, "special": token.special}
            tokens.append(found | {"expert": self.experts[top], "weight": round(float(weights[top]), 4)})
        layers = [{"name": layer.name, "block": layer.block, "kind": layer.kind} for layer in part.layers]
        return {"name": part.name, "tokens": tokens, "layers": layers, "weights": _rounded(part.weights)}

    def to_text(self) -> str:
        """Return plain text of at most 100 columns."""
        return explain_text.text(self)

    def to_html(self) -> str:
        """Return one page that needs no network and no other file."""
        return explain_page.page(self)


def _means(cells: Iterable[tuple[Any, Weights]]) -> dict[Any, Shares]:
    """Return the mean weights [K] of the cells [n, K] that have a name in common."""
    sums: dict[Any, Any] = {}
    counts: dict[Any, int] = {}
    for name, values in cells:
        sums[name] = sums.get(name, 0.0) + values.sum(0, dtype=np.float64)
        counts[name] = counts.get(name, 0) + len(values)
    return {name: sums[name] / counts[name] for name in sums}


def _rounded(values: npt.NDArray[Any]) -> Any:
    return np.round(values.astype(np.float64), 4).tolist()
