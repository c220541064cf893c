"""Experts of unlike architectures: their predictions are mixed instead of their weights, then distilled into a student.

With p_k(c | x) expert k's probabilities and coefficients alpha_k:

    logits           q(c | x) = softmax_c( sum_k alpha_k ln p_k(c | x) )        a product of experts
    probabilities    q(c | x) = sum_k alpha_k p_k(c | x)                        a mixture of experts

    alpha:    min over alpha of  - 1/n sum_i ln q(y_i | x_i)                    on labelled rows, by any optimizer here
    student:  min over w of  T^2 KL(q_T || s_T) + label_weight * CE(y, s)       on any rows

with q_T = softmax(ln q / T) and s_T = softmax(s / T) of the student's logits s.
Every expert answers every row once; learning alpha then costs a sum of K tables a point and no forward pass.

Source: distillation is Hinton et al. 2015, arXiv:1503.02531; GLUE (arXiv:2512.22467) names experts of unlike
architectures as open, so what is done about them here is this project's.
"""

import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from consilience.coefficients.coefficients import Alpha
from consilience.errors import InputError, nearest
from consilience.learned.loop import Stopping, descend
from consilience.mixing.target import draw, noise, run
from consilience.optimizers.anchor import Anchor
from consilience.optimizers.gradient import Terms
from consilience.optimizers.make import make_optimizer
from consilience.optimizers.parameterisation import parameterise
from consilience.optimizers.settings import Descent
from consilience.training.step import cosine

Kind = Literal["logits", "probabilities"]
Predict = Callable[[nn.Module, Tensor], Tensor]

#: Least probability: a mixture may leave the simplex by SPSA's step, and a float's logarithm ends somewhere anyway.
_LEAST = 1e-12
#: The label of a row without one.
UNLABELLED = -1


def answers_of(experts: Sequence[nn.Module], inputs: Tensor, *, predict: Predict = run, batch: int = 256) -> Tensor:
    """Return every expert's log-probabilities on every row, [K, n, C] float32.

    Args:
        experts: modules of any architecture over the same classes; evaluated in eval mode, without gradients.
        inputs: [n, ...], what all of them take.
        predict: (module, inputs) -> logits [n, C].
        batch: rows at a time.

    Raises:
        InputError: no experts, no rows, unlike numbers of classes, or an answer that is not finite.
    """
    if not experts or not len(inputs):
        raise InputError("experts: there is no expert or no row; give at least one of each")
    found = [_answer(expert, inputs, predict, batch) for expert in experts]
    for number, answer in enumerate(found):
        if answer.shape != found[0].shape:
            raise InputError(
                f"expert {number}: it answers with {list(answer.shape)} and expert 0 with {list(found[0].shape)}; only "
                "experts over the same classes can be mixed"
            )
        if not bool(torch.isfinite(answer).all()):
            raise InputError(f"expert {number}: an answer is not finite; check its input's normalisation and dtype")
    return torch.stack(found)


def _answer(expert: nn.Module, inputs: Tensor, predict: Predict, batch: int) -> Tensor:
    modes = [(part, part.training) for part in expert.modules()]
    expert.eval()
    try:
        with torch.no_grad():
            parts = [predict(expert, inputs[i : i + batch]) for i in range(0, len(inputs), batch)]
    finally:
        for part, training in modes:
            part.training = training
    return log_softmax(torch.cat(parts).float(), -1)


def mixture(answers: Tensor, alpha: Alpha, kind: Kind = "logits") -> Tensor:
    """Return ln q of the mixed predictions.

    Args:
        answers: log-probabilities [K, n, C].
        alpha: [K] or [K, 1] coefficients.
        kind: what is mixed; see above. Under "probabilities" what is not positive is 1e-12, then rows are divided by
            their sum.

    Returns:
        [n, C] float64.

    Raises:
        InputError: unknown kind, or not one coefficient an expert.
    """
    _check(kind)
    return _mixed(answers.to(torch.float64), _weights(alpha, len(answers)), kind)


def _mixed(answers: Tensor, weights: Tensor, kind: Kind) -> Tensor:
    if kind == "logits":
        return log_softmax(torch.einsum("k,knc->nc", weights, answers), -1)
    total = torch.einsum("k,knc->nc", weights, answers.exp()).clamp(min=_LEAST)
    return (total / total.sum(-1, keepdim=True)).log()


