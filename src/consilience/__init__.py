"""Consilience: one model from many experts.

    import consilience as cs
    cs.merge("base", {"math": "path/a", "code": "path/b"}, "out", method="ties", density=0.2)

Names are imported on first use, so ``import consilience`` is quick and needs no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from consilience.api import align, diagnose, learn, merge, merge_recipe, override_recipe, plan_recipe
    from consilience.checkpoints import open_checkpoint
    from consilience.coefficients import Coefficients, load_coefficients, save_coefficients
    from consilience.errors import ConsilienceError, InputError, MachineError
    from consilience.learned.statistics import collect_statistics
    from consilience.mixing import distill, mix
    from consilience.recipe import Recipe, read_recipe
    from consilience.routing import build_routed, load_routed
    from consilience.sweeps import sweep
    from consilience.tasks import evaluate
    from consilience.training import fine_tune

_HOME = {
    "build_routed": "consilience.routing",
    "load_routed": "consilience.routing",
    "Coefficients": "consilience.coefficients",
    "collect_statistics": "consilience.learned.statistics",
    "distill": "consilience.mixing",
    "fine_tune": "consilience.training",
    "align": "consilience.api",
    "diagnose": "consilience.api",
    "learn": "consilience.api",
    "load_coefficients": "consilience.coefficients",
    "merge": "consilience.api",
    "merge_recipe": "consilience.api",
    "mix": "consilience.mixing",
    "override_recipe": "consilience.api",
    "plan_recipe": "consilience.api",
    "open_checkpoint": "consilience.checkpoints",
    "ConsilienceError": "consilience.errors",
    "InputError": "consilience.errors",
    "MachineError": "consilience.errors",
    "Recipe": "consilience.recipe",
    "read_recipe": "consilience.recipe",
    "evaluate": "consilience.tasks",
    "sweep": "consilience.sweeps",
    "save_coefficients": "consilience.coefficients",
}

__all__ = [
    "Coefficients",
    "ConsilienceError",
    "InputError",
    "MachineError",
    "Recipe",
    "align",
    "build_routed",
    "collect_statistics",
    "diagnose",
    "distill",
    "evaluate",
    "fine_tune",
    "learn",
    "load_coefficients",
    "load_routed",
    "merge",
    "merge_recipe",
    "mix",
    "open_checkpoint",
    "override_recipe",
    "plan_recipe",
    "read_recipe",
    "save_coefficients",
    "sweep",
]


def __dir__() -> list[str]:
    """Return the public names too, which are imported only once they are used."""
    return sorted({*globals(), *__all__})


def _missing(name: str, error: ImportError) -> Exception:
    from consilience.errors import missing_extra

    return missing_extra(error, f"consilience.{name}") or error


def __getattr__(name: str) -> Any:
    if name in _HOME:
        try:
            return getattr(import_module(_HOME[name]), name)
        except ImportError as error:
            raise _missing(name, error) from None
    raise AttributeError(f"module 'consilience' has no attribute {name!r}")
