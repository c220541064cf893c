"""From a recipe's settings to one value per tensor, expert and parameter.

Precedence as in mergekit: the ``parameters`` of a model (or a slice's source), of a slice, of a module, of the recipe,
then the method's default (mergekit's, if the recipe spells the method ``merge_method``). A list of numbers is a
gradient over depth: linear interpolation at ``t = layer / (layers - 1)``, 1 in the only layer of a model, 0 outside
layers; in slices each slice counts its own layers.
A list of ``filter``/``value`` takes the first entry that matches the tensor's name.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from consilience.errors import InputError, nearest
from consilience.methods.signature import Method
from consilience.name_filter import name_filter
from consilience.recipe.schema import Filtered, Recipe, Setting

#: The first number in a name, with what precedes it; longer runs of digits are not layer numbers.
_LAYER = re.compile(r"^((?:.*?\.)?)(\d{1,9})\.")

#: What filters in recipes of mergekit's form name, whatever the architecture: no typos where a model has none of it.
_PARTS = frozenset((
    "attention", "attn", "block_sparse_moe", "down_proj", "embed_tokens", "gate_proj", "input_layernorm", "k_proj",
    "layernorm", "lm_head", "mlp", "model.norm", "norm", "o_proj", "post_attention_layernorm", "q_proj", "self_attn",
    "up_proj", "v_proj",
))  # fmt: skip

#: What a model's stack of layers is called, just before the layer's number.
_STACKS = (["layers"], ["layer"], ["h"], ["block"], ["blocks"])


def depths(names: Iterable[str]) -> dict[str, float]:
    """Return each tensor's relative depth: the first number in its name over the largest under the same prefix.

    The only layer of a stack is at depth 1, as in mergekit. What has a single number without being a stack by its name
    or the only one of its model, such as a connector's first module, is at depth 0.
    """
    found = {name: match for name in names if (match := _LAYER.match(name))}
    last: dict[str, int] = {}
    for match in found.values():
        last[match[1]] = max(last.get(match[1], 0), int(match[2]))
    shallow = not any(last.values())
    single = {stack: float(shallow or stack.split(".")[-2:-1] in _STACKS) for stack in last}
    return {name: int(m[2]) / last[m[1]] if last[m[1]] else single[m[1]] for name, m in found.items()}


def gradient(values: list[float], t: float) -> float:
    """Interpolate ``values`` at relative depth ``t`` in [0, 1]."""
    scaled = t * (len(values) - 1)
    low = int(scaled)
    high = min(low + 1, len(values) - 1)
    return (1 - (scaled - low)) * values[low] + (scaled - low) * values[high]


@dataclass
class _Choice:
    """A value and the tensors it is for; ``depths`` are those of the tensors that took it."""

    matches: Callable[[str], bool]
    pattern: str | None
    value: Any
    depths: set[float] = field(default_factory=set[float])

    @property
    def graded(self) -> bool:
        """Whether it is a gradient whose ends differ."""
        return isinstance(self.value, list) and not isinstance(self.value[0], str) and len(set(self.value)) > 1


class _Resolved:
    """One setting, ready to be asked for any tensor's value."""

    def __init__(self, setting: Any, where: str, elsewhere: frozenset[str] = frozenset()) -> None:
        """``elsewhere`` are filters that need not match: other models have such tensors."""
        self.where, self.elsewhere = where, elsewhere
        filtered = isinstance(setting, list) and isinstance(setting[0], Filtered)
        entries = cast(list[Filtered], setting) if filtered else [Filtered.model_construct(filter=None, value=setting)]
        self.choices = [
            _Choice(name_filter(entry.filter, f"{where}: filter"), entry.filter, entry.value) for entry in entries
        ]
        #: Whether any tensor's value was asked for; it is not where every model has its own.
        self.reached = False

    @property
    def plain(self) -> Any:
        """The value, if it is the same for all tensors; None where there are filters."""
        return self.choices[0].value if not self.filtered else None

    @property
    def filtered(self) -> bool:
        """Whether it has filters."""
        return len(self.choices) > 1 or self.choices[0].pattern is not None

    @property
    def covers(self) -> bool:
        """Whether every tensor gets a value."""
        return any(choice.pattern in (None, "*") for choice in self.choices)

    def at(self, name: str, t: float) -> Any:
        self.reached = True
        choice = next((choice for choice in self.choices if choice.matches(name)), None)
        if choice is None:
            return None
        choice.depths.add(t)
        value = choice.value
        numeric = isinstance(value, list) and not isinstance(value[0], str)
        return gradient(cast(list[float], value), t) if numeric else value

    def check_used(self, names: Iterable[str]) -> None:
        """Refuse a filter that matches no tensor at all: it is a typo."""
        names = list(names)
        for choice in self.choices:
            if not choice.depths and choice.pattern not in self.elsewhere and not any(map(choice.matches, names)):
                parts = sorted({part for name in names[:500] for part in name.split(".")})
                raise InputError(
                    f"{self.where}: filter {choice.pattern!r} matches no tensor{nearest(choice.pattern or '', parts)}"
                )

    def without_effect(self, names: Iterable[str]) -> list[str]:
        """Say of what was given that no tensor's value comes from it."""
        if not self.reached:
            return [f"{self.where}: has no effect, since every model has its own"]
        notes: list[str] = []
        for number, choice in enumerate(self.choices):
            if not choice.depths and choice.pattern is not None:
                name = next(filter(choice.matches, names), "")
                first = next((other for other in self.choices[:number] if other.matches(name)), None)
                before = "the value without a filter" if first and first.pattern is None else "the filter"
                before += f" {first.pattern!r}" if first and first.pattern is not None else ""
                why = f"{before} before it takes its tensors" if first else f"{name!r} is not merged by itself"
                why = why if name else "no tensor of these models is called so"
                notes.append(f"{self.where}: filter {choice.pattern!r} has no effect: {why}")
            if choice.graded and choice.depths == {0.0}:
                notes.append(
                    f"{self.where}: a gradient over depth, but no tensor it is for lies in a numbered layer: all take "
                    f"its first value, {choice.value[0]:g}"
                )
        return notes


