"""The experts of the doctor's study: small image tasks, a network trained a little on all of them, and SGD from there.

A task is a range of the classes of one data set. The heads are trained with the base, one a task, and frozen; experts
and merges are trunks, each one vector of parameters, so that a merge is a sum of vectors. What is trained is kept in
``.cache/vision/doctor``; the same setting gives the same weights on the same machine.
"""

import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save
from torch import Tensor
from torch.func import functional_call

from consilience.doctor.evidence.logs.curve import collect
from consilience.doctor.evidence.logs.facts import LARGEST, read_facts
from consilience.doctor.evidence.logs.reading import Reading
from consilience.doctor.evidence.training import Training, assemble
from consilience.errors import InputError, MachineError
from consilience.workdir import write_file
from suites.packages import locked
from suites.vision import CACHE, data, nets
from suites.vision.images import DataSet, Images

#: Change when the meaning of a setting or the training itself changes.
VERSION = 1
#: Rows that are measured at once.
_BATCH = 256
#: Steps of a training at which the noise of its gradients is measured.
_WATCHED = 20


@dataclass(frozen=True)
class Suite:
    """Tasks and their base; ``parts`` cuts a data set's classes into so many tasks.

    ``validation``, ``train``, ``base`` and ``test`` are rows a task, all apart; of the last two, a small data set gives
    what it has. The base is trained by AdamW at a constant rate, ``steps`` steps of ``batch`` rows of every task: where
    a training ends that falls to rate 0, the tasks' gradients cancel, and the mean of experts gains nothing.
    """

    sources: tuple[str, ...] = ("fashion-mnist", "mnist", "coloured-digits", "digits")
    parts: int = 2
    size: int = 28
    net: str = "vit4"
    width: int = 64
    patch: int = 7
    validation: int = 100
    train: int = 400
    base: int = 2000
    test: int = 300
    steps: int = 200
    batch: int = 24
    learning_rate: float = 1e-3

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks, the parts of a data set together."""
        return tuple(f"{source}/{part}" for source in self.sources for part in range(self.parts))


@dataclass(frozen=True)
class Tuning:
    """How an expert is trained: constant rate, minibatches drawn with replacement from its first ``rows`` rows."""

    optimizer: str
    learning_rate: float
    steps: int
    batch: int
    rows: int

    @property
    def name(self) -> str:
        """A name for files and tables."""
        return f"{self.optimizer}-lr{self.learning_rate:g}-t{self.steps}-b{self.batch}-n{self.rows}"

    @classmethod
    def of(cls, name: str) -> "Tuning":
        """Return the setting with a name."""
        optimizer, rate, steps, batch, rows = re.split(r"-(?:lr|t|b|n)(?=\d)", name)
        return cls(optimizer, float(rate), int(steps), int(batch), int(rows))

    @property
    def length(self) -> float:
        """H."""
        return self.learning_rate * self.steps


@dataclass(frozen=True)
class Rows:
    """Inputs, float32 [n, C, H, W], and labels, int64 [n]."""

    inputs: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: Sequence[int] | Tensor) -> "Rows":
        """Return some rows."""
        index = torch.as_tensor(rows, dtype=torch.int64)
        return Rows(self.inputs[index], self.labels[index])


@dataclass(frozen=True)
class Task:
    """One task's rows, which no two purposes share: probes are validation rows, and test rows are for the report."""

    name: str
    validation: Rows
    train: Rows
    base: Rows
    test: Rows


PURPOSES = ("validation", "train", "base", "test")


@dataclass(frozen=True)
class Score:
    """Mean loss, in nats, and share of right answers."""

    loss: float
    accuracy: float


