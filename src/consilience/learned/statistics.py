"""One pass over rows for a model's statistics: Gram matrices and means of what layers are given, Fisher information.

Gram matrices are made a part of the layers at a time, so that those in memory stay bounded; Fisher information needs a
second set of weights. See ``experts/statistics.py`` for what is written.
"""

import contextlib
from collections.abc import Generator, Iterator, Sequence
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import torch

from consilience.checkpoints.open import open_checkpoint
from consilience.checkpoints.reference import Reference, resolve
from consilience.errors import InputError
from consilience.experts.model import open_model
from consilience.experts.statistics import KINDS, Facts, Fisher, Kind, Writer, mark_of, open_statistics
from consilience.learned.inputs import InputSums, leaders, passes, watched
from consilience.numbers import is_count
from consilience.progress import Progress, ProgressOption, open_progress
from consilience.student.factored import layers_of
from consilience.student.names import parameters_of, renamed
from consilience.tasks.encoding import Encoded, encode, vocabulary_of
from consilience.tasks.load import check_folder, load_model, load_own_tokenizer, require_transformers
from consilience.tasks.readout import decoder_start, padded
from consilience.tasks.rows import Task, load_task
from consilience.workdir import digest_of, workdir

#: Bytes of Gram matrices of one pass.
BYTES = 2 << 30


@dataclass(frozen=True)
class Collecting:
    """How statistics are made: which, of how many rows and tokens, and how Fisher information takes its labels."""

    kinds: tuple[Kind, ...] = ("gram",)
    fisher: Fisher = "sampled"
    rows: int | None = None
    batch_size: int = 16
    dtype: str = "float32"
    device: str = "cpu"
    seed: int = 0
    trust_remote_code: bool = False


def collect_statistics(
    model: str | Path,
    data: Task | Path | str,
    out: Path | str,
    *,
    settings: Collecting | None = None,
    force: bool = False,
    progress: ProgressOption = True,
) -> Facts:
    """Read rows once with a model, and write its statistics on them to a folder.

    Args:
        model: ``PATH`` or ``PATH+ADAPTER``.
        data: a JSONL file of rows, or a task.
        out: the folder to make.
        settings: see ``Collecting``.
        force: replace statistics that are there.
        progress: show it.

    Raises:
        InputError: a row does not suit the model, there is no layer to look at, or activations are not finite.
    """
    require_transformers("collecting statistics")
    settings = Collecting() if settings is None else settings
    _check(settings)
    place = resolve(str(model))
    check_folder(place.model)
    task = data if isinstance(data, Task) else load_task(data)
    mark = _mark(str(model))
    digest = digest_of({"statistics": [mark, task.digest, asdict(settings)]})
    inputs = [place.model, *(part for part in (place.adapter, task.path) if part is not None)]
    with workdir(Path(out), digest, force=force, inputs=inputs) as work, open_progress(progress) as bar:
        if work.delivered is not None:
            return open_statistics(out).facts
        writer = Writer(work.new_result())
        facts = _collect(str(model), place, mark, task, writer, settings, bar)
        writer.finish(facts)
        work.deliver({})
    return facts


def _mark(model: str) -> str:
    opened = open_model("model", model)
    try:
        return mark_of(opened)
    finally:
        opened.close()


def _check(settings: Collecting) -> None:
    wrong = next((kind for kind in settings.kinds if kind not in KINDS), None)
    if wrong is not None or not settings.kinds:
        raise InputError(f"kind: {wrong!r} is none of {', '.join(KINDS)}")
    if settings.fisher not in ("sampled", "empirical", "exact"):
        raise InputError(f"fisher: {settings.fisher!r} is none of sampled, empirical, exact")
    if settings.dtype not in ("float32", "bfloat16"):
        raise InputError(f"dtype: {settings.dtype!r} is neither float32 nor bfloat16")
    for name in ("rows", "batch_size"):
        count = getattr(settings, name)
        if not (is_count(count) or (name == "rows" and count is None)):
            raise InputError(f"{name}: {count!r} is no positive whole number")


