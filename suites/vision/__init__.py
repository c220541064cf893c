"""The vision suite: image data sets by name, small networks, and experts on class-skewed shards of one data set.

Nothing here imports torch; ``images``, ``data``, ``nets``, ``domains`` and ``experts`` are the modules to use.
"""

from suites.language import CACHE as _CACHE

CACHE = _CACHE / "vision"
"""Data sets that were fetched and experts that were trained; deleting it costs time only."""

__all__ = ["CACHE"]