class World:
    """The tasks and their base, whose trunk is ``theta``: a network is a vector of parameters and a task's head."""

    def __init__(self, suite: Suite, tasks: Sequence[Task], net: torch.nn.Module) -> None:
        self.suite, self.tasks, self.net = suite, tuple(tasks), net
        if any(True for _ in net.buffers()):
            raise InputError(f"net={suite.net}: has running statistics, which a sum of vectors has not; choose a vit")
        shapes = {name: one.shape for name, one in net.named_parameters() if not name.startswith("head.")}
        self.shapes = shapes
        self.theta = torch.cat([one.detach().flatten() for name, one in net.named_parameters() if name in shapes])
        self.heads: dict[str, Tensor] = {}

    def logits(self, theta: Tensor, task: int, inputs: Tensor) -> Tensor:
        """Return what trunk ``theta`` says with a task's head, [B, classes]."""
        parts = theta.split([shape.numel() for shape in self.shapes.values()])
        state = {name: part.view(shape) for (name, shape), part in zip(self.shapes.items(), parts, strict=True)}
        head = {f"head.{key}": self.heads[f"{key}.{task}"] for key in ("weight", "bias")}
        return functional_call(self.net, state | head, (inputs,), strict=True)

    def loss(self, theta: Tensor, task: int, rows: Rows) -> Tensor:
        """Return the mean loss of some rows."""
        return F.cross_entropy(self.logits(theta, task, rows.inputs), rows.labels)

    def gradient(self, theta: Tensor, task: int, rows: Rows) -> tuple[float, Tensor]:
        """Return the mean loss of some rows, and its gradient by the trunk."""
        place = theta.detach().requires_grad_()
        loss = self.loss(place, task, rows)
        (found,) = torch.autograd.grad(loss, place)
        return float(loss.detach()), found

    @torch.no_grad()
    def score(self, theta: Tensor, task: int, rows: Rows) -> Score:
        """Measure a trunk on some rows of a task."""
        said = torch.cat([self.logits(theta, task, part) for part in rows.inputs.split(_BATCH)])
        right = float((said.argmax(1) == rows.labels).double().mean())
        return Score(float(F.cross_entropy(said, rows.labels)), right)


# Tasks.


def gather(suite: Suite, seed: int, load: Callable[[str], DataSet] = data.load) -> dict[str, Images]:
    """Return every task's images by ``TASK/PURPOSE``, drawn by ``seed``; labels count from 0 within a task.

    Raises:
        InputError: a data set has too few images.
    """
    found: dict[str, Images] = {}
    for name, source in ((name, name.rpartition("/")[0]) for name in suite.tasks):
        whole = load(source)
        part, each = int(name.rpartition("/")[2]), len(whole.classes) // suite.parts
        generator = np.random.default_rng([seed, suite.tasks.index(name)])
        published = [_of_classes(one, part * each, each, generator) for one in (whole.train, whole.test)]
        least = suite.validation + suite.train
        if least >= len(published[0]):
            raise InputError(f"{name}: more than {least} training images are wanted of {len(published[0])}; lower them")
        cuts = {
            "validation": _cut(published[0], 0, suite.validation),
            "train": _cut(published[0], suite.validation, suite.train),
            "base": _cut(published[0], least, suite.base),
            "test": _cut(published[1], 0, suite.test),
        }
        found |= {f"{name}/{purpose}": resized(images, suite.size) for purpose, images in cuts.items()}
    return found


def _of_classes(images: Images, first: int, count: int, generator: np.random.Generator) -> Images:
    """Return the images of some classes in a random order."""
    labels = images.labels.numpy()
    rows = generator.permutation(np.flatnonzero((labels >= first) & (labels < first + count)))
    chosen = images.take(rows)
    return Images(chosen.images, chosen.labels - first)


def _cut(images: Images, start: int, count: int) -> Images:
    return Images(images.images[start : start + count], images.labels[start : start + count])


def resized(images: Images, size: int) -> Images:
    """Return images of three channels and ``size`` pixels; coloured ones as what stands out from their ground."""
    pixels = images.images.float()
    pixels = (_ink(pixels) if pixels.shape[1] == 3 else pixels).expand(-1, 3, -1, -1)
    if pixels.shape[-1] != size:
        pixels = F.interpolate(pixels, (size, size), mode="bilinear", antialias=True)
    return Images(pixels.round().clamp(0, 255).to(torch.uint8), images.labels)


def _ink(pixels: Tensor) -> Tensor:
    """Return every pixel's distance from its image's most usual colour, [N, 1, H, W], the farthest at 255.

    In their own colours, cluttered digits are not learned from a few hundred rows at all.
    """
    ground = pixels.flatten(2).median(2).values[:, :, None, None]
    away = (pixels - ground).square().sum(1, keepdim=True).sqrt()
    return 255 * away / away.amax((2, 3), keepdim=True).clamp(min=1)


