"""Loss per token, rank classification and divergence of transformers models, batched.

The output layer is applied only where a token is scored, a bounded number of tokens at a time (``readout.py``).
"""

import math
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, Literal

from consilience.errors import InputError
from consilience.progress import NullProgress, Progress
from consilience.tasks.encoding import Encoded, encode, vocabulary_of
from consilience.tasks.intervals import bootstrap
from consilience.tasks.readout import Readout, decoder_start, padded, readout
from consilience.tasks.results import Accuracy, Divergence, Loss, TaskResult
from consilience.tasks.rows import Task

if TYPE_CHECKING:
    from torch import Tensor

    from consilience.tasks import shared_prefix

Dtype = Literal["float32", "bfloat16"]

#: Bound on one block of float32 logits [tokens, vocabulary], in bytes; a pass holds a few such blocks. (From 32 MiB on
#: the C library maps fresh pages for every tensor, which costs more than what is computed in them.)
LOGITS_BYTES = 31 << 20
#: Bound on the padded tokens of one batch, for the memory of long sequences.
BATCH_TOKENS = 8192
#: The same on a CPU, where activations of more tokens leave the processor's cache and every step waits for memory.
CPU_BATCH_TOKENS = 768
#: Float32 logits that a processor works on at a time.
_CACHED_BYTES = 768 << 10
#: Stands in for log 0, so that 0 * (log 0 - log 0) is 0 and not NaN.
_LOG_ZERO = -1e37


def _batches(examples: Sequence[Encoded], batch_size: int, tokens: int) -> Iterator[list[int]]:
    """Indices of examples in batches of like length, the longest first so that memory runs out early if at all."""
    order = sorted(range(len(examples)), key=lambda i: (-len(examples[i].inputs), -len(examples[i].source), i))
    batch: list[int] = []
    widest = 0
    for index in order:
        wide = max(widest, len(examples[index].inputs) + len(examples[index].source))
        if batch and (len(batch) == batch_size or wide * (len(batch) + 1) > tokens):
            yield batch
            batch, wide = [], len(examples[index].inputs) + len(examples[index].source)
        batch.append(index)
        widest = wide
    if batch:
        yield batch


def casting(model: Any, dtype: Dtype) -> AbstractContextManager[Any]:
    """Return autocast to the dtype of matrix products; weights are cast once within the outermost such block."""
    import torch

    return torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=dtype == "bfloat16")


@contextmanager
def _evaluating(models: Sequence[Any], dtype: Dtype) -> Generator[None]:
    """No gradients, no dropout, and autocast: one block over all batches, so weights are cast to bfloat16 once."""
    import torch

    training = [model.training for model in models]
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(casting(models[0], dtype))
        try:
            for model in models:
                model.eval()
            yield
        finally:
            for model, was in zip(models, training, strict=True):
                model.train(was)


