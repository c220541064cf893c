"""A recipe of several documents: named merges that later ones use as models, as in mergekit-multi.

    name: low
    merge_method: linear
    models: [{model: a}, {model: b}]
    ---
    merge_method: ties
    base_model: base
    models: [{model: low}, {model: c}]

A document's name stands for what it makes wherever a model is named (``low+adapter`` too). The document without a name
is the output, the last one where all have names. Their order in the file does not matter.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from consilience.checkpoints.files import path_of
from consilience.errors import InputError
from consilience.recipe.schema import Recipe, parse_recipe
from consilience.recipe.slices import mentions
from consilience.recipe.yaml_file import read_documents


def read_recipe(path: Path | str) -> Recipe:
    """Read a recipe from a YAML file, of one document or several.

    Raises:
        InputError: names the document and the first key that is wrong.
    """
    return parse_documents(read_documents(path_of(path, "recipe")), str(path)).with_file(Path(path))


def parse_documents(values: Sequence[Any], where: str) -> Recipe:
    """Validate a recipe given as the plain values of its documents; return the output's, with its ``stages``.

    Raises:
        InputError: as ``parse_recipe``; names are missing, used twice or by nobody, or stages need each other.
    """
    if not values:
        raise InputError(f"{where}: holds no recipe; see 'consilience merge --help' for an example")
    if len(values) == 1:
        return parse_recipe(values[0], where)
    recipes = [parse_recipe(value, f"{where}: document {number}") for number, value in enumerate(values, 1)]
    unnamed = [number for number, recipe in enumerate(recipes) if recipe.name is None]
    if len(unnamed) > 1:
        raise InputError(
            f"{where}: documents {unnamed[0] + 1} and {unnamed[1] + 1} have no name; give one to each but the output's"
        )
    output = unnamed[0] if unnamed else len(recipes) - 1
    named: dict[str, Recipe] = {}
    for number, recipe in enumerate(recipes, 1):
        name = recipe.name
        if name is not None and name in named:
            raise InputError(f"{where}: document {number}: name {name!r} is used twice; choose another")
        if name is not None:
            named[name] = recipe
    last = recipes[output]
    order: list[str] = []
    _visit(last, named, order, [last.name] if last.name is not None else [], where)
    unused = [name for name, recipe in named.items() if recipe is not last and name not in order]
    if unused:
        raise InputError(
            f"{where}: stage {unused[0]!r} is used by no other, and is not the output "
            f"({'the document without a name' if unnamed else 'the last document'}); remove it, or merge it by itself"
        )
    return last.with_stages({name: named[name] for name in order}, where)


def stage_of(reference: str, names: Mapping[str, Any]) -> tuple[str, str] | None:
    """Return the stage that a model's reference names, and what follows the name (an adapter); None: it names none."""
    if reference in names:
        return reference, ""
    name, plus, rest = reference.partition("+")
    return (name, plus + rest) if plus and name in names else None


def _visit(recipe: Recipe, named: Mapping[str, Recipe], order: list[str], path: list[str], where: str) -> None:
    """Put the stages that a recipe needs into ``order``, each behind those that it needs itself."""
    for reference in model_references(recipe):
        found = stage_of(reference, named)
        if found is None or found[0] in order:
            continue
        name = found[0]
        if name in path:
            circle = " -> ".join([*path[path.index(name) :], name])
            raise InputError(f"{where}: stages need each other: {circle}; break the circle")
        _visit(named[name], named, order, [*path, name], where)
        order.append(name)


def model_references(recipe: Recipe) -> list[str]:
    """Return every model that a recipe names."""
    base = [recipe.base_model] if recipe.base_model is not None else []
    inside = [each.reference for each in mentions(recipe)] if recipe.sliced else []
    return [*base, *inside, *(entry.model for entry in recipe.models)]
