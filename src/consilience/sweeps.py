"""One recipe merged once for every point of a grid of values, with a table of all merges and their scores.

OUT holds a folder for each point, an ordinary output each, and ``results.json``. The points are planned before the
first is merged, so that a wrong value leaves nothing behind. A rerun keeps the merges that are finished: a folder that
is there counts as such if ``results.json`` holds the digest of the work that it would be now, written before it
appeared.
"""

import contextlib
import math
import re
import shutil
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from consilience.api import (
    check_adapter_options,
    check_options,
    merge_recipe,
    override_recipe,
    plan_recipe,
    work_digest,
)
from consilience.checkpoints.files import path_of
from consilience.checkpoints.json_files import read_object
from consilience.errors import InputError, MachineError, option
from consilience.methods.registry import load
from consilience.numbers import finite
from consilience.recipe.overrides import text_of
from consilience.recipe.schema import Recipe
from consilience.workdir import check_out, done_path, write_json

if TYPE_CHECKING:
    from consilience.progress import ProgressOption
    from consilience.tasks.results import Metric
    from consilience.tasks.rows import Task

RESULTS = "results.json"
#: Points of one sweep: more is a slip of the pen, or a job for a search.
LIMIT = 1000
#: What a grid may vary besides the method's parameters, by the argument that ``override_recipe`` has for it.
_KEYS = {"method": "method", "seed": "seed", "dtype": "out_dtype"}


@dataclass(frozen=True)
class Point:
    """One merge of a sweep.

    Attributes:
        name: of its folder (or file) in OUT.
        values: what it differs in, by key.
        digest: of the work, as it would be now.
        bytes: that its weights take.
        replaces: what stood at its place when it was last begun, by inode; None: nothing.
        summary: what the merge reported; None: it is not finished, or was stopped before it could report.
        scores: of each task, by metric.
    """

    name: str
    values: dict[str, Any]
    digest: str
    bytes: int
    replaces: int | None = None
    summary: dict[str, Any] | None = None
    scores: dict[str, dict[str, float]] = field(default_factory=dict[str, dict[str, float]])


@dataclass(frozen=True)
class SweepResult:
    """All merges of a sweep, as ``results.json`` has them.

    ``metric`` says what ``best`` is best in: the mean of all tasks' losses, or of their accuracies where a task has no
    loss; None where there are no tasks. It was chosen on the rows that it is measured on.
    """

    out: str
    points: tuple[Point, ...]
    metric: str | None = None
    best: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return {"format": 1} | asdict(self)


def sweep(
    recipe: "Recipe | Mapping[str, Any] | Path | str",
    out: Path | str,
    grid: Mapping[str, Sequence[Any]],
    *,
    tasks: "Sequence[Task | Path | str]" = (),
    max_examples: int | None = None,
    as_adapter: Any = None,
    rank: int | None = None,
    force: bool = False,
    threads: int | None = None,
    device: str = "cpu",
    trust_remote_code: bool = False,
    progress: "ProgressOption" = False,
    told: Callable[[str], None] | None = None,
    **settings: Any,
) -> SweepResult:
    """Merge a recipe once for every combination of a grid's values, and measure each merge.

        cs.sweep("recipe.yaml", "sweep", {"weight": [0.2, 0.4, 0.6]}, tasks=["code=heldout/code.jsonl"])

    Args:
        recipe: what to merge: a recipe, the same as plain values, or its file.
        out: a folder for all merges: ``01-weight=0.2`` and so on, and ``results.json``.
        grid: values by key, as ``override_recipe`` takes them (``density``, ``math.weight``), or of ``method``,
            ``seed`` and ``dtype``. Keys vary like the digits of a number, the last one fastest.
        tasks: JSONL files to measure every merge on, as ``evaluate`` takes them.
        max_examples: the first rows of each task that are used.
        as_adapter: as ``merge_recipe``.
        rank: as ``merge_recipe``.
        force: replace merges that are there and are not what the grid says now.
        threads: as ``merge_recipe``.
        device: where models run that are learned or measured.
        trust_remote_code: run ``.py`` files that come with the base.
        progress: as ``merge_recipe``, for each merge in turn.
        told: called with a line before and after each merge.
        settings: ``stochastic_rounding``, ``allow_nonfinite``, ``shard_size``, ``strict``: as ``merge_recipe``.

    Raises:
        InputError: a value, a model or a task is wrong, or OUT holds something else; nothing is left behind but merges
            that were finished before it was found.
        MachineError: the machine failed; the same call continues.
    """
    folder, say = path_of(out, "out"), told or (lambda line: None)
    measured = _tasks(tasks, max_examples)
    common: dict[str, Any] = {"threads": threads, "trust_remote_code": trust_remote_code, "progress": progress}
    recipes, points, flat, base = _planned(
        recipe, folder, grid, as_adapter, rank, device if not measured else "cpu", trust_remote_code, settings
    )
    _check_measurable(bool(measured), flat, as_adapter is not None and base is None)
    points, done = _resumed(folder, points, force)
    _check_space(folder, sum(point.bytes for point, there in zip(points, done, strict=True) if not there))
    with _folder_of(folder, done):
        _write(folder, points)
        for number, each in enumerate(recipes):
            point, place = points[number], folder / points[number].name
            where = f"{number + 1} of {len(points)}, {point.name}"
            say(f"{where}: {'is there already' if done[number] else 'merging'}")
            if not done[number]:
                summary = merge_recipe(
                    each,
                    place,
                    as_adapter=as_adapter,
                    rank=rank,
                    force=force and point.replaces is not None,
                    device=device if _learns(each) or not measured else "cpu",
                    warned=lambda text: say(f"warning: {text}"),
                    **common,
                    **settings,
                )
                points[number] = point = replace(point, summary=finite(asdict(summary)))
                done[number] = True
                _write(folder, points)
            if measured:
                say(f"{where}: measuring")
                model = str(place) if as_adapter is None else f"{base}+{place}"
                measuring = {"name": point.name, "max_examples": max_examples, "device": device} | common
                points[number] = replace(point, scores=_scores(model, measured, **measuring))
                _write(folder, points)
    result = _result(folder, points)
    write_json(folder / RESULTS, result.to_dict())
    return result


