"""How well an expert suits a labelled target, without training: scores to pick one expert by, or to weight all.

Every score is higher for the better expert. The features are the inputs of the expert's last linear layer.

The proxies of GLUE's baseline "proxy-metric selection" (arXiv:2512.22467) are not named in the text that was available;
its introduction cites LogME, which is the default here and not claimed to be the paper's.
"""

import math
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from consilience.errors import InputError, nearest
from consilience.mixing.target import run

Proxy = Literal["logme", "h_score", "leep", "loss", "accuracy"]
Predict = Callable[[nn.Module, Tensor], Tensor]
Features = Callable[[nn.Module, Tensor], Tensor] | str | None

#: Relative change of a / b at which LogME's fixed point counts as found, and the most rounds towards it.
_CLOSE, _ROUNDS = 1e-3, 100
#: Least squared residual and least squared weights as shares of |y|^2: a class that is fitted exactly stays finite.
_LEAST = 1e-12


def log_me(features: Tensor, labels: Tensor) -> float:
    """Return the evidence of Bayesian linear regression of each class on the features, a sample, averaged over classes.

        y_c ~ N(F m, 1/b),  m ~ N(0, 1/a):
        evidence(a, b) = n/2 ln b + d/2 ln a - n/2 ln 2 pi - b/2 |F m - y_c|^2 - a/2 |m|^2 - 1/2 ln det A
        A = a I + b F'F,  m = b A^-1 F'y_c;      LogME = mean over c of max_{a,b} evidence / n

    The maximum is a fixed point of a = gamma / |m|^2 and b = (n - gamma) / |F m - y_c|^2, with s the eigenvalues of F'F
    and gamma = sum_i b s_i / (a + b s_i). It is iterated to a relative change of a / b below 1e-3, at most 100 rounds;
    one SVD of F serves every class.

    Args:
        features: [n, d], any floating dtype; computed in float64.
        labels: [n] integers. Classes that do not occur are left out: their evidence is unbounded.

    Raises:
        InputError: fewer than two classes occur, values are not finite, or the shapes do not meet.

    Source: You et al. 2021, LogME, arXiv:2102.11005, section 4. The released code stops at a change of 1e-2 or after 11
    rounds, adds 1e-5 to both denominators, and counts classes up to the largest label whether they occur or not.
    """
    held, classes = _checked(features, labels)
    u, s, _ = torch.linalg.svd(held, full_matrices=False)
    targets = torch.nn.functional.one_hot(classes).to(torch.float64)
    inside = u.T @ targets
    scores = [
        _evidence(s.square(), inside[:, c], float(targets[:, c].sum()), held.shape) for c in range(targets.shape[1])
    ]
    return sum(scores) / len(scores)


def _evidence(sigma: Tensor, z: Tensor, total: float, shape: torch.Size) -> float:
    """Return the greatest evidence a sample of one class: ``z`` = U'y, ``total`` = |y|^2."""
    n, d = shape
    outside, floor = max(0.0, total - float(z.square().sum())), _LEAST * total

    def fit(a: float, b: float) -> tuple[float, float]:
        shrunk = a + b * sigma
        residual = float((z * a / shrunk).square().sum()) + outside
        return max(residual, floor), max(float((z * b * sigma.sqrt() / shrunk).square().sum()), floor)

    a = b = 1.0
    for _ in range(_ROUNDS):
        residual, weights = fit(a, b)
        gamma = float((b * sigma / (a + b * sigma)).sum())
        before = a / b
        # n - gamma is 0 where features span the samples; b then only grows, as the evidence does.
        a, b = max(gamma, _LEAST) / weights, max(n - gamma, _LEAST * n) / residual
        if abs(a / b - before) < _CLOSE * before:
            break
    residual, weights = fit(a, b)
    determinant = float(torch.log(a + b * sigma).sum()) + (d - len(sigma)) * math.log(a)
    free = n * math.log(b) + d * math.log(a) - n * math.log(2 * math.pi)
    return (free - b * residual - a * weights - determinant) / (2 * n)


