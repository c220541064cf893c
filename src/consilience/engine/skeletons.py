"""The folder of models that stand for those that other merges will make: it goes when its last plan is closed."""

import weakref
from contextlib import ExitStack
from pathlib import Path

from consilience.workdir import scratch


class Skeletons:
    """A folder for models without values; it is taken away by ``close``, or when nobody holds it any more."""

    def __init__(self) -> None:
        stack = ExitStack()
        self.path: Path = stack.enter_context(scratch("consilience-stages-"))
        self.close = weakref.finalize(self, stack.close)

    def holds(self, path: str) -> bool:
        """Whether a file lies in the folder."""
        return path.startswith(f"{self.path}/")
