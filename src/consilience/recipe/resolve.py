"""From a recipe's settings to one value per tensor, expert and parameter.

Precedence as in mergekit: the model's own ``parameters``, then the recipe's, then the method's default. A list of
numbers is a gradient over depth: linear interpolation at ``t = layer / (layers - 1)``, 0 outside layers.
A list of ``filter``/``value`` takes the first entry that matches the tensor's name.
"""

import fnmatch
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

from consilience.errors import InputError, nearest
from consilience.methods.signature import Method
from consilience.recipe.schema import Filtered, Recipe, Setting

#: The first number in a name, with what precedes it; longer runs of digits are not layer numbers.
_LAYER = re.compile(r"^((?:.*?\.)?)(\d{1,9})\.")


def depths(names: Iterable[str]) -> dict[str, float]:
    """Return each tensor's relative depth: the first number in its name over the largest under the same prefix."""
    found = {name: match for name in names if (match := _LAYER.match(name))}
    last: dict[str, int] = {}
    for match in found.values():
        last[match[1]] = max(last.get(match[1], 0), int(match[2]))
    return {name: int(m[2]) / last[m[1]] if last[m[1]] else 0.0 for name, m in found.items()}


def matcher(pattern: str | None, where: str) -> Callable[[str], bool]:
    """Return the test of one filter: ``re:`` regex (searched), glob if it has ``*`` or ``?``, else substring."""
    if pattern is None or pattern == "*":
        return lambda name: True
    if pattern.startswith("re:"):
        try:
            compiled = re.compile(pattern[3:])
        except re.error as error:
            raise InputError(f"{where}: filter {pattern!r} is not a regular expression ({error})") from None
        return lambda name: compiled.search(name) is not None
    if any(c in pattern for c in "*?"):
        return lambda name: fnmatch.fnmatchcase(name, pattern)
    return lambda name: pattern in name


def gradient(values: list[float], t: float) -> float:
    """Interpolate ``values`` at relative depth ``t`` in [0, 1]."""
    scaled = t * (len(values) - 1)
    low = int(scaled)
    high = min(low + 1, len(values) - 1)
    return (1 - (scaled - low)) * values[low] + (scaled - low) * values[high]


class _Resolved:
    """One setting, ready to be asked for any tensor's value."""

    def __init__(self, setting: Setting, where: str) -> None:
        self.where = where
        self.filters: list[tuple[Callable[[str], bool], str | None, Any]] = []
        self.used: set[str | None] = set()
        self.plain: Any = None
        if isinstance(setting, list) and isinstance(setting[0], Filtered):
            for entry in cast(list[Filtered], setting):
                self.filters.append((matcher(entry.filter, where), entry.filter, entry.value))
        else:
            self.plain = setting

    def at(self, name: str, t: float) -> Any:
        value = self.plain
        for matches, pattern, candidate in self.filters:
            if matches(name):
                value = candidate
                self.used.add(pattern)
                break
        numeric = isinstance(value, list) and not isinstance(value[0], str)
        return gradient(cast(list[float], value), t) if numeric else value

    def check_used(self, names: Iterable[str]) -> None:
        """Refuse a filter that matches no tensor at all: it is a typo."""
        names = list(names)
        for matches, pattern, _ in self.filters:
            if pattern not in self.used and not any(map(matches, names)):
                parts = sorted({part for name in names[:500] for part in name.split(".")})
                raise InputError(f"{self.where}: filter {pattern!r} matches no tensor{nearest(pattern or '', parts)}")


def _texts(setting: Setting) -> Setting:
    """Take numbers where texts are wanted (block numbers, say) as they are written."""
    values = setting if isinstance(setting, list) else [setting]
    if any(isinstance(value, bool) or not isinstance(value, int | float) for value in values):
        return setting
    return [f"{value:g}" for value in cast(list[float], values)]


class Settings:
    """The settings of a recipe for one method, resolved tensor by tensor."""

    def __init__(self, recipe: Recipe, method: Method, experts: dict[str, int], where: str) -> None:
        """``experts`` maps each expert's name to its entry in ``recipe.models``."""
        self.method, self.where = method, where
        self.experts = list(experts)
        self._shared = self._group(recipe.parameters, "parameters")
        self._preset = self._presets(recipe)
        self._own = {
            name: self._group(recipe.models[index].parameters, f"models.{index}.parameters", own=True)
            for name, index in experts.items()
        }

    def _group(self, parameters: dict[str, Setting], place: str, own: bool = False) -> dict[str, _Resolved]:
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
        return {key: _Resolved(value, f"{self.where}: {place}.{key}") for key, value in given.items()}

    def _presets(self, recipe: Recipe) -> Mapping[str, Any]:
        """Return the defaults of the preset that the recipe names."""
        name = recipe.parameters.get("preset")
        return self.method.presets.get(name, {}) if isinstance(name, str) else {}

    def _value(self, key: str, expert: str | None, name: str, t: float) -> Any:
        parameter = self.method.parameters[key]
        groups = [self._own[expert]] if expert is not None else []
        value, place = None, self.where
        for group in (*groups, self._shared):
            if key in group and value is None:
                value, place = group[key].at(name, t), group[key].where
        if value is None:
            value = self._preset.get(key, parameter.default)
        if value is None:
            raise InputError(f"{self.where}: parameter {key!r} has no value for tensor {name!r}; give one")
        words = isinstance(cast(object, value), list) and parameter.kind != "texts"
        problem = "must be one value or a list of numbers" if words else parameter.check(value)
        if problem:
            raise InputError(f"{place}: {value!r} for tensor {name!r}: {problem}")
        if parameter.kind == "texts":
            return (value,) if isinstance(value, str) else tuple(value)
        return float(value) if parameter.kind == "number" else int(value) if parameter.kind == "integer" else value

    def once(self) -> dict[str, Any]:
        """Return a learned method's keyword arguments, which are the same for all tensors.

        Raises:
            InputError: a setting differs between tensors (a gradient over depth, or filters).
        """
        for group in (self._shared, *self._own.values()):
            for key, resolved in group.items():
                if resolved.filters or (
                    isinstance(resolved.plain, list) and self.method.parameters[key].kind != "texts"
                ):
                    raise InputError(
                        f"{resolved.where}: a learned method's parameters are the same for all tensors; give one value"
                    )
        return self.at("", 0.0)

    def at(self, name: str, t: float) -> dict[str, Any]:
        """Return the method's keyword arguments for one tensor."""
        out: dict[str, Any] = {}
        for key, parameter in self.method.parameters.items():
            argument = key if key != "lambda" else "lambda_"
            if parameter.per_expert:
                out[argument] = tuple(self._value(key, expert, name, t) for expert in self.experts)
            else:
                out[argument] = self._value(key, None, name, t)
        return out

    def check_used(self, names: Iterable[str]) -> None:
        """Refuse filters that match none of the merged tensors."""
        names = list(names)
        for group in (self._shared, *self._own.values()):
            for resolved in group.values():
                resolved.check_used(names)