def h_score(features: Tensor, labels: Tensor) -> float:
    """Return tr(cov(F)^+ cov(E[F | y])): the features' variance between classes, in units of their whole variance.

    With U the left singular vectors of the centred features and P the averaging over classes this is |P U|^2, so it
    lies in [0, min(rank, classes - 1)]. Directions below 1e-10 of the largest singular value are left out (the ``^+``).

    Args:
        features: [n, d], any floating dtype; computed in float64.
        labels: [n] integers.

    Raises:
        InputError: as for ``log_me``.

    Source: Bao et al. 2019, An Information-Theoretic Approach to Transferability in Task Transfer Learning. With few
    samples (n near d) the covariance is singular and the score near its bound whatever the features are.
    """
    held, classes = _checked(features, labels)
    u, s, _ = torch.linalg.svd(held - held.mean(0), full_matrices=False)
    kept = u[:, s > 1e-10 * s.max()]
    counts = torch.bincount(classes).to(torch.float64)
    sums = torch.zeros(len(counts), kept.shape[1], dtype=torch.float64).index_add_(0, classes, kept)
    return float((sums.square() / counts[:, None]).sum())


def leep(probabilities: Tensor, labels: Tensor) -> float:
    """Return the log likelihood, in nats a sample, of the labels under the classes that the expert predicts.

        P(y, z) = 1/n sum_{i: y_i = y} p_i(z);    LEEP = 1/n sum_i ln sum_z P(y_i | z) p_i(z)

    The expert's classes z need not be the target's: it is at most 0, and 0 where predictions determine the labels.

    Args:
        probabilities: [n, Z], rows sum to 1; computed in float64.
        labels: [n] integers.

    Raises:
        InputError: as for ``log_me``.

    Source: Nguyen et al. 2020, LEEP, arXiv:2002.12462, equations 1 to 3.
    """
    p, classes = _checked(probabilities, labels)
    joint = torch.nn.functional.one_hot(classes).to(torch.float64).T @ p
    # A class z that is never predicted has no part in any sum below.
    given = joint / joint.sum(0).clamp(min=torch.finfo(torch.float64).tiny)
    return float((p * given[classes]).sum(1).log().mean())


def zero_shot_loss(logits: Tensor, labels: Tensor) -> float:
    """Return the mean of ``-ln softmax(z)[label]`` in nats: logits or log-probabilities [n, C], labels [n]."""
    held, chosen = _answers(logits, labels)
    if int(chosen.max()) >= held.shape[1]:
        raise InputError(
            f"labels: {int(chosen.max())} is not one of the expert's {held.shape[1]} classes; score by leep"
        )
    return float(torch.nn.functional.cross_entropy(held, chosen))


def zero_shot_accuracy(logits: Tensor, labels: Tensor) -> float:
    """Return the share of rows whose greatest logit (or probability) is the label's: [n, C], [n]."""
    held, chosen = _answers(logits, labels)
    return float((held.argmax(1) == chosen).to(torch.float64).mean())


