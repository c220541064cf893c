"""What a measurement says: frozen values with their per-example parts, as JSON, and as tables."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from rich.console import Group
    from rich.text import Text

Metric = Literal["loss", "acc", "acc_norm", "kl", "js"]

_TITLES: dict[Metric, str] = {
    "loss": "loss, nats per token (lower is better)",
    "acc": "accuracy by rank classification, % (summed log-probability; higher is better)",
    "acc_norm": "accuracy by rank classification, % (log-probability per character; higher is better)",
    "kl": "KL(reference || model), nats per token (lower is better)",
    "js": "Jensen-Shannon divergence from the reference, nats per token (lower is better)",
}


@dataclass(frozen=True, slots=True)
class Interval:
    """A 95% interval (unless asked otherwise)."""

    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Settings:
    """What changes a result: part of the cache's key. ``dtype`` is the one matrix products run in."""

    dtype: str = "float32"
    max_examples: int | None = None
    max_tokens: int | None = None
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Loss:
    """Negative log-likelihood in nats per scored token, every token weighing the same.

    ``value = sum(nats) / sum(tokens)``; example j is row ``rows[j]``, with ``nats[j]`` nats over ``tokens[j]`` tokens.
    """

    value: float
    interval: Interval
    n_examples: int
    n_tokens: int
    rows: tuple[int, ...]
    nats: tuple[float, ...]
    tokens: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Accuracy:
    """Share of rows whose labelled choice ranks first.

    ``acc`` ranks by the summed log-probability of a choice's tokens and is what a table shows; ``acc_norm`` by that sum
    over the choice's number of characters, as lm-evaluation-harness has them. The first of equal choices wins.
    """

    acc: float
    interval: Interval
    acc_norm: float
    interval_norm: Interval
    n_examples: int
    rows: tuple[int, ...]
    correct: tuple[bool, ...]
    correct_norm: tuple[bool, ...]


@dataclass(frozen=True, slots=True)
class Divergence:
    """Mean divergence per scored token of a model b from a reference a, in nats.

    ``kl`` is KL(a || b), ``js`` the Jensen-Shannon divergence (at most ln 2). Example j is row ``rows[j]``, with
    ``kl_sums[j]`` and ``js_sums[j]`` nats over ``tokens[j]`` positions.
    """

    kl: float
    interval: Interval
    js: float
    interval_js: Interval
    n_examples: int
    n_tokens: int
    rows: tuple[int, ...]
    kl_sums: tuple[float, ...]
    js_sums: tuple[float, ...]
    tokens: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class TaskResult:
    """Everything measured on one task.

    ``n_cut`` rows lost ``dropped_tokens`` scored tokens to ``max_tokens`` or to the model's context. ``input_tokens``
    (padding not counted) went through the model in ``seconds``, which include the reference's pass but no loading.
    """

    task: str
    n_examples: int
    loss: Loss | None
    accuracy: Accuracy | None
    divergence: Divergence | None
    reference: str | None = None
    n_cut: int = 0
    dropped_tokens: int = 0
    input_tokens: int = 0
    seconds: float = 0.0
    cached: bool = False

    def value(self, metric: Metric) -> tuple[float, Interval] | None:
        """Return a metric and its interval, or None where the task has none."""
        if metric == "loss":
            return self.loss and (self.loss.value, self.loss.interval)
        if metric == "acc":
            return self.accuracy and (self.accuracy.acc, self.accuracy.interval)
        if metric == "acc_norm":
            return self.accuracy and (self.accuracy.acc_norm, self.accuracy.interval_norm)
        if metric == "kl":
            return self.divergence and (self.divergence.kl, self.divergence.interval)
        return self.divergence and (self.divergence.js, self.divergence.interval_js)

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-able values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> "TaskResult":
        """Rebuild what ``to_dict`` gave, also after a trip through JSON.

        Raises:
            KeyError, TypeError: the value is not of this form.
        """
        parts: dict[str, Any] = dict(value)
        for key, kind in (("loss", Loss), ("accuracy", Accuracy), ("divergence", Divergence)):
            parts[key] = None if value[key] is None else _rebuild(kind, value[key])
        return cls(**parts)