def _texts(setting: Setting) -> Setting:
    """Take numbers where texts are wanted (block numbers, say) as they are written."""
    values = setting if isinstance(setting, list) else [setting]
    if any(isinstance(value, bool) or not isinstance(value, int | float) for value in values):
        return setting
    return [f"{value:g}" for value in cast(list[float], values)]


def default_values(recipe: Recipe, method: Method) -> dict[str, Any]:
    """Return the defaults: the preset's, if the recipe names one, mergekit's in a recipe of its form, else ours."""
    name = recipe.parameters.get("preset")
    preset = method.presets.get(name, {}) if isinstance(name, str) else {}
    ours = {key: parameter.default for key, parameter in method.parameters.items()}
    return {**ours, **(method.mergekit if recipe.mergekit else {}), **preset}


@dataclass(frozen=True)
class Given:
    """Parameters and their place in a recipe."""

    place: str
    parameters: Mapping[str, Setting]


@dataclass
class Known:
    """What the settings of all slices of one recipe have in common: those of one place are asked by all of them."""

    groups: dict[str, dict[str, _Resolved]] = field(default_factory=dict[str, dict[str, _Resolved]])
    used_defaults: dict[str, Any] = field(default_factory=dict[str, Any])


class Settings:
    """The settings of a recipe for one method, resolved tensor by tensor."""

    def __init__(
        self,
        recipe: Recipe,
        method: Method,
        experts: Mapping[str, "int | Given"],
        where: str,
        *,
        nearer: Sequence["Given"] = (),
        known: "Known | None" = None,
    ) -> None:
        """Take a recipe's settings apart.

        Args:
            recipe: the recipe.
            method: its method.
            experts: each expert's name and its entry's number in ``recipe.models``, or what is given to it alone.
            where: how errors name the recipe.
            nearer: what counts before the recipe's own parameters, nearest first: a slice's, a module's.
            known: what other settings of the same recipe have in common with these.
        """
        self.method, self.where = method, where
        self.experts = list(experts)
        self._elsewhere = _PARTS if recipe.mergekit else frozenset[str]()
        self._known = Known() if known is None else known
        scopes = (*nearer, Given("parameters", recipe.parameters))
        self._shared = [self._group(given.parameters, given.place) for given in scopes]
        #: What stands for a parameter where the recipe is silent; and, of those that were needed, their values.
        self._defaults = default_values(recipe, method)
        self._flags = {key: each for key, each in method.mergekit.items() if isinstance(each, str)}
        self._flags = self._flags if recipe.mergekit else {}
        entries = recipe.models
        own = {
            name: Given(f"models.{given}.parameters", entries[given].parameters) if isinstance(given, int) else given
            for name, given in experts.items()
        }
        self._own = {name: self._group(given.parameters, given.place, own=True) for name, given in own.items()}
        settings = [each for group in self._groups for each in group.values()]
        self._filters = [choice for each in settings for choice in each.choices if choice.pattern is not None]
        self._found: dict[tuple[float | bool, ...], dict[str, Any]] = {}

    @property
    def used_defaults(self) -> dict[str, Any]:
        """The defaults that were needed."""
        return self._known.used_defaults

    def _group(self, parameters: Mapping[str, Setting], place: str, own: bool = False) -> dict[str, _Resolved]:
        if place not in self._known.groups:
            self._known.groups[place] = self._resolved(parameters, place, own)
        return self._known.groups[place]

    def _resolved(self, parameters: Mapping[str, Setting], place: str, own: bool) -> dict[str, _Resolved]:
        known = self.method.parameters
        for key in parameters:
            if key not in known:
                hint = nearest(key, list(known)) or f" (it has: {', '.join(known)})"
                raise InputError(
                    f"{self.where}: {place}.{key}: method {self.method.name!r} has no such parameter{hint}"
                )
            if own and not known[key].per_expert:
                raise InputError(
                    f"{self.where}: {place}.{key} is shared by all models; move it to the top-level parameters"
                )
        given = {key: _texts(value) if known[key].kind == "texts" else value for key, value in parameters.items()}
        return {key: _Resolved(value, f"{self.where}: {place}.{key}", self._elsewhere) for key, value in given.items()}

    def _value(self, key: str, expert: str | None, name: str, t: float) -> Any:
        parameter = self.method.parameters[key]
        groups = [self._own[expert]] if expert is not None else []
        value, place = None, self.where
        for group in (*groups, *self._shared):
            if key in group and value is None:
                value, place = group[key].at(name, t), group[key].where
        if value is None:
            value = self._defaults[key]
            if parameter.effective:
                self.used_defaults[key] = value
        if value is None:
            raise InputError(f"{self.where}: parameter {key!r} has no value for tensor {name!r}; give one")
        if value is True:
            value = self._flags.get(key, value)
        words = isinstance(cast(object, value), list) and parameter.kind != "texts"
        problem = "must be one value or a list of numbers" if words else parameter.check(value)
        if problem:
            raise InputError(f"{place}: {value!r} for tensor {name!r}: {problem}")
        if parameter.kind == "texts":
            return (value,) if isinstance(value, str) else tuple(cast(list[str], value))
        return float(value) if parameter.kind == "number" else int(value) if parameter.kind == "integer" else value

    def once(self) -> dict[str, Any]:
        """Return a learned method's keyword arguments, which are the same for all tensors.

        Raises:
            InputError: a setting differs between tensors (a gradient over depth, or filters).
        """
        for group in self._groups:
            for key, resolved in group.items():
                if resolved.filtered or (
                    isinstance(resolved.plain, list) and self.method.parameters[key].kind != "texts"
                ):
                    raise InputError(
                        f"{resolved.where}: a learned method's parameters are the same for all tensors; give one value"
                    )
        return self.at("", 0.0)

    @property
    def _groups(self) -> list[dict[str, _Resolved]]:
        """Every group of settings, the recipe's own first."""
        return [*reversed(self._shared), *self._own.values()]

    def at(self, name: str, t: float, own: Sequence[str] = ()) -> dict[str, Any]:
        """Return the method's keyword arguments for one tensor: the same for the same depth and matching filters.

        ``own`` is what each expert calls it, if not so.
        """
        if own:
            return self._at(name, t, own)
        key = (t, *(choice.matches(name) for choice in self._filters))
        if key not in self._found:
            self._found[key] = self._at(name, t, own)
        return self._found[key].copy()

    def _at(self, name: str, t: float, own: Sequence[str]) -> dict[str, Any]:
        out: dict[str, Any] = {}
        names = dict(zip(self.experts, own, strict=True)) if own else {}
        for key, parameter in self.method.parameters.items():
            argument = key if key != "lambda" else "lambda_"
            if parameter.per_expert:
                out[argument] = tuple(self._value(key, one, names.get(one, name), t) for one in self.experts)
            else:
                out[argument] = self._value(key, None, name, t)
        return out

    def check_used(self, names: Iterable[str]) -> None:
        """Refuse filters that match none of the merged tensors."""
        check_used([(self, names, {})])

    def without_effect(self, names: Iterable[str]) -> list[str]:
        """Say in a line each what of the given settings changes nothing."""
        return without_effect([(self, names, {})])

    def _key_notes(self, key: str, resolved: _Resolved, names: Iterable[str]) -> list[str]:
        parameter = self.method.parameters[key]
        if parameter.effective:
            return resolved.without_effect(names)
        given = [choice.value for choice in resolved.choices]
        changed = any(value != parameter.default for value in given)
        return [f"{resolved.where}: has no effect in method {self.method.name!r}"] if changed else []

    def spelled_out(self, recipe: Recipe) -> Recipe:
        """Return the recipe with every default that was needed written down, so that no version's own count."""
        shared: dict[str, Any] = dict(recipe.parameters)
        for key, value in self.used_defaults.items():
            value = list(cast(tuple[str, ...], value)) if isinstance(value, tuple) else value
            if key not in shared:
                shared[key] = value
            elif not self._shared[-1][key].covers:  # filters that leave tensors to the default
                shared[key] = [*cast(list[Filtered], shared[key]), Filtered(filter=None, value=cast(Any, value))]
        return recipe.model_copy(update={"parameters": shared})


