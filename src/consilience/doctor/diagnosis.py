"""What the doctor says of a set of experts, as plain values: figures, findings, and what is not known."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from consilience.doctor.candidates import Candidate
from consilience.doctor.findings.finding import Finding
from consilience.doctor.trying import Tried


@dataclass(frozen=True)
class ExpertFacts:
    """One expert.

    Attributes:
        name: of the expert.
        reference: where it is.
        form: "full" or "adapter".
        norm: ||tau_k||.
        relative_norm: ||tau_k|| / ||theta_0||, over the tensors that some expert changes.
        base_cosine: cos(theta_k, theta_0), over the same.
        weight: p_k.
        moved: D_k = ||merge - theta_k||, with these weights.
        changed: share of these tensors' entries that it changes.
        effective_rank: median over matrices of ||tau||_F^4 / ||tau tau^T||_F^2; None: it changes no matrix.
        effective_rank_error: standard error of the sketch at the matrix that is the median; 0: it is exact.
    """

    name: str
    reference: str
    form: str
    norm: float
    relative_norm: float
    base_cosine: float
    weight: float
    moved: float
    changed: float
    effective_rank: float | None
    effective_rank_error: float | None


@dataclass(frozen=True)
class PairFacts:
    """Two experts.

    Attributes:
        first: name of one.
        second: name of the other.
        cosine: of their task vectors.
        opposite: share of the entries that both change that differ in sign: 0.5 by chance; None: no such entry.
        overlap: share of input directions in common, over all matrices: sum e_jk / sqrt(sum e_jj sum e_kk); None: none.
        overlap_error: its standard error.
    """

    first: str
    second: str
    cosine: float
    opposite: float | None
    overlap: float | None
    overlap_error: float | None


@dataclass(frozen=True)
class BlockFacts:
    """One block of the model, or all that is outside blocks.

    Attributes:
        name: of the block.
        norms: by expert.
        displacement: V.
        cosine: of the pair that agrees least.
        pair: that pair.
        cancelled: share of the experts' magnitude that is lost in their sum.
        sigma_max: largest singular value of the task vectors.
        sigma_max_centred: the same of the task vectors less their mean.
        effective_ranks: median over matrices, by expert; None where there is no matrix.
        effective_rank_errors: their standard errors.
        pairs: all pairs.
    """

    name: str
    norms: tuple[float, ...]
    displacement: float
    cosine: float | None
    pair: tuple[str, str] | None
    cancelled: float
    sigma_max: float = 0.0
    sigma_max_centred: float = 0.0
    effective_ranks: tuple[float | None, ...] = ()
    effective_rank_errors: tuple[float | None, ...] = ()
    pairs: tuple["PairFacts", ...] = ()


@dataclass(frozen=True)
class SetFacts:
    """All experts together.

    Attributes:
        parameters: entries of all tensors that can be merged.
        changed: entries of the tensors that some expert changes.
        displacement: V with the weights used; None where they do not sum to 1.
        orthogonal: what V would be were the task vectors orthogonal, (1 - 1/K) of their mean squared length.
        sigma_max: largest singular value of the task vectors.
        sigma_max_centred: the same of the task vectors less their mean.
        common: share of their energy that their mean holds; 1 / K where they are orthogonal.
        cancelled: share of the magnitude that cancels in their sum.
        by_chance: the same for independent normal entries of these lengths, where all change all entries.
    """

    parameters: int
    changed: int
    displacement: float | None
    orthogonal: float
    sigma_max: float
    sigma_max_centred: float
    common: float
    cancelled: float
    by_chance: float


@dataclass(frozen=True)
class ProbedTask:
    """One task's losses, in nats per answered token.

    Attributes:
        task: the expert whose it is.
        rows: probe rows.
        base: of the base.
        own: of its expert.
        merged: of the merge with the weights given, measured.
        scan: on the way from the expert to the merge, at each of ``ProbeFacts.points``.
        curvature: of that way, in nats per squared unit of length.
        barrier: the most by which the way rises above the straight line between its ends.
        heterogeneity: distance of its gradient at the base from the tasks' mean, in the span of the task vectors.
        noise: variance of one row's gradient there; None: it has a single row.
    """

    task: str
    rows: int
    base: float
    own: float
    merged: float
    scan: tuple[float, ...]
    curvature: float
    barrier: float
    heterogeneity: float
    noise: float | None


@dataclass(frozen=True)
class ProbeFacts:
    """What probe data said.

    Attributes:
        points: shares of the way from an expert to the merge that were measured.
        tasks: by expert.
        candidates: merges, the best first: those that were tried by measured mean loss, then others by predicted.
        methods: merges by other methods that were asked for, as they were measured, the best first.
        saturation: predicted mean loss of all tasks under uniform merges of k random experts, k = 1 ... K.
        next_gain: predicted gain of one more expert like these, on those tasks; None: fewer than three experts.
    """

    points: tuple[float, ...]
    tasks: tuple[ProbedTask, ...]
    candidates: tuple[Candidate, ...]
    methods: tuple[Tried, ...]
    saturation: tuple[float, ...]
    next_gain: float | None


@dataclass(frozen=True)
class TrainedExpert:
    """How an expert was trained, as far as its logs tell; None: they do not.

    Attributes:
        name: of the expert.
        steps: optimizer steps.
        learning_rate: the peak, where a file states it or it follows from the schedule and the log.
        schedule: of the learning rate.
        batch_size: rows a step.
        rows: of the training data.
        epochs: passes over them.
        optimizer: its name.
        adapter: "lora", "full" or "freeze".
        length: H, the sum of learning rates over the steps.
        length_from: how H was found: "logged", "interpolated", "schedule", "peak" or "given".
        final_loss: of the training.
        stability: the leading term of Lemma 1, of SGD alone: how far replacing one row would move it, for ranking.
        temperature: learning rate over batch, as the mean over the training weighs it.
        unread: files that were left unread, and why.
        highest_rate: the highest rate that was logged: the peak is no less.
    """

    name: str
    steps: int | None
    learning_rate: float | None
    schedule: str | None
    batch_size: int | None
    rows: int | None
    epochs: float | None
    optimizer: str | None
    adapter: str | None
    length: float | None
    length_from: str | None
    final_loss: float | None
    stability: float | None
    temperature: float | None
    unread: tuple[str, ...]
    highest_rate: float | None = None


@dataclass(frozen=True)
class BoundFacts:
    """Parts of the bound on the merge's excess risk, for ranking causes: no guarantee. None: not known.

    Attributes:
        displacement: the four causes of V, in squared length.
        risk: the parts of the theorem, in nats.
        dominant: the largest of the known parts of ``risk``, where more than one is known.
    """

    displacement: Mapping[str, float | None]
    risk: Mapping[str, float | None]
    dominant: str | None


@dataclass(frozen=True)
class Diagnosis:
    """The doctor's report.

    Attributes:
        recipe: what was diagnosed.
        base: its base.
        weights: where p comes from.
        experts: those that fit.
        refused: name and reason of those that do not.
        together: of the whole set.
        pairs: of two experts each.
        blocks: along the model.
        findings: what is wrong or worth knowing, in order.
        unknown: what the report could not say, and what would tell.
        evidence: what was read: "checkpoints", and "logs" or "probes" if given.
        seconds: what it took.
        probes: what probe data said, if there were any.
        training: how experts were trained, if any log says something of any of them.
        bound: the theory's terms, as far as logs and probes tell them.
    """

    recipe: str
    base: str
    weights: str
    experts: tuple[ExpertFacts, ...]
    refused: tuple[tuple[str, str], ...]
    together: SetFacts
    pairs: tuple[PairFacts, ...]
    blocks: tuple[BlockFacts, ...]
    findings: tuple[Finding, ...]
    unknown: tuple[str, ...]
    evidence: tuple[str, ...]
    seconds: float
    probes: ProbeFacts | None = None
    training: tuple[TrainedExpert, ...] = ()
    bound: BoundFacts | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-able values."""
        return {"format": 1, **asdict(self)}

    def by_severity(self) -> Mapping[str, int]:
        """Return how many findings there are of each severity."""
        counts: dict[str, int] = {}
        for finding in self.findings:
            counts[finding.severity] = counts.get(finding.severity, 0) + 1
        return counts
