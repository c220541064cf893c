"""A method is a typed function; its signature is the schema of its parameters.

    @elementwise(source="arXiv:2306.01708", base="required")
    def ties(tensor: TensorSpec, *, weight: Annotated[PerExpert, Default(1.0), "multiplier"], ...) -> Elementwise: ...

    @matrix(source="arXiv:2412.00081", copies=4)
    def of_matrices(stack: Stack, *, others: Others, ...) -> Update: ...

An *element-wise* method says for each tensor what to do with blocks of its rows (``Elementwise``), mostly by a compiled
function in the same file. A *matrix* method is itself the arithmetic: it gets a whole matrix as its ``Stack``.

A parameter annotated ``PerExpert`` takes one number per expert (a recipe gives one for all, or one each, and per
layer); ``float``, ``int``, ``bool``, ``Literal``, ``str`` and ``tuple[str, ...]`` parameters are shared by all experts.
``Range`` bounds numbers.

A *learned* method is a function of the whole merge: it returns Coefficients, found on data (``learned_method``). Its
arguments may also be settings: frozen dataclasses whose fields, annotated alike, are parameters of the method, by the
same names. So each part of learning (an objective, an optimizer, the data) owns its parameters, and methods share them.
"""

import inspect
import math
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass, replace
from functools import wraps
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol, TypeVar, cast, get_args, get_origin, get_type_hints

from consilience.errors import InputError
from consilience.methods.program import Elementwise, Floats, Matrix, Merged, Program
from consilience.methods.weighted_sum import weighted

if TYPE_CHECKING:
    from pathlib import Path

    from consilience.experts.statistics import Kind, Statistics

PerExpert = tuple[float, ...]
#: Makes lines of a run's summary of the experts' names, what a method measured of them [K, q], and its parameters.
Notes = Callable[[Sequence[str], Floats, Mapping[str, Any]], list[str]]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Default:
    """The value a parameter takes when the recipe is silent."""

    value: float | bool | str | tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Range:
    """Closed bounds of a number."""

    low: float = float("-inf")
    high: float = float("inf")


@dataclass(frozen=True, slots=True)
class Each:
    """Marks a tuple of settings that has one of every class which a registry lists."""

    classes: Callable[[], Iterable[type]]


@dataclass(frozen=True, slots=True)
class NoEffect:
    """Marks a parameter that is accepted, so that a recipe of mergekit's is read, and changes nothing."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """What a method may know of a tensor without its data.

    ``statistics``: every expert's, if it reads any; ``base``: whether there is one to take task vectors from.
    """

    name: str
    shape: tuple[int, ...]
    numel: int
    experts: tuple[str, ...]
    statistics: "tuple[Statistics, ...]" = ()
    base: bool = True


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter of a method, as read from its signature. ``choices`` is empty for numbers and flags."""

    name: str
    kind: Literal["number", "integer", "flag", "choice", "text", "texts"]
    per_expert: bool
    default: float | bool | str | tuple[str, ...] | None
    range: Range
    choices: tuple[Any, ...]
    help: str
    effective: bool = True

    def check(self, value: Any) -> str | None:
        """Return what is wrong with ``value``, or None."""
        if self.kind == "flag":
            return None if isinstance(value, bool) else "must be true or false"
        if self.kind == "choice":
            valid = any(type(value) is type(choice) and value == choice for choice in self.choices)
            return None if valid else f"must be one of {', '.join(map(str, self.choices))}"
        if self.kind in ("text", "texts"):
            texts = [value] if isinstance(value, str) else value
            many = self.kind == "texts" and isinstance(texts, list | tuple)
            valid = all(isinstance(text, str) for text in texts) if many else isinstance(value, str)
            return None if valid else "must be text" + (", or a list of texts" if self.kind == "texts" else "")
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            return "must be a finite number" + _number_meant(value)
        if self.kind == "integer" and value != int(value):
            return "must be a whole number"
        if not self.range.low <= value <= self.range.high:
            return f"must lie in [{self.range.low:g}, {self.range.high:g}]"
        return None


