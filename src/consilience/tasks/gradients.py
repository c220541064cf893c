"""Learning takes gradients whatever the caller has switched off."""

from collections.abc import Generator
from contextlib import contextmanager


@contextmanager
def gradients() -> Generator[None]:
    """Let torch record operations within, under ``torch.no_grad()`` and ``torch.inference_mode()`` too."""
    import torch

    with torch.inference_mode(mode=False), torch.enable_grad():
        yield
