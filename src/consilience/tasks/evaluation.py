"""Evaluate a model on tasks, with a cache: a cached result needs no torch and no model in memory."""

from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from consilience.checkpoints.adapter_files import locate_adapter
from consilience.checkpoints.reference import Reference, resolve
from consilience.errors import InputError
from consilience.experts.vocabulary import has_tokenizer
from consilience.numbers import is_count
from consilience.progress import Progress, ProgressOption, open_progress
from consilience.tasks.cache import fingerprint, key_of, recall, remember
from consilience.tasks.leaks import learned_on
from consilience.tasks.load import check_folder, load_model, load_own_tokenizer, require_transformers
from consilience.tasks.results import Evaluation, Settings, TaskResult
from consilience.tasks.rows import Task, load_tasks

if TYPE_CHECKING:
    from consilience.tasks.metrics import Dtype

#: A model: ``PATH``, ``PATH+ADAPTER``, or a loaded transformers model.
ModelLike = Any


@dataclass(frozen=True, slots=True)
class _Source:
    """A model that is loaded only when something has to be run; ``loaded`` is set for one that came in memory."""

    name: str
    path: Reference | None
    loaded: Any | None

    def identity(self) -> list[str] | None:
        """What the cache knows the model by; None for a model in memory, whose results are not cached."""
        if self.path is None:
            return None
        adapter = self.path.adapter
        return [fingerprint(self.path.model), *([fingerprint(locate_adapter(adapter).home)] if adapter else [])]

    def load(self, device: str, trust_remote_code: bool) -> Any:
        if self.path is None:
            return self.loaded
        adapter = self.path.adapter
        return load_model(self.path.model, adapter=adapter, device=device, trust_remote_code=trust_remote_code)


def _source(model: ModelLike, adapter: Path | str | None = None, name: str | None = None) -> _Source:
    if not isinstance(model, str | Path):
        if adapter is not None:
            raise InputError("an adapter goes on a model given by its path; load it onto the model yourself instead")
        return _Source(name or type(model).__name__, None, model)
    place = resolve(str(model))
    if adapter is not None:
        if place.adapter is not None:
            raise InputError(f"{model}: names an adapter, and adapter={adapter} another; give one")
        place = Reference(place.model, resolve(str(adapter)).model)
    check_folder(place.model)
    shown = str(model) if adapter is None else f"{model}+{adapter}"
    return _Source(name or shown, place, None)


def _tasks(tasks: Sequence[Task | Path | str] | Task | Path | str) -> list[Task]:
    if isinstance(tasks, Task | Path | str):
        return load_tasks([tasks])
    if not isinstance(cast(Any, tasks), Sequence | None):
        raise InputError(f"tasks: is a {type(tasks).__name__}; give JSONL files, or tasks")
    return load_tasks(tasks)


@contextmanager
def _threads(threads: int | None) -> Generator[None]:
    if threads is None:
        yield
        return
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _versions() -> list[str]:
    """Versions that a number may depend on, had without importing the packages."""
    out: list[str] = []
    for package in ("torch", "transformers", "tokenizers"):
        try:
            out.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            out.append(f"{package} none")
    return out


