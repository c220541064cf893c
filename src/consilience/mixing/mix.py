"""GLUE: one model from experts of one architecture, mixed for a target by what it loses there.

    minimise over alpha   L(theta(alpha)),   theta(alpha) = sum_k alpha_k theta_k

Experts never change; what is learned are their coefficients.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast, get_args

import numpy as np
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn

from consilience.coefficients.coefficients import Alpha
from consilience.coefficients.groups import Group
from consilience.coefficients.spectrum import Spectrum
from consilience.errors import InputError, nearest
from consilience.learned.loop import History, Stopping, descend
from consilience.mixing.bank import ExpertBank, StateDict
from consilience.mixing.batchnorm import Policy
from consilience.mixing.identity import digest
from consilience.mixing.problem import Counts, TargetLoss
from consilience.mixing.target import Measure, RemoteScore, Target, as_rows, measure_of, split
from consilience.mixing.trajectory import Traced
from consilience.numbers import is_count, is_number
from consilience.optimizers.anchor import Anchor
from consilience.optimizers.diagnosis import FEWEST, Diagnosis, Record, diagnose
from consilience.optimizers.gradient import Optimizer
from consilience.optimizers.kept import screen
from consilience.optimizers.make import make_optimizer
from consilience.optimizers.parameterisation import Parameterisation
from consilience.optimizers.settings import GRADIENT, NAMES, Descent, adjust
from consilience.optimizers.spaces import BlendSpace, Space
from consilience.optimizers.spsa import record_of
from consilience.progress import ProgressOption, open_progress
from consilience.tasks.gradients import gradients


@dataclass(frozen=True, eq=False)
class Mixture:
    """One model mixed from experts, and how it was found.

    Attributes:
        alpha: [K, N] float64 coefficients, of the best validation loss if rows were held out.
        names: the experts' names [K].
        groups: the groups of parameters [N].
        state: the mixture's state dict, in the module's dtypes.
        history: the terms of the loss before each step.
        validation: (steps done, held-out loss) where it was taken; a score's sign is turned.
        trajectory: [steps + 1, K, N]: the coefficients at the start and after every step.
        step: the number of steps that ``alpha`` is from.
        entropy: of alpha in nats, the mean over groups; NaN off the simplex (these five: see ``Spectrum.facts``).
        distance: ``||theta(alpha) - theta_bar||``, as a share of the experts' own root mean square distance.
        left_hull: whether some coefficient is negative, or they sum to more than 1.
        sigma_max: largest singular value of the experts' matrix.
        sigma_max_centred: the same less the experts' mean.
        counts: forward and backward passes.
        seconds: wall time of the search, all its interrupted parts together.
        record: what SPSA measured, for ``consilience.optimizers.diagnosis``; None of other optimizers.
    """

    alpha: Alpha
    names: tuple[str, ...]
    groups: tuple[Group, ...]
    state: dict[str, Tensor]
    history: History
    validation: list[tuple[int, float]]
    trajectory: Alpha
    step: int
    entropy: float
    distance: float
    left_hull: bool
    sigma_max: float
    sigma_max_centred: float
    counts: Counts
    seconds: float
    record: Record | None = None

    @property
    def movement(self) -> list[float]:
        """Return ``||alpha_{t+1} - alpha_t||`` of every step: what the learning rate comes to."""
        return [float(np.linalg.norm(change)) for change in np.diff(self.trajectory, axis=0)]

    @property
    def diagnosis(self) -> Diagnosis | None:
        """Say what the run did and what to change; None of other optimizers than SPSA, and of a dozen steps or less."""
        if self.record is None or len(self.record.steps) < FEWEST:
            return None
        return diagnose(self.record)


@dataclass(frozen=True)
class Search:
    """How a mixture is searched for; the arguments of ``mix`` of the same names."""

    space: Space = "simplex"
    optimizer: str = "spsa"
    steps: int = 200
    learning_rate: float = 0.1
    start: Sequence[float] | None = None
    radius: float = 0.0
    parts: int = 0
    seed: int = 0
    every: int = 10
    patience: int = 5
    settings: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def map(self, bank: ExpertBank, spectrum: Spectrum) -> Parameterisation:
        """Return the map from what moves to a bank's coefficients.

        Raises:
            InputError: the start is not one coefficient an expert, or out of the space's reach.
        """
        experts = len(bank.names)
        start = [1.0 / experts] * experts if self.start is None else list(self.start)
        if len(start) != experts:
            raise InputError(f"start: {len(start)} coefficients for {experts} experts; give one each")
        space = BlendSpace(space=self.space, radius=self.radius, parts=self.parts)
        fixed = 0.0 if bank.has_base else 1.0 / experts
        return space.map(np.where(bank.learned, bank.table(start), fixed), bank.learned, lambda: spectrum)


def mix(
    module: nn.Module,
    experts: Mapping[str, StateDict],
    target: Target | Any,
    *,
    space: Space = "simplex",
    optimizer: str = "spsa",
    granularity: str = "global",
    steps: int = 200,
    learning_rate: float = 0.1,
    base: StateDict | None = None,
    start: Sequence[float] | None = None,
    measure: str | Measure = "cross_entropy",
    batch_size: int = 64,
    holdout: float = 0.2,
    every: int = 10,
    patience: int = 5,
    bn: Policy | None = None,
    recalibration: int = 20,
    training: bool = False,
    radius: float = 0.0,
    parts: int = 0,
    keep: int = 0,
    exclude: Sequence[str] = (),
    seed: int = 0,
    progress: ProgressOption = False,
    folder: Path | str | None = None,
    **settings: Any,
) -> Mixture:
    """Mix experts into the model that loses least on a target.

    simplex: alpha = softmax(beta), from beta = 0; affine: sum alpha = 1 of any sign; task_vector: theta_0 + sum alpha_k
    (theta_k - theta_0), free. For many experts, whose estimates are noisier: low_rank, coordinates along the directions
    in which the experts differ most (from the mean, sum alpha = 1); hierarchical, a softmax inside clusters of like
    experts times one across them; and ``keep``, which drops the worst beforehand.

    ``spsa`` takes two evaluations a direction and no backward pass (GLUE); ``sgd``, ``adam`` and ``adamw`` take the
    full gradient; ``cma`` evolves. Every optimizer fits every space and granularity.

    mu, the learning rate, the number of steps and the batch size of the paper are not known: the defaults are ours.

    Args:
        module: of the experts' architecture; it is copied, not changed, and its own values do not count.
        experts: state dicts by name; they are copied once and never written to.
        target: a ``Target``, or (inputs, labels) tensors, or a sized data set of (input, label). None, if the measure
            is a ``RemoteScore``.
        space: where coefficients may lie.
        optimizer: see above.
        granularity: which parameters share a coefficient: global, block, module, tensor or re:PATTERN.
        steps: most steps.
        learning_rate: in units of what moves: logits for the simplex, else coefficients.
        base: theta_0's state dict, for ``task_vector``.
        start: coefficients to start from, one an expert; default: 1/K.
        measure: cross_entropy, accuracy, or what ``consilience.mixing.target`` defines (not with a ``Target``).
        batch_size: rows of a minibatch; 0: all (not with a ``Target``).
        holdout: share of the rows held out where no validation rows are given; 0: none, and no early stopping.
        every: steps between two validations.
        patience: validations without a new best that end the search.
        bn: what batch normalisation does, see ``batchnorm``; default: recalibrate if there are rows, else blend.
        recalibration: minibatches for re-estimating running statistics.
        training: run the module in training mode (dropout), with equal random numbers for all points of a step.
        radius: greatest distance of the mixture from the experts' mean, in units of their own root mean square
            distance from it; 0: any.
        parts: directions of low_rank, or clusters of hierarchical; 0: about the square root of the number of experts.
        keep: how many experts to keep, those that alone lose least on the validation rows (or the first minibatch);
            the others have coefficient 0 and no entry in the result; 0: all.
        exclude: patterns of parameters that are not learned (``consilience.name_filter``): they stay at the base's
            values where there is a base, else at the experts' mean.
        seed: of minibatches, directions and noise.
        progress: True for a bar (or lines) on standard error, a function called with (steps done, steps in all), or a
            ``Progress``.
        folder: where the state is kept, from which an interrupted call goes on; None: nothing is kept.
        settings: further fields of ``consilience.optimizers.settings.Descent``: mu, directions, rule, schedule, ...

    Raises:
        InputError: the experts do not fit the module or each other, the target has no rows, a setting is unknown, or
            the loss is not finite.

    Source: Park et al., GLUE, arXiv:2512.22467.
    """
    search = Search(
        space, optimizer, steps, learning_rate, None if start is None else [float(value) for value in start], radius,
        parts, seed, every, patience, settings,
    )  # fmt: skip
    _check(search, base)
    check_module(module)
    experts = named_experts(experts)
    if target is None and not isinstance(measure, RemoteScore):
        raise InputError("target: is missing; give (inputs, labels) tensors, a data set of (input, label), or a Target")
    held = target if isinstance(target, Target) else _target(target, measure, batch_size, holdout, seed)
    remote = isinstance(held.measure, RemoteScore)
    policy: Policy = bn or ("recalibrate" if held.train is not None and not remote else "blend")

    def problem(chosen: Mapping[str, StateDict]) -> TargetLoss:
        origin = base if space == "task_vector" else None
        bank = ExpertBank.of(chosen, module, grouping=granularity, base=origin, exclude=exclude)
        return TargetLoss(bank, module, held, seed=seed, bn=policy, training=training, recalibration=recalibration)

    loss = problem(experts)
    if keep:
        names = [loss.bank.names[k] for k in screen(alone(loss), keep)]
        loss = problem({name: experts[name] for name in names})
    return mix_bank(loss.bank, loss, search, progress=progress, folder=folder)


def alone(loss: TargetLoss) -> list[float]:
    """Return what every expert loses alone [K]: on the validation rows, or where there are none on a minibatch."""
    each = [loss.bank.table(row) for row in np.eye(len(loss.bank.names))]
    if loss.target.validation is not None or isinstance(loss.target.measure, RemoteScore):
        return [loss.validate(alpha) for alpha in each]
    return [sum(loss.at([alpha], 0)[0].values()) for alpha in each]


def mix_bank(
    bank: ExpertBank,
    loss: TargetLoss,
    search: Search,
    *,
    parameterisation: Parameterisation | None = None,
    spectrum: Spectrum | None = None,
    progress: ProgressOption = False,
    folder: Path | str | None = None,
) -> Mixture:
    """Search a bank that is already there, in ``search.space`` or any other map from what moves to coefficients.

    See ``mix`` for the rest.

    Raises:
        InputError: as ``mix``.
    """
    spectrum = spectrum or bank.spectrum()
    loss.counts = Counts()
    mapped = parameterisation or search.map(bank, spectrum)
    traced = Traced(_optimizer(search, mapped), loss.counts)
    stoppable = loss.target.validation is not None or isinstance(loss.target.measure, RemoteScore)
    stopping = Stopping(loss.validate, search.every, search.patience) if stoppable and search.steps else None
    with open_progress(progress) as shown, gradients():
        shown.phase("mixing", search.steps)
        learned = descend(
            traced,
            loss,
            search.steps,
            stopping=stopping,
            folder=None if folder is None else Path(folder),
            identity=None if folder is None else digest(bank, loss, search, mapped),
            progress=shown,
        )
    seconds = traced.seconds()
    alpha = learned.alpha
    return Mixture(
        alpha=alpha,
        names=bank.names,
        groups=bank.layout.groups,
        state=loss.state(alpha),
        history=learned.history,
        validation=learned.history.held_out,
        trajectory=traced.trajectory,
        step=learned.step,
        **spectrum.facts(alpha),
        counts=loss.counts,
        seconds=seconds,
        record=record_of(traced.inner),
    )


def check_module(module: Any) -> None:
    """Check that a module was given.

    Raises:
        InputError: it is something else.
    """
    if not isinstance(module, nn.Module):
        raise InputError(f"module: is a {type(module).__name__}; give a torch module of the experts' architecture")


def named_experts(experts: Any) -> Mapping[str, StateDict]:
    """Return experts by name; those of a list are called expert-1, expert-2, ...

    Raises:
        InputError: they are neither a mapping nor a list.
    """
    if isinstance(experts, list | tuple):
        experts = {f"expert-{k}": one for k, one in enumerate(cast(Sequence[Any], experts), 1)}
    if not isinstance(experts, Mapping):
        raise InputError(f"experts: is a {type(experts).__name__}; give state dicts by name, or a list of them")
    return cast(Mapping[str, StateDict], experts)


def _target(data: Any, measure: str | Measure, batch_size: int, holdout: float, seed: int) -> Target:
    found = measure_of(measure)
    if data is None:
        return Target(None, None, found, batch_size)
    rows = as_rows(data)
    learn, hold = split(rows, holdout, seed) if holdout else (rows, None)
    return Target(learn, hold, found, batch_size)


def _check(search: Search, base: StateDict | None) -> None:
    if not is_count(search.steps, 0):
        raise InputError(f"steps: {search.steps!r} must be a whole number of at least 0")
    if not is_number(search.learning_rate) or search.learning_rate < 0:
        raise InputError(f"learning_rate: {search.learning_rate!r} must be a number of at least 0")
    if search.space not in get_args(Space):
        raise InputError(f"space {search.space!r} is unknown (known: {', '.join(get_args(Space))})")
    if (search.space == "task_vector") != (base is not None):
        raise InputError(
            f"space {search.space!r}: "
            + ("needs base, the experts' common start" if base is None else "takes no base; use space='task_vector'")
        )


def _descent(search: Search) -> Descent:
    """Return the optimizer's settings.

    Raises:
        InputError: one is unknown or has a value that it cannot have.
    """
    known = sorted(NAMES - {"learning_rate", "steps"})
    for name in search.settings:
        if name not in known:
            raise InputError(f"setting {name!r} is unknown (known: {', '.join(known)}){nearest(name, known)}")
    # GLUE's step is beta - eta d u: no momentum, no decay. Adam's rules bring their own by name.
    rule = search.optimizer if search.optimizer in GRADIENT else "sgd"
    values = {"learning_rate": search.learning_rate, "steps": search.steps, "rule": rule, "schedule": "constant"}
    try:
        return TypeAdapter(Descent).validate_python(asdict(adjust(Descent(), **(values | dict(search.settings)))))
    except ValidationError as error:
        first = error.errors()[0]
        name = next(part for part in first["loc"] if part in known)
        raise InputError(f"setting {name!r}: {first['input']!r} will not do; {first['msg']}") from None


def _optimizer(search: Search, mapped: Parameterisation) -> Optimizer:
    anchor = Anchor(mapped.alpha(mapped.initial()), mapped.learned, 0.0)
    try:
        return make_optimizer(search.optimizer, _descent(search), mapped, anchor, search.seed)
    except ValueError as error:
        raise InputError(f"optimizer {search.optimizer!r}: {error}") from None
