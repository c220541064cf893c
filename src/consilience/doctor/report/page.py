"""A diagnosis as one HTML page that needs no network, no script and no other file."""

from collections.abc import Callable, Mapping, Sequence

from consilience.doctor.diagnosis import Diagnosis, ExpertFacts, TrainedExpert
from consilience.doctor.findings.finding import ORDER, Group, Severity, grouped
from consilience.doctor.report import draw
from consilience.doctor.report.draw import number, percent, safe
from consilience.doctor.report.pictures import agreement, depth, measured
from consilience.pages.page import compose

#: What a severity is called, for one and for several.
_WORDS: dict[Severity, tuple[str, str]] = {
    "stop": ("stop", "stops"),
    "warning": ("warning", "warnings"),
    "note": ("note", "notes"),
}
_VERDICTS: dict[Severity, str] = {
    "stop": "Do not merge these experts as they are.",
    "warning": "They can be merged, but something will likely suffer.",
    "note": "Nothing stands in the way of merging them.",
}
#: Characters of a path.
_LONG = 32


def page(diagnosis: Diagnosis) -> str:
    """Return the page."""
    slots = {"head": _head(diagnosis), "body": "".join(section(diagnosis) for section in _SECTIONS)}
    return compose("consilience.doctor.report", "page", f"Merge doctor: {safe(diagnosis.recipe)}", slots)


def _head(diagnosis: Diagnosis) -> str:
    """Return the verdict, counts of findings, and what was read."""
    counts = diagnosis.by_severity()
    badges = " ".join(_badge(one, counts[one]) for one in ORDER if one in counts)
    together = diagnosis.together
    facts = {
        "Recipe": draw.name(diagnosis.recipe),
        "Base": draw.name(diagnosis.base),
        "Weights": safe(diagnosis.weights),
        "Read": safe(", ".join(diagnosis.evidence)) + f", {number(diagnosis.seconds, '.1f')} s",
        "Changed": f"{_millions(together.changed)} of {_millions(together.parameters)} parameters, by some expert",
    }
    return f'<p class="verdict">{_verdict(diagnosis)}</p><p>{badges}</p>{_definitions("facts", facts)}'


def _verdict(diagnosis: Diagnosis) -> str:
    counts = diagnosis.by_severity()
    for severity in ORDER:
        if severity in counts:
            return _VERDICTS[severity]
    seen = "their weights and probe data tell" if diagnosis.probes is not None else "their weights tell"
    whom = "this expert" if len(diagnosis.experts) == 1 else f"these {len(diagnosis.experts)} experts"
    return f"Nothing is wrong with {whom} as far as {seen}."


def _badge(severity: Severity, count: int) -> str:
    return f'<span class="badge {severity}">{count} {_WORDS[severity][count != 1]}</span>'


def _millions(count: int) -> str:
    return f"{count / 1e6:.1f} M" if count >= 1e5 else str(count)


def _definitions(kind: str, facts: dict[str, str]) -> str:
    return f'<dl class="{kind}">' + "".join(f"<dt>{key}</dt><dd>{value}</dd>" for key, value in facts.items()) + "</dl>"


def _findings(diagnosis: Diagnosis) -> str:
    if not diagnosis.findings:
        return ""
    items = "".join(_group(diagnosis, group) for group in grouped(diagnosis.findings))
    return f'<section><h2>What to do, the most urgent first</h2><ol class="findings">{items}</ol></section>'


def _group(diagnosis: Diagnosis, group: Group) -> str:
    """Return findings of one kind: the first in full, with whom the others concern and every different advice."""
    finding = group.first
    facts = {
        "Who": _whom(diagnosis, finding.experts),
        "Likewise": safe(", ".join(group.others)),
        "Do": safe("; ".join(group.advice)),
        "Effect": safe(finding.effect),
        "How sure": safe(finding.confidence),
        "Where": safe(", ".join(finding.places)),
    }
    told = _definitions("finding", {key: value for key, value in facts.items() if value})
    badge = f'<span class="badge {finding.severity}">{_WORDS[finding.severity][0]}</span>'
    return f'<li class="{finding.severity}"><p class="what">{badge} {safe(finding.what)}</p>{told}</li>'


def _whom(diagnosis: Diagnosis, experts: Sequence[str]) -> str:
    if len(experts) > 2 and set(experts) >= {one.name for one in diagnosis.experts}:
        return "all experts"
    return ", ".join(map(draw.name, experts))


def _peak(one: TrainedExpert) -> str:
    """Return the peak rate, or the least that it can have been."""
    least = one.learning_rate is None and one.highest_rate is not None
    return f"≥ {number(one.highest_rate)}" if least else number(one.learning_rate)


def _rank(one: ExpertFacts) -> str:
    """Return the effective rank, with the error of its sketch where it has one."""
    error = f' <span class="small">± {one.effective_rank_error:.1f}</span>' if one.effective_rank_error else ""
    return number(one.effective_rank, ".1f") + error