# The base.


def world(suite: Suite, seed: int, cache: Path | None = None, load: Callable[[str], DataSet] = data.load) -> World:
    """Return the tasks and the base of a suite, drawn and trained by ``seed`` unless they are in the cache.

    Raises:
        InputError: the suite is wrong.
        MachineError: a data set cannot be fetched, or the cache cannot be written.
    """
    place = folder(suite, seed, cache)
    with locked(place / ".lock"):
        if not (place / "tasks.safetensors").is_file():
            images = gather(suite, seed, load)
            both = {name: {"images": one.images, "labels": one.labels} for name, one in images.items()}
            flat = {f"{name}/{key}": value.contiguous() for name, one in both.items() for key, value in one.items()}
            write_file(place / "tasks.safetensors", save(flat))
        stored = load_file(place / "tasks.safetensors")
        images = {name.removesuffix("/images"): Images(value, stored[name.removesuffix("images") + "labels"])
                  for name, value in stored.items() if name.endswith("/images")}  # fmt: skip
        made = _untrained(suite, images, seed)
        if not (place / "base.safetensors").is_file():
            theta, heads = _joint(made, seed)
            write_file(place / "base.safetensors", save({"theta": theta, **heads}))
        kept = load_file(place / "base.safetensors")
    made.theta = kept.pop("theta")
    made.heads = kept
    return made


def folder(suite: Suite, seed: int, cache: Path | None = None) -> Path:
    """Return where a suite's tasks, base and experts of one seed are kept."""
    digest = hashlib.blake2b(json.dumps([VERSION, asdict(suite)]).encode(), digest_size=4).hexdigest()
    return (cache or CACHE) / "doctor" / f"{suite.net}-{len(suite.tasks)}-{digest}-seed{seed}"


def _untrained(suite: Suite, images: Mapping[str, Images], seed: int) -> World:
    shown = Images(*(torch.cat([getattr(images[f"{name}/base"], key) for name in suite.tasks])
                     for key in ("images", "labels")))  # fmt: skip
    classes = tuple(map(str, range(int(shown.labels.max()) + 1)))
    joint = DataSet("joint", classes, shown, shown)
    spec = nets.spec_for(suite.net, joint, width=suite.width, patch=suite.patch)
    tasks: list[Task] = []
    for name in suite.tasks:
        rows = {key: images[f"{name}/{key}"] for key in PURPOSES}
        tasks.append(Task(name, **{key: Rows(spec.inputs(one.images), one.labels) for key, one in rows.items()}))
    return World(suite, tasks, nets.build(spec, seed).eval())