def evaluate(
    model: ModelLike,
    tasks: Sequence[Task | Path | str] | Task | Path | str,
    *,
    reference: ModelLike | Mapping[str, ModelLike] | None = None,
    adapter: Path | str | None = None,
    tokenizer: Any | None = None,
    name: str | None = None,
    batch_size: int = 32,
    max_examples: int | None = None,
    max_tokens: int | None = None,
    dtype: "Dtype" = "float32",
    device: str = "cpu",
    threads: int | None = None,
    seed: int = 0,
    cache: bool = True,
    progress: ProgressOption = True,
    trust_remote_code: bool = False,
) -> Evaluation:
    """Measure a model on tasks: loss per token, accuracy where rows have choices, KL from a reference where given.

    Results of models on disk are cached by the content of the model's and reference's files, the rows, the settings and
    the versions of torch and transformers, so a second call reads a few files. (Threads are not part of the key, nor is
    the batch size in float32: they change results by rounding only, 1e-5 of a loss.) The model is loaded once, when a
    first result is missing, and references one at a time.

    Args:
        model: ``PATH`` of a Hugging Face folder, ``PATH+ADAPTER`` (a PEFT adapter on top), a hub id, or a loaded
            transformers model (then ``tokenizer`` is needed, and nothing is cached).
        tasks: JSONL files as ``PATH`` or ``NAME=PATH``, or ``Task`` values.
        reference: a model to measure KL(reference || model) from, for all tasks, or one per task name; tasks that the
            mapping leaves out get no divergence.
        adapter: the same as ``+ADAPTER``.
        tokenizer: instead of the one in the model's folder.
        name: what tables call the model; its path by default.
        batch_size: sequences per forward pass.
        max_examples: use the first rows of each task only.
        max_tokens: score the first tokens of each row only; what that cuts is reported.
        dtype: of matrix products, "float32" or "bfloat16": 2.5 times as fast on a CPU with bfloat16 units, losses off
            by 0.1% (1% on fifty tokens), KL between two models off by 2 to 4%. Compare models in one dtype.
        device: where models given by path run.
        threads: torch's CPU threads during the call; None leaves them as they are.
        seed: of the bootstrap intervals.
        cache: read and write the cache.
        progress: True for a bar (or lines) on standard error, a function called with (sequences done, sequences in all)
            of each task, or a ``Progress``.
        trust_remote_code: run ``.py`` files that come with the model.

    Raises:
        InputError: a model, adapter, tokenizer, task or setting is wrong; one line names the file and the mend.
        MachineError: not enough memory.
    """
    _check(batch_size, max_examples, max_tokens, dtype, threads)
    named = _tasks(tasks)
    if isinstance(reference, Mapping):
        unknown = sorted(set(map(str, reference)) - {task.name for task in named})
        if unknown:
            known = ", ".join(task.name for task in named)
            raise InputError(f"reference for {unknown[0]!r}: no such task; the tasks are {known}")
        per_task: dict[str, ModelLike] = dict(reference)
    else:
        per_task = {} if reference is None else {task.name: reference for task in named}
    own = _source(model, adapter, name)
    references = {task: _source(value) for task, value in per_task.items()}
    settings = Settings(dtype, max_examples, max_tokens, seed)
    run = _Run(own, tokenizer, settings, batch_size, device, trust_remote_code)
    results: dict[str, TaskResult] = {}
    keys = {task.name: _key(run, task, references.get(task.name), cache) for task in named}
    for task in named:
        found = _recalled(keys[task.name], task.name, references.get(task.name))
        if found is not None:
            results[task.name] = found
    missing = [task for task in named if task.name not in results]
    if missing:
        require_transformers("evaluating a model")
        with _threads(threads), open_progress(progress) as shown:
            for task, result in _measured(run, missing, references, shown):
                results[task.name] = result
                key = keys[task.name]
                if key is not None:
                    remember("results", key, result.to_dict())
    notes = learned_on(own.path.model, named) if own.path is not None else ()
    return Evaluation(own.name, tuple(results[task.name] for task in named), settings, notes)


@dataclass(frozen=True, slots=True)
class _Run:
    model: _Source
    tokenizer: Any | None
    settings: Settings
    batch_size: int
    device: str
    trust_remote_code: bool


def _check(batch_size: int, max_examples: int | None, max_tokens: int | None, dtype: str, threads: int | None) -> None:
    counts = {"batch_size": batch_size, "max_examples": max_examples, "max_tokens": max_tokens, "threads": threads}
    for setting, value in counts.items():
        if value is not None and not is_count(value):
            raise InputError(f"{setting} {value!r} must be a whole number, and must be at least 1")
    if dtype not in ("float32", "bfloat16"):
        raise InputError(f"dtype {dtype!r} must be float32 or bfloat16")


