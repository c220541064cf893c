"""How a merge's models are opened: by reference, or by the name of the merge that makes them."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from consilience.experts.model import Model, open_model
from consilience.recipe.stages import stage_of


@dataclass(frozen=True)
class Opener:
    """Opens models: relative paths start from ``root``, and ``made`` has what other merges made, by name."""

    root: Path | None = None
    made: Mapping[str, Path] = field(default_factory=dict[str, Path])

    def __call__(self, name: str, reference: str, *, base: bool = False) -> Model:
        """Return a model, or an adapter, by its reference; see ``open_model``."""
        found = stage_of(reference, self.made)
        if found is None:
            return open_model(name, reference, self.root, base=base)
        stage, adapter = found
        return replace(open_model(name, f"{self.made[stage]}{adapter}", self.root, base=base), reference=reference)
