"""Learning by alignment, as Expert Merging and its chunked successor share it: settings, optimizer, loop, report."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from typing import Any

from consilience.coefficients import Coefficients
from consilience.coefficients.coefficients import Alpha
from consilience.errors import InputError
from consilience.learned.compare import compared
from consilience.learned.loop import Learned, Stopping, descend, schedule
from consilience.learned.problem import Problem
from consilience.learned.ranking import Ranking, make_ranking
from consilience.learned.run import Data, Run, Workshop, groups_of, open_workshop, provenance
from consilience.objectives.objective import Objective
from consilience.optimizers.anchor import Anchor
from consilience.optimizers.gradient import Descent, Optimizer, Terms
from consilience.optimizers.make import make_optimizer
from consilience.optimizers.parameterisation import parameterise


@dataclass(frozen=True)
class AlignmentSettings:
    """The parameters of ``expert_merging``, by the same names."""

    preset: str
    alphabar: tuple[float, ...]
    grouping: str
    exclude: tuple[str, ...]
    coefficients: Any
    gamma: float
    reg_norm: Any
    beta: tuple[float, ...]
    logit_weight: float
    temperature: float
    divergence: Any
    hidden_weight: float
    hidden_layers: tuple[str, ...]
    hidden_distance: Any
    entropy_weight: float
    target_weight: float
    mean: Any
    total: Any
    positions: Any
    samples: int
    responses: Any
    response_tokens: int
    optimizer: Any
    learning_rate: float
    weight_decay: float
    schedule: Any
    clip: float
    mu: float
    directions: int
    sigma: float
    population: int
    batch: int
    steps: int
    holdout: float
    patience: int
    precision: Any
    checkpoint: bool
    batch_tokens: int
    answers: int = 1
    answer_temperature: float = 0.0
    written_prompts: int = 0
    estimate_rule: Any = "adam"
    law: Any = "rademacher"
    perturb: Any = "w"
    normalise: bool = False
    tune_mu: bool = False
    most_directions: int = 0
    bounds: tuple[float, float] | None = None
    score: Any = "loss"

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> "AlignmentSettings":
        """Pick the settings out of a function's arguments; those with a default here may be missing."""
        return cls(**{f.name: values[f.name] for f in fields(cls) if f.name in values or f.default is MISSING})

    @property
    def layers(self) -> Sequence[int] | str:
        """Blocks to align; none without a weight."""
        if not self.hidden_weight:
            return ()
        if self.hidden_layers == ("middle",):
            return "middle"
        try:
            return tuple(int(part) for text in self.hidden_layers for part in text.split(","))
        except ValueError:
            raise InputError(
                f"hidden_layers: {', '.join(self.hidden_layers)!r} is neither middle nor block numbers; write 7,15"
            ) from None

    @property
    def data(self) -> Data:
        """How rows are read."""
        return Data(
            self.samples, self.responses, self.response_tokens, self.positions, self.holdout, "calibration",
            self.answers, self.answer_temperature, judged=bool(self.logit_weight), written=self.written_prompts,
            tokens=self.batch_tokens,
        )  # fmt: skip

    def objective(self, layers: tuple[int, ...]) -> Objective:
        """Return what is minimised, without the anchor.

        Raises:
            InputError: every weight is zero.
        """
        found = Objective(
            self.logit_weight, self.hidden_weight, self.entropy_weight, self.target_weight, layers, self.temperature,
            self.divergence, self.hidden_distance, self.beta, self.mean, self.total,
        )  # fmt: skip
        if not found.weights:
            raise InputError("logit_weight, hidden_weight, entropy_weight, target_weight: all are 0; give one a weight")
        return found

    @property
    def descent(self) -> Descent:
        """How the optimizer steps."""
        rule = self.optimizer if self.optimizer in ("adam", "adamw", "sgd") else self.estimate_rule
        return Descent(
            rule, self.learning_rate, self.steps, self.schedule, self.clip, self.weight_decay,
            mu=self.mu, directions=self.directions, sigma=self.sigma, population=self.population, law=self.law,
            perturb=self.perturb, normalise=self.normalise, tune_mu=self.tune_mu,
            most_directions=self.most_directions, bounds=self.bounds,
        )  # fmt: skip

    def start(self, run: Run) -> Coefficients:
        """Return the coefficients at the anchor."""
        return groups_of(run, self.grouping, self.exclude, self.alphabar)


def learn_alignment(
    run: Run,
    start: Coefficients,
    settings: AlignmentSettings,
    *,
    anchor: Alpha | None = None,
    parameters: Mapping[str, Any] | None = None,
    compare: bool = True,
) -> Coefficients:
    """Learn coefficients from ``start`` by aligning with the experts, and return them with the facts of the run.

    Args:
        run: the run.
        start: groups and first values; what is not ``learned`` stays.
        settings: the method's parameters.
        anchor: [K, N] where the L1 anchor pulls to; ``start`` by default.
        parameters: the method's own, for the record; ``settings`` by default.
        compare: measure the result beside the base and Task Arithmetic.
    """
    begun = time.perf_counter()
    settings.objective(())  # what is wrong with the settings is said before the models are read
    optimizer = optimizer_of(start, settings, run.seed, anchor)
    shop = open_workshop(
        run, start, settings.data, layers=settings.layers, precision=settings.precision,
        checkpoint=settings.checkpoint, trimmed=start.trimmed,
        teachers=bool(settings.logit_weight or settings.hidden_weight),
    )  # fmt: skip
    try:
        learned = minimise(run, shop, _problem(shop, settings), optimizer, settings, start)
        facts = compared(shop, learned.alpha, score=settings.score) if compare else {}
    finally:
        shop.close()
    facts |= report(run, shop, settings, learned, time.perf_counter() - begun, parameters)
    return start.with_alpha(learned.alpha, **facts, **_diagnosis(optimizer))


