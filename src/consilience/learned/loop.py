"""The learning loop: steps, early stopping, history, and a state on disk from which an interrupted run goes on."""

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Protocol

import numpy as np

from consilience.checkpoints.json_files import parse_object
from consilience.coefficients.coefficients import Alpha
from consilience.errors import InputError
from consilience.methods.signature import Range
from consilience.optimizers.gradient import Loss, Optimizer, Terms
from consilience.progress import NullProgress, Progress
from consilience.workdir import write_file

#: Seconds between two states written to disk, and how many times that for each second that writing one takes.
SAVE_EVERY, SAVE_COST = 20.0, 2.5
#: Numbers of a state up to which every step keeps a copy of it, to be written if the step is interrupted.
SMALL = 1_000_000
#: Change when the meaning of a stored state changes.
VERSION = 1


@dataclass(frozen=True, kw_only=True)
class EarlyStopping:
    """On which rows it is decided when to stop, and when."""

    holdout: Annotated[float, Range(0, 0.9), "share of each expert's rows held out for early stopping"] = 0.0
    patience: Annotated[int, Range(1), "held-out checks (one every five steps) without a new best that end it"] = 4


@dataclass(frozen=True, kw_only=True)
class Loop:
    """How long is learned, and from how many samples a step."""

    batch: Annotated[int, Range(0), "samples per step, taken in turn from the experts; 0: all"] = 8
    steps: Annotated[int, Range(0), "optimizer steps"] = 40
    stopping: EarlyStopping = EarlyStopping()


@dataclass
class History:
    """What happened: the terms of the loss before each step, and (steps done, held-out loss) where it was taken."""

    terms: list[Terms] = field(default_factory=list[Terms])
    held_out: list[tuple[int, float]] = field(default_factory=list[tuple[int, float]])

    def lines(self) -> list[dict[str, Any]]:
        """Return one JSON-able object per step."""
        held = dict(self.held_out)
        return [
            {"step": i, "loss": sum(t.values()), **t} | ({"held_out": held[i + 1]} if i + 1 in held else {})
            for i, t in enumerate(self.terms)
        ]


@dataclass(frozen=True)
class Stopping:
    """Stop early: the held-out loss is taken at the start, every ``every`` steps and after the last.

    ``patience`` takes without a new best end the run. The start counts, so the best is never worse than it. ``on_best``
    is called at every new best, for what is learned beside the coefficients.
    """

    loss: Callable[[Alpha], float]
    every: int = 5
    patience: int = 4
    on_best: Callable[[], None] | None = None


@dataclass(frozen=True)
class Learned:
    """The coefficients found, the history, and the number of steps they are from."""

    alpha: Alpha
    history: History
    step: int


