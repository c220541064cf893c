"""Keys of mergekit recipes that nothing reads: taken as mergekit takes them, and named in the notes.

Recipes on model cards are full of them: ``density`` under ``linear``, ``weight`` under ``slerp``, ``normalize`` at the
top level. A recipe that says ``merge_method:`` may have them. What looks like a typo of a key that would be read is an
error all the same, and so is what mergekit would miss.

    a parameter that another method has, or that mergekit had once       note
    a parameter shared by all models, under one of them                  note, unless required or not mergekit's method
    a parameter at the top level, a key of recipes under parameters      note, unless it is required
    a parameter beside a model's name instead of under its parameters    error
    any other key, near a known one                                      error with the known one
    any other key                                                        note; an error if the method is not mergekit's

mergekit also averages a ``base_model`` that is not among the models of ``linear``, if a weight is given for all.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar, cast

from consilience.errors import InputError, nearest
from consilience.methods.mergekit import PARAMETERS, REQUIRED
from consilience.methods.registry import MERGEKIT_METHODS
from consilience.methods.signature import Method

if TYPE_CHECKING:
    from consilience.recipe.schema import ModelEntry, Module, Recipe, Slice, SliceSource

_Part = TypeVar("_Part", "Recipe", "Module")
_Entry = TypeVar("_Entry", "ModelEntry", "SliceSource")
#: The least share of characters that a typo has in common with what was meant.
NEAR = 0.8
_Keys = Mapping[str, Sequence[str]]


def without_unknown(recipe: Mapping[Any, Any], known: _Keys, where: str) -> tuple[dict[Any, Any], tuple[str, ...]]:
    """Return a recipe's plain values without the keys that no recipe has, and notes that name these.

    Args:
        recipe: as it was read; other forms than mergekit's are returned as they are.
        known: the keys of each kind of mapping by the key that holds it ("" for the recipe, ``models``, ...).
        where: how errors and notes name the recipe.

    Raises:
        InputError: a parameter is where it does not count, and is required or a model's own.
    """
    if recipe.get("merge_method") not in MERGEKIT_METHODS:
        return dict(recipe), ()
    unknown: dict[str, None] = {}
    misplaced: dict[str, None] = {}
    out = _cleaned(recipe, "", known, where, (unknown, misplaced))
    notes = [
        f"{where}: {_listed(list(misplaced))} at the top level: no effect, as in mergekit, but under parameters alone"
    ]
    return out, (*(notes if misplaced else ()), *_unknown_note(list(unknown), where))


_Dropped = tuple[dict[str, None], dict[str, None]]


def _cleaned(
    mapping: Mapping[Any, Any], place: str, known: _Keys, where: str, dropped: _Dropped, kind: str = ""
) -> dict[Any, Any]:
    out: dict[Any, Any] = {}
    for key, value in mapping.items():
        if not isinstance(key, str):  # the schema refuses it
            out[key] = value
            continue
        here = f"{place}{key}"
        if key in known[kind] and value is None:
            continue  # "parameters:" with nothing under it
        if key in known[kind]:
            out[key] = _within(value, here, known, where, dropped) if key in known else value
        elif key in PARAMETERS and (kind or key in REQUIRED):
            owner = "the model's parameters" if kind in ("models", "sources") else "parameters"
            raise InputError(f"{where}: {here}: is a parameter and does not count there; write it under {owner}")
        elif key in PARAMETERS:
            dropped[1][key] = None
        elif nearest(key, known[kind], cutoff=NEAR):
            out[key] = value  # the schema refuses it
        else:
            dropped[0][key] = None
    return out


def _within(value: Any, place: str, known: _Keys, where: str, dropped: _Dropped) -> Any:
    """Return what a key holds, cleaned: a list of mappings (``models``), or a mapping of them (``modules``)."""
    kind = place.rpartition(".")[2]
    if isinstance(value, list):
        entries = enumerate(cast(list[Any], value))
        return [
            _cleaned(each, f"{place}.{number}.", known, where, dropped, kind) if isinstance(each, dict) else each
            for number, each in entries
        ]
    if kind == "modules" and isinstance(value, dict):
        return {
            name: _cleaned(each, f"{place}.{name}.", known, where, dropped, kind) if isinstance(each, dict) else each
            for name, each in cast(dict[Any, Any], value).items()
        }
    return value


def without_unused(recipe: "Recipe", method: Method, keys: Sequence[str], where: str) -> tuple["Recipe", list[str]]:
    """Return a recipe without the parameters that its method does not read, and notes that name each once.

    Args:
        recipe: any; one that does not say ``merge_method:`` is returned as it is.
        method: its method.
        keys: the keys of a recipe, which do not count under ``parameters``.
        where: how errors and notes name the recipe.

    Raises:
        InputError: a key that is read nowhere looks like a typo of one that is.
    """
    if not recipe.mergekit:
        return recipe, []
    shared = [recipe, *recipe.slices]
    for module in recipe.modules.values():
        shared += [module, *module.slices]
    reader = _Reader(method, keys, {key for each in shared for key in each.parameters}, where)
    modules = {name: _read_part(reader, module, f"modules.{name}.") for name, module in recipe.modules.items()}
    return _read_part(reader, recipe, "").model_copy(update={"modules": modules}), list(reader.notes())


def _read_part(reader: "_Reader", part: _Part, place: str) -> _Part:
    """Return a recipe or a module of it with the parameters that are read."""
    slices = [_read_slice(reader, piece, f"{place}slices.{number}") for number, piece in enumerate(part.slices)]
    entries = [reader.entry(each, f"{place}models.{number}.parameters") for number, each in enumerate(part.models)]
    shared = reader.read(part.parameters, f"{place}parameters", own=False)
    return part.model_copy(update={"slices": slices, "models": entries, "parameters": shared})


def _read_slice(reader: "_Reader", piece: "Slice", place: str) -> "Slice":
    sources = [reader.entry(each, f"{place}.sources.{k}.parameters") for k, each in enumerate(piece.sources)]
    shared = reader.read(piece.parameters, f"{place}.parameters", own=False)
    return piece.model_copy(update={"sources": sources, "parameters": shared})


def with_averaged_base(recipe: "Recipe", method: Method, where: str) -> tuple["Recipe", list[str]]:
    """Return a recipe whose base is among the models, if mergekit averages it too, and a note that says so."""
    base = recipe.base_model
    if not recipe.mergekit or method.name != "linear" or base is None or "weight" not in recipe.parameters:
        return recipe, []
    if not recipe.models or any(entry.model == base for entry in recipe.models):
        return recipe, []
    entry = recipe.models[0].model_copy(update={"model": base, "name": None, "parameters": {}, "data": None})
    note = f"{where}: base_model: averaged with the models, as in mergekit, since parameters.weight is for all"
    return recipe.model_copy(update={"models": [*recipe.models, entry]}), [note]


class _Reader:
    """What of a recipe's parameters is read, and what is not, by the reason why."""

    def __init__(self, method: Method, keys: Sequence[str], given: set[str], where: str) -> None:
        self.method, self.keys, self.where, self.given = method, keys, where, given
        self.unused: dict[str, None] = {}
        self.own: dict[str, None] = {}
        self.misplaced: dict[str, None] = {}
        self.unknown: dict[str, None] = {}

    def entry(self, entry: _Entry, place: str) -> _Entry:
        return entry.model_copy(update={"parameters": self.read(entry.parameters, place, own=True)})

    def read(self, parameters: Mapping[str, Any], place: str, *, own: bool) -> dict[str, Any]:
        """Return the parameters that the method reads, of which ``own`` ones are one model's."""
        return {key: value for key, value in parameters.items() if self._counts(key, value, place, own)}

    def _counts(self, key: str, value: Any, place: str, own: bool) -> bool:
        parameter = self.method.parameters.get(key)
        if parameter is not None and parameter.effective:
            shared_by_all = own and not parameter.per_expert
            noted = self.method.name in MERGEKIT_METHODS and (key not in REQUIRED or key in self.given)
            if shared_by_all and noted:
                self.own[key] = None
                return False
            return True  # or an error where values are resolved
        if parameter is not None:
            if value != parameter.default:
                self.unused[key] = None
        elif key in PARAMETERS:
            self.unused[key] = None
        elif key in self.keys:
            self.misplaced[key] = None
        else:
            self._unknown(key, place)
        return False

    def _unknown(self, key: str, place: str) -> None:
        own = list(self.method.parameters)
        near = nearest(key, own, cutoff=NEAR) or nearest(key, [*PARAMETERS, *self.keys], cutoff=NEAR)
        if not near and self.method.name not in MERGEKIT_METHODS:
            near = f" (it has: {', '.join(own)})"
        if near:
            raise InputError(f"{self.where}: {place}.{key}: method {self.method.name!r} has no such parameter{near}")
        self.unknown[key] = None

    def notes(self) -> Iterator[str]:
        if self.unused:
            why = f"since method {self.method.name!r} does not use {'them' if len(self.unused) > 1 else 'it'}"
            yield f"{self.where}: {_listed(list(self.unused))}: no effect, {why}"
        if self.own:
            yield (
                f"{self.where}: {_listed(list(self.own))} under a model: no effect, as in mergekit, since all models "
                "share one value; write it under the top-level parameters to have it count"
            )
        if self.misplaced:
            yield (
                f"{self.where}: {_listed(list(self.misplaced))} under parameters: no effect, as in mergekit; write it "
                "at the top level to have it count"
            )
        yield from _unknown_note(list(self.unknown), self.where)


def _unknown_note(unknown: Sequence[str], where: str) -> tuple[str, ...]:
    return (f"{where}: {_listed(unknown)}: no effect, as in mergekit: nothing is called so",) if unknown else ()


def _listed(keys: Sequence[str]) -> str:
    return ", ".join(key if len(key) <= 40 else f"{key[:37]}..." for key in sorted(keys))