def _check(kind: str) -> None:
    if kind not in get_args(Kind):
        raise InputError(f"kind: {kind!r} is none of {', '.join(get_args(Kind))}{nearest(kind, get_args(Kind))}")


def _weights(alpha: Alpha, experts: int) -> Tensor:
    values = torch.as_tensor(np.asarray(alpha, np.float64))
    if values.numel() != experts:
        raise InputError(
            f"alpha: {list(values.shape)} coefficients for {experts} experts; predictions are mixed with one an expert"
        )
    return values.reshape(-1)


class FunctionLoss:
    """The mixed predictions' loss on labelled rows, for any optimizer of coefficients [K, 1]; it has ``at``.

    All points of a step see one minibatch, a function of (seed, step). Sums are in float64.
    """

    def __init__(
        self, answers: Tensor, labels: Tensor, *, kind: Kind = "logits", batch: int = 0, seed: int = 0
    ) -> None:
        """Take the experts' log-probabilities [K, n, C] and labels [n]; ``batch`` rows a step, 0: all.

        Raises:
            InputError: unknown kind, or labels that do not meet the answers; leave unlabelled rows out.
        """
        _check(kind)
        if answers.ndim != 3 or labels.shape != answers.shape[1:2] or labels.is_floating_point() or not len(labels):
            raise InputError(
                f"labels: shape {list(labels.shape)} does not meet answers {list(answers.shape)}; give an integer a row"
            )
        if int(labels.min()) < 0 or int(labels.max()) >= answers.shape[2]:
            raise InputError(f"labels: they must be from 0 to {answers.shape[2] - 1}; leave unlabelled rows out")
        self.answers, self.labels = answers, labels.to(torch.int64)
        self.kind: Kind = kind
        self.batch, self.seed = batch, seed

    def __call__(self, alpha: Alpha, step: int, *, gradient: bool) -> tuple[Terms, Alpha | None]:
        """Return the loss at ``alpha`` [K, 1] on the rows of ``step`` and, if asked for, dL/dalpha [K, 1]."""
        answers, labels = self._rows(step)
        weights = _weights(alpha, len(answers)).requires_grad_(gradient)
        loss = cross_entropy(_mixed(answers, weights, self.kind), labels)
        if not gradient:
            return {"target": loss.item()}, None
        (slope,) = torch.autograd.grad(loss, weights)
        return {"target": loss.item()}, slope.numpy().reshape(np.shape(alpha))

    def at(self, points: Sequence[Alpha], step: int) -> list[Terms]:
        """Return the loss at several points on the rows of ``step``; all mixtures are one product."""
        answers, labels = self._rows(step)
        if not points:
            return []
        weights = torch.stack([_weights(point, len(answers)) for point in points])
        held = answers if self.kind == "logits" else answers.exp()
        totals = torch.einsum("pk,knc->pnc", weights, held)
        if self.kind == "probabilities":
            totals = totals.clamp(min=_LEAST).log()
        return [{"target": cross_entropy(total, labels).item()} for total in totals]

    def _rows(self, step: int) -> tuple[Tensor, Tensor]:
        chosen = torch.tensor(draw(len(self.labels), self.batch, self.seed, step))
        return self.answers[:, chosen].to(torch.float64), self.labels[chosen]


@dataclass(frozen=True)
class Distillation:
    """How a student learns from mixed predictions; the defaults are this project's.

    Args:
        steps: minibatches.
        batch: rows of one; 0: all.
        rate: Adam's learning rate, falling to 0 along a cosine.
        temperature: T of the targets and of the student against them.
        label_weight: weight of the labels' cross-entropy, where there are labels.
        weight_decay: decoupled decay of the student's weights.
        seed: of the minibatches and of dropout.
    """

    steps: int = 200
    batch: int = 64
    rate: float = 1e-3
    temperature: float = 2.0
    label_weight: float = 0.0
    weight_decay: float = 0.0
    seed: int = 0


