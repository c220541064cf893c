"""A base and its experts: opened from headers and checked against each other before any work."""

from consilience.experts.align import Alignment, align
from consilience.experts.model import Model, Source, open_model
from consilience.experts.stack import Stack

__all__ = ["Alignment", "Model", "Source", "Stack", "align", "open_model"]