@contextlib.contextmanager
def _folder_of(out: Path, done: list[bool]) -> Generator[None]:
    """Make OUT; where the input turns out to be wrong before anything is done, leave nothing of it behind."""
    made = _made(out)
    try:
        yield
    except InputError:
        if not any(done):
            (out / RESULTS).unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                for path in made:
                    path.rmdir()
        raise


def plan_sweep(
    recipe: Any,
    out: Path | str,
    grid: Mapping[str, Sequence[Any]],
    *,
    tasks: "Sequence[Task | Path | str]" = (),
    max_examples: int | None = None,
    as_adapter: Any = None,
    rank: int | None = None,
    force: bool = False,
    device: str = "cpu",
    trust_remote_code: bool = False,
    **settings: Any,
) -> tuple[list[Point], list[bool]]:
    """Return the points of a sweep, and which of them are finished; nothing is touched. Arguments as ``sweep``.

    Raises:
        InputError: as ``sweep``, before its first merge.
    """
    measured = _tasks(tasks, max_examples)
    _, points, flat, base = _planned(
        recipe,
        path_of(out, "out"),
        grid,
        as_adapter,
        rank,
        device if not measured else "cpu",
        trust_remote_code,
        settings,
    )
    _check_measurable(bool(measured), flat, as_adapter is not None and base is None)
    return _resumed(path_of(out, "out"), points, force)


def _check_measurable(wanted: bool, flat: bool, unbased: bool) -> None:
    if wanted and (flat or unbased):
        raise InputError(f"{_called('tasks')}: models are measured that are folders, and these are files of tensors")


def _learns(recipe: Recipe) -> bool:
    """Whether a recipe's method learns its coefficients, and so runs models."""
    return load(recipe.merge_method).learn is not None and recipe.coefficients is None


def _called(name: str) -> str:
    """Return an option without its value, as a user gives it: ``--sweep``, or ``grid`` in Python."""
    return option(name) if option(name).startswith("--") else {"sweep": "grid"}.get(name, name)


def points_of(recipe: Any, grid: Mapping[str, Sequence[Any]]) -> list[tuple[str, dict[str, Any], Recipe]]:
    """Return the name, values and recipe of every point of a grid.

    Raises:
        InputError: the grid is empty, too large or has a value twice; or a value is wrong.
    """
    if not grid:
        raise InputError(f"{_called('sweep')}: names no values; give KEY=VALUE,VALUE")
    if not isinstance(cast(Any, grid), Mapping):
        raise InputError(f"{_called('sweep')}: is a {type(grid).__name__}; give a mapping of lists of values by key")
    grid = {key: _plain_values(values) for key, values in grid.items()}
    for key, values in grid.items():
        if isinstance(values, str) or not isinstance(values, Sequence) or not values:
            raise InputError(f"{_called('sweep')} {key}: give a list of values")
        shown = [text_of(value) for value in values]
        twice = next((text for text in shown if shown.count(text) > 1), None)
        if twice is not None:
            raise InputError(f"{_called('sweep')} {key}: has {twice} twice; leave one out")
    total = math.prod(map(len, grid.values()))
    if total > LIMIT:
        raise InputError(f"{_called('sweep')}: {total} merges are more than {LIMIT}; leave values out")
    combinations = list(product(*grid.values()))
    width = max(2, len(str(len(combinations))))
    found: list[tuple[str, dict[str, Any], Recipe]] = []
    for number, combination in enumerate(combinations):
        values = dict(zip(grid, combination, strict=True))
        name = "-".join([f"{number + 1:0{width}d}", *(f"{key}={_word(value)}" for key, value in values.items())])
        found.append((name[:120].rstrip("."), values, _with_values(recipe, values)))
    return found


