"""Every objective, in the order of its parameters. One is a file and a line here."""

import importlib

from consilience.objectives.term import Term

TERMS = (
    "consilience.objectives.alignment:Logits",
    "consilience.objectives.alignment:Hidden",
    "consilience.objectives.entropy:Entropy",
    "consilience.objectives.target:Target",
)


def terms() -> tuple[type[Term], ...]:
    """Return the class of every objective."""
    return tuple(getattr(importlib.import_module(module), name) for module, name in (t.split(":") for t in TERMS))