def proxy_scores(
    module: nn.Module,
    states: Sequence[Mapping[str, Tensor]],
    inputs: Tensor,
    labels: Tensor,
    proxy: Proxy = "logme",
    *,
    features: Features = None,
    predict: Predict | None = None,
    batch: int = 256,
) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Score every expert on the target set by loading its state into one module in turn; higher is better.

    The zero-shot loss is negated. The module gets its own state and modes back, also where a score fails.

    Args:
        module: the experts' architecture; evaluated in eval mode, without gradients.
        states: one state dict an expert.
        inputs: [n, ...], what the module takes.
        labels: [n] integers.
        proxy: which score.
        features: the module whose input is scored (its name), or a function (module, inputs) -> [n, d]; None: the last
            ``nn.Linear``.
        predict: (module, inputs) -> logits [n, C]; None calls the module, whose output is the logits or has them as
            ``.logits``.
        batch: rows at a time.

    Returns:
        [K] float64.

    Raises:
        InputError: unknown proxy, no module of that name, a state that does not fit, or as the score raises.
    """
    if proxy not in get_args(Proxy):
        raise InputError(f"proxy: {proxy!r} is none of {', '.join(get_args(Proxy))}{nearest(proxy, get_args(Proxy))}")
    if not states:
        raise InputError("experts: there is none to score; give at least one")
    score = _SCORES[proxy]
    read = _reader(features) if proxy in ("logme", "h_score") else predict or run
    scores: list[float] = []
    with _borrowed(module):
        for expert, state in enumerate(states):
            _load(module, state, expert)
            parts = [read(module, inputs[i : i + batch]) for i in range(0, len(inputs), batch)]
            if not parts:
                raise InputError("inputs: the target set is empty; give it at least one row")
            scores.append(score(torch.cat(parts), labels))
    return np.array(scores, np.float64)


_SCORES: dict[Proxy, Callable[[Tensor, Tensor], float]] = {
    "logme": log_me,
    "h_score": h_score,
    "leep": lambda logits, labels: leep(torch.softmax(logits.to(torch.float64), -1), labels),
    "loss": lambda logits, labels: -zero_shot_loss(logits, labels),
    "accuracy": zero_shot_accuracy,
}


@contextmanager
def _borrowed(module: nn.Module) -> Generator[None]:
    """Put a module into eval mode without gradients; afterwards give it its state and modes back."""
    state = {name: value.detach().clone() for name, value in module.state_dict().items()}
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        module.load_state_dict(state)
        for part, training in modes:
            part.training = training


def _load(module: nn.Module, state: Mapping[str, Tensor], expert: int) -> None:
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        raise InputError(
            f"expert {expert}: its state does not fit the module ({error}); give that expert's own"
        ) from None


def _reader(features: Features) -> Predict:
    return features if callable(features) else lambda module, inputs: _input_of(module, inputs, features)


def _input_of(module: nn.Module, inputs: Tensor, name: str | None) -> Tensor:
    """Return what the named part (the last linear layer) of the module is given, [n, d]."""
    parts = dict(module.named_modules())
    found = (
        next((n for n, part in reversed(parts.items()) if isinstance(part, nn.Linear)), "") if name is None else name
    )
    if not found or found not in parts:
        raise InputError(
            f"features: the module has no {found or 'linear layer'!r}; name the layer whose input is scored"
        )
    seen: list[Tensor] = []

    def keep(_: nn.Module, given: tuple[Tensor, ...]) -> None:
        seen.append(given[0].detach())

    hook = parts[found].register_forward_pre_hook(keep)
    try:
        module(inputs)
    finally:
        hook.remove()
    if not seen:
        raise InputError(f"features: the forward pass does not run {found!r}; name the layer whose input is scored")
    return seen[-1].flatten(1)


def _answers(values: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return values in float64 and labels as indices into their columns."""
    if values.ndim != 2 or labels.shape != values.shape[:1] or not len(labels):
        raise InputError(f"labels: shape {list(labels.shape)} does not meet {list(values.shape)}; give one label a row")
    if not bool(torch.isfinite(values).all()):
        raise InputError("features: a value is not finite; the expert's forward pass overflows on these inputs")
    if labels.is_floating_point() or int(labels.min()) < 0:
        raise InputError("labels: they must be integers from 0; leave unlabelled rows out")
    return values.detach().to(torch.float64), labels.to(torch.int64)


def _checked(values: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return values in float64 and labels renumbered by the classes that occur."""
    held, chosen = _answers(values, labels)
    classes, numbered = chosen.unique(return_inverse=True)
    if len(classes) < 2:
        raise InputError(f"labels: only class {int(classes[0])} occurs; a score needs rows of two classes or more")
    return held, numbered