def _collect(
    name: str, place: Reference, mark: str, task: Task, writer: Writer, settings: Collecting, bar: Progress
) -> Facts:
    bar.phase("loading the model")
    trust = settings.trust_remote_code
    model = load_model(place.model, adapter=place.adapter, device=settings.device, trust_remote_code=trust)
    model.requires_grad_(False)
    tokenizer = load_own_tokenizer(place.model, place.adapter, trust_remote_code=trust)
    parameters = _parameters(model, place, name)
    rows = _encoded(model, tokenizer, task, settings)
    alias: dict[str, str] = {}
    norm = 0.0
    tokens = sum(len(one.inputs) + len(one.source) for one in rows)
    if "gram" in settings.kinds or "mean" in settings.kinds:
        alias = _activations(model, parameters, rows, writer, settings, bar, name)
    if "fisher" in settings.kinds:
        norm = _fisher(model, parameters, task, rows, writer, settings, bar)
    digest = blake2b(repr([(one.source, one.inputs) for one in rows]).encode(), digest_size=16).hexdigest()
    fisher = settings.fisher if "fisher" in settings.kinds else None
    count = len({one.row for one in rows})
    return Facts(name, mark, settings.kinds, count, tokens, (digest,), fisher, settings.seed, norm, alias)


def _parameters(model: Any, place: Reference, where: str) -> dict[str, Any]:
    """Return stored name -> parameter; of tensors that the library renamed only where values prove the place."""
    checkpoint = open_checkpoint(place.model)
    try:
        shapes = {name: info.shape for name, info in checkpoint.tensors.items() if info.dtype.mergeable}
        found = parameters_of(model, shapes, (), where)
        doubted = renamed(model, found)
        if place.adapter is not None:  # whose update is in the values
            return {name: value for name, value in found.items() if name not in doubted}
        for name in doubted:
            stored = torch.from_numpy(checkpoint.read(name).copy()).view(_kind(checkpoint.tensors[name].dtype.name))
            if not torch.equal(stored.view(shapes[name]).to(found[name]), found[name].cpu()):
                del found[name]
        return found
    finally:
        checkpoint.storage.close()