#: Settings, the tensors that they are for, and what those are to each expert, where experts call them otherwise.
Parts = Iterable[tuple[Settings, Iterable[str], Mapping[str, Iterable[str]]]]


def _asked(parts: Parts) -> list[tuple[Settings, str, _Resolved, list[str]]]:
    """Return every setting once, with the names of all tensors that may ask for it."""
    found: dict[int, tuple[Settings, str, _Resolved, list[str]]] = {}
    for settings, names, own in parts:
        listed = list(names)
        renamed = {expert: list(theirs) for expert, theirs in own.items()}
        shared = [*listed, *(name for theirs in renamed.values() for name in theirs)]
        groups = [(group, shared) for group in reversed(settings._shared)]  # pyright: ignore[reportPrivateUsage]
        groups += [(group, renamed.get(name, listed)) for name, group in settings._own.items()]  # pyright: ignore[reportPrivateUsage]
        for group, asking in groups:
            for key, resolved in group.items():
                found.setdefault(id(resolved), (settings, key, resolved, []))[3].extend(asking)
    return list(found.values())


def check_used(parts: Parts) -> None:
    """Refuse filters that match none of the merged tensors, of settings and the tensors they are for."""
    for _, _, resolved, names in _asked(parts):
        resolved.check_used(names)


def without_effect(parts: Parts) -> list[str]:
    """Say in a line each what of the given settings, with the tensors they are for, changes nothing."""
    notes: list[str] = []
    for settings, key, resolved, names in _asked(parts):
        notes += settings._key_notes(key, resolved, names)  # pyright: ignore[reportPrivateUsage]
    return notes
