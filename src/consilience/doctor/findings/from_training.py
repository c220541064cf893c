"""What training logs add to a diagnosis: figures by expert, the bound's parts as far as they are known, findings."""

from collections.abc import Sequence

import numpy as np

from consilience.doctor.diagnosis import BoundFacts, TrainedExpert
from consilience.doctor.evidence.probe import Probe
from consilience.doctor.evidence.training import Comparison, Lengths, Training, compare
from consilience.doctor.findings.finding import Finding
from consilience.doctor.theory.bound import (
    CAUSES,
    PARTS,
    Maybe,
    Terms,
    constant_power,
    excess_risk,
    growth,
    noise_variance,
    spread_bound,
    stability_bound,
    stability_leading,
)
from consilience.doctor.theory.geometry import Geometry, Vector

#: Passes over the data beyond which Lemma 1's T^2 / n^2 outweighs its T / (b n) by far.
MANY_EPOCHS = 10.0
#: Times the median temperature from which on an expert is called hot.
HOT = 4.0
#: Fields whose differences make experts hard to compare, in words.
_WORDS = {"family": "optimizers", "adapter": "kinds of training", "batch_size": "batch sizes",
          "weight_decay": "weight decays"}  # fmt: skip


def trained(trainings: Sequence[Training]) -> tuple[TrainedExpert, ...]:
    """Return the figures of each training."""
    return tuple(
        TrainedExpert(
            name=one.name,
            steps=one.steps,
            learning_rate=one.learning_rate,
            highest_rate=one.highest_rate,
            schedule=one.schedule,
            batch_size=one.batch_size,
            rows=one.rows,
            epochs=one.epochs,
            optimizer=one.optimizer,
            adapter=one.adapter,
            length=None if one.length is None else one.length.value,
            length_from=None if one.length is None else one.length.how,
            final_loss=one.final_loss,
            stability=None
            if one.family != "sgd"
            else stability_leading(steps=one.steps, rows=one.rows, batch=one.batch_size, power=power(one)),
            temperature=one.temperature,
            unread=one.unread,
        )
        for one in trainings
    )


def _variance(training: Training) -> Maybe:
    """Return sigma^2; without a logged noise scale the logged norms, which hold noise already, stand alone."""
    if training.noise_scale is None:
        return 0.0
    return noise_variance(training.noise_scale, training.gradient, training.batch_size)


def power(training: Training) -> Maybe:
    """Return sum_t eta_t^2 G_t from the log, or as if steps and norms were constant."""
    variance = _variance(training)
    found = training.power(variance)
    if found is not None:
        return found
    return constant_power(training.learning_rate, training.steps, training.gradient, variance)


def bound_facts(
    trainings: Sequence[Training], geometry: Geometry, p: Vector, probe: Probe | None = None
) -> BoundFacts | None:
    """Return the parts of the bound that logs, weights and probes tell; None where p is not on the simplex.

    The smoothness is the largest curvature that the probes found. Of experts that were not trained by SGD, what depends
    on learning rates is not known.
    """
    if (p < 0).any() or abs(p.sum() - 1) > 1e-6:
        return None
    smooth = None if probe is None or not (probe.curvatures > 0).any() else float(probe.curvatures.max())
    # The bound is SGD's: what another optimizer did with the same learning rates is no term of it.
    ours = [one.length if one.family == "sgd" else None for one in trainings]
    lengths: list[Maybe] = [None if length is None else length.value for length in ours]
    variances: list[Maybe] = [_variance(one) if one.noise_scale is not None else None for one in trainings]
    if probe is not None:
        measured = [None if np.isnan(value) else float(value) for value in probe.noise]
        variances = [one if one is not None else other for one, other in zip(variances, measured, strict=True)]
    spread = spread_bound(
        tuple(map(float, p / p.sum())),
        lengths=lengths,
        gradient=None if probe is None else probe.base_gradient,
        heterogeneity=None if probe is None else tuple(map(float, probe.heterogeneity)),
        smoothness=smooth,
        excursions=tuple(map(float, np.diag(geometry.gram))),
        squares=[None if length is None else length.squares for length in ours],
        variances=variances,
        batches=[one.batch_size for one in trainings],
    )
    stabilities = [
        stability_bound(steps=one.steps, rows=one.rows, batch=one.batch_size, power=power(one),
                        growth=growth(length, smooth))
        for one, length in zip(trainings, lengths, strict=True)
    ]  # fmt: skip
    terms = excess_risk(
        [1 / len(p)] * len(p),
        tuple(map(float, p)),
        smoothness=smooth,
        gradients=[one.final_gradient for one in trainings],
        moves=tuple(map(float, geometry.moves(p))),
        stabilities=stabilities,
        merged_losses=None if probe is None else tuple(map(float, probe.merged)),
    )
    return BoundFacts(
        {name: spread.part(name) for name in CAUSES}, {name: terms.part(name) for name in PARTS}, _dominant(terms)
    )