def _kind(name: str) -> torch.dtype:
    return {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[name]


def _encoded(model: Any, tokenizer: Any, task: Task, settings: Collecting) -> list[Encoded]:
    text = model.config.get_text_config()
    start = decoder_start(model) if getattr(model.config, "is_encoder_decoder", False) else None
    rows = encode(
        task, tokenizer, decoder_start=start, max_examples=settings.rows, vocabulary=vocabulary_of(model),
        context=getattr(text, "max_position_embeddings", None),
    )  # fmt: skip
    return list(rows)


@contextlib.contextmanager
def _computing(settings: Collecting) -> Generator[None]:
    device = torch.device(settings.device).type
    with torch.autocast(device, dtype=torch.bfloat16, enabled=settings.dtype == "bfloat16"):
        yield


# ---------------------------------------------------------------------------------------------------------- activations


def _activations(
    model: Any, parameters: dict[str, Any], rows: Sequence[Encoded], writer: Writer, settings: Collecting,
    bar: Progress, where: str,
) -> dict[str, str]:  # fmt: skip
    """Write Gram matrices and means, and return which layers share them."""
    matrices = [name for name, value in parameters.items() if value.ndim == 2]
    layers = layers_of(model, parameters, matrices)
    if not layers:
        raise InputError(f"{where}: has no linear layer of its own, so there are no activations to look at")

    def first() -> None:
        with _computing(settings):
            model(**padded(rows[:1], model)[0], use_cache=False)

    leader = leaders(layers, first)
    kinds: list[Kind] = [kind for kind in settings.kinds if kind != "fisher"]
    parts = list(passes({name: 4 * layers[name].in_features ** 2 for name in leader.values()}, BYTES))
    bar.phase("activations", len(parts) * len(rows), "rows")
    norms = _norms(model, parameters) if "gram" in kinds else {}
    for number, wanted in enumerate(parts):
        heard = InputSums(kinds)
        own = norms if number == 0 else {}
        with watched(layers, wanted, heard.take), watched(own, own, heard.take_scaled(own)), _computing(settings):
            for batch, mask, inputs in _batches(model, rows, settings):
                heard.mask = mask
                model(**inputs, use_cache=False)
                bar.advance(len(batch))
        for key, total in heard.sums.items():
            total /= heard.counts[key.partition("/")[2]]
            if not bool(total.isfinite().all()):
                raise InputError(f"{where}: activations at {key.partition('/')[2]!r} are not finite; use float32")
        writer.add({key: total.cpu().numpy() for key, total in heard.sums.items()})
    return {f"{kind}/{name}": f"{kind}/{lead}" for kind in kinds for name, lead in leader.items() if name != lead}


def _norms(model: Any, parameters: dict[str, Any]) -> dict[str, Any]:
    """Return the module of every vector that scales what its module has normalised, and is its own alone."""
    names = {id(value): name for name, value in parameters.items() if value.ndim == 1}
    found: dict[str, Any] = {}
    for module in model.modules():
        name = names.get(id(getattr(module, "weight", None)))
        if name is not None and type(module).__name__.endswith("Norm"):
            found[name] = module
    return found


def _batches(
    model: Any, rows: Sequence[Encoded], settings: Collecting
) -> Iterator[tuple[Sequence[Encoded], Any, dict[str, Any]]]:
    """Yield rows of like lengths with their mask of tokens (None: all) and inputs; those with two sides one by one."""
    order = sorted(rows, key=lambda one: len(one.inputs))
    size = 1 if any(one.source for one in rows) else settings.batch_size
    for at in range(0, len(order), size):
        batch = order[at : at + size]
        inputs = padded(batch, model)[0]
        yield batch, (inputs["attention_mask"].bool() if len(batch) > 1 else None), inputs


# --------------------------------------------------------------------------------------------------- Fisher information


def _fisher(
    model: Any, parameters: dict[str, Any], task: Task, rows: Sequence[Encoded], writer: Writer, settings: Collecting,
    bar: Progress,
) -> float:  # fmt: skip
    """Write the diagonal of the Fisher information, and return its norm."""
    held = {id(value): name for name, value in parameters.items() if value.is_floating_point()}
    own = {name: value for name, value in parameters.items() if held.get(id(value)) == name}
    totals = {name: torch.zeros_like(value, dtype=torch.float32) for name, value in own.items()}
    by_row: dict[int, list[Encoded]] = {}
    for one in rows:
        by_row.setdefault(one.row, []).append(one)
    generator = torch.Generator().manual_seed(settings.seed)
    for value in own.values():
        value.requires_grad_(True)
    bar.phase(f"Fisher information ({settings.fisher})", len(by_row), "rows")
    try:
        for number, sequences in by_row.items():
            found = _slopes(model, list(own.values()), sequences, task.where(number), settings, generator)
            for weight, slopes in found:
                for name, slope in zip(own, slopes, strict=True):
                    if slope is not None:
                        totals[name].addcmul_(slope.float(), slope.float(), value=weight / len(by_row))
            bar.advance(1)
    finally:
        model.requires_grad_(False)
    writer.add({f"fisher/{name}": total.cpu().numpy() for name, total in totals.items()})
    return float(np.sqrt(sum(float(total.double().square().sum()) for total in totals.values())))


def _slopes(
    model: Any, values: Sequence[Any], sequences: Sequence[Encoded], where: str, settings: Collecting, generator: Any
) -> Iterator[tuple[float, Sequence[Any]]]:
    """Yield (probability, slope of the log-likelihood) of the labels that a row's Fisher information is over."""
    if settings.fisher == "exact":
        if len(sequences) < 2:
            raise InputError(f"{where}: exact Fisher information is over a row's choices, and it has none; use sampled")
        logs = torch.stack([_log_likelihood(model, one, one.targets, settings) for one in sequences]).log_softmax(0)
        for log in logs:
            slopes = torch.autograd.grad(log, values, retain_graph=True, allow_unused=True)
            yield float(log.detach().exp()), slopes
        return
    one = sequences[0]
    if settings.fisher == "empirical" and (len(sequences) > 1 or not one.targets):
        raise InputError(f"{where}: empirical Fisher information needs a response; add one, or use sampled")
    targets = one.targets if settings.fisher == "empirical" else None
    log = _log_likelihood(model, one, targets, settings, generator)
    yield 1.0, torch.autograd.grad(log, values, allow_unused=True)


def _log_likelihood(
    model: Any, one: Encoded, targets: Sequence[int] | None, settings: Collecting, generator: Any = None
) -> Any:
    """Return the log-likelihood of tokens at a row's scored positions; without any, of tokens that it draws itself."""
    inputs, where, _ = padded([one], model)
    with _computing(settings):
        logits = model(**inputs, use_cache=False).logits[where].float()
    logs = logits.log_softmax(-1)
    if targets is None:
        drawn = torch.multinomial(logs.detach().exp().cpu(), 1, generator=generator)[:, 0]
    else:
        drawn = torch.tensor(list(targets))
    return logs[torch.arange(len(logs), device=logs.device), drawn.to(logs.device)].sum()