def distill_targets(
    student: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    settings: Distillation | None = None,
    *,
    labels: Tensor | None = None,
    predict: Predict = run,
) -> list[Terms]:
    """Train ``student`` in place towards mixed predictions on target inputs, with or without labels.

    The student is trained in train mode, with random numbers of the seed alone, and gets its modes back. The
    temperature's T^2 keeps the gradient's size the same for every T.

    Args:
        student: any module over the experts' classes.
        inputs: [n, ...].
        targets: ln q [n, C] as ``mixture`` returns it.
        settings: see ``Distillation``.
        labels: [n] integers, -1 where a row has none.
        predict: (module, inputs) -> logits [n, C].

    Returns:
        The terms before each step: ``kl`` (times T^2) and, with labels, ``labels`` (times its weight).

    Raises:
        InputError: settings or shapes that make no sense, or a loss that is not finite.
    """
    held = settings or Distillation()
    _validate(held, inputs, targets, labels)
    modes = [(part, part.training) for part in student.modules()]
    student.train()
    try:
        return list(_descend(student, inputs, targets, labels, held, predict))
    finally:
        for part, training in modes:
            part.training = training


def _descend(
    student: nn.Module, inputs: Tensor, targets: Tensor, labels: Tensor | None, settings: Distillation, predict: Predict
) -> Generator[Terms]:
    moved = [parameter for parameter in student.parameters() if parameter.requires_grad]
    rule = torch.optim.AdamW(moved, settings.rate, weight_decay=settings.weight_decay)
    for step in range(settings.steps):
        rule.param_groups[0]["lr"] = cosine(step, settings.steps, peak=settings.rate)
        chosen = torch.tensor(draw(len(inputs), settings.batch, settings.seed, step))
        with noise(settings.seed, step):
            logits = predict(student, inputs[chosen])
        parts = losses(logits, targets[chosen], None if labels is None else labels[chosen], settings)
        loss = torch.stack(list(parts.values())).sum()
        if not bool(torch.isfinite(loss)):
            raise InputError(f"student: the loss is not finite at step {step}; lower the rate ({settings.rate:g})")
        rule.zero_grad(set_to_none=True)
        loss.backward()
        rule.step()
        yield {name: float(value.detach()) for name, value in parts.items()}
    rule.zero_grad(set_to_none=True)


def losses(
    logits: Tensor, targets: Tensor, labels: Tensor | None = None, settings: Distillation | None = None
) -> dict[str, Tensor]:
    """Return the student's weighted terms on one minibatch.

    Args:
        logits: [n, C] of the student.
        targets: ln q [n, C].
        labels: [n], -1 where a row has none: such a row counts in the mean with 0.
        settings: temperature and the labels' weight.

    Returns:
        ``kl``: T^2 KL(q_T || s_T), the mean over rows; with labels ``labels``: label_weight * CE.
    """
    held = settings or Distillation()
    heat = held.temperature
    wanted = log_softmax(targets.to(logits.dtype) / heat, -1)
    each = kl_div(log_softmax(logits / heat, -1), wanted, reduction="none", log_target=True).sum(-1)
    found = {"kl": heat**2 * each.mean()}
    if labels is not None:
        known = cross_entropy(logits, labels, ignore_index=UNLABELLED, reduction="none")
        found["labels"] = held.label_weight * known.mean()
    return found


def learn_weights(
    answers: Tensor,
    labels: Tensor,
    *,
    kind: Kind = "logits",
    held_out: tuple[Tensor, Tensor] | None = None,
    optimizer: str = "adam",
    settings: Descent | None = None,
    batch: int = 0,
    seed: int = 0,
) -> Alpha:
    """Return the coefficients [K], positive and of sum 1, of least loss of the mixed predictions on labels.

    Args:
        answers: log-probabilities [K, n, C].
        labels: [n] integers.
        kind: what is mixed.
        held_out: answers and labels to stop early by; None: all steps are taken.
        optimizer: any of ``make_optimizer``.
        settings: of the optimizer; by default 150 steps at rate 0.3 along a cosine.
        batch: rows of a step; 0: all.
        seed: of the minibatches and random directions.

    Raises:
        InputError: as for ``FunctionLoss``, or no such optimizer.
    """
    how = settings or Descent(learning_rate=0.3, steps=150)
    loss = FunctionLoss(answers, labels, kind=kind, batch=batch, seed=seed)
    mapped = parameterise("softmax", np.full((len(answers), 1), 1 / len(answers)), [True])
    moved = make_optimizer(optimizer, how, mapped, Anchor(mapped.start, mapped.learned, 0.0), seed)
    stopping = None
    if held_out is not None:
        held = FunctionLoss(*held_out, kind=kind)
        stopping = Stopping(lambda alpha: held(alpha, 0, gradient=False)[0]["target"], every=10, patience=5)
    return descend(moved, loss, how.steps, stopping=stopping).alpha[:, 0]


