"""What linear layers are given: hooks that see it, which layers share it, and how many fit into memory at a time."""

import contextlib
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

from consilience.errors import InputError
from consilience.experts.statistics import Kind
from consilience.learned.gram import tokens_of


@contextlib.contextmanager
def watched(layers: Mapping[str, Any], names: Iterable[str], take: Callable[[str, Any], None]) -> Generator[None]:
    """Within the context ``take(name, x)`` gets the inputs of layers; nothing is differentiated."""
    handles = [
        layers[name].register_forward_pre_hook(lambda _module, args, name=name: take(name, args[0])) for name in names
    ]
    try:
        with torch.no_grad():
            yield
    finally:
        for handle in handles:
            handle.remove()


def leaders(layers: Mapping[str, Any], run: Callable[[], None]) -> dict[str, str]:
    """Return for every layer that ``run`` calls the first one that was given the very same tensor."""
    last: list[Any] = [None, ""]
    found: dict[str, str] = {}

    def take(name: str, x: Any) -> None:
        if x is not last[0]:
            last[:] = [x, name]
        found.setdefault(name, last[1])

    with watched(layers, layers, take):
        run()
    return found


def passes(sizes: Mapping[str, int], limit: int) -> Iterator[list[str]]:
    """Yield names whose sizes fit a limit together, in their order; one that exceeds it comes alone."""
    taken, held = 0, list[str]()
    for name, size in sizes.items():
        if held and taken + size > limit:
            yield held
            taken, held = 0, []
        taken, held = taken + size, [*held, name]
    if held:
        yield held


class InputSums:
    """Sums of what layers are given, over the tokens of passes."""

    def __init__(self, kinds: Sequence[Kind]) -> None:
        self.kinds = kinds
        self.sums: dict[str, Any] = {}
        self.counts: dict[str, int] = {}
        self.mask: Any = None

    def take(self, name: str, x: Any) -> None:
        """Add the tokens of a pass to a layer's sums."""
        rows = tokens_of(x, self.mask)
        if self.mask is not None and len(rows) == x.shape[:-1].numel() != int(self.mask.sum()):
            raise InputError(
                f"layer {name!r} is given what a router chose, with padding in it; read rows one by one: "
                "batch_size=1, or batch_tokens=1"
            )
        with torch.autocast(x.device.type, enabled=False):
            rows = rows.float()
            self.counts[name] = self.counts.get(name, 0) + len(rows)
            if "gram" in self.kinds:
                self._add(f"gram/{name}", rows.T @ rows)
            if "mean" in self.kinds:
                self._add(f"mean/{name}", rows.sum(0))

    def take_scaled(self, norms: Mapping[str, Any]) -> Callable[[str, Any], None]:
        """Return what adds a pass' tokens to the mean squares of what norms' scales multiply, entry by entry.

        An output is affine in its scale, y(w) = x w + y(0), whatever the norm is: so x = y(1) - y(0).
        """

        def take(name: str, given: Any) -> None:
            own = norms[name].weight.data
            try:
                values: list[Any] = []
                for scale in (1.0, 0.0):
                    norms[name].weight.data = torch.full_like(own, scale)
                    values.append(norms[name].forward(given))
            finally:
                norms[name].weight.data = own
            x, mask = values[0] - values[1], self.mask
            if x.shape[-1] != own.numel() or (mask is not None and x.shape[: mask.ndim] != mask.shape):
                return  # laid out so that padding cannot be told from tokens
            rows = (x if mask is None else x[mask.to(x.device)]).reshape(-1, own.numel()).float()
            self.counts[name] = self.counts.get(name, 0) + len(rows)
            self._add(f"gram/{name}", rows.square().sum(0))

        return take

    def _add(self, key: str, value: Any) -> None:
        self.sums[key] = self.sums[key].add_(value) if key in self.sums else value
