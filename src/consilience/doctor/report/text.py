"""A diagnosis as text: what to do first, then the figures it rests on."""

from collections.abc import Sequence

from consilience.doctor.diagnosis import Diagnosis, TrainedExpert
from consilience.doctor.findings.finding import Group, grouped
from consilience.errors import printable

_MARKS = {"stop": "STOP", "warning": "warning", "note": "note"}
#: Pairs and blocks that are listed; the JSON has all.
_MOST_PAIRS, _MOST_BLOCKS = 10, 8
#: Findings of one kind that are named, and different advice on them that is given.
_MOST_LIKE = 8


def text(diagnosis: Diagnosis) -> str:
    """Return the report."""
    parts = [_summary(diagnosis), _findings(diagnosis), _experts(diagnosis), _pairs(diagnosis), _blocks(diagnosis)]
    parts += [_training(diagnosis), _bound(diagnosis), _tasks(diagnosis), _candidates(diagnosis)]
    if diagnosis.unknown:
        parts.append("Not known from what was given:\n" + "\n".join(f"  - {one}" for one in diagnosis.unknown))
    parts.append("Figures describe these weights; none is a guarantee of what a merge will do.")
    return "\n\n".join(part for part in parts if part)


def _summary(diagnosis: Diagnosis) -> str:
    together = diagnosis.together
    lines = [
        f"{printable(diagnosis.recipe)}: {len(diagnosis.experts)} expert(s) on {printable(diagnosis.base)}, "
        f"{together.changed / 1e6:.1f} M of {together.parameters / 1e6:.1f} M parameters changed by some, "
        f"{diagnosis.seconds:.1f} s",
        f"weights: {diagnosis.weights}",
    ]
    if together.displacement is not None and len(diagnosis.experts) > 1:
        share = together.displacement / together.orthogonal if together.orthogonal else 0.0
        lines.append(
            f"displacement V = {together.displacement:.4g}, {100 * share:.0f} % of what orthogonal task vectors of "
            f"these lengths would have; sigma_max {together.sigma_max:.4g}, centred {together.sigma_max_centred:.4g}"
        )
        lines.append(
            f"{100 * together.cancelled:.0f} % of the experts' magnitude cancels in their sum (by chance "
            f"{100 * together.by_chance:.0f} %); {100 * together.common:.0f} % of their energy is common "
            f"(orthogonal: {100 / len(diagnosis.experts):.0f} %)"
        )
    return "\n".join(lines)


def _findings(diagnosis: Diagnosis) -> str:
    if not diagnosis.findings:
        return "Nothing is wrong with these experts as far as their weights tell."
    return "\n".join(line for group in grouped(diagnosis.findings) for line in _group(group))


def _group(group: Group) -> list[str]:
    """Return the lines of findings of one kind: the first of them, whom the others concern, what to do, and where."""
    first, others = group.first, _some(group.others)
    lines = [f"{_MARKS[first.severity]}: {printable(first.what)} [{first.confidence}]"]
    lines += [f"    likewise: {printable(others)}"] if others else []
    lines.append(f"    do: {printable(_some(group.advice, '; '))}" + (f" ({first.effect})" if first.effect else ""))
    lines += [f"    where: {printable(', '.join(first.places))}"] if first.places else []
    return lines


def _some(names: Sequence[str], separator: str = ", ") -> str:
    more = len(names) - _MOST_LIKE
    return separator.join(names[:_MOST_LIKE]) + (f"{separator}{more} more (--json)" if more > 0 else "")


def _experts(diagnosis: Diagnosis) -> str:
    header = ("expert", "form", "length", "of base", "cos base", "weight", "moved by", "changed", "eff. rank")
    rows = [
        (printable(one.name), one.form, f"{one.norm:.4g}", f"{one.relative_norm:.3g}", f"{one.base_cosine:.4f}",
         f"{one.weight:.3g}", f"{one.moved:.4g}", f"{100 * one.changed:.1f} %",
         "-" if one.effective_rank is None else f"{one.effective_rank:.1f}"
         + (f" ± {one.effective_rank_error:.1f}" if one.effective_rank_error else ""))
        for one in diagnosis.experts
    ]  # fmt: skip
    return _columns(header, rows)


def _pairs(diagnosis: Diagnosis) -> str:
    if not diagnosis.pairs:
        return ""
    header = ("pair", "cosine", "opposite signs", "overlap of inputs")
    shown = sorted(diagnosis.pairs, key=lambda one: -abs(one.cosine))[:_MOST_PAIRS]
    rows = [
        (printable(f"{one.first} - {one.second}"), f"{one.cosine:+.3f}",
         "-" if one.opposite is None else f"{100 * one.opposite:.1f} %",
         "-" if one.overlap is None else f"{one.overlap:.2f} ± {one.overlap_error:.2f}")
        for one in shown
    ]  # fmt: skip
    more = len(diagnosis.pairs) - len(shown)
    return _columns(header, rows) + (f"\n({more} more pairs: --json)" if more else "")


