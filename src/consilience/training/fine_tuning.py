"""Fine-tune one model on several tasks' rows jointly, all weights or a LoRA; resumable."""

import contextlib
import fcntl
import json
import math
import os
import platform
import shutil
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from consilience.checkpoints.json_files import read_object
from consilience.checkpoints.reference import resolve
from consilience.engine.output import OURS, install, partial_path, sync_tree, write_json
from consilience.errors import InputError, MachineError
from consilience.tasks.cache import fingerprint
from consilience.tasks.encoding import Encoded, encode
from consilience.tasks.load import check_folder, load_tokenizer, require_transformers
from consilience.tasks.rows import Task, load_task
from consilience.training.losses import batch_loss, collate, token_losses
from consilience.training.model import Trainee, load_trainee, write_trained
from consilience.training.record import TaskShare, TrainingRecord, describe
from consilience.training.sampling import draw
from consilience.training.settings import Precision, Settings
from consilience.training.state import Progress, load_state, save_state

#: Called after every step with (steps done, steps in all, loss of the step in nats per response token).
Listener = Callable[[int, int, float], None]

_PLAN, _STATE, _RESULT = "training-plan.json", "state.safetensors", "result"
#: Writing checkpoints may take this share of the time.
_CHECKPOINT_SHARE = 0.05


@dataclass(frozen=True, slots=True)
class _Data:
    """A task and its rows as sequences, one a row."""

    task: Task
    examples: tuple[Encoded, ...]


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
    progress: bool | Listener = False,
) -> TrainingRecord:
    r"""Fine-tune a model on the labelled rows of one or several tasks, in equal shares.

    Minimises, with AdamW, the mean over the batch's tasks t of the mean loss per response token,

        L = mean_t  -sum_{i in t} sum_j log p(y_ij | x_i, y_i<j) / sum_{i in t} |y_i|,

    over responses only, under the model's chat template (``tasks.encode`` says which tokens count; of choices, the
    right one). On one task this makes an expert; on all tasks it is mixture training, the reference a merge of the
    experts is compared with. Row g of the run comes from task g mod K; each task's rows are passed over in orders
    seeded by (seed, task, pass), as often as it takes. Dropout is off.

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
            weights are held in bfloat16); "float32" computes and writes float32.
        threads: of torch; None leaves them as they are.
        device: a torch device.
        checkpoint_seconds: seconds between saved states, more where saving takes over a twentieth of the time.
        force: replace what stands at ``out``.
        progress: True for a bar with the loss on the terminal, or a function called after every step.

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
    folder, out = resolve(str(base)).model, Path(out)
    check_folder(folder)
    _check_out(out, folder, force)
    data = _read(folder, tasks)
    plan = {"base": fingerprint(folder), "tasks": [one.task.digest for one in data], **asdict(settings)}
    partial = partial_path(out.absolute())
    with _claimed(partial, json.loads(json.dumps(plan))), _threads(threads), _listener(progress) as listener:
        longest = max(len(one.inputs) for part in data for one in part.examples)
        with _memory(folder):
            trainee = load_trainee(folder, settings, device, longest)
            done = _train(trainee, data, settings, partial / _STATE, checkpoint_seconds, listener)
        record = _record(str(base), str(plan["base"]), data, settings, trainee, done, device)
        _finish(trainee, settings, folder, partial, out, record)
    return record


def _check_out(out: Path, base: Path, force: bool) -> None:
    real = out.absolute()
    if out.name in ("", ".."):
        raise InputError(f"{out}: is not a name to write to; name a new folder")
    for place in (real, partial_path(real)):
        if place.resolve() == base.resolve() or place.resolve() in base.resolve().parents:
            raise InputError(f"{place}: is or holds the base {base}; choose another OUT")
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise InputError(f"{out}: exists and is not a folder; choose another OUT")
    if out.is_dir() and any(out.iterdir()) and not force:
        raise InputError(f"{out}: exists and is not empty; choose another OUT, or replace it with force")


def _read(folder: Path, tasks: Sequence[Task | str | Path]) -> list[_Data]:
    """Read and encode the tasks' rows, all of which must be labelled."""
    if not tasks:
        raise InputError("no task given; name at least one JSONL file")
    read = [task if isinstance(task, Task) else load_task(task) for task in tasks]
    names = [task.name for task in read]
    for task in read:
        if names.count(task.name) > 1:
            raise InputError(f"{task.path}: two tasks are named {task.name!r}; give one as NAME=PATH")
        for index, row in enumerate(task.rows):
            if not row.labelled:
                raise InputError(f"{task.where(index)}: has no response to learn; add one or drop the row")
    tokenizer = load_tokenizer(folder)
    config = read_object(folder / "config.json")
    context = config.get("max_position_embeddings")
    limit = context if isinstance(context, int) else None
    return [_Data(task, _right(task, encode(task, tokenizer, context=limit))) for task in read]


def _right(task: Task, examples: Sequence[Encoded]) -> tuple[Encoded, ...]:
    """Keep one sequence a row: of choices, the right one."""
    return tuple(one for one in examples if one.candidate in (None, task.rows[one.row].gold))