class Scalars(Protocol):
    """TensorBoard's writer, as far as it is used."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None:
        """Log one number."""
        ...


def descend(
    optimizer: Optimizer,
    loss: Loss,
    steps: int,
    *,
    stopping: Stopping | None = None,
    folder: Path | None = None,
    identity: Any = None,
    progress: Progress | None = None,
    scalars: Scalars | None = None,
) -> Learned:
    """Run an optimizer for ``steps`` steps, or until early stopping; continue where ``folder`` left off.

    Args:
        optimizer: what moves the coefficients.
        loss: the objective without the anchor.
        steps: most steps.
        stopping: early stopping on held-out samples: the best coefficients it saw are returned.
        folder: where the state is kept; None keeps none.
        identity: JSON-able facts that a state must share to be continued.
        progress: told of every step.
        scalars: a TensorBoard writer.
    """
    run = _Run(optimizer, stopping, folder, identity)
    start = run.restore()
    progress = progress or NullProgress()
    progress.advance(start)
    if steps and not run.history.held_out:
        run.check(0)
    saved, pause = time.monotonic(), SAVE_EVERY
    small = folder is not None and sum(np.size(value) for value in optimizer.state().values()) <= SMALL
    for number in range(start, steps):
        if run.hopeless:
            break
        before = optimizer.state() if small else None
        try:
            terms = optimizer.step(loss, number)
        except (KeyboardInterrupt, OSError, MemoryError):
            if before is not None:  # the optimizer may have stopped half-way; a large state is on disk, a little older
                run.save(number, before)
            raise
        run.history.terms.append(terms)
        due = stopping is not None and ((number + 1) % stopping.every == 0 or number + 1 == steps)
        held = run.check(number + 1) if due else None
        if scalars is not None:
            _log(scalars, number, terms, held)
        progress.advance(1, **terms, **({} if held is None else {"held_out": held}))
        if time.monotonic() - saved > pause or number + 1 == steps or run.hopeless:
            begun = time.monotonic()
            run.save(number + 1)
            saved = time.monotonic()
            pause = SAVE_EVERY * max(1.0, SAVE_COST * (saved - begun))
    best = run.best if run.best is not None else optimizer.alpha
    return Learned(best, run.history, run.best_step if run.best is not None else len(run.history.terms))


def _log(scalars: Scalars, number: int, terms: Terms, held: float | None) -> None:
    scalars.add_scalar("loss/total", sum(terms.values()), number)
    for name, value in terms.items():
        scalars.add_scalar(f"loss/{name}", value, number)
    if held is not None:
        scalars.add_scalar("loss/held_out", held, number)


class _Run:
    """Early stopping's memory and the state on disk."""

    def __init__(self, optimizer: Optimizer, stopping: Stopping | None, folder: Path | None, identity: Any) -> None:
        self.optimizer, self.stopping, self.folder = optimizer, stopping, folder
        self.key = hashlib.blake2b(json.dumps([VERSION, identity], sort_keys=True).encode(), digest_size=16).hexdigest()
        self.history = History()
        self.best: Alpha | None = None
        self.best_step = 0
        self.best_loss = float("inf")
        self.misses = 0

    @property
    def hopeless(self) -> bool:
        return self.stopping is not None and self.misses >= self.stopping.patience

    def check(self, done: int) -> float | None:
        """Take the held-out loss after ``done`` steps, if rows are held out."""
        if self.stopping is None:
            return None
        alpha = self.optimizer.alpha
        value = self.stopping.loss(alpha)
        self.history.held_out.append((done, value))
        if value < self.best_loss:
            self.best, self.best_loss, self.best_step, self.misses = alpha.copy(), value, done, 0
            if self.stopping.on_best is not None:
                self.stopping.on_best()
        else:
            self.misses += 1
        return value

    def save(self, done: int, state: dict[str, Any] | None = None) -> None:
        """Write what ``done`` steps led to; ``state`` is the optimizer's where it is not the present one."""
        if self.folder is None:
            return
        from safetensors.numpy import save

        self.folder.mkdir(parents=True, exist_ok=True)
        state = self.optimizer.state() if state is None else state
        arrays = {f"optimizer.{key}": np.atleast_1d(value) for key, value in state.items()}
        if self.best is not None:
            arrays["best"] = self.best
        facts = {
            "key": self.key,
            "done": done,
            "scalars": sorted(key for key, value in state.items() if np.ndim(value) == 0),
            "terms": self.history.terms,
            "held_out": self.history.held_out,
            "best_step": self.best_step,
            "best_loss": self.best_loss if self.best is not None else None,
            "misses": self.misses,
        }
        contiguous = {key: np.ascontiguousarray(value) for key, value in arrays.items()}
        write_file(self.folder / "state.safetensors", save(contiguous, {"facts": json.dumps(facts)}))

    def _read(self) -> tuple[dict[str, Any], dict[str, Any]] | None:
        """Return the facts and arrays on disk, unless they are damaged or of another run: then it is learned again."""
        path = None if self.folder is None else self.folder / "state.safetensors"
        if path is None or not path.is_file():
            return None
        from consilience.checkpoints.open import open_checkpoint

        try:
            checkpoint = open_checkpoint(path)
        except InputError:
            return None
        try:
            facts = parse_object(checkpoint.metadata.get("facts", "{}").encode(), str(path))
            if facts.get("key") != self.key:
                return None
            return facts, {name: _array(checkpoint, name) for name in checkpoint.tensors}
        except InputError:
            return None
        finally:
            checkpoint.storage.close()

    def restore(self) -> int:
        """Take back the state on disk, if it is of this run, and return the number of steps it has done."""
        found = self._read()
        if found is None:
            return 0
        facts, arrays = found
        state = {name.removeprefix("optimizer."): v for name, v in arrays.items() if name.startswith("optimizer.")}
        self.optimizer.restore({k: v.reshape(()) if k in facts["scalars"] else v for k, v in state.items()})
        self.history = History(facts["terms"], [(int(a), float(b)) for a, b in facts["held_out"]])
        self.best, self.best_step = arrays.get("best"), facts["best_step"]
        self.best_loss = float("inf") if facts["best_loss"] is None else facts["best_loss"]
        self.misses = facts["misses"]
        return int(facts["done"])


def _array(checkpoint: Any, name: str) -> Any:
    kinds = {"F64": "<f8", "F32": "<f4", "I64": "<i8", "I32": "<i4", "BOOL": "?", "U8": "u1"}
    info = checkpoint.tensors[name]
    return checkpoint.read(name).view(kinds[info.dtype.name]).reshape(info.shape).copy()


def schedule(experts: Sequence[int], size: int, seed: int, step: int) -> list[int]:
    """Return the samples of one step: ``size`` of them, taken in turn from the experts; 0 or as many as there are: all.

    Every expert's samples are passed over in a fresh random order each round, a function of seed and step alone. A
    sample that would come twice in a step, because its expert has few, comes once, and the step is that much smaller.
    """
    if size <= 0 or size >= len(experts):
        return list(range(len(experts)))
    own = {e: [i for i, x in enumerate(experts) if x == e] for e in sorted(set(experts))}
    out: list[int] = []
    for position in range(step * size, (step + 1) * size):
        expert = list(own)[position % len(own)]
        turn, place = divmod(position // len(own), len(own[expert]))
        order = np.random.default_rng([seed, expert, turn]).permutation(len(own[expert]))
        chosen = own[expert][int(order[place])]
        if chosen not in out:
            out.append(chosen)
    return out