def _blocks(diagnosis: Diagnosis) -> str:
    if len(diagnosis.experts) < 2:
        return ""
    total = sum(one.displacement for one in diagnosis.blocks)
    shown = sorted(diagnosis.blocks, key=lambda one: -one.displacement)[:_MOST_BLOCKS]
    header = ("block", "share of V", "cancelled", "least cosine", "between")
    rows = [
        (printable(one.name), f"{100 * one.displacement / total:.1f} %" if total else "-",
         f"{100 * one.cancelled:.0f} %", "-" if one.cosine is None else f"{one.cosine:+.3f}",
         printable(" - ".join(one.pair or ())))
        for one in shown
    ]  # fmt: skip
    more = len(diagnosis.blocks) - len(shown)
    return _columns(header, rows) + (f"\n({more} more blocks: --json)" if more else "")


def _training(diagnosis: Diagnosis) -> str:
    if not diagnosis.training:
        return ""
    header = (
        "training",
        "length H",
        "from",
        "steps",
        "peak rate",
        "batch",
        "rows",
        "epochs",
        "optimizer",
        "stability",
        "rate / batch",
    )
    rows = [
        (printable(one.name), _number(one.length), one.length_from or "-", _number(one.steps),
         _peak(one), _number(one.batch_size), _number(one.rows), _number(one.epochs),
         printable(one.optimizer or "-"), _number(one.stability), _number(one.temperature))
        for one in diagnosis.training
    ]  # fmt: skip
    unread = [f"not read: {printable(line)}" for one in diagnosis.training for line in one.unread]
    return "\n".join([_columns(header, rows), *unread])


def _peak(one: TrainedExpert) -> str:
    """Return the peak rate, or the least that it can have been."""
    if one.learning_rate is None and one.highest_rate is not None:
        return f">= {_number(one.highest_rate)}"
    return _number(one.learning_rate)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _bound(diagnosis: Diagnosis) -> str:
    if diagnosis.bound is None:
        return ""
    parts = {**diagnosis.bound.displacement, **diagnosis.bound.risk}
    known = [f"{name} {value:.3g}" for name, value in parts.items() if value is not None]
    missing = [name for name, value in parts.items() if value is None]
    if not known:
        return ""
    lines = ["terms of the bound, to rank causes by: " + ", ".join(known)]
    lines += [f"not known: {', '.join(missing)}"] if missing else []
    return "\n".join(lines)


def _tasks(diagnosis: Diagnosis) -> str:
    if diagnosis.probes is None:
        return ""
    header = ("loss, nats a token", "rows", "base", "own expert", "merged", "gain kept", "barrier", "curvature")
    rows = [
        (printable(one.task), str(one.rows), f"{one.base:.3f}", f"{one.own:.3f}", f"{one.merged:.3f}",
         f"{100 * (one.base - one.merged) / (one.base - one.own):.0f} %" if one.base > one.own else "-",
         f"{one.barrier:.3f}", f"{one.curvature:.3g}")
        for one in diagnosis.probes.tasks
    ]  # fmt: skip
    return _columns(header, rows)


def _candidates(diagnosis: Diagnosis) -> str:
    if diagnosis.probes is None:
        return ""
    header = ("merges, the best first", "measured", "predicted", "worst rise", "of")
    rows = [
        (
            printable(one.name),
            "-" if one.measured_mean is None else f"{one.measured_mean:.3f}",
            f"{one.mean:.3f}",
            f"{one.worst:.3f}",
            printable(one.worst_task),
        )
        for one in diagnosis.probes.candidates
    ]
    rows += [
        (printable(one.name), f"{one.mean:.3f}", "-", f"{one.worst:.3f}", printable(one.worst_task))
        for one in diagnosis.probes.methods
    ]
    lines = [_columns(header, rows)]
    if diagnosis.probes.saturation:
        curve = " ".join(f"{value:.3f}" for value in diagnosis.probes.saturation)
        lines.append(f"mean loss of all tasks after averaging k random experts, k = 1 ...: {curve}")
    if diagnosis.probes.next_gain is not None:
        lines.append(f"one more expert like these is predicted to change it by {-diagnosis.probes.next_gain:+.3f}")
    return "\n".join(lines)


def _columns(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table: the first column to the left, the others to the right."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    lines: list[str] = []
    for row in (header, *rows):
        cells = [
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
