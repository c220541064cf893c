"""Fine-tune one model on several tasks' rows jointly, all weights or a LoRA; resumable."""

import contextlib
import platform
import time
from collections.abc import Generator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from consilience.checkpoints.files import path_of
from consilience.checkpoints.reference import resolve
from consilience.engine.output import check_side_files
from consilience.errors import InputError, MachineError
from consilience.progress import LossProgressOption, Progress, open_progress
from consilience.tasks.cache import fingerprint
from consilience.tasks.gradients import gradients
from consilience.tasks.load import check_device, check_folder, require_transformers
from consilience.tasks.rows import Task
from consilience.training.data import Examples, read_examples
from consilience.training.losses import batch_loss, collate, token_losses
from consilience.training.model import Trainee, load_trainee, write_trained
from consilience.training.record import RECORD, TaskShare, TrainingRecord, describe, read_record
from consilience.training.sampling import draw
from consilience.training.settings import Precision, Settings
from consilience.training.state import STATE, TrainingState, load_state, save_state
from consilience.training.step import descend
from consilience.workdir import OURS, digest_of, workdir

#: Writing checkpoints may take this share of the time.
_CHECKPOINT_SHARE = 0.05


def fine_tune(
    base: Path | str,
    tasks: Sequence[Task | str | Path],
    out: Path | str,
    *,
    learning_rate: float,
    steps: int,
    lora_rank: int | None = None,
    lora_alpha: float | None = None,
    target_modules: Sequence[str] | None = None,
    batch_size: int = 8,
    warmup: float = 0.06,
    weight_decay: float = 0.0,
    clip: float = 1.0,
    seed: int = 0,
    precision: Precision = "mixed",
    threads: int | None = None,
    device: str = "cpu",
    checkpoint_seconds: float = 60.0,
    force: bool = False,
    progress: LossProgressOption = False,
) -> TrainingRecord:
    r"""Fine-tune a model on the labelled rows of one or several tasks, in equal shares.

    Minimises, with AdamW, the mean over the batch's tasks t of the mean loss per response token,

        L = mean_t  -sum_{i in t} sum_j log p(y_ij | x_i, y_i<j) / sum_{i in t} |y_i|,

    over responses only, under the model's chat template (``tasks.encode`` says which tokens count: of choices, the
    right one's; of ``text`` rows, all). On one task this makes an expert; on all tasks it is mixture training, the
    reference a merge of the experts is compared with. Row g of the run comes from task g mod K; each task's rows are
    passed over in orders seeded by (seed, task, pass), as often as it takes. Dropout is off.

    Everything is made in OUT.partial, and OUT appears whole. The state is saved there about once a minute, so the same
    call continues a run that was stopped, on a CPU with one thread to the same bytes. A partial run of anything else is
    discarded.

    Args:
        base: a Hugging Face folder of a decoder-only language model, with its tokenizer.
        tasks: tasks, or JSONL files as ``PATH`` or ``NAME=PATH``; every row needs a response.
        out: folder to make: a model that transformers loads, or with ``lora_rank`` a PEFT adapter. The record is
            written to OUT/consilience/training.json, for an adapter to OUT/training.json.
        learning_rate: the peak, reached by a linear warm-up and followed by a cosine to zero.
        steps: optimizer steps.
        lora_rank: rank of LoRA factors to train; None trains all weights.
        lora_alpha: factors are scaled by alpha / rank; None: twice the rank.
        target_modules: names of the modules that get factors; None: every linear layer but the output layer.
        batch_size: rows in a step.
        warmup: share of the steps to warm up over.
        weight_decay: decoupled, as a share of the weight per unit of learning rate.
        clip: bound on the Euclidean norm of the gradient.
        seed: of the orders of rows and of the factors A.
        precision: "mixed" computes in bfloat16 under autocast on float32 weights and writes bfloat16 (a LoRA's frozen
            weights are held in bfloat16); "float32" computes and writes float32, which suits a base stored in float32:
            written in bfloat16, its task vector would hold the rounding of every weight.
        threads: of torch; None leaves them as they are.
        device: a torch device.
        checkpoint_seconds: seconds between saved states; up to ten times as many where saving takes over a twentieth of
            the time.
        force: replace what stands at ``out``.
        progress: True for a bar with the loss (or lines) on standard error, a function called with (steps done, steps
            in all, loss) after every step, or a ``Progress``.

    Raises:
        InputError: a setting, the base or a row does not suit, or the loss is no longer finite; nothing is left behind.
        MachineError: memory or disk ran out; OUT.partial is kept and the same call continues.
    """
    require_transformers("training")
    modules = None if target_modules is None else tuple(target_modules)
    settings = Settings(
        learning_rate=learning_rate,
        steps=steps,
        lora_rank=lora_rank,
        lora_alpha=lora_alpha,
        target_modules=modules,
        batch_size=batch_size,
        warmup=warmup,
        weight_decay=weight_decay,
        clip=clip,
        seed=seed,
        precision=precision,
    )
    folder, out = _base(base), path_of(out, "out")
    check_device(device)
    if lora_rank is None:
        check_side_files(folder)
    data = read_examples(folder, tasks)
    inputs = [folder, *(one.task.path for one in data if one.task.path is not None)]
    plan = {"base": fingerprint(folder), "tasks": [one.task.digest for one in data], **asdict(settings)}
    with (
        workdir(out, digest_of(plan), force=force, inputs=inputs) as work,
        _threads(threads),
        gradients(),
        open_progress(progress, ("loss",)) as shown,
    ):
        if work.delivered is not None:
            return read_record(_record_folder(out, lora_rank) / RECORD)
        longest = max(len(one.inputs) for part in data for one in part.sequences)
        with _memory(folder):
            trainee = load_trainee(folder, str(base), settings, device, longest)
            done = _train(trainee, data, settings, work.path / STATE, checkpoint_seconds, shown)
        record = _record(str(base), str(plan["base"]), data, settings, trainee, done, device)
        result = work.new_result()
        write_trained(trainee, settings, folder, result)
        ours = _record_folder(result, lora_rank)
        ours.mkdir(exist_ok=True)
        (ours / RECORD).write_text(record.as_json(), encoding="utf-8")
        work.deliver({})
    return record