def _rebuild(kind: type[Any], value: dict[str, Any]) -> Any:
    def field(key: str, item: Any) -> Any:
        if key.startswith("interval"):
            return Interval(**item)
        return tuple(item) if isinstance(item, list | tuple) else item

    return kind(**{key: field(key, item) for key, item in value.items()})


@dataclass(frozen=True, slots=True)
class Evaluation:
    """One model measured on several tasks; ``notes`` say where the figures are not what they seem."""

    model: str
    results: tuple[TaskResult, ...]
    settings: Settings
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-able values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> "Evaluation":
        """Rebuild what ``to_dict`` gave, also after a trip through JSON.

        Raises:
            KeyError, TypeError: the value is not of this form.
        """
        results = tuple(TaskResult.from_dict(result) for result in value["results"])
        return cls(value["model"], results, Settings(**value["settings"]), tuple(value["notes"]))

    def to_json(self, *, examples: bool = True) -> str:
        """Return indented JSON; ``examples=False`` leaves the per-example parts out."""
        value = self.to_dict()
        if not examples:
            for result in value["results"]:
                for part in ("loss", "accuracy", "divergence"):
                    if result[part] is not None:
                        result[part] = {k: v for k, v in result[part].items() if not isinstance(v, tuple)}
        return json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False)


def _present(evaluations: Sequence[Evaluation], metric: Metric) -> bool:
    return any(result.value(metric) for evaluation in evaluations for result in evaluation.results)


def _number(metric: Metric, value: float) -> str:
    if metric in ("acc", "acc_norm"):
        return f"{100 * value:.1f}"
    return f"{value:.{3 if metric == 'loss' else 4}f}"


def _cell(metric: Metric, value: float, interval: Interval, *, best: bool) -> "Text":
    from rich.text import Text

    low, high = _number(metric, interval.low), _number(metric, interval.high)
    return Text.assemble((_number(metric, value), "bold" if best else ""), (f" [{low}, {high}]", "dim"))


def render(evaluations: Evaluation | Iterable[Evaluation], metrics: Sequence[Metric] | None = None) -> "Group":
    """Return one rich table per metric: models as rows, tasks as columns, 95% intervals in brackets, the best in bold.

    Args:
        evaluations: one or more; a task that a model was not measured on shows as ``-``.
        metrics: which tables; by default the loss, then ``acc`` and ``kl`` where any task has them.
    """
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    models = [evaluations] if isinstance(evaluations, Evaluation) else list(evaluations)
    wanted: tuple[Metric, ...] = ("loss", "acc", "kl")
    tables: list[Any] = []
    for metric in metrics or [m for m in wanted if _present(models, m)]:
        of = [{r.task: found for r in m.results if (found := r.value(metric))} for m in models]
        tasks = list(dict.fromkeys(task for column in of for task in column))
        table = Table()
        table.add_column("model", overflow="fold")
        for task in tasks:
            table.add_column(Text(task), justify="right")
        if len(tasks) > 1:
            table.add_column("mean", justify="right")
        highest = metric in ("acc", "acc_norm")
        best = {t: (max if highest else min)(column[t][0] for column in of if t in column) for t in tasks}
        for model, column in zip(models, of, strict=True):
            cells = [
                _cell(metric, *column[t], best=len(models) > 1 and column[t][0] == best[t])
                if t in column
                else Text("-")
                for t in tasks
            ]
            if len(tasks) > 1:
                values = [value for value, _ in column.values()]
                mean = sum(values) / len(values) if len(values) == len(tasks) else None
                cells.append(Text("-" if mean is None else _number(metric, mean)))
            table.add_row(Text(model.model), *cells)
        tables += [Text(_TITLES[metric]), table]  # not the table's title, which would be as narrow as the table
    cut = [f"{m.model}, {r.task}: {r.n_cut} of {r.n_examples} rows cut, {r.dropped_tokens} tokens not scored"
           for m in models for r in m.results if r.n_cut]  # fmt: skip
    return Group(*tables, *(Text(line) for line in cut))