def _blocks(
    models: Sequence[Any], examples: Sequence[Encoded], batch_size: int, dtype: Dtype, advance: Callable[[int], None]
) -> Iterator[tuple["Tensor", "Tensor", list["Tensor"]]]:
    """Yield (example index [n], target [n], each model's logits [n, V]) for blocks of scored positions."""
    import torch

    from consilience.tasks import shared_prefix

    if not examples:
        return
    with _evaluating(models, dtype):
        readouts = [readout(model, examples[0]) for model in models]
        vocabulary = readouts[0].vocabulary
        if any(one.vocabulary != vocabulary for one in readouts):
            sizes = " and ".join(str(one.vocabulary) for one in readouts)
            raise InputError(f"the models' vocabularies hold {sizes} tokens, so no divergence is defined between them")
        block = max(1, LOGITS_BYTES // (4 * vocabulary))
        tokens = min(BATCH_TOKENS, CPU_BATCH_TOKENS) if models[0].device.type == "cpu" else BATCH_TOKENS
        if any(one.head is None for one in readouts):
            tokens = min(tokens, block)
        runs = shared_prefix.passes(readouts, examples, batch_size, tokens)
        for batch, where, targets, states in runs or _whole(readouts, examples, batch_size, tokens):
            owners = torch.tensor(batch)[where[0].cpu()]
            for start in range(0, len(owners), block):
                part = slice(start, start + block)
                logits = [one.logits(s[part]) for one, s in zip(readouts, states, strict=True)]
                yield owners[part], targets[part], logits
            advance(len(batch))


def _whole(
    readouts: Sequence[Readout], examples: Sequence[Encoded], batch_size: int, tokens: int
) -> "Iterator[shared_prefix.Pass]":
    """Run whole sequences, a batch at a time."""
    for batch in _batches(examples, batch_size, tokens):
        inputs, where, targets = padded([examples[i] for i in batch], readouts[0].model)
        states = [one.states({k: v.to(one.model.device) for k, v in inputs.items()}, where) for one in readouts]
        yield batch, where, targets, states


def _sum_into(total: "Tensor", owners: "Tensor", values: "Tensor") -> None:
    total.index_add_(0, owners, values.double().cpu())


def _slices(n: int, vocabulary: int, device: str) -> Iterator[slice]:
    """Cut n rows of float32 logits into slices that stay in a processor's cache: ten times as fast as fresh tensors."""
    rows = max(1, _CACHED_BYTES // (4 * vocabulary)) if device == "cpu" else max(1, n)
    return (slice(start, min(start + rows, n)) for start in range(0, n, rows))


def negative_log_likelihood(logits: "Tensor", targets: "Tensor") -> "Tensor":
    """-log softmax(logits)[target] in nats, computed in float32: logits [n, V] of any float dtype, targets [n] -> [n].

    log sum exp z is taken as max z + log sum exp(z - max z).
    """
    import torch

    out = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    for part in _slices(logits.shape[0], logits.shape[1], logits.device.type):
        row = logits[part].to(torch.float32, copy=True)
        chosen = row.gather(-1, targets[part, None])[:, 0]
        highest = row.amax(-1, keepdim=True)
        out[part] = row.sub_(highest).exp_().sum(-1).log_().add_(highest[:, 0]).sub_(chosen)
    return out


def divergences(logits_a: "Tensor", logits_b: "Tensor") -> tuple["Tensor", "Tensor"]:
    """KL(a || b) and the Jensen-Shannon divergence of softmax(logits_a) = a and softmax(logits_b) = b, in nats.

    KL = sum_v a_v (log a_v - log b_v), JS = (KL(a || m) + KL(b || m)) / 2 with m = (a + b) / 2; temperature 1.
    Logits are [n, V] of any float dtype, taken to float32; both results are [n]. A token that a gives probability 0
    adds nothing; KL is infinite where b gives 0 to a token that a does not. Rounding below zero is set to zero.
    """
    import torch

    n, vocabulary = logits_a.shape
    kl, js = (torch.empty(n, dtype=torch.float32, device=logits_a.device) for _ in range(2))
    slices = list(_slices(n, vocabulary, logits_a.device.type))
    widest = max((part.stop - part.start for part in slices), default=0)
    buffers = torch.empty(6, widest, vocabulary, dtype=torch.float32, device=logits_a.device)
    for part in slices:
        log_a, log_b, log_m, a, b, difference = (buffer[: part.stop - part.start] for buffer in buffers)
        torch.log_softmax(logits_a[part].float(), -1, out=log_a).clamp_min_(_LOG_ZERO)
        torch.log_softmax(logits_b[part].float(), -1, out=log_b).clamp_min_(_LOG_ZERO)
        torch.exp(log_a, out=a)
        torch.exp(log_b, out=b)
        torch.add(a, b, out=log_m).div_(2).log_().clamp_min_(_LOG_ZERO)
        kl[part] = torch.linalg.vecdot(a, torch.sub(log_a, log_b, out=difference))
        js[part] = torch.linalg.vecdot(a, torch.sub(log_a, log_m, out=difference))
        js[part] += torch.linalg.vecdot(b, torch.sub(log_b, log_m, out=difference))
    return kl.clamp_min_(0).masked_fill_(kl > -_LOG_ZERO * 1e-9, math.inf), js.div_(2).clamp_min_(0)


def _finite(values: Sequence[float], examples: Sequence[Encoded], task: Task, what: str) -> tuple[float, ...]:
    for value, one in zip(values, examples, strict=True):
        if not math.isfinite(value):
            raise InputError(
                f"{task.where(one.row)}: the {what} is {value}: the model's weights hold NaN or infinity, or overflow;"
                " check how it was made"
            )
    return tuple(values)


def measure(
    model: Any,
    tokenizer: Any,
    task: Task,
    *,
    reference: Any | None = None,
    reference_name: str | None = None,
    batch_size: int = 32,
    max_examples: int | None = None,
    max_tokens: int | None = None,
    dtype: Dtype = "float32",
    seed: int = 0,
    progress: Progress | None = None,
) -> TaskResult:
    """Measure a model on a task in one pass: the loss, the accuracy where rows have choices, and with a reference KL.

    The loss is over labelled rows (of choices, the right one), the divergence over the same positions and, for
    unlabelled rows, over every position. See ``loss_per_token``, ``rank_accuracy`` and ``divergence`` for the
    equations, ``encode`` for which tokens count and how limits cut.

    Args:
        model: a transformers causal or encoder-decoder language model, on its device, in any dtype.
        tokenizer: its tokenizer.
        task: the rows.
        reference: a model of the same kind and vocabulary to measure the divergence from (the expert, say).
        reference_name: what to call it in the result.
        batch_size: sequences per forward pass; results depend on it by rounding only (1e-5; 1e-3 in bfloat16).
        max_examples: use the first rows only.
        max_tokens: score the first tokens of each row only; how much was cut is in the result.
        dtype: "float32" runs the model as it is; "bfloat16" runs matrix products under autocast. Log-softmax and sums
            are in float32 and float64 either way.
        seed: of the bootstrap intervals.
        progress: told of every batch.

    Raises:
        InputError: a row does not suit the model, all rows are unlabelled and there is no reference, the vocabularies
            differ, or the model's logits are not finite.
    """
    import torch

    config = model.config
    causal = not getattr(config, "is_encoder_decoder", False)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    examples = encode(
        task,
        tokenizer,
        decoder_start=None if causal else decoder_start(model),
        max_tokens=max_tokens,
        max_examples=max_examples,
        context=getattr(text, "max_position_embeddings", None),
        vocabulary=vocabulary_of(model),
    )
    if reference is None and not any(one.targets for one in examples):
        raise InputError(f"{task.where(0)}: no row has a response, so there is no loss; add one, or give a reference")
    # Choices other than the right one only rank: the reference need not see them.
    right = [i for i, one in enumerate(examples) if one.candidate in (None, task.rows[one.row].gold)]
    wrong = sorted(set(range(len(examples))) - set(right))
    if reference is None:
        right = [i for i in right if examples[i].targets]
    progress = progress or NullProgress()
    progress.phase(f"evaluating {task.name}", len(right) + len(wrong), "sequences")
    models = [model] if reference is None else [model, reference]
    nats, kl, js = (torch.zeros(len(examples), dtype=torch.float64) for _ in range(3))
    started = time.perf_counter()
    # Without a reference all choices go together, so that what they share runs once.
    parts = ((sorted(right + wrong), models),) if reference is None else ((right, models), (wrong, [model]))
    for chosen, runs in parts:
        index = torch.tensor(chosen)
        part = [examples[i] for i in chosen]
        for owners, targets, logits in _blocks(runs, part, batch_size, dtype, progress.advance):
            owners = index[owners]
            scored = targets >= 0
            if bool(scored.all()):
                _sum_into(nats, owners, negative_log_likelihood(logits[0], targets))
            elif bool(scored.any()):
                _sum_into(nats, owners[scored.cpu()], negative_log_likelihood(logits[0][scored], targets[scored]))
            if len(logits) == 2:
                forward, both = divergences(logits[1].to(logits[0].device), logits[0])
                _sum_into(kl, owners, forward)
                _sum_into(js, owners, both)
    seconds = time.perf_counter() - started
    labelled = [i for i in right if examples[i].targets]
    return TaskResult(
        task=task.name,
        n_examples=len({one.row for one in examples}),
        loss=_loss(task, [examples[i] for i in labelled], nats[labelled].tolist(), seed) if labelled else None,
        accuracy=_accuracy(task, examples, nats.tolist(), seed) if wrong else None,
        divergence=None
        if reference is None
        else _divergence(task, [examples[i] for i in right], kl[right].tolist(), js[right].tolist(), seed),
        reference=reference_name,
        n_cut=sum(one.dropped > 0 for one in examples),
        dropped_tokens=sum(one.dropped for one in examples),
        input_tokens=sum(len(examples[i].inputs) + len(examples[i].source) for i in (*right, *wrong)),
        seconds=seconds,
    )


def _loss(task: Task, examples: Sequence[Encoded], nats: Sequence[float], seed: int) -> Loss:
    nats = _finite(nats, examples, task, "loss")
    tokens = tuple(len(one.targets) for one in examples)
    value = math.fsum(nats) / sum(tokens)
    rows = tuple(one.row for one in examples)
    return Loss(value, bootstrap(nats, tokens, seed=seed), len(rows), sum(tokens), rows, nats, tokens)


def _accuracy(task: Task, examples: Sequence[Encoded], nats: Sequence[float], seed: int) -> Accuracy:
    nats = _finite(nats, examples, task, "loss")
    rows: dict[int, list[float]] = {}
    for one, value in zip(examples, nats, strict=True):
        if one.candidate is not None:
            rows.setdefault(one.row, []).append(value)
    correct: list[bool] = []
    correct_norm: list[bool] = []
    for index, values in rows.items():
        row = task.rows[index]
        per_character = [value / len(choice) for value, choice in zip(values, row.choices or (), strict=True)]
        correct.append(values.index(min(values)) == row.gold)
        correct_norm.append(per_character.index(min(per_character)) == row.gold)
    n = len(rows)
    return Accuracy(
        sum(correct) / n,
        bootstrap(correct, seed=seed),
        sum(correct_norm) / n,
        bootstrap(correct_norm, seed=seed),
        n,
        tuple(rows),
        tuple(correct),
        tuple(correct_norm),
    )


def _divergence(
    task: Task, examples: Sequence[Encoded], kl: Sequence[float], js: Sequence[float], seed: int
) -> Divergence:
    kl, js = _finite(kl, examples, task, "KL divergence"), _finite(js, examples, task, "JS divergence")
    tokens = tuple(len(one.positions) for one in examples)
    n = sum(tokens)
    return Divergence(
        math.fsum(kl) / n,
        bootstrap(kl, tokens, seed=seed),
        math.fsum(js) / n,
        bootstrap(js, tokens, seed=seed),
        len(tokens),
        n,
        tuple(one.row for one in examples),
        kl,
        js,
        tokens,
    )


def loss_per_token(
    model: Any,
    tokenizer: Any,
    task: Task,
    *,
    batch_size: int = 32,
    max_examples: int | None = None,
    max_tokens: int | None = None,
    dtype: Dtype = "float32",
    seed: int = 0,
) -> Loss:
    """Negative log-likelihood in nats per scored token: -sum_i sum_t log p(y_it | x_i, y_i<t) / sum_i |y_i|.

    Arguments and errors are those of ``measure``.

    Raises:
        InputError: as ``measure``, and when the task has no labelled row.
    """
    result = measure(
        model,
        tokenizer,
        task,
        batch_size=batch_size,
        max_examples=max_examples,
        max_tokens=max_tokens,
        dtype=dtype,
        seed=seed,
    )
    assert result.loss is not None  # measure refuses a task without labelled rows
    return result.loss


def rank_accuracy(
    model: Any,
    tokenizer: Any,
    task: Task,
    *,
    batch_size: int = 32,
    max_examples: int | None = None,
    dtype: Dtype = "float32",
    seed: int = 0,
) -> Accuracy:
    """Rank classification: is the labelled choice c* = argmax_c log p(c | x)?

    ``acc`` ranks by the sum of the choice's token log-probabilities, ``acc_norm`` by that sum over the number of
    characters of the choice (as in lm-evaluation-harness). Under a chat template a choice includes the token that ends
    the turn, which keeps a choice from winning by being the beginning of another. Arguments as in ``measure``.

    Raises:
        InputError: as ``measure``, and when no row has choices.
    """
    result = measure(model, tokenizer, task, batch_size=batch_size, max_examples=max_examples, dtype=dtype, seed=seed)
    if result.accuracy is None:
        raise InputError(f"{task.where(0)}: no row has choices and a label, so there is nothing to rank; add them")
    return result.accuracy


def divergence(
    model_a: Any,
    model_b: Any,
    tokenizer: Any,
    task: Task,
    *,
    batch_size: int = 32,
    max_examples: int | None = None,
    max_tokens: int | None = None,
    dtype: Dtype = "float32",
    seed: int = 0,
) -> Divergence:
    """Mean over scored positions of KL(softmax z_a || softmax z_b), a the reference (an expert), and of JS; T = 1.

    Softmaxes are taken in float32. Labelled rows compare where the answer's tokens are predicted, unlabelled rows at
    every position. Arguments as in ``measure``. Under bfloat16 autocast the rounding of two different models adds 0.001
    to 0.005 nats (2 to 4% of 0.1), so compare close models in float32. (The teacher comes first, as in Expert Merging,
    arXiv 2509.25712.)

    Raises:
        InputError: as ``measure``; unlabelled rows are fine here.
    """
    result = measure(
        model_b,
        tokenizer,
        task,
        reference=model_a,
        batch_size=batch_size,
        max_examples=max_examples,
        max_tokens=max_tokens,
        dtype=dtype,
        seed=seed,
    )
    assert result.divergence is not None  # there is a reference
    return result.divergence
