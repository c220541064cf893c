"""Train an expert's gates on its own rows, alone: no other expert is seen; resumable."""

import hashlib
import json
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from consilience.errors import InputError, MachineError
from consilience.progress import LossProgressOption, Progress, open_progress
from consilience.routing.expert import Expert
from consilience.routing.layer import LowRank
from consilience.routing.local.answers import answer_losses
from consilience.routing.local.gate_settings import GateSettings
from consilience.routing.local.gates import GatedLinear, gated
from consilience.routing.local.own_rows import check_rows, some_rows
from consilience.tasks.encoding import Encoded
from consilience.training.data import Examples
from consilience.training.losses import batch_loss
from consilience.training.record import CurvePoint, curve
from consilience.training.sampling import draw
from consilience.training.state import TrainingState, load_state, save_state
from consilience.training.step import descend

#: Rows that the loss and the gates are measured on before and after.
PROBE_ROWS = 16
#: Up to this many tokens a CPU is quicker at plain attention than at the fused one, whose backward pass is slow there.
SHORT = 256


@dataclass(frozen=True, slots=True)
class GateRecord:
    """How an expert's gates were trained.

    Attributes:
        expert: its name.
        tasks: a digest of the rows of each of its tasks.
        settings: of the training.
        parameters: how many numbers were trained.
        rows: how many of the rows the following were measured on, which were trained on too.
        loss_before: mean over tasks of the mean nats per response token with all gates at 1/2.
        loss_after: the same with the trained gates.
        mean_gate: mean of sigmoid(v . u) over modules and tokens, after training.
        curve: losses of the steps.
        seconds: of the steps, over all the runs it took.
    """

    expert: str
    tasks: dict[str, str]
    settings: GateSettings
    parameters: int
    rows: int
    loss_before: float
    loss_after: float
    mean_gate: float
    curve: tuple[CurvePoint, ...]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return json.loads(json.dumps(asdict(self)))


def train_gates(
    model: Any,
    name: str,
    factors: Mapping[str, LowRank],
    examples: Sequence[Examples],
    settings: GateSettings,
    state: Path | None = None,
    progress: LossProgressOption = False,
    *,
    checkpoint_seconds: float = 60.0,
) -> tuple[dict[str, Tensor], GateRecord]:
    """Learn v [in] of every module of an expert, in float32, and say how it went.

        L = mean_t  -sum_{i in t} sum_j log p(y_ij | x_i, y_i<j) / sum_{i in t} |y_i|,     t the tasks of a batch

    is minimised over the gates alone, in a model whose every adapted layer gives W u + sigmoid(v . u) B A u. The
    model is left as it was.

    Args:
        model: the base, a language model of transformers, causal or encoder-decoder.
        name: of the expert.
        factors: the expert's, by module.
        examples: the expert's own tasks, encoded for the model.
        settings: of the training.
        state: a folder to keep the state in; the same call goes on from there, on a CPU with one thread to the same
            bytes, and that of another expert, other rows or settings is left alone. (That the base is the same is the
            caller's to know.)
        progress: True for a bar with the loss (or lines) on standard error, a function called with (steps done, steps
            in all, loss) after every step, or a ``Progress``.
        checkpoint_seconds: seconds between saved states; the last is saved at the end.

    Raises:
        InputError: a row has no response, the expert does not fit the model, "float32" is asked of a model in another
            precision, or the loss is no longer finite.
        MachineError: memory ran out, or the state cannot be written or read.

    Source: PHATGOOSE (arXiv:2402.05859) and its code.
    """
    check_rows(name, examples)
    _check_precision(model, settings)
    expert = Expert(name, factors)
    file = None if state is None else _state_file(state, expert, examples, settings)
    rows = some_rows(examples, PROBE_ROWS)
    with (
        _memory(name),
        gated(model, expert) as layers,
        _quick_attention(model, examples),
        open_progress(progress, ("loss",)) as shown,
    ):
        shown.phase(f"gates of {name}", settings.steps)
        before, _ = _measure(model, layers, rows, settings)
        done = _train(model, layers, examples, settings, file, shown, checkpoint_seconds)
        after, opening = _measure(model, layers, rows, settings)
    gates = {module: layer.gate.detach().float().cpu() for module, layer in layers.items()}
    record = GateRecord(
        expert=name,
        tasks={one.task.name: one.task.digest for one in examples},
        settings=settings,
        parameters=sum(gate.numel() for gate in gates.values()),
        rows=len(rows),
        loss_before=before,
        loss_after=after,
        mean_gate=opening,
        curve=curve(done.losses, [one.task.name for one in examples]),
        seconds=round(done.seconds, 1),
    )
    return gates, record


def _check_precision(model: Any, settings: GateSettings) -> None:
    if settings.precision == "float32" and model.dtype not in (torch.float32, torch.float64):
        kind = str(model.dtype).removeprefix("torch.")
        raise InputError(f"precision: the base is loaded in {kind}, not in float32; load it so, or use mixed")