def _record_folder(out: Path, lora_rank: int | None) -> Path:
    return out / OURS if lora_rank is None else out


def _base(base: Path | str) -> Path:
    place = resolve(str(base))
    if place.adapter is not None:
        raise InputError(f"{base}: names an adapter, and training starts from a model; merge the two first")
    check_folder(place.model)
    return place.model


@contextlib.contextmanager
def _threads(threads: int | None) -> Generator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def _memory(base: Path) -> Generator[None]:
    """Turn the ways memory runs out into one line."""
    try:
        yield
    except MemoryError as error:
        raise MachineError(f"{base}: not enough memory to train it; lower batch_size") from error
    except RuntimeError as error:
        if "out of memory" in str(error) or "can't allocate memory" in str(error):
            raise MachineError(f"{base}: not enough memory to train it; lower batch_size") from error
        raise


def _train(
    trainee: Trainee, data: Sequence[Examples], settings: Settings, state: Path, every: float, progress: Progress
) -> TrainingState:
    """Take the steps that are left, saving the state now and then; return where the run stands."""
    import torch

    parameters = list(trainee.parameters.values())
    optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay, fused=True)
    done = load_state(state, trainee.parameters, optimizer)
    progress.phase("training", settings.steps)
    progress.advance(done.step)
    saved, pause = time.monotonic(), every
    while done.step < settings.steps:
        started = time.monotonic()
        done.losses.append(_step(trainee, data, settings, optimizer, done.step))
        done.step += 1
        done.seconds += time.monotonic() - started
        latest = done.losses[-1]
        progress.advance(1, loss=sum(latest.values()) / len(latest))
        if time.monotonic() - saved >= pause:
            started = time.monotonic()
            save_state(state, trainee.parameters, optimizer, done)
            saved = time.monotonic()
            pause = min(max(every, (saved - started) / _CHECKPOINT_SHARE), 10 * every)
    return done


def _step(
    trainee: Trainee, data: Sequence[Examples], settings: Settings, optimizer: Any, step: int
) -> dict[int, float]:
    """Take one optimizer step and return the losses by task."""
    import torch

    model, parameters = trainee.model, list(trainee.parameters.values())
    pairs = draw([len(one.sequences) for one in data], settings.batch_size, step, settings.seed)
    batch = collate([data[k].sequences[i] for k, i in pairs], [k for k, _ in pairs], model.device)
    with torch.autocast(model.device.type, torch.bfloat16, enabled=settings.precision == "mixed"):
        loss, losses = batch_loss(token_losses(model, batch), batch.tasks)
    descend(loss, parameters, optimizer, settings.learning_rate_at(step), settings.clip, f"step {step + 1}")
    return losses


def _record(
    base: str,
    digest: str,
    data: Sequence[Examples],
    settings: Settings,
    trainee: Trainee,
    done: TrainingState,
    device: str,
) -> TrainingRecord:
    import torch
    import transformers

    sizes = [len(one.sequences) for one in data]
    drawn = [pair for step in range(settings.steps) for pair in draw(sizes, settings.batch_size, step, settings.seed)]
    shares: list[TaskShare] = []
    for k, one in enumerate(data):
        rows = [one.sequences[i] for task, i in drawn if task == k]
        tokens, cut = sum(len(row.targets) for row in rows), sum(row.dropped > 0 for row in one.sequences)
        path = None if one.task.path is None else str(one.task.path)
        shares.append(TaskShare(one.task.name, path, one.task.digest, sizes[k], len(rows), tokens, cut))
    versions = {"python": platform.python_version(), "torch": torch.__version__.split("+")[0]}
    versions["transformers"] = transformers.__version__
    return TrainingRecord(
        base=base,
        base_digest=digest,
        tasks=tuple(shares),
        parameters=sum(parameter.numel() for parameter in trainee.parameters.values()),
        seconds=round(done.seconds, 1),
        threads=torch.get_num_threads(),
        device=device,
        versions=versions,
        **describe(settings, trainee.modules, done.losses, [one.task.name for one in data]),
    )