def _experts(diagnosis: Diagnosis) -> str:
    """Return the table of experts, in the recipe's order, which gives them their numbers."""
    norms = [one.norm for one in diagnosis.experts]
    moves = [one.moved for one in diagnosis.experts]
    longest, farthest = _largest(norms), _largest(moves)
    rows = [
        (f'<span class="chip">{k}</span> {draw.name(one.name)}<span class="small">{safe(one.form)}, '
         f"{_reference(one.reference)}</span>",
         number(one.norm) + draw.bar(one.norm, longest), percent(one.relative_norm, ".3g"),
         number(one.base_cosine, ".4f"), number(one.weight, ".3g"), number(one.moved) + draw.bar(one.moved, farthest),
         percent(one.changed), _rank(one))
        for k, one in enumerate(diagnosis.experts, 1)
    ]  # fmt: skip
    head = ("Expert", "Length ‖τ‖", "of the base’s", "Cosine with the base", "Weight", "Moved by the merge",
            "Entries changed", "Effective rank")  # fmt: skip
    refused = "".join(f"<li>{draw.name(name)}: {safe(reason)}</li>" for name, reason in diagnosis.refused)
    left_out = f"<h3>Left out, since they cannot be merged</h3><ul>{refused}</ul>" if refused else ""
    shown = draw.table(head, rows, fold=draw.MOST_ROWS)
    return f"<section><h2>The experts</h2>{shown}{left_out}</section>"


def _reference(reference: str) -> str:
    """Return where an expert is; of a long path, its end."""
    if len(reference) <= _LONG:
        return draw.name(reference)
    return f'<span title="{safe(reference)}">…{draw.name(reference[-_LONG:])}</span>'


def _largest(values: Sequence[float]) -> float:
    return max((shown for value in values if (shown := draw.drawable(value)) is not None), default=0.0)


def _together(diagnosis: Diagnosis) -> str:
    """Return figures of the whole set."""
    count, together = len(diagnosis.experts), diagnosis.together
    if count < 2:
        return ""
    share = None
    if together.displacement is not None and together.orthogonal:
        share = together.displacement / together.orthogonal
    displacement = "not defined: the weights do not sum to 1"
    if together.displacement is not None:
        vectors = "orthogonal task vectors of these lengths"
        displacement = f"{number(together.displacement)}, {percent(share, '.0f')} of what {vectors} would have"
    facts = {
        "Displacement V": displacement,
        "Common": f"{percent(together.common)} of their energy lies in their mean (orthogonal: {percent(1 / count)})",
        "Cancelled": f"{percent(together.cancelled)} of their magnitude is lost in their sum (by chance "
        f"{percent(together.by_chance)})",
        "Largest singular value": f"{number(together.sigma_max)}; of task vectors less their mean "
        f"{number(together.sigma_max_centred)}",
    }
    return f"<section><h2>All together</h2>{_definitions('facts', facts)}</section>"


def _training(diagnosis: Diagnosis) -> str:
    """Return how experts were trained, as far as logs tell, and the theory's terms."""
    if not diagnosis.training and diagnosis.bound is None:
        return ""
    unread = [f"<li>{safe(line)}</li>" for one in diagnosis.training for line in one.unread]
    left_out = draw.folded(f"Files that were not read: {len(unread)}", f"<ul>{''.join(unread)}</ul>") if unread else ""
    table = _trained(diagnosis.training) if diagnosis.training else ""
    return f"<section><h2>How they were trained</h2>{table}{left_out}{_bound(diagnosis)}</section>"


def _trained(training: Sequence[TrainedExpert]) -> str:
    lengths = [one.length for one in training if one.length is not None]
    longest = _largest(lengths)
    rows = [
        (draw.name(one.name), number(one.length) + draw.bar(one.length, longest), _said(one.length_from),
         _said(one.optimizer), _said(one.schedule), number(one.steps), _peak(one),
         number(one.batch_size), number(one.rows), number(one.epochs), number(one.final_loss), number(one.stability),
         number(one.temperature))
        for one in training
    ]  # fmt: skip
    head = ("Expert", "Length H", "found by", "Optimizer", "Schedule", "Steps", "Peak rate", "Batch", "Rows", "Epochs",
            "Final loss", "Stability term", "Rate / batch")  # fmt: skip
    note = (
        "H is the sum of learning rates over the steps. The lower the stability term, the less one row moves an "
        "expert; the lower rate over batch, the less noise it ended with."
    )
    return f'<p class="hint">{note}</p>{draw.table(head, rows, words=(2, 3, 4), fold=draw.MOST_ROWS)}'


def _said(word: str | None) -> str:
    return "–" if word is None else draw.name(word)


def _bound(diagnosis: Diagnosis) -> str:
    """Return the parts of the bound that are known, if any."""
    bound = diagnosis.bound
    if bound is None or not any(value is not None for value in (*bound.displacement.values(), *bound.risk.values())):
        return ""
    parts = (_parts("Causes of the displacement, squared length", bound.displacement),
             _parts("Parts of the excess risk, nats", bound.risk))  # fmt: skip
    worst = f" The largest that is known: {safe(bound.dominant)}." if bound.dominant is not None else ""
    note = f"For ranking causes: derived for plain SGD; of other optimizers it tells no sizes.{worst}"
    return f'<h3>What the theory blames</h3><p class="hint">{note}</p><div class="two">{"".join(parts)}</div>'


def _parts(title: str, parts: Mapping[str, float | None]) -> str:
    longest = _largest([value for value in parts.values() if value is not None])
    rows = [(safe(part), number(value, ".3g") + draw.bar(value, longest)) for part, value in parts.items()]
    return draw.table((title, "Term"), rows)


def _unknown(diagnosis: Diagnosis) -> str:
    if not diagnosis.unknown:
        return ""
    items = "".join(f"<li>{safe(one)}</li>" for one in diagnosis.unknown)
    return f"<section><h2>What is not known</h2><ul>{items}</ul></section>"


#: Sections from top to bottom; each is empty where a diagnosis has nothing for it.
_SECTIONS: tuple[Callable[[Diagnosis], str], ...] = (
    _findings,
    _experts,
    _together,
    agreement,
    depth,
    _training,
    measured,
    _unknown,
)
