"""Route every token to the right experts: local gates, instructions, and a model that holds all experts at once.

    model = consilience.load_routed("routed/")
    model.generate(...)

Names are imported on use, so ``import consilience.routing`` needs neither torch nor transformers.
"""

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from consilience.checkpoints.files import path_of

if TYPE_CHECKING:
    from consilience.progress import ProgressOption
    from consilience.routing.folder.load import load_routed
    from consilience.routing.folder.store import Description
    from consilience.routing.model import Routing
    from consilience.routing.settings import Settings

_HOME = {"Description": "folder.store", "Routing": "model", "Settings": "settings", "load_routed": "folder.load"}

__all__ = ["Description", "Routing", "Settings", "build_routed", "load_routed"]


def build_routed(
    recipe: Mapping[str, Any] | Path | str,
    out: Path | str,
    *,
    force: bool = False,
    device: str = "cpu",
    trust_remote_code: bool = False,
    progress: "ProgressOption" = False,
) -> "Description":
    """Build a routed model's folder from a recipe: a YAML file, or the same as plain values.

    ``progress``: True for a bar (or lines) on standard error, a function called with (done, in all) of each part of the
    work, or a ``Progress``.

    Raises:
        InputError: the recipe, an adapter or a row is wrong; nothing is left behind.
        MachineError: memory or disk ran out; the same call continues.
    """
    from consilience.tasks.load import require_transformers

    require_transformers("routing")
    from consilience.routing.folder.build import build
    from consilience.routing.folder.recipe import parse_route_recipe, read_route_recipe

    more: dict[str, Any] = {
        "force": force,
        "device": device,
        "progress": progress,
        "trust_remote_code": trust_remote_code,
    }
    path_of(out, "out")
    if isinstance(recipe, Mapping):
        return build(parse_route_recipe(dict(recipe), "recipe"), out, where="recipe", **more)
    path = path_of(recipe, "recipe")
    return build(read_route_recipe(path), out, root=path.parent, where=str(path), **more)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value
