"""What a mixture is compared with: fixed weights, the greedy soup, the full gradient, the ensemble, the base.

uniform         alpha_k = 1 / K
data_size       alpha_k = n_k / sum_j n_j
best_single     alpha = one-hot(argmax_k score_k)
proxy_softmax   alpha = softmax(score / T)
random_simplex  alpha uniform on the simplex
greedy_soup     the mean of the experts that, added in order of merit, do no harm on held-out rows
full_gradient   the same search by backpropagation
ensemble        the experts' averaged probabilities: K models, not one

Weights are [K] float64; ``ExpertBank.table`` makes coefficients of them. GLUE (arXiv:2512.22467) compares with uniform,
data-size, proxy-selected and full-gradient weights; which proxy it takes is not known, so scores are an argument.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from consilience.errors import InputError
from consilience.mixing.bank import ExpertBank, StateDict
from consilience.mixing.batchnorm import mode
from consilience.mixing.fine_tune import Evaluation, FineTuned, fine_tune
from consilience.mixing.mix import Mixture, Search, mix_bank
from consilience.mixing.problem import EVALUATION_ROWS, TargetLoss
from consilience.mixing.student import Student
from consilience.mixing.target import as_rows, passes, run
from consilience.progress import ProgressOption

Weights = npt.NDArray[np.float64]

#: Keeps these random numbers apart from others that are drawn from the same seed.
_STREAM = 0xBA5E


def uniform(experts: int) -> Weights:
    """Return ``1 / K`` for each of K experts."""
    return np.full(experts, 1.0 / experts)


def data_size(sizes: Sequence[float]) -> Weights:
    """Return the experts' shares of all training rows.

    Raises:
        InputError: a size is negative or not finite, or none is positive.
    """
    found = np.asarray(sizes, np.float64)
    if not (np.isfinite(found).all() and (found >= 0).all() and found.sum() > 0):
        raise InputError("data_size: give every expert's number of training rows, none negative and not all 0")
    return found / found.sum()


def best_single(scores: Sequence[float] | Weights) -> Weights:
    """Return all weight on the expert with the highest score (the first of several).

    Raises:
        InputError: a score is NaN, or there is none.
    """
    found = np.zeros(len(scores))
    found[int(np.argmax(_scores(scores)))] = 1.0
    return found


def proxy_softmax(scores: Sequence[float] | Weights, temperature: float = 1.0) -> Weights:
    """Return ``softmax(score / T)``: the softer kin of ``best_single``, which it tends to as T falls to 0.

    Raises:
        InputError: a score is NaN, there is none, or the temperature is not positive.
    """
    if not temperature > 0:
        raise InputError(f"temperature = {temperature:g}: must be positive")
    found = _scores(scores)
    weights = np.exp((found - found.max()) / temperature)
    return weights / weights.sum()


def _scores(scores: Sequence[float] | Weights) -> Weights:
    found = np.asarray(scores, np.float64)
    if not found.size or not np.isfinite(found).all():
        raise InputError("scores: give every expert a finite score")
    return found


def random_simplex(experts: int, seed: int) -> Weights:
    """Return a point drawn uniformly from the simplex."""
    return np.random.default_rng([_STREAM, seed]).dirichlet(np.ones(experts))


def greedy_soup(loss: TargetLoss) -> Weights:
    """Return equal weights for the experts that, tried in order of held-out loss, did not raise the mean's.

    Source: Wortsman et al., Model soups, arXiv:2203.05482, algorithm 1.

    Raises:
        ValueError: no rows are held out.
    """
    experts = len(loss.bank.names)
    alone = [loss.validate(loss.bank.table(np.eye(experts)[k])) for k in range(experts)]
    order = np.argsort(alone, kind="stable").tolist()
    chosen, best = order[:1], alone[order[0]]
    for expert in order[1:]:
        value = loss.validate(loss.bank.table(_mean_of([*chosen, expert], experts)))
        if value <= best:
            chosen, best = [*chosen, expert], value
    return _mean_of(chosen, experts)


def _mean_of(chosen: Sequence[int], experts: int) -> Weights:
    weights = np.zeros(experts)
    weights[list(chosen)] = 1.0 / len(chosen)
    return weights


def full_gradient(
    bank: ExpertBank,
    loss: TargetLoss,
    search: Search,
    *,
    progress: ProgressOption = False,
    folder: Path | str | None = None,
) -> Mixture:
    """Search by backpropagation with the learning rate, minibatches, rule and number of steps of another search.

    Raises:
        InputError: as ``consilience.mixing.mix``; also, the measure has no gradient.
    """
    same = replace(search, optimizer=str(search.settings.get("rule", "sgd")))
    return mix_bank(bank, loss, same, progress=progress, folder=folder)


def ensemble_probabilities(bank: ExpertBank, module: nn.Module, data: Any) -> Tensor:
    """Return the experts' averaged probabilities on rows [n, C], in float64: K forward passes a row.

    Raises:
        InputError: there are no rows.
    """
    student, rows = Student(module, bank), as_rows(data, "data")
    room = bank.room(1)
    total: Tensor | None = None
    for weights in np.eye(len(bank.names)):
        expert = student.show(bank.blends([bank.table(weights)], room))
        with mode(expert, "blend"), torch.no_grad():
            logits = [run(expert, inputs) for inputs, _ in passes(rows, EVALUATION_ROWS, bank.matrix.device)]
        found = torch.softmax(torch.cat(logits).double(), -1)
        total = found if total is None else total + found
    assert total is not None
    return total / len(bank.names)


def ensemble(bank: ExpertBank, module: nn.Module, data: Any) -> Evaluation:
    """Return accuracy and cross-entropy of the averaged probabilities.

    Raises:
        InputError: there are no rows.
    """
    probabilities, rows = ensemble_probabilities(bank, module, data), as_rows(data, "data")
    labels = torch.cat([labels for _, labels in passes(rows, EVALUATION_ROWS, probabilities.device)])
    right = (probabilities.argmax(-1) == labels).double().mean()
    # A probability of 0 in float64 is below e^-745 for every expert.
    picked = probabilities.gather(1, labels[:, None]).clamp(min=torch.finfo(torch.float64).tiny)
    return Evaluation(float(right), float(-picked.log().mean()), len(rows))


def from_base(module: nn.Module, base: StateDict, train: Any, test: Any = None, **settings: Any) -> FineTuned:
    """Fine-tune theta_0 itself: what the target's rows give without experts; see ``fine_tune``."""
    return fine_tune(module, base, train, test, **settings)