def _number_meant(value: Any) -> str:
    """Say how to write the number that a text or a flag seems to stand for."""
    if isinstance(value, bool):
        return "; YAML reads yes and on as true, no and off as false: write 1 or 0"
    if not isinstance(value, str):
        return ""
    share = value.strip().endswith("%")
    try:
        number = float(value.strip().removesuffix("%")) / (100 if share else 1)
    except ValueError:
        return ", not a word"
    return f"; write {number:g}" + ("" if share else " without quotes")


class MethodFunction(Protocol):
    """Turns one tensor's parameters into the program to run."""

    __name__: str
    __doc__: str | None

    def __call__(self, tensor: TensorSpec, /, **parameters: Any) -> Program:
        """Return the program."""
        ...


@dataclass(frozen=True)
class Method:
    """A merge method: its name, what it needs, its parameters and the function that plans a tensor.

    ``learn`` is set for learned methods: it finds the coefficients that ``plan`` alone would take from the anchor.
    ``mergekit`` has the defaults of mergekit's method of this name that differ from ours; ``statistics`` is the kind
    that it reads of every expert, ``notes`` what it says of a run's measures. ``collect`` makes the statistics with the
    model before the merge: a function of a ``Run`` and of the folder that they go to, to every expert's own.
    """

    name: str
    plan: MethodFunction
    parameters: dict[str, Parameter]
    base: Literal["required", "optional", "unused"]
    minimum: int
    maximum: int | None
    data: str
    source: str
    counts_base: bool
    learn: Callable[..., Any] | None = None
    presets: Mapping[str, Mapping[str, Any]] = field(default_factory=dict[str, Mapping[str, Any]])
    mergekit: Mapping[str, Any] = field(default_factory=dict[str, Any])
    statistics: "Kind | None" = None
    notes: Notes | None = None
    collect: "Callable[[Any, Path], list[Path]] | None" = None

    @property
    def reads_target(self) -> bool:
        """Whether it learns from the recipe's ``target`` instead of every expert's own rows."""
        return self.data.startswith("target")

    @property
    def reads_calibration(self) -> bool:
        """Whether it learns from every expert's ``data.calibration``."""
        return self.data.startswith("calibration")

    @property
    def rows_key(self) -> Literal["calibration", "probe"]:
        """Which of an expert's files in the recipe's ``data`` it learns from."""
        return "probe" if self.data.startswith("probe") else "calibration"

    @property
    def summary(self) -> str:
        """The first line of the docstring."""
        return ((self.learn or self.plan).__doc__ or "").strip().splitlines()[0]


def _parameter(name: str, annotation: Any, default: Any = None) -> Parameter:
    base, *extras = get_args(annotation) if get_origin(annotation) is Annotated else (annotation,)
    per_expert = base == PerExpert
    choices: tuple[Any, ...] = ()
    if get_origin(base) is types.UnionType or get_origin(base) is Literal:
        choices = get_args(base) if get_origin(base) is Literal else ()
    kinds: dict[Any, Any] = {bool: "flag", int: "integer", str: "text", tuple[str, ...]: "texts", float: "number"}
    kind = "choice" if choices else "number" if per_expert else kinds.get(base)
    if kind is None:
        raise TypeError(f"parameter {name}: annotation {base!r} is not one that the schema knows")
    return Parameter(
        name=name.rstrip("_"),
        kind=kind,
        per_expert=per_expert,
        default=next((e.value for e in extras if isinstance(e, Default)), default),
        range=next((e for e in extras if isinstance(e, Range)), Range()),
        choices=choices,
        help=next((e for e in extras if isinstance(e, str)), ""),
        effective=not any(isinstance(e, NoEffect) for e in extras),
    )


def _annotations(owner: Callable[..., Any]) -> dict[str, tuple[Any, Any]]:
    """Return annotation and default (None: there is none) of a dataclass's fields, or of keyword arguments."""
    if is_dataclass(owner):
        hints = get_type_hints(owner, include_extras=True)
        return {f.name: (hints[f.name], None if f.default is MISSING else f.default) for f in fields(owner)}
    own = {p.name: p.annotation for p in inspect.signature(owner).parameters.values() if p.kind is p.KEYWORD_ONLY}
    bare = types.SimpleNamespace(__annotations__=own)
    hints = get_type_hints(bare, globalns=getattr(owner, "__globals__", {}), include_extras=True)
    return {name: (hints[name], None) for name in own}