@dataclass(frozen=True, eq=False)
class Distilled:
    """What ``distill`` did: the experts' coefficients [K], and the student's terms before each step."""

    alpha: Alpha
    history: list[Terms]


def distill(
    student: nn.Module,
    experts: Sequence[nn.Module],
    inputs: Tensor,
    alpha: Alpha | Literal["equal", "learned"] = "equal",
    settings: Distillation | None = None,
    *,
    kind: Kind = "logits",
    labels: Tensor | None = None,
    predict: Predict = run,
) -> Distilled:
    """Train ``student`` in place towards the mixed predictions of experts of any architecture over the same classes.

    This is what is left where weights cannot be averaged (``consilience.align`` says when): it needs inputs, no labels,
    and the student may have any architecture, an expert's weights to start from included.

    Args:
        student: any module over the experts' classes.
        experts: modules of any architecture; evaluated once on every row.
        inputs: [n, ...], what all of them take.
        alpha: [K] or [K, 1] coefficients; "equal": 1/K each; "learned": by the labels (``learn_weights``).
        settings: see ``Distillation``.
        kind: what is mixed, "logits" (a product of experts) or "probabilities" (a mixture).
        labels: [n] integers, -1 where a row has none.
        predict: (module, inputs) -> logits [n, C].

    Raises:
        InputError: experts, rows, coefficients, labels or settings make no sense, or a loss is not finite.
    """
    answers = answers_of(experts, inputs, predict=predict)
    if isinstance(alpha, str):
        alpha = _chosen(alpha, answers, labels, kind, settings or Distillation())
    targets = mixture(answers, alpha, kind)
    history = distill_targets(student, inputs, targets, settings, labels=labels, predict=predict)
    return Distilled(np.asarray(alpha, np.float64).reshape(-1), history)


def _chosen(alpha: str, answers: Tensor, labels: Tensor | None, kind: Kind, settings: Distillation) -> Alpha:
    if alpha == "equal":
        return np.full(len(answers), 1 / len(answers))
    if alpha != "learned":
        raise InputError(f"alpha: {alpha!r} is neither 'equal' nor 'learned'; or give one number an expert")
    if labels is None or labels.shape != answers.shape[1:2] or not bool((labels != UNLABELLED).any()):
        raise InputError("alpha: is learned by labels, and no row has one; give labels, or alpha='equal'")
    known = labels != UNLABELLED
    return learn_weights(answers[:, known], labels[known], kind=kind, seed=settings.seed)


def _validate(settings: Distillation, inputs: Tensor, targets: Tensor, labels: Tensor | None) -> None:
    for name in ("steps", "rate", "temperature"):
        if not 0 < getattr(settings, name) < math.inf:
            raise InputError(f"{name}: {getattr(settings, name)} is not above 0; choose a positive number")
    for name in ("label_weight", "weight_decay"):
        if not 0 <= getattr(settings, name) < math.inf:
            raise InputError(f"{name}: {getattr(settings, name)} is not 0 or above; choose such a number")
    if targets.ndim != 2 or len(targets) != len(inputs) or not len(inputs):
        raise InputError(
            f"targets: {list(targets.shape)} do not meet {len(inputs)} inputs; give log-probabilities a row"
        )
    if labels is not None and (labels.shape != targets.shape[:1] or labels.is_floating_point()):
        raise InputError(
            f"labels: shape {list(labels.shape)} for {len(inputs)} inputs; give one integer a row, -1: none"
        )
    if labels is not None and not UNLABELLED <= int(labels.min()) <= int(labels.max()) < targets.shape[1]:
        raise InputError(f"labels: they must be from 0 to {targets.shape[1] - 1}, or -1 for a row without one")
