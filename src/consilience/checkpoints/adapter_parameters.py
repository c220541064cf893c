"""Adapters of single parameters (PEFT's ``target_parameters``), among them all experts of a mixture at once.

PEFT adapts what is no Linear layer, such as the fused weight [experts, out, in] of a mixture, by its own name.
Invariants of its files, in the order in which they are checked:

1. ``target_parameters`` lists parameters by the ends of their names; a key is a parameter's name, with modules before
   it or without.
2. Factors carry no parameter's name. Of several parameters of a module M the one that M declares last has the factors
   ``M.lora_A``, ``M.lora_B``, and each one before it one more ``base_layer``: which is which the base shows.
3. A is [experts * r, in] with row ``e * r + j``, and B [out, r * experts] with column ``j * experts + e``, for rank j
   of expert e; the update of expert e is ``scale * B_e @ A_e`` with ``scale = alpha / r``.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, cast

from consilience.checkpoints.checkpoint import TensorInfo
from consilience.checkpoints.lora_scale import PeftScales
from consilience.errors import InputError

_WRAPPER = ".base_layer"


@dataclass(frozen=True)
class ParameterFactors:
    """Factors of a parameter of ``module``: ``depth`` wrappers inside, that is, so many of those adapted come after it.

    ``options`` has, by each full name that the config allows, the rank of one expert and the scale.
    """

    module: str
    depth: int
    a: TensorInfo
    b: TensorInfo
    options: dict[str, tuple[int, float]]


def parameter_keys(config: Mapping[str, Any] | None, where: str) -> list[str]:
    """Return the keys of ``target_parameters``.

    Raises:
        InputError: they are no list of names.
    """
    keys = (config or {}).get("target_parameters") or []
    if not isinstance(keys, list) or not all(isinstance(key, str) and key for key in cast(list[Any], keys)):
        raise InputError(f"{where}: target_parameters must list names of parameters, not {keys!r}; restore the config")
    return sorted(cast(list[str], keys))


def parameters_of(module: str, keys: Iterable[str]) -> list[str]:
    """Return the full names of a module's parameters that the keys may mean; whether they exist the base shows."""
    bare = unnested(module)[0]
    parts = (key.rpartition(".") for key in keys)
    return [f"{bare}.{name}" for parent, _, name in parts if not parent or f".{bare}".endswith(f".{parent}")]


def unnested(module: str) -> tuple[str, int]:
    """Return a module without the wrappers at its end, and how many there are."""
    bare = module
    while bare.endswith(_WRAPPER):
        bare = bare.removesuffix(_WRAPPER)
    return bare, (len(module) - len(bare)) // len(_WRAPPER)


def by_parameter(modules: Mapping[str, int], keys: list[str], scales: PeftScales) -> set[str]:
    """Return those of an adapter's modules whose factors are of parameters other than a Linear layer's weight.

    That is where one wrapper is inside another, or where the factors have several times the rank.

    Args:
        modules: the rows of A by module.
        keys: of ``target_parameters``.
        scales: what the config says of ranks.
    """
    nested = {module for module in modules if unnested(module)[1] or f"{module}{_WRAPPER}" in modules}
    many = {m for m, rows in modules.items() if parameters_of(m, keys) and rows not in scales.ranks_of(m)}
    return nested | many


def parameter_factors(
    module: str, a: TensorInfo, b: TensorInfo, keys: list[str], scales: PeftScales, file: str
) -> ParameterFactors:
    """Return one parameter's factors, and what they are under each name that it may have.

    Raises:
        InputError: the config does not list the parameter, or gives no rank that the factors have.
    """
    names, (bare, depth), rows = parameters_of(module, keys), unnested(module), a.shape[0]
    if not names:
        raise InputError(
            f"{file}: {module} has factors of a parameter, and target_parameters in the config lists none of {bare}; "
            "restore the config"
        )
    if len(a.shape) != 2 or len(b.shape) != 2:
        raise InputError(f"{file}: {module}: factors A {list(a.shape)} and B {list(b.shape)} are no matrices")
    options: dict[str, tuple[int, float]] = {}
    for name in names:
        ranks = [rank for rank in scales.ranks_of(name) if rows % rank == 0]
        if len(ranks) == 1:
            options[name] = (ranks[0], scales.scale(name, ranks[0], None))
    if not options:
        raise InputError(
            f"{file}: {module}: its factors have {rows} rows, which the rank in the config, {scales.config.get('r')}, "
            "does not divide; restore the config"
        )
    return ParameterFactors(bare, depth, a, b, options)