def _dominant(terms: Terms) -> str | None:
    """Return the largest part, where more than one is known."""
    known = [name for name in PARTS if terms.part(name) is not None]
    return terms.dominant if len(known) > 1 else None


def findings(trainings: Sequence[Training]) -> list[Finding]:
    """Return what is unequal, contradictory or excessive."""
    compared = compare(trainings)
    return [*_lengths(trainings, compared), *_hot(trainings, compared), *_differences(trainings, compared),
            *_epochs(trainings), *_conflicts(trainings)]  # fmt: skip


def _lengths(trainings: Sequence[Training], compared: Comparison) -> list[Finding]:
    """Unequal training lengths, one finding for each optimizer and kind of training."""
    found: list[Finding] = []
    for group in compared.lengths:
        if not group.unequal or len(group.experts) < 2:
            continue
        listed = ", ".join(f"{trainings[k].name} {value:.3g}" for k, value in _longest_first(group))
        found.append(Finding(
            "note", "unequal-length", tuple(trainings[k].name for k in group.experts),
            f"experts were trained for unequal lengths by {group.optimizer}: H = sum of learning rates = {listed}",
            "leave the task vectors as they are; the lengths tell which expert's training to look at if one of them "
            "dominates or is missing from the merge",
            "in the project's study unequal lengths did not merge worse than equal ones of the same mean"
            + ("" if not group.approximate else f"; H is approximate here: {', '.join(group.approximate)}"),
            "possible" if group.approximate else "likely",
        ))  # fmt: skip
    return found


def _longest_first(group: Lengths) -> list[tuple[int, float]]:
    return sorted(zip(group.experts, group.values, strict=True), key=lambda pair: -pair[1])


def _hot(trainings: Sequence[Training], compared: Comparison) -> list[Finding]:
    """Experts that were trained with much more noise than the others of their optimizer."""
    found: list[Finding] = []
    for group in compared.lengths:
        known = [(trainings[k], value) for k in group.experts if (value := trainings[k].temperature) is not None]
        middle = float(np.median([value for _, value in known])) if known else 0.0
        found += [
            Finding(
                "warning", "hot-training", (one.name,),
                f"{one.name} was trained at {value / middle:.1f} times the median learning rate over batch "
                f"({value:.3g} against {middle:.3g})",
                "train it with a smaller learning rate or larger batches",
                "its noise goes into the merge: in the project's study, experts of one optimizer merged the worse the "
                "higher this was",
                "possible",
            )
            for one, value in known if value >= HOT * middle
        ]  # fmt: skip
    return found


def _differences(trainings: Sequence[Training], compared: Comparison) -> list[Finding]:
    found: list[Finding] = []
    for one in compared.differences:
        if one.field in _WORDS:
            values = ", ".join(f"{training.name} {'unknown' if value is None else value}"
                               for training, value in zip(trainings, one.values, strict=True))  # fmt: skip
            found.append(Finding(
                "note", f"different-{one.field.replace('_', '-')}", tuple(t.name for t in trainings),
                f"experts were trained with different {_WORDS[one.field]}: {values}",
                "compare lengths only among those of one kind" if one.field in ("family", "adapter") else
                "expect the smaller one to carry more gradient noise" if one.field == "batch_size" else
                "expect lengths of task vectors to say less",
            ))  # fmt: skip
    return found


def _epochs(trainings: Sequence[Training]) -> list[Finding]:
    return [
        Finding("note", "many-epochs", (one.name,), f"{one.name} saw its data {one.epochs:.0f} times",
                "use more rows, or stop earlier", "the bound's stability term grows with (steps / rows)^2", "possible")
        for one in trainings if one.epochs is not None and one.epochs > MANY_EPOCHS
    ]  # fmt: skip


def _conflicts(trainings: Sequence[Training]) -> list[Finding]:
    return [
        Finding("note", "contradictory-logs", (one.name,),
                f"{one.name}: {conflict.field} is {conflict.kept.value} in {conflict.kept.source} and "
                f"{conflict.other.value} in {conflict.other.source}",
                "see which of the two is this expert's; the first was used")
        for one in trainings for conflict in one.conflicts
    ]  # fmt: skip
