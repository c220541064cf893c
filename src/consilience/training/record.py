"""What a training run writes about itself."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from consilience.checkpoints.json_files import read_object
from consilience.errors import InputError
from consilience.training.settings import Precision, Settings

#: The record's name in an output.
RECORD = "training.json"
#: Steps whose losses one point of the curve averages.
WINDOW = 10


@dataclass(frozen=True, slots=True)
class TaskShare:
    """A task's part in the training: its rows, how many were drawn (with repetition), and the tokens they scored.

    ``digest`` identifies the rows; ``cut`` counts rows whose answer does not fit into the model's context.
    """

    name: str
    path: str | None
    digest: str
    rows: int
    drawn: int
    tokens: int
    cut: int

    @property
    def epochs(self) -> float:
        """Passes over the task's rows."""
        return self.drawn / self.rows


@dataclass(frozen=True, slots=True)
class CurvePoint:
    """Losses in nats per response token, averaged over the ten steps that end with ``step`` (counted from 1)."""

    step: int
    loss: float
    tasks: dict[str, float]


@dataclass(frozen=True, slots=True)
class TrainingRecord:
    """How a model or adapter was trained: enough to train it again.

    ``seconds`` is the time of the steps, over all the runs it took; ``parameters`` how many numbers were trained.
    """

    base: str
    base_digest: str
    tasks: tuple[TaskShare, ...]
    learning_rate: float
    steps: int
    batch_size: int
    warmup: float
    weight_decay: float
    clip: float
    seed: int
    precision: Precision
    lora_rank: int | None
    lora_alpha: float | None
    target_modules: tuple[str, ...] | None
    parameters: int
    curve: tuple[CurvePoint, ...]
    first_loss: float
    final_loss: float
    seconds: float
    threads: int
    device: str
    versions: dict[str, str]
    optimizer: str = "AdamW, betas 0.9 and 0.999, epsilon 1e-8"
    schedule: str = "linear warm-up, then cosine to zero"
    loss: str = "mean over the batch's tasks of the mean nats per response token"

    def as_json(self) -> str:
        """The record as readable JSON."""
        return json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n"


def read_record(path: Path | str) -> TrainingRecord:
    """Read a ``training.json``.

    Raises:
        InputError: the file cannot be read or is no training record.
    """
    path = Path(path)
    value: Any = read_object(path)
    try:
        tasks = tuple(TaskShare(**share) for share in value.pop("tasks"))
        curve = tuple(CurvePoint(**point) for point in value.pop("curve"))
        modules = value.pop("target_modules")
        names = None if modules is None else tuple(modules)
        return TrainingRecord(**value, tasks=tasks, curve=curve, target_modules=names)
    except (KeyError, TypeError) as error:
        raise InputError(f"{path}: is no record of a training ({error}); name a training.json of fine_tune") from None


def curve(losses: Sequence[Mapping[int, float]], names: Sequence[str]) -> tuple[CurvePoint, ...]:
    """Average each step's losses by task index over windows of ten steps; the last window may be shorter."""
    points: list[CurvePoint] = []
    for start in range(0, len(losses), WINDOW):
        part = losses[start : start + WINDOW]
        means = {name: [step[k] for step in part if k in step] for k, name in enumerate(names)}
        tasks = {name: _mean(values) for name, values in means.items() if values}
        points.append(CurvePoint(start + len(part), _mean([_mean(list(step.values())) for step in part]), tasks))
    return tuple(points)


def _mean(values: Sequence[float]) -> float:
    return round(sum(values) / len(values), 6)


def describe(
    settings: Settings, modules: tuple[str, ...] | None, losses: Sequence[Mapping[int, float]], names: Sequence[str]
) -> dict[str, Any]:
    """Return the fields of a record that follow from the settings, the adapted modules and every step's losses."""
    points = curve(losses, names)
    fields = {name: getattr(settings, name) for name in Settings.__dataclass_fields__}
    alpha = None if settings.lora_rank is None else settings.alpha
    ends = {"first_loss": _mean(list(losses[0].values())), "final_loss": points[-1].loss}
    return {**fields, "lora_alpha": alpha, "target_modules": modules, "curve": points, **ends}
