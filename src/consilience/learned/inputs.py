"""What linear layers are given: hooks that see it, which layers share it, and how many fit into memory at a time."""

import contextlib
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from typing import Any

import torch


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