def _state_file(state: Path, expert: Expert, examples: Sequence[Examples], settings: GateSettings) -> Path:
    """Return the file of this very training: what it depends on is in its name."""
    known = hashlib.sha256(json.dumps([expert.name, asdict(settings)]).encode())
    for one in examples:
        known.update(f"{one.task.name}/{one.task.digest}/{len(one.sequences)}".encode())
    for module, factors in sorted(expert.factors.items()):
        known.update(module.encode())
        for part in (factors.a, factors.b):
            known.update(part.double().cpu().numpy().tobytes())
    try:
        state.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MachineError(f"{state}: cannot be made ({error.strerror}); mend it, then run this again") from None
    return state / f"gates-{known.hexdigest()[:32]}.safetensors"


@contextmanager
def _memory(name: str) -> Generator[None]:
    """Turn the ways memory runs out into one line."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        said = str(error)
        if isinstance(error, MemoryError) or "out of memory" in said or "can't allocate memory" in said:
            raise MachineError(f"expert {name!r}: not enough memory for its gates; lower batch_size") from error
        raise


@contextmanager
def _quick_attention(model: Any, examples: Sequence[Examples]) -> Generator[None]:
    """Compute attention the way whose backward pass is the quickest, within."""
    config: Any = model.config
    longest = max(len(sequence.inputs) for one in examples for sequence in one.sequences)
    fused = getattr(config, "_attn_implementation", None) == "sdpa" and not config.sub_configs
    if not fused or config.is_encoder_decoder or model.device.type != "cpu" or longest > SHORT:
        yield
        return
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation("sdpa")


def _autocast(model: Any, settings: GateSettings) -> torch.autocast:
    return torch.autocast(model.device.type, torch.bfloat16, enabled=settings.precision == "mixed")


@torch.no_grad()
def _measure(
    model: Any, layers: Mapping[str, GatedLinear], rows: Sequence[tuple[int, Encoded]], settings: GateSettings
) -> tuple[float, float]:
    """Return the loss of rows, and the mean gate; rows pass one by one, so that no gate of padding counts."""
    openings: dict[GatedLinear, list[Tensor]] = {layer: [] for layer in layers.values()}

    def look(layer: GatedLinear, inputs: tuple[Tensor, ...]) -> None:
        openings[layer].append(layer.opening(inputs[0]).flatten())

    handles = [layer.register_forward_pre_hook(look) for layer in openings]
    try:
        with _autocast(model, settings):
            found = [answer_losses(model, [sequence], [task]) for task, sequence in rows]
    finally:
        for handle in handles:
            handle.remove()
    loss, _ = batch_loss(torch.cat([nats for nats, _ in found]), torch.cat([tasks for _, tasks in found]))
    means = [torch.cat(seen).mean() for seen in openings.values() if seen]
    return float(loss), float(torch.stack(means).mean())


def _train(
    model: Any,
    layers: Mapping[str, GatedLinear],
    examples: Sequence[Examples],
    settings: GateSettings,
    file: Path | None,
    progress: Progress,
    checkpoint_seconds: float,
) -> TrainingState:
    """Take the steps that are left; return where the training stands."""
    gates: dict[str, Any] = {module: layer.gate for module, layer in layers.items()}
    optimizer = torch.optim.AdamW(
        gates.values(), lr=settings.learning_rate, weight_decay=settings.weight_decay, fused=True
    )
    done = TrainingState() if file is None else load_state(file, gates, optimizer)
    progress.advance(done.step)
    saved, taken = time.monotonic(), False
    while done.step < settings.steps:
        started = time.monotonic()
        done.losses.append(_step(model, list(gates.values()), examples, settings, optimizer, done.step))
        done.step += 1
        done.seconds += time.monotonic() - started
        latest, taken = done.losses[-1], True
        progress.advance(1, loss=sum(latest.values()) / len(latest))
        if file is not None and time.monotonic() - saved >= checkpoint_seconds:
            save_state(file, gates, optimizer, done)
            saved, taken = time.monotonic(), False
    if file is not None and taken:
        save_state(file, gates, optimizer, done)
    return done


def _step(
    model: Any, gates: list[Tensor], examples: Sequence[Examples], settings: GateSettings, optimizer: Any, step: int
) -> dict[int, float]:
    """Take one optimizer step and return the losses by task."""
    pairs = draw([len(one.sequences) for one in examples], settings.batch_size, step, settings.seed)
    with _autocast(model, settings):
        nats, tasks = answer_losses(model, [examples[k].sequences[i] for k, i in pairs], [k for k, _ in pairs])
        loss, losses = batch_loss(nats, tasks)
    descend(loss, gates, optimizer, settings.learning_rate_at(step), settings.clip, f"step {step + 1} of the gates")
    return losses