def _joint(made: World, seed: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Train the trunk with one head a task, all of which start from the same weights."""
    generator = np.random.default_rng([seed, 1])
    start = dict(made.net.named_parameters())
    theta = made.theta.clone().requires_grad_()
    made.heads = {
        f"{key}.{task}": start[f"head.{key}"].detach().clone().requires_grad_()
        for task in range(len(made.tasks))
        for key in ("weight", "bias")
    }
    suite = made.suite
    optimizer = torch.optim.AdamW([theta, *made.heads.values()], lr=suite.learning_rate, weight_decay=0.05)
    for _ in range(suite.steps):
        optimizer.zero_grad(set_to_none=True)
        for number, task in enumerate(made.tasks):
            rows = task.base.take(generator.integers(0, len(task.base), suite.batch).tolist())
            (made.loss(theta, number, rows) / len(made.tasks)).backward()
        optimizer.step()
    return theta.detach(), {name: one.detach() for name, one in made.heads.items()}


# Experts.


@dataclass(frozen=True)
class Expert:
    """A task vector [P] and what its log says."""

    task: int
    tuning: Tuning
    tau: Tensor
    training: Training


def expert(made: World, task: int, tuning: Tuning, seed: int, cache: Path | None = None) -> Expert:
    """Return a task's expert, trained unless it is in the cache.

    Raises:
        InputError: the tuning wants more rows than there are, or an unknown optimizer.
        MachineError: the training's loss is no number any more, or the cache cannot be written.
    """
    place = folder(made.suite, seed, cache) / "experts" / f"{tuning.name}-{task}.safetensors"
    log = place.with_suffix(".json")
    with locked(place.parent / f".{place.stem}.lock"):
        if not place.is_file():
            tau, said = train(made, task, tuning, seed)
            write_file(log, json.dumps(said).encode())
            write_file(place, save({"tau": tau}))
    record = json.loads(log.read_text("utf-8"))
    return Expert(task, tuning, load_file(place)["tau"], training_of(record, made.tasks[task].name))


def training_of(record: Mapping[str, Any], name: str) -> Training:
    """Return a log as the doctor reads it."""
    facts = read_facts(record["facts"], name, strict=True)
    return assemble([Reading(facts, collect(enumerate(record["curve"], 1), name))], name)


def train(made: World, task: int, tuning: Tuning, seed: int) -> tuple[Tensor, dict[str, Any]]:
    """Train the base's trunk for one task; returns the task vector and the log: loss, rate and gradient by step.

    Raises:
        InputError: the tuning wants more rows than there are, or an unknown optimizer.
        MachineError: the loss is no number any more.
    """
    own = made.tasks[task].train
    if tuning.rows > len(own):
        raise InputError(f"{tuning.name}: wants {tuning.rows} rows of {len(own)}; lower them")
    generator = np.random.default_rng([seed, task, 2])
    theta = made.theta.clone()
    optimizer = _optimizer(theta, tuning)
    curve: list[dict[str, float]] = []
    noise = _Noise(tuning.batch)
    for step in range(tuning.steps):
        rows = own.take(generator.integers(0, tuning.rows, tuning.batch).tolist())
        watched = tuning.batch > 1 and step % max(1, tuning.steps // _WATCHED) == 0
        loss, theta.grad = noise.gradient(made, theta, task, rows) if watched else made.gradient(theta, task, rows)
        if not math.isfinite(loss):
            raise MachineError(f"{made.tasks[task].name}, {tuning.name}: the loss is {loss} at step {step}")
        norm = float(theta.grad.norm())
        curve.append({"loss": loss, "learning_rate": tuning.learning_rate, "grad_norm": norm})
        optimizer.step()
    facts: dict[str, Any] = {
        "optimizer": tuning.optimizer, "steps": tuning.steps, "batch_size": tuning.batch, "rows": tuning.rows,
        "learning_rate": tuning.learning_rate, "adapter": "full", "noise_scale": noise.scale,
    }  # fmt: skip
    return theta.detach() - made.theta, {"facts": facts, "curve": curve}


def _optimizer(theta: Tensor, tuning: Tuning) -> torch.optim.Optimizer:
    if tuning.optimizer == "sgd":
        return torch.optim.SGD([theta], lr=tuning.learning_rate)
    if tuning.optimizer == "adam":
        return torch.optim.Adam([theta], lr=tuning.learning_rate)
    raise InputError(f"optimizer={tuning.optimizer}: there are sgd and adam")


class _Noise:
    """The gradient noise scale sigma^2 / ||grad f||^2 from gradients of a minibatch's halves.

    Of halves of m rows, E m ||g_1 - g_2||^2 / 2 = sigma^2 and E <g_1, g_2> = ||grad f||^2.
    """

    def __init__(self, batch: int) -> None:
        self.half = batch // 2
        self.variance = self.signal = 0.0

    def gradient(self, made: World, theta: Tensor, task: int, rows: Rows) -> tuple[float, Tensor]:
        """Return loss and gradient of a minibatch, by halves."""
        sides = [made.gradient(theta, task, rows.take(range(start, 2 * self.half, 2))) for start in (0, 1)]
        (first, one), (second, two) = sides
        self.variance += self.half / 2 * float((one - two).square().sum())
        self.signal += float(one @ two)
        return (first + second) / 2, (one + two) / 2

    @property
    def scale(self) -> float | None:
        """The noise scale, at most the largest number that a log may hold; None where nothing was measured."""
        if not self.variance:
            return None
        return min(LARGEST, self.variance / self.signal) if self.signal > 0 else LARGEST
