"""How experts were trained, from whatever their runs left behind, and how their trainings differ.

    H = sum_t eta_t                                  the training length; S = sum_t eta_t^2
    batch = per device * devices * accumulation
    scale_k = H_target / H_k                         tau_k scaled to what a training of length H_target would have moved

H measures how far plain SGD goes. With Adam, weight decay or low-rank factors it says less, so lengths are compared
among experts of one optimizer and one kind of training alone, and not at all where the optimizer is not known. Scaling
tau_k is the first-order equivalent of training for longer or shorter, after the fact; in the project's study it did
harm. What no file says is None.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np

from consilience.checkpoints.files import exists, why_absent
from consilience.doctor.evidence.logs.combine import Conflict, combine
from consilience.doctor.evidence.logs.curve import Curve
from consilience.doctor.evidence.logs.facts import fold, number, read_facts, same
from consilience.doctor.evidence.logs.folder import read_file, read_folder
from consilience.doctor.evidence.logs.lengths import Length
from consilience.doctor.evidence.logs.reading import Reading
from consilience.doctor.theory.bound import Maybe, gradient_power, temperature
from consilience.errors import InputError

#: Lengths of one optimizer whose largest is beyond so many times the smallest are unequal.
UNEQUAL = 1.1
#: Evenly spaced steps at which logged gradients and rates are brought together.
_SAMPLES = 10_000
#: Adam's relatives by name: the same rule with other storage.
_FAMILIES = ("adamw", "adam", "sgd", "adafactor", "lion", "adagrad", "rmsprop", "muon", "lamb", "lars", "sophia")
#: Words that make another rule of an optimizer: its steps are not what the plain one's are.
_OTHER_RULES = ("schedule_free", "schedulefree", "galore", "apollo", "stable", "grok", "ademamix")
_MOMENTUM = re.compile(r"momentum\W*([\d.]*\d)")


@dataclass(frozen=True, slots=True, eq=False)
class Training:
    """What is known of how an expert was trained; None where no file says it.

    ``learning_rate`` is the peak, ``highest_rate`` the highest that was logged, which may be less. ``warmup_steps`` may
    be a fraction of one, ``adapter`` is ``lora``, ``full`` or ``freeze``. ``sources`` has where each field was read
    from, by its name. ``unread`` holds a line for every file that was left unread.
    """

    name: str
    steps: int | None = None
    planned_steps: int | None = None
    learning_rate: float | None = None
    highest_rate: float | None = None
    schedule: str | None = None
    warmup_steps: float | None = None
    batch_size: int | None = None
    batch_per_device: int | None = None
    devices: int | None = None
    accumulation: int | None = None
    rows: int | None = None
    epochs: float | None = None
    optimizer: str | None = None
    weight_decay: float | None = None
    clip: float | None = None
    adapter: str | None = None
    lora_rank: int | None = None
    lora_alpha: float | None = None
    data: tuple[str, ...] | None = None
    noise_scale: float | None = None
    final_loss: float | None = None
    length: Length | None = None
    curve: Curve = field(default_factory=Curve)
    sources: Mapping[str, str] = field(default_factory=dict[str, str])
    conflicts: tuple[Conflict, ...] = ()
    unread: tuple[str, ...] = ()

    @property
    def family(self) -> str | None:
        """The optimizer without what does not change its steps, such as ``paged_adamw_8bit``'s pages and bits."""
        if self.optimizer is None:
            return None
        words = fold(self.optimizer)
        momentum = _MOMENTUM.search(self.optimizer.lower())
        if any(other in words for other in _OTHER_RULES) or (momentum and number(momentum[1])):
            return words
        return next((name for name in _FAMILIES if name in words), words)

    @property
    def gradient(self) -> Maybe:
        """The mean squared logged gradient norm; that of minibatches, before clipping."""
        logged = self.curve.series.get("grad_norm")
        return None if logged is None else float((logged.values**2).mean())

    @property
    def final_gradient(self) -> Maybe:
        """The mean squared gradient norm over the last tenth of the log."""
        logged = self.curve.series.get("grad_norm")
        return None if logged is None else float((logged.values[-max(1, len(logged) // 10) :] ** 2).mean())

    def power(self, variance: Maybe) -> Maybe:
        """Return ``sum_t 4 eta_t^2 (||grad f(x_t)||^2 + sigma^2)`` from the log, for ``bound.stability_bound``.

        Learning rates and norms are linear between logged steps; without rates, every step counts S / T.
        """
        gradients, rates = self.curve.series.get("grad_norm"), self.curve.series.get("learning_rate")
        if gradients is None or self.length is None or self.length.squares is None or not self.steps:
            return None
        at = np.linspace(1, self.steps, min(self.steps, _SAMPLES))
        norms = np.interp(at, gradients.steps, gradients.values)
        if rates is None or self.length.how not in ("logged", "interpolated"):
            eta = np.full(len(at), 1.0)
        else:
            eta = np.interp(at, rates.steps, rates.values)
        weight = float((eta**2).sum())
        power = gradient_power(eta.tolist(), norms.tolist(), variance)
        return None if power is None or weight == 0 else power * self.length.squares / weight

    @property
    def temperature(self) -> float | None:
        """SGD's temperature (``bound.temperature``); None where lengths or batch are not known."""
        if self.length is None or not self.length.value > 0:
            return None
        return temperature(squares=self.length.squares, length=self.length.value, batch=self.batch_size)


def read_training(source: str | Path | Mapping[str, Any] | Sequence[Any], where: str) -> Training:
    """Return what is known of an expert's training.

    Args:
        source: a file, a folder, plain values by field, or several of these: the first that says something counts, and
            what contradicts it is kept apart.
        where: the expert's name, for errors about plain values.

    Raises:
        InputError: a file is missing or malformed, or a key of the plain values is unknown or wrong; one line.
    """
    parts = source if isinstance(source, Sequence) and not isinstance(source, str) else [source]
    readings = [reading for part in parts for reading in _readings(part, where)]
    return assemble(readings, where)


def _readings(source: Any, where: str) -> list[Reading]:
    if isinstance(source, Mapping):
        return [Reading(read_facts(cast(Mapping[Any, Any], source), where, strict=True))]
    if not isinstance(source, str | Path):
        raise InputError(f"{where}: logs: must be a path or a mapping, not a {type(source).__name__}; name a log")
    path = Path(source)
    if not exists(path):
        raise InputError(f"{path}: {why_absent(path, what='log or folder')}")
    return read_folder(path) if path.is_dir() else [read_file(path)]


def _skipped(reading: Reading) -> list[str]:
    """Say what of a log's curve was left out."""
    if not reading.curve.skipped:
        return []
    return [
        f"{reading.curve.first_skipped}: is a value that no log can have, and was left out with "
        f"{reading.curve.skipped - 1} more"
    ]


def assemble(readings: Sequence[Reading], name: str) -> Training:
    """Return one training from what its files say: the first value of a field counts, others must agree with it."""
    said = combine(readings)
    fields = set(Training.__dataclass_fields__) - {"length"}
    named = {key: fact.value for key, fact in said.facts.items() if key in fields}
    return Training(
        name=name, **named, length=said.length, curve=said.curve, conflicts=said.conflicts,
        sources={key: fact.source for key, fact in said.facts.items()},
        unread=tuple(line for reading in readings for line in (*reading.unread, *_skipped(reading))),
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Lengths:
    """Experts of one optimizer and kind, by position, whose training lengths can be compared, or one of none known.

    ``scales`` are H_target / H_k, what to multiply each tau_k by; ``target`` is the median. ``variation`` is the
    variance of H over its squared mean, at equal weights. ``unequal`` says whether the largest is beyond ``UNEQUAL``
    times the smallest. ``approximate`` has why H says less here: ``optimizer``, ``weight decay``, ``adapter``, and how
    it was found where the log did not have it.
    """

    optimizer: str | None
    adapter: str | None
    experts: tuple[int, ...]
    values: tuple[float, ...]
    target: float
    scales: tuple[Maybe, ...]
    variation: float
    unequal: bool
    approximate: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Difference:
    """A field in which trainings differ, and its values by expert; None where it is not known."""

    field: str
    values: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Comparison:
    """What differs between trainings: comparable lengths, positions of experts without one, and differing fields."""

    lengths: tuple[Lengths, ...]
    unknown: tuple[int, ...]
    differences: tuple[Difference, ...]

    @property
    def unequal(self) -> bool:
        """Whether lengths differ within an optimizer."""
        return any(group.unequal for group in self.lengths)


#: Fields in which a difference is told; ``family`` is the optimizer's.
COMPARED = (
    "family", "adapter", "batch_size", "epochs", "rows", "data", "learning_rate", "schedule", "weight_decay",
    "lora_rank", "lora_alpha",
)  # fmt: skip


def compare(trainings: Sequence[Training]) -> Comparison:
    """Return how trainings differ; lengths within one optimizer and kind only, since H of another says something else.

    Experts whose optimizer is not known are a group each: they are compared with nobody.
    """
    groups: dict[tuple[str | int, str | None], list[int]] = {}
    for k, training in enumerate(trainings):
        if training.length is not None:
            groups.setdefault((training.family or k, training.adapter), []).append(k)
    lengths = [_grouped(trainings, members) for members in groups.values()]
    unknown = tuple(k for k, training in enumerate(trainings) if training.length is None)
    columns = [Difference(name, tuple(getattr(training, name) for training in trainings)) for name in COMPARED]
    return Comparison(tuple(lengths), unknown, tuple(column for column in columns if _differs(column.values)))


def _grouped(trainings: Sequence[Training], members: list[int]) -> Lengths:
    optimizer, adapter = trainings[members[0]].family, trainings[members[0]].adapter
    found = [(trainings[k], length) for k in members if (length := trainings[k].length) is not None]
    values = np.array([length.value for _, length in found])
    target, mean = float(np.median(values)), float(values.mean())
    return Lengths(
        optimizer, adapter, tuple(members), tuple(values.tolist()), target,
        scales=tuple(target / value if value > 0 else None for value in values.tolist()),
        variation=float((values / mean).var()) if mean > 0 else 0.0,
        unequal=bool(values.max() > UNEQUAL * values.min()),
        approximate=_approximate(optimizer, adapter, found),
    )  # fmt: skip


def _approximate(
    optimizer: str | None, adapter: str | None, found: Sequence[tuple[Training, Length]]
) -> tuple[str, ...]:
    reasons = [] if optimizer == "sgd" else ["optimizer"]
    reasons += ["weight decay"] if any(training.weight_decay for training, _ in found) else []
    reasons += [] if adapter == "full" else ["adapter"]
    return (*reasons, *sorted({length.how for _, length in found} - {"logged", "given"}))


def _differs(values: Sequence[Any]) -> bool:
    known = [value for value in values if value is not None]
    return any(not same(known[0], value) for value in known[1:])