def _key(run: _Run, task: Task, reference: _Source | None, cache: bool) -> str | None:
    """The name of a result in the cache, or None where it cannot or must not be kept."""
    if not cache or run.tokenizer is not None:
        return None
    model = run.model.identity()
    other = None if reference is None else reference.identity()
    if model is None or (reference is not None and other is None):
        return None
    kind = run.device.partition(":")[0]
    return key_of(
        {
            "model": model,
            "reference": other,
            "rows": task.digest,
            "settings": asdict(run.settings),
            # In bfloat16 the shape of a product picks the kernel, and so the rounding: up to 0.1% of a loss.
            "batch_size": run.batch_size if run.settings.dtype == "bfloat16" else None,
            "device": kind,
            "versions": _versions(),
        }
    )


def _recalled(key: str | None, task: str, reference: _Source | None) -> TaskResult | None:
    value = recall("results", key) if key is not None else None
    if value is None:
        return None
    try:
        result = TaskResult.from_dict(value)
    except (KeyError, TypeError, AttributeError):
        return None
    # The key is of contents: the names are this call's.
    return replace(result, task=task, reference=reference and reference.name, cached=True)


def _measured(
    run: _Run, tasks: Sequence[Task], references: Mapping[str, _Source], progress: Progress
) -> Iterator[tuple[Task, TaskResult]]:
    from consilience.tasks.metrics import casting, measure

    if run.model.path is not None:
        progress.phase(f"loading {run.model.name}")
    model = run.model.load(run.device, run.trust_remote_code)
    tokenizer = run.tokenizer or _tokenizer(run)
    with ExitStack() as casts:
        held: tuple[_Source, Any] | None = None
        casting_on = False
        # Tasks with the same reference follow each other, so that each reference is loaded once.
        for task in sorted(tasks, key=lambda t: references[t.name].name if t.name in references else ""):
            source = references.get(task.name)
            if source is None:
                held = None
            elif held is None or held[0] != source:
                casts.close()  # a reference is loaded in full precision, and what was cast of the last one is let go
                held, casting_on = None, False  # before the next is loaded: two references need not fit into memory
                held = (source, _reference(run, source, tokenizer))
            if not casting_on:  # over all tasks of a reference, so that weights are cast once
                casts.enter_context(casting(model, run.settings.dtype))  # pyright: ignore[reportArgumentType]
                casting_on = True
            result = measure(
                model,
                tokenizer,
                task,
                reference=held and held[1],
                reference_name=source and source.name,
                batch_size=run.batch_size,
                max_examples=run.settings.max_examples,
                max_tokens=run.settings.max_tokens,
                dtype=run.settings.dtype,  # pyright: ignore[reportArgumentType]
                seed=run.settings.seed,
                progress=progress,
            )
            yield task, result


def _tokenizer(run: _Run) -> Any:
    if run.model.path is None:
        raise InputError("a model in memory needs its tokenizer; pass tokenizer=")
    place = run.model.path
    return load_own_tokenizer(place.model, place.adapter, trust_remote_code=run.trust_remote_code)


def _reference(run: _Run, source: _Source, tokenizer: Any) -> Any:
    """Load a reference, having checked that it was trained on the same tokens."""
    place = source.path
    if place is not None and any(
        has_tokenizer(folder) for folder in (place.model, place.adapter) if folder is not None
    ):
        other = load_own_tokenizer(place.model, place.adapter, trust_remote_code=run.trust_remote_code)
        if other.get_vocab() != tokenizer.get_vocab():
            raise InputError(
                f"{source.name}: its tokenizer differs from that of {run.model.name}, so their predictions cannot be"
                " compared; give a reference with the same vocabulary"
            )
    return source.load(run.device, run.trust_remote_code)