def _diagnosis(optimizer: Optimizer) -> dict[str, Any]:
    """Return what the run's own measurements say of it, where it made any."""
    from consilience.optimizers.diagnosis import FEWEST, diagnose
    from consilience.optimizers.spsa import record_of

    record = record_of(optimizer)
    if record is None or len(record.steps) < FEWEST:
        return {}
    found = diagnose(record)
    return {"diagnosis": {"verdict": found.verdict, "advice": found.advice, "evidence": dict(found.evidence)}}


def optimizer_of(start: Coefficients, settings: AlignmentSettings, seed: int, anchor: Alpha | None = None) -> Optimizer:
    """Return the optimizer at ``start``."""
    import torch

    mapped = parameterise(settings.coefficients, start.alpha, start.learned)
    # A map and its inverse may miss the start by a rounding error, which would turn the penalty's slope there from 0
    # into its full size.
    at = mapped.alpha(mapped.initial()) if anchor is None else torch.tensor(anchor, dtype=torch.float64)
    pull = Anchor(at, mapped.learned, settings.gamma, settings.reg_norm)
    return make_optimizer(settings.optimizer, settings.descent, mapped, pull, seed)


def minimise(
    run: Run,
    shop: Workshop,
    problem: Problem | Ranking,
    optimizer: Optimizer,
    settings: Any,
    start: Coefficients,
    *,
    beside: Any = None,
    on_best: Callable[[], None] | None = None,
) -> Learned:
    """Run the loop, with early stopping where rows are held out.

    Args:
        run: the run.
        shop: its workshop.
        problem: the loss.
        optimizer: what moves the coefficients.
        settings: the method's parameters.
        start: groups and first values.
        beside: settings of what is learned beside the coefficients: a state is of one value of them.
        on_best: called when the held-out loss is the least so far.
    """
    experts = [shop.samples[i].expert for i in shop.learn]

    def loss(alpha: Alpha, step: int, *, gradient: bool) -> tuple[Terms, Alpha | None]:
        chosen = [shop.learn[i] for i in schedule(experts, settings.batch, run.seed, step)]
        return problem.evaluate(alpha, chosen, gradient=gradient)

    def held(alpha: Alpha) -> float:
        return sum(problem.evaluate(alpha, shop.hold, gradient=False)[0].values())

    stopping = Stopping(held, patience=settings.patience, on_best=on_best) if shop.hold else None
    identity = [
        [model.identity() for model in run.plan.models],
        [run.plan.scales(k) for k in range(len(run.experts))],
        run.experts,
        repr(settings),
        run.seed,
        [s.digest for s in shop.samples],
        [(s.row.choices, s.row.gold) for s in shop.samples],  # what is ranked is encoded anew every time
        start.alpha.tolist(),
        [(g.name, g.tensors, g.chunks, g.learned) for g in start.groups],
        repr(start.trimmed),
        repr(beside),
    ]
    run.progress.phase("learning", settings.steps)
    stage = run.folder.name if run.folder is not None else "learning"
    with run.scalars(stage) as scalars:
        return descend(
            optimizer, loss, settings.steps, stopping=stopping, folder=run.folder, identity=identity,
            progress=run.progress, scalars=scalars,
        )  # fmt: skip


def _problem(shop: Workshop, settings: AlignmentSettings) -> Problem | Ranking:
    if settings.score == "accuracy":
        return make_ranking(shop, settings.samples)
    objective = settings.objective(shop.reader.layers)
    _check_labels(shop, objective)
    return shop.problem(objective)


def _check_labels(shop: Workshop, objective: Objective) -> None:
    if objective.target and not any(t >= 0 for s in shop.samples for t in s.encoded.targets):
        if shop.run.plan.method.reads_target:
            raise InputError("target: no row has a response; add the response that each prompt should get")
        raise InputError("target_weight: no calibration row has a response; add responses, or set target_weight=0")


def report(
    run: Run,
    shop: Workshop,
    settings: Any,
    learned: Learned,
    seconds: float,
    parameters: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return the facts that are written beside the coefficients."""
    lines = learned.history.lines()
    values = parameters or vars(settings)
    return facts_of(run, shop, values, settings.data, seconds) | {
        "layers": list(shop.reader.layers),
        "steps": len(lines),
        "step": learned.step,
        "history": lines,
    }


def facts_of(run: Run, shop: Workshop, parameters: Mapping[str, Any], data: Data, seconds: float) -> dict[str, Any]:
    """Return what every learned method writes beside its coefficients."""
    return {
        "method": run.plan.method.name,
        "parameters": {key: list(v) if isinstance(v, tuple) else v for key, v in parameters.items()},
        "seed": run.seed,
        "seconds": round(seconds, 2),
        "device": run.machine.device,
        "calibration": provenance(run, shop.samples, data),
    } | ({"notes": shop.notes} if shop.notes else {})
