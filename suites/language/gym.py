"""Generators of the Python package reasoning-gym, imported one at a time from its wheel.

The package's ``__init__`` files import all of its hundred generators, and those need ten more packages than the few
generators used here.
"""

import sys
from importlib import import_module
from importlib.machinery import ModuleSpec
from importlib.util import module_from_spec
from pathlib import Path
from types import ModuleType
from typing import Any

from suites.language import CACHE
from suites.packages import fetched, python_package

REASONING_GYM = "reasoning-gym==0.1.25"
SEED = 0


def import_bare(root: Path, name: str) -> ModuleType:
    """Import the module ``name`` from the folder ``root`` without running the ``__init__`` of its packages."""
    parts = name.split(".")
    for depth in range(1, len(parts)):
        package = ".".join(parts[:depth])
        if package not in sys.modules:
            spec = ModuleSpec(package, None, is_package=True)
            spec.submodule_search_locations = [str(root.joinpath(*parts[:depth]))]
            sys.modules[package] = module_from_spec(spec)
    return import_module(name)


def generator(name: str, size: int, **settings: Any) -> Any:
    """Return a seeded data set of reasoning-gym: iterable, its items hold ``question``, ``answer`` and ``metadata``.

    Args:
        name: the generator's module under ``reasoning_gym``, such as ``arithmetic.chain_sum``.
        size: how many items it gives.
        settings: fields of the generator's configuration.

    Raises:
        MachineError: the package cannot be fetched.
    """
    root = fetched("reasoning-gym", lambda work: python_package(REASONING_GYM, work), CACHE / "language")
    import_bare(root, f"reasoning_gym.{name}")
    create: Any = import_bare(root, "reasoning_gym.factory").create_dataset
    return create(name.rpartition(".")[2], size=size, seed=SEED, **settings)
