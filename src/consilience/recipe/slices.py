"""The forms of a recipe as one: what each part of the output is stacked from.

``slices`` is one part, ``modules`` has several; a module's ``models`` are one slice of all layers. Which tensors a part
has, and how many layers, the models' files say (``engine/slices.py``).
"""

from collections.abc import Iterator
from dataclasses import dataclass

from consilience.recipe.resolve import Given
from consilience.recipe.schema import ModelEntry, Module, Recipe, Slice


@dataclass(frozen=True)
class SourceOfSlice:
    """Layers of a model, all of them where ``layers`` is None, as ``place`` of the recipe gives them."""

    place: str
    model: str
    name: str | None
    layers: tuple[int, int] | None
    given: Given


@dataclass(frozen=True)
class SliceOfPart:
    """One slice: its sources, its base, and the parameters that count before the recipe's, nearest first."""

    place: str
    sources: tuple[SourceOfSlice, ...]
    base: str | None
    nearer: tuple[Given, ...]


@dataclass(frozen=True)
class Part:
    """A part of the output, None the only one, and its slices in order."""

    place: str
    name: str | None
    slices: tuple[SliceOfPart, ...]


def parts_of(recipe: Recipe) -> list[Part]:
    """Return what a recipe of slices or modules stacks, part by part."""
    if recipe.slices:
        return [Part("slices", None, tuple(_slices(recipe, recipe.slices, "slices", ())))]
    return [_module(recipe, name, module) for name, module in recipe.modules.items()]


@dataclass(frozen=True)
class Mention:
    """A model that is merged, the name it is given, if any, and the place that names it first."""

    reference: str
    name: str | None
    place: str


def mentions(recipe: Recipe) -> list[Mention]:
    """Return each model that is merged, once, in order of mention."""
    found: dict[str, Mention] = {}
    pieces = [piece for part in parts_of(recipe) for piece in part.slices]
    for piece in pieces:
        for source in piece.sources:
            before = found.get(source.model)
            if before is None or (before.name is None and source.name is not None):
                found[source.model] = Mention(source.model, source.name, before.place if before else source.place)
        if piece.base is not None:
            found.setdefault(piece.base, Mention(piece.base, None, f"{piece.place}.base_model"))
    return list(found.values())


def _module(recipe: Recipe, name: str, module: Module) -> Part:
    place = f"modules.{name}"
    nearer = (Given(f"{place}.parameters", module.parameters),)
    if module.slices:
        return Part(place, name, tuple(_slices(recipe, module.slices, f"{place}.slices", nearer)))
    sources = [_whole(entry, f"{place}.models.{number}") for number, entry in enumerate(module.models)]
    if recipe.base_model is not None and all(source.model != recipe.base_model for source in sources):
        base = f"{place}.base_model"
        sources.append(SourceOfSlice(base, recipe.base_model, None, None, Given(f"{base}.parameters", {})))
    return Part(place, name, (SliceOfPart(f"{place}.models", tuple(sources), recipe.base_model, nearer),))


def _whole(entry: ModelEntry, place: str) -> SourceOfSlice:
    return SourceOfSlice(place, entry.model, entry.name, None, Given(f"{place}.parameters", entry.parameters))


def _slices(recipe: Recipe, slices: list[Slice], place: str, nearer: tuple[Given, ...]) -> Iterator[SliceOfPart]:
    for number, piece in enumerate(slices):
        here = f"{place}.{number}"
        sources = tuple(
            SourceOfSlice(
                f"{here}.sources.{k}", each.model, None, each.layer_range,
                Given(f"{here}.sources.{k}.parameters", each.parameters),
            )
            for k, each in enumerate(piece.sources)
        )  # fmt: skip
        own = Given(f"{here}.parameters", piece.parameters)
        yield SliceOfPart(here, sources, piece.base_model or recipe.base_model, (own, *nearer))