def _settings(annotation: Any) -> list[type] | None:
    """Return the classes of settings that a field or argument holds; None: it is no settings, but a value."""
    if get_origin(annotation) is Annotated:
        each = [extra for extra in get_args(annotation) if isinstance(extra, Each)]
        return list(each[0].classes()) if each else None
    return [annotation] if isinstance(annotation, type) and is_dataclass(annotation) else None


def _declares(owner: Callable[..., Any], annotation: Any) -> bool:
    return get_origin(annotation) is Annotated or not is_dataclass(owner)


def parameters_of(owner: Callable[..., Any]) -> dict[str, Parameter]:
    """Return the parameters that a function's keyword arguments or a settings class's fields declare, in their order.

    Settings within are read in their place. Their fields without ``Annotated`` are no parameters: they keep the
    class's default.
    """
    found: dict[str, Parameter] = {}
    for name, (annotation, default) in _annotations(owner).items():
        inner = _settings(annotation)
        if inner is not None:
            for part in inner:
                found |= parameters_of(part)
        elif _declares(owner, annotation):
            parameter = _parameter(name, annotation, default)
            found[parameter.name] = parameter
    return found


def _arguments(owner: Callable[..., Any], values: Mapping[str, Any]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name, (annotation, _) in _annotations(owner).items():
        inner = _settings(annotation)
        if inner is not None:
            parts = tuple(settings_of(part, values) for part in inner)
            out[name] = parts if get_origin(annotation) is Annotated else parts[0]
        elif _declares(owner, annotation):
            out[name] = values[name]
    return out


def settings_of(kind: type[T], values: Mapping[str, Any]) -> T:
    """Return settings from a method's parameters by name, of which there may be more."""
    return kind(**_arguments(kind, values))


def elementwise(
    *,
    source: str,
    base: Literal["required", "optional", "unused"] = "required",
    experts: tuple[int, int | None] = (1, None),
    counts_base: bool = False,
    mergekit: Mapping[str, Any] | None = None,
) -> Callable[[Callable[..., Elementwise]], Method]:
    """Make a method of a function that says what to do with the elements of one tensor.

    Args:
        source: where it is published.
        base: whether a base model is needed; ``unused`` methods average weights and use a base, where one is named,
            only for its config, tokenizer and tensor order (and under adapters); methods with an ``optional`` one say
            by ``TensorSpec.base`` what they do.
        experts: least and greatest number of stack rows.
        counts_base: the base, where there is one, is row 0 of the stack (SLERP's first end point).
        mergekit: defaults of mergekit's method of this name, where they differ: recipes in its form take them. A text
            is also what a plain ``true`` means there.
    """

    def decorate(function: Callable[..., Elementwise]) -> Method:
        return Method(
            name=function.__name__,
            plan=cast(MethodFunction, function),
            parameters=parameters_of(function),
            base=base,
            minimum=experts[0],
            maximum=experts[1],
            data="none",
            source=source,
            counts_base=counts_base,
            mergekit=mergekit or {},
        )

    return decorate


#: What a matrix method does with tensors that are no matrices: a parameter of its own, by this name.
Others = Annotated[
    Literal["mean", "sum", "base"],
    Default("mean"),
    "tensors that are no matrices: the mean of the task vectors, their sum, or the base's values",
]


def matrix(
    *,
    source: str,
    copies: float,
    experts: tuple[int, int | None] = (1, None),
    name: str | None = None,
    reads: "Kind | None" = None,
    notes: Notes | None = None,
    data: str | None = None,
    collect: "Callable[[Any, Path], list[Path]] | None" = None,
    scales: bool = False,
) -> Callable[[Callable[..., Merged]], Method]:
    """Make a method of a function of one matrix, ``function(stack, **parameters)``: its merged task vector.

    With ``reads`` it is ``function(stack, statistics, **parameters)``, an iterator over every expert's of the kind, and
    tensors that lack them are treated as those that are no matrices. Fisher information is of tensors of any shape.

    Tensors of one or of more than two dimensions are treated as the function's parameter ``others: Others`` says. A
    parameter ``lambda_`` multiplies every merged task vector; the function need not look at either.

    Args:
        source: where it is published.
        copies: how many times the stack, [K, m, n] in the compute type, the function holds at its peak.
        experts: least and greatest number of experts.
        name: of the method, where it is not the function's.
        reads: the kind of statistics it reads.
        notes: makes lines of the summary of what the function measured, if it returns ``Measured``.
        data: the data it needs, where it is not statistics alone.
        collect: makes those statistics from the experts' rows, see ``Method``.
        scales: it merges norms' scales, vectors, by the diagonals of their Gram matrices, too.
    """

    def decorate(function: Callable[..., Merged]) -> Method:
        parameters = parameters_of(function)
        if "others" not in parameters:
            raise TypeError(f"{function.__name__}: a matrix method has a parameter others")

        @wraps(function)
        def plan(tensor: TensorSpec, **values: Any) -> Program:
            count, scale = len(tensor.experts), values.get("lambda_", 1.0)
            held = tensor.statistics
            due = reads == "fisher" or len(tensor.shape) == 2 or (scales and len(tensor.shape) == 1)
            if reads is not None and due and all(one.has(reads, tensor.name, tensor.shape) for one in held):
                own = _with_statistics(function, held, reads, tensor.name)
                return Matrix(own, values, (1.0,) * count, copies, scale)
            if reads is None and len(tensor.shape) == 2:
                return Matrix(function, values, (1.0,) * count, copies, scale)
            share = {"mean": 1.0 / count, "sum": 1.0, "base": 0.0}[values["others"]]
            return Elementwise("task_vectors", weighted((share,) * count), scale=scale)

        return Method(
            name or function.__name__, cast(MethodFunction, plan), parameters, "required", *experts,
            data or ("none" if reads is None else f"statistics: {reads} of every expert"), source, counts_base=False,
            statistics=reads, notes=notes, collect=collect,
        )  # fmt: skip

    return decorate


def _with_statistics(
    function: Callable[..., Merged], parts: "tuple[Statistics, ...]", kind: "Kind", tensor: str
) -> Callable[..., Merged]:
    from consilience.experts.statistics import read_all

    if not parts:  # planned before they are collected

        def refused(*_: Any, **__: Any) -> Floats:
            raise InputError(f"tensor {tensor!r}: its statistics are not collected yet; call merge_recipe, which does")

        return refused
    return lambda stack, **values: function(stack, read_all(parts, kind, tensor), **values)


def _anchor(tensor: TensorSpec, *, alphabar: PerExpert, **rest: Any) -> Program:
    """Task Arithmetic at the anchor: where learning starts from."""
    del tensor, rest
    return Elementwise("task_vectors", weighted(alphabar))


def learned_method(
    *,
    source: str,
    data: str,
    experts: tuple[int, int | None] = (1, None),
    presets: Mapping[str, Mapping[str, Any]] | None = None,
    changed: Mapping[str, Mapping[str, Any]] | None = None,
) -> Callable[[Callable[..., Any]], Method]:
    """Make a method of a function that finds coefficients on data.

    The function takes a ``consilience.learned.run.Run`` and, as keyword arguments, parameters and settings, one of
    whose parameters is ``alphabar`` (per expert: the coefficients to start from), and returns ``Coefficients``.

    Args:
        source: where it is published.
        data: the data it needs.
        experts: least and greatest number of experts.
        presets: values for what a recipe leaves out, by the value of its parameter ``preset``.
        changed: what of a shared parameter is this method's own, by the fields of ``Parameter``.
    """

    def decorate(function: Callable[..., Any]) -> Method:
        parameters = parameters_of(function)
        if "alphabar" not in parameters:
            raise TypeError(f"{function.__name__}: a learned method has a parameter alphabar")
        parameters |= {name: replace(parameters[name], **values) for name, values in (changed or {}).items()}

        @wraps(function)
        def learn(run: Any, **values: Any) -> Any:
            return function(run, **_arguments(function, values))

        plan = cast(MethodFunction, _anchor)
        return Method(
            function.__name__, plan, parameters, "required", *experts, data, source, counts_base=False, learn=learn,
            presets=presets or {},
        )  # fmt: skip

    return decorate
