"""A method is a typed function; its signature is the schema of its parameters.

    @method(source="arXiv:2306.01708", base="required")
    def ties(tensor: TensorSpec, *, weight: Annotated[PerExpert, Default(1.0), "multiplier"], ...) -> Program: ...

A parameter annotated ``PerExpert`` takes one number per expert (a recipe gives one for all, or one each, and per
layer); ``float``, ``bool`` and ``Literal`` parameters are shared by all experts. ``Range`` bounds numbers.
"""

import inspect
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Protocol, cast, get_args, get_origin, get_type_hints

from consilience.methods.program import Program

PerExpert = tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Default:
    """The value a parameter takes when the recipe is silent."""

    value: float | bool | str


@dataclass(frozen=True, slots=True)
class Range:
    """Closed bounds of a number."""

    low: float = float("-inf")
    high: float = float("inf")


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """What a method may know of a tensor without its data."""

    name: str
    shape: tuple[int, ...]
    numel: int
    experts: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter of a method, as read from its signature. ``choices`` is empty for numbers and flags."""

    name: str
    kind: Literal["number", "flag", "choice"]
    per_expert: bool
    default: float | bool | str | None
    range: Range
    choices: tuple[Any, ...]
    help: str

    def check(self, value: Any) -> str | None:
        """Return what is wrong with ``value``, or None."""
        if self.kind == "flag":
            return None if isinstance(value, bool) else "must be true or false"
        if self.kind == "choice":
            valid = any(type(value) is type(choice) and value == choice for choice in self.choices)
            return None if valid else f"must be one of {', '.join(map(str, self.choices))}"
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or value != value
            or abs(value) == float("inf")
        ):
            return "must be a finite number"
        if not self.range.low <= value <= self.range.high:
            return f"must lie in [{self.range.low:g}, {self.range.high:g}]"
        return None


class MethodFunction(Protocol):
    """Turns one tensor's parameters into the program to run."""

    __name__: str
    __doc__: str | None

    def __call__(self, tensor: TensorSpec, /, **parameters: Any) -> Program:
        """Return the program."""
        ...


@dataclass(frozen=True)
class Method:
    """A merge method: its name, what it needs, its parameters and the function that plans a tensor."""

    name: str
    plan: MethodFunction
    parameters: dict[str, Parameter]
    base: Literal["required", "optional", "unused"]
    minimum: int
    maximum: int | None
    data: str
    source: str
    counts_base: bool

    @property
    def summary(self) -> str:
        """The first line of the docstring."""
        return (self.plan.__doc__ or "").strip().splitlines()[0]


def _parameter(name: str, annotation: Any) -> Parameter:
    base, *extras = get_args(annotation) if get_origin(annotation) is Annotated else (annotation,)
    per_expert = base == PerExpert
    choices: tuple[Any, ...] = ()
    if get_origin(base) is types.UnionType or get_origin(base) is Literal:
        choices = get_args(base) if get_origin(base) is Literal else ()
    kind: Literal["number", "flag", "choice"] = "choice" if choices else "flag" if base is bool else "number"
    if kind == "number" and not per_expert and base is not float:
        raise TypeError(f"parameter {name}: annotation {base!r} is not PerExpert, float, bool or Literal")
    return Parameter(
        name=name.rstrip("_"),
        kind=kind,
        per_expert=per_expert,
        default=next((e.value for e in extras if isinstance(e, Default)), None),
        range=next((e for e in extras if isinstance(e, Range)), Range()),
        choices=choices,
        help=next((e for e in extras if isinstance(e, str)), ""),
    )


def method(
    *,
    source: str,
    base: Literal["required", "optional", "unused"] = "required",
    experts: tuple[int, int | None] = (1, None),
    data: str = "none",
    counts_base: bool = False,
) -> Callable[[Callable[..., Program]], Method]:
    """Make a method of a planning function.

    Args:
        source: where it is published.
        base: whether a base model is needed; ``unused`` methods average weights and use a base, where one is named,
            only for its config, tokenizer and tensor order (and under adapters).
        experts: least and greatest number of stack rows.
        data: the data it needs.
        counts_base: the base is row 0 of the stack (SLERP's first end point).
    """

    def decorate(function: Callable[..., Program]) -> Method:
        hints = get_type_hints(function, include_extras=True)
        names = [p.name for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY]
        parameters = [_parameter(name, hints[name]) for name in names]
        return Method(
            name=function.__name__,
            plan=cast(MethodFunction, function),
            parameters={p.name: p for p in parameters},
            base=base,
            minimum=experts[0],
            maximum=experts[1],
            data=data,
            source=source,
            counts_base=counts_base,
        )

    return decorate