def _plain_values(values: Any) -> Any:
    """Return a key's values with numpy's arrays and scalars as Python's lists and numbers, which JSON holds."""
    if hasattr(values, "tolist"):
        return values.tolist()
    return [_plain_values(value) for value in cast("list[Any]", values)] if isinstance(values, list | tuple) else values


def _word(value: Any) -> str:
    """Return a value as part of a folder's name."""
    if isinstance(value, list | tuple):
        return "_".join(map(_word, cast("list[Any]", value)))
    return re.sub(r"[^A-Za-z0-9._+]+", "_", text_of(value)) if not _negative(value) else text_of(value)


def _negative(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value < 0


def _with_values(recipe: Any, values: dict[str, Any]) -> Recipe:
    keys = {argument: values[key] for key, argument in _KEYS.items() if key in values}
    parameters = {key: value for key, value in values.items() if key not in _KEYS}
    return override_recipe(recipe, parameters, swept=True, **keys)


def _planned(
    recipe: Any,
    out: Path,
    grid: Mapping[str, Sequence[Any]],
    as_adapter: Any,
    rank: int | None,
    device: str,
    trust_remote_code: bool,
    settings: dict[str, Any],
) -> tuple[list[Recipe], list[Point], bool, Path | None]:
    """Plan every point; return recipes, points, whether the outputs are files, and the base's folder.

    Raises:
        InputError: a point cannot be merged.
    """
    from consilience.engine.adapter_output import check_adapter
    from consilience.engine.output import check_plan, inputs

    recipes: list[Recipe] = []
    points: list[Point] = []
    flat, base = False, None
    for name, values, each in points_of(recipe, grid):
        plan = plan_recipe(each, out / name, **settings)
        try:
            kind = check_adapter(plan, as_adapter, rank)
            if kind is not None:
                check_adapter_options(
                    settings.get("shard_size"),
                    stochastic=settings.get("stochastic_rounding", False),
                    allow_nonfinite=settings.get("allow_nonfinite", False),
                )
            plan = check_options(plan, device, None, trust_remote_code=trust_remote_code)
            flat = kind is None and plan.alignment.donor.folder is None
            name += ".safetensors" if flat else ""
            base = plan.base.folder if plan.base is not None else None
            check_plan(out / name, plan, folder=not flat)
            check_out(out / name, folder=not flat, force=True, inputs=inputs(plan))
            size = plan.layout.size if kind is None else 0
            points.append(Point(name, values, work_digest(plan, kind, rank), size))
            recipes.append(each)
        finally:
            plan.close()
    return recipes, points, flat, base


def _tasks(tasks: "Sequence[Task | Path | str]", max_examples: int | None) -> "list[Task]":
    if not tasks:
        if max_examples is not None:
            raise InputError(f"{option('max_examples', str(max_examples))}: only goes with {_called('tasks')}")
        return []
    from consilience.tasks.load import require_transformers
    from consilience.tasks.rows import load_tasks

    require_transformers("measuring merges")
    return load_tasks(tasks)


def _inode(path: Path) -> int | None:
    return path.lstat().st_ino if path.exists() or path.is_symlink() else None


def _resumed(out: Path, points: list[Point], force: bool) -> tuple[list[Point], list[bool]]:
    """Return the points with what an earlier run found, and which of them are finished.

    Raises:
        InputError: OUT holds something else, or a merge that is not what the grid says now (without ``force``).
    """
    before = _before(out)
    names = {point.name for point in points}
    stale = next((name for name in before if name not in names and _inode(out / name) is not None), None)
    if stale is not None:
        raise InputError(f"{out}: holds {stale}, which is of another sweep; choose another OUT, or move that away")
    found: list[Point] = []
    done: list[bool] = []
    for point in points:
        there, earlier = _inode(out / point.name), before.get(point.name)
        same = earlier is not None and earlier.digest == point.digest
        if there is None or done_path(out / point.name).exists():
            found.append(point)
            done.append(False)
        elif same and earlier is not None and earlier.replaces != there:
            found.append(replace(point, summary=earlier.summary))
            done.append(True)
        elif not force:
            raise InputError(
                f"{out / point.name}: is there, and not what this sweep would merge now; choose another OUT, or pass "
                f"{option('force')} to replace it"
            )
        else:
            found.append(replace(point, replaces=there))
            done.append(False)
    return found, done


def _before(out: Path) -> dict[str, Point]:
    """Return the points of the sweep that stands at OUT, by name.

    Raises:
        InputError: what stands there is no sweep.
    """
    path = out / RESULTS
    if out.is_dir() and not path.is_file() and any(out.iterdir()):
        raise InputError(f"{out}: is not empty, and no sweep is in it; choose a new folder")
    if (out.exists() or out.is_symlink()) and not out.is_dir():
        raise InputError(f"{out}: is no folder; choose a new one")
    if not path.is_file():
        return {}
    try:
        listed: list[dict[str, Any]] = list(read_object(path)["points"])
        points = [Point(**{key: value for key, value in each.items()}) for each in listed]
    except (KeyError, TypeError):
        raise InputError(f"{path}: is not a sweep's list of results; restore it, or choose another OUT") from None
    return {point.name: point for point in points}


def _check_space(out: Path, size: int) -> None:
    """Refuse to start what cannot fit.

    Raises:
        MachineError: says how much is missing.
    """
    place = out.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < size:
        raise MachineError(
            f"{out}: the sweep's merges need {size / 1e9:.2f} GB of disk and {free / 1e9:.2f} GB are free; free some, "
            "or sweep fewer values"
        )


def _made(out: Path) -> list[Path]:
    """Make OUT and the folders above it; return those that were made, the innermost first.

    Raises:
        InputError: one cannot be made.
    """
    missing: list[Path] = []
    path = out.absolute()
    while not path.exists():
        missing.append(path)
        path = path.parent
    try:
        for path in reversed(missing):
            path.mkdir()
    except OSError as error:
        raise InputError(f"{out}: cannot be made ({error.strerror}); choose another OUT") from None
    return missing


def _write(out: Path, points: Iterable[Point]) -> None:
    write_json(out / RESULTS, SweepResult(str(out), tuple(points)).to_dict())


def _scores(model: str, tasks: "list[Task]", **settings: Any) -> dict[str, dict[str, float]]:
    """Measure a model and return each task's metrics."""
    from consilience.tasks import evaluate

    found = evaluate(model, tasks, **settings)
    metrics: tuple[Metric, ...] = ("loss", "acc")
    return {
        result.task: {metric: value[0] for metric in metrics if (value := result.value(metric)) is not None}
        for result in found.results
    }


def _result(out: Path, points: list[Point]) -> SweepResult:
    """Return the result with its best point: of the lowest mean loss, or else of the highest mean accuracy."""
    for metric, sign in (("loss", 1), ("acc", -1)):
        means = [mean_score(point, metric) for point in points]
        if all(mean is not None for mean in means):
            best = min(range(len(points)), key=lambda index: sign * cast(float, means[index]))
            return SweepResult(str(out), tuple(points), metric, points[best].name)
    return SweepResult(str(out), tuple(points))


def mean_score(point: Point, metric: str) -> float | None:
    """Return a metric's mean over all tasks; None where a task does not have it, or there are none."""
    values = [scores.get(metric) for scores in point.scores.values()]
    if not values or None in values:
        return None
    return sum(cast("list[float]", values)) / len(values)


def table(result: SweepResult) -> list[str]:
    """Return a sweep's table as lines of text, the best merge marked by ``*``."""
    keys = list(result.points[0].values)
    tasks = [(task, metric) for task, scores in result.points[0].scores.items() for metric in scores]
    several = result.metric is not None and len(result.points[0].scores) > 1
    titles = {"loss": "loss", "acc": "accuracy"}
    rows = [["", "merge", *keys, *(f"{task} {titles[metric]}" for task, metric in tasks)]]
    rows[0] += [f"mean {titles[str(result.metric)]}"] if several else []
    for point in result.points:
        row = ["*" if point.name == result.best else "", point.name, *(text_of(point.values[key]) for key in keys)]
        row += [f"{point.scores[task][metric]:.4f}" for task, metric in tasks]
        row += [f"{mean_score(point, str(result.metric)):.4f}"] if several else []
        rows.append(row)
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    if result.best is not None:
        better = "lowest" if result.metric == "loss" else "highest"
        mean = "mean " if several else ""
        lines.append(f"* {better} {mean}{titles[str(result.metric)]}; chosen on these rows, so measure it on others")
    return [*lines, *_notes(result)]


def _notes(result: SweepResult) -> list[str]:
    """Return what the merges noted, each note once, less what says what was swept."""
    told = [note for point in result.points for note in dict.fromkeys((point.summary or {}).get("notes", ()))]
    swept = tuple(f"{start}{key}=" for key in result.points[0].values for start in ("--sweep ", ""))
    counts = Counter(note for note in told if not note.startswith(swept))
    few = {note: f" ({count} of {len(result.points)} merges)" for note, count in counts.items()}
    return [f"note: {note}{few[note] if count < len(result.points) else ''}" for note, count in counts.items()]