@contextlib.contextmanager
def _claimed(partial: Path, plan: dict[str, Any]) -> Generator[None]:
    """Hold OUT.partial for this run alone; empty it unless it holds the same plan's; remove it on wrong input."""
    _make(partial)
    descriptor = os.open(partial, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise MachineError(f"{partial}: another run is writing there; wait for it, or choose another OUT") from None
        if any(partial.iterdir()) and not (partial / _PLAN).is_file():
            raise MachineError(f"{partial}: is in the way and no training left it; move it elsewhere")
        try:
            _adopt(partial, plan)
            yield
        except InputError:
            shutil.rmtree(partial)
            raise
    finally:
        os.close(descriptor)


def _make(partial: Path) -> None:
    try:
        partial.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{partial}: cannot be made ({error.strerror}); choose another OUT") from None


def _adopt(partial: Path, plan: dict[str, Any]) -> None:
    path = partial / _PLAN
    with contextlib.suppress(InputError):
        if path.is_file() and read_object(path) == plan:
            return
    (partial / _STATE).unlink(missing_ok=True)
    write_json(path, plan)


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
def _listener(progress: bool | Listener) -> Generator[Listener]:
    if not isinstance(progress, bool):
        yield progress
        return
    if not progress:
        yield lambda _done, _total, _loss: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}"),
        TimeRemainingColumn(),
    )
    # Without an argument of its own, rich draws the bar once, at the end, where the output is not a terminal.
    with Progress(*columns, console=Console(stderr=True)) as bar:
        row = bar.add_task("training", total=None, loss=math.nan)
        yield lambda done, total, loss: bar.update(row, completed=done, total=total, loss=loss)


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
    trainee: Trainee, data: Sequence[_Data], settings: Settings, state: Path, every: float, listener: Listener
) -> Progress:
    """Take the steps that are left, saving the state now and then; return where the run stands."""
    import torch

    parameters = list(trainee.parameters.values())
    optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay, fused=True)
    done = load_state(state, trainee.parameters, optimizer)
    saved, pause = time.monotonic(), every
    while done.step < settings.steps:
        started = time.monotonic()
        done.losses.append(_step(trainee, data, settings, optimizer, done.step))
        done.step += 1
        done.seconds += time.monotonic() - started
        latest = done.losses[-1]
        listener(done.step, settings.steps, sum(latest.values()) / len(latest))
        if time.monotonic() - saved >= pause:
            started = time.monotonic()
            save_state(state, trainee.parameters, optimizer, done)
            saved = time.monotonic()
            pause = max(every, (saved - started) / _CHECKPOINT_SHARE)
    return done


def _step(trainee: Trainee, data: Sequence[_Data], settings: Settings, optimizer: Any, step: int) -> dict[int, float]:
    """Take one optimizer step and return the losses by task."""
    import torch

    model, parameters = trainee.model, list(trainee.parameters.values())
    pairs = draw([len(one.examples) for one in data], settings.batch_size, step, settings.seed)
    batch = collate([data[k].examples[i] for k, i in pairs], [k for k, _ in pairs], model.device)
    for group in optimizer.param_groups:
        group["lr"] = settings.learning_rate_at(step)
    with torch.autocast(model.device.type, torch.bfloat16, enabled=settings.precision == "mixed"):
        loss, losses = batch_loss(token_losses(model, batch), batch.tasks)
    if not math.isfinite(float(loss.detach())):
        raise InputError(
            f"learning_rate = {settings.learning_rate:g}: the loss is {float(loss.detach())} at step {step + 1};"
            " lower it, or check the base's weights"
        )
    optimizer.zero_grad(set_to_none=True)
    torch.autograd.backward(loss)
    torch.nn.utils.clip_grad_norm_(parameters, settings.clip)
    optimizer.step()
    return losses


def _record(
    base: str,
    digest: str,
    data: Sequence[_Data],
    settings: Settings,
    trainee: Trainee,
    done: Progress,
    device: str,
) -> TrainingRecord:
    import torch
    import transformers

    sizes = [len(one.examples) for one in data]
    drawn = [pair for step in range(settings.steps) for pair in draw(sizes, settings.batch_size, step, settings.seed)]
    shares: list[TaskShare] = []
    for k, one in enumerate(data):
        rows = [one.examples[i] for task, i in drawn if task == k]
        tokens, cut = sum(len(row.targets) for row in rows), sum(row.dropped > 0 for row in one.examples)
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
        **describe(settings, done.losses, [one.task.name for one in data]),
    )


def _finish(trainee: Trainee, settings: Settings, base: Path, partial: Path, out: Path, record: TrainingRecord) -> None:
    """Write the result in OUT.partial, move it to OUT and take OUT.partial away."""
    result = partial / _RESULT
    try:
        write_trained(trainee, settings, base, result)
        ours = result if settings.lora_rank is not None else result / OURS
        ours.mkdir(exist_ok=True)
        (ours / "training.json").write_text(record.as_json(), encoding="utf-8")
        sync_tree(result)
        install(result, out)
        shutil.rmtree(partial)
    except OSError as error:
        raise MachineError(
            f"{error.filename or out}: cannot be written ({error.strerror}); mend it, then run this again"
        ) from error
