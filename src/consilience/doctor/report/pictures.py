"""Pictures of a diagnosis: how experts agree, where in the model, and what probe data measured and predict."""

import re
from collections.abc import Sequence

from consilience.doctor.diagnosis import BlockFacts, Diagnosis, PairFacts, ProbedTask, ProbeFacts
from consilience.doctor.report import draw
from consilience.doctor.report.draw import Line, Shading, Value, drawable, number, percent, safe

#: Columns of a name inside a sentence.
_SHORT = 40
#: Heights of a small picture and of a large one.
_SMALL, _LARGE = 110, 200
_BLOCK = re.compile(r"(.*?)\.?(\d{1,9})")


def agreement(diagnosis: Diagnosis) -> str:
    """Return maps of all pairs of experts, and their numbers."""
    pairs = diagnosis.pairs
    if not pairs:
        return ""
    cosines, opposite = [one.cosine for one in pairs], [one.opposite for one in pairs]
    overlaps = [one.overlap for one in pairs]
    by_cosine = Shading(0.0, draw.reach_of(cosines, 0.0, 0.1), two=True)
    by_sign = Shading(0.5, draw.reach_of(opposite, 0.5, 0.05), two=True, shares=True, flipped=True)
    by_overlap = Shading(0.0, draw.reach_of(overlaps, 0.0, 0.1))
    maps = (
        _map(diagnosis, cosines, by_cosine, "Cosines",
             "Blue: they pull the same way; orange: against each other; 0: orthogonal."),
        _map(diagnosis, opposite, by_sign, "Sign conflicts, %",
             "Share of the entries that both change, and in opposite directions; by chance 50&nbsp;%."),
        _map(diagnosis, overlaps, by_overlap, "Overlap of inputs",
             "0: they listen to different input directions; 1: to the same."),
    )  # fmt: skip
    numbers = draw.folded("The numbers of all pairs", _pairs(pairs))
    return (
        '<section><h2>How they agree</h2><p class="hint">Rows and columns are experts, by their numbers in the table '
        f'above; every pair stands twice.</p><div class="side">{"".join(maps)}</div>{numbers}</section>'
    )


def _map(diagnosis: Diagnosis, values: Sequence[Value], shade: Shading, title: str, note: str) -> str:
    names = [one.name for one in diagnosis.experts]
    place = {name: k for k, name in enumerate(names)}
    cells: list[list[Value]] = [[None] * len(names) for _ in names]
    for one, value in zip(diagnosis.pairs, values, strict=True):
        j, k = place[one.first], place[one.second]
        cells[j][k] = cells[k][j] = value
    said = f"{title}: {_range(diagnosis.pairs, values, shade)}"
    return draw.figure(title, note, draw.matrix(names, cells, shade, said), "")


def _range(pairs: Sequence[PairFacts], values: Sequence[Value], shade: Shading) -> str:
    """Return which pairs have the least and the largest value."""
    known = [(shown, one) for one, value in zip(pairs, values, strict=True) if (shown := drawable(value)) is not None]
    if not known:
        return "not known of any pair"
    ends = dict.fromkeys((min(known, key=lambda one: one[0]), max(known, key=lambda one: one[0])))
    words = [
        f"{shade.said(value)} ({draw.clipped(one.first, _SHORT)} and {draw.clipped(one.second, _SHORT)})"
        for value, one in ends
    ]
    return " to ".join(words)


def _pairs(pairs: Sequence[PairFacts]) -> str:
    rows = [
        (f"{draw.name(one.first)} – {draw.name(one.second)}", number(one.cosine, "+.4f"), percent(one.opposite),
         number(one.overlap, ".3f"), number(one.overlap_error, ".4f"))
        for one in sorted(pairs, key=lambda one: -abs(drawable(one.cosine) or 0.0))
    ]  # fmt: skip
    head = ("Pair, the strongest cosine first", "Cosine", "Opposite signs", "Overlap of inputs", "± standard error")
    return draw.table(head, rows)


def depth(diagnosis: Diagnosis) -> str:
    """Return what happens along the model."""
    blocks = _ordered(diagnosis.blocks)
    if not blocks:
        return ""
    several = len(diagnosis.experts) > 1
    drawn = f'<div class="two">{_displacement(blocks)}{_cancelled(blocks)}</div>' if several else ""
    return f"<section><h2>Where in the model</h2>{drawn}{_lengths(diagnosis, blocks)}</section>"


def _ordered(blocks: Sequence[BlockFacts]) -> list[BlockFacts]:
    """Return blocks by their numbers; towers, and what lies outside, as they come."""
    towers = list(dict.fromkeys(_place(one.name)[0] for one in blocks))
    return sorted(blocks, key=lambda one: (towers.index(_place(one.name)[0]), _place(one.name)[1]))


def _place(block: str) -> tuple[str, int]:
    match = _BLOCK.fullmatch(block)
    return (block, -1) if match is None else (match[1], int(match[2]))


def _ticks(blocks: Sequence[BlockFacts]) -> list[str]:
    places = [_place(one.name) for one in blocks]
    return ["rest" if index < 0 else str(index) for _, index in places]


def _across(blocks: Sequence[BlockFacts]) -> str:
    """Return the words of the axis along the model."""
    towers = dict.fromkeys(tower for tower, index in (_place(one.name) for one in blocks) if index >= 0)
    rest = [one.name for one in blocks if _place(one.name)[1] < 0]
    words: list[str] = []
    if towers:
        words.append("blocks of " + ", then ".join(draw.clipped(one, _SHORT) or "the model" for one in towers))
    if rest:
        words.append("rest: " + ", ".join(draw.clipped(one, _SHORT) for one in rest))
    return "; ".join(words)


def _displacement(blocks: Sequence[BlockFacts]) -> str:
    total = sum(drawable(one.displacement) or 0.0 for one in blocks)
    shares = [drawable(one.displacement) for one in blocks]
    shares = [None if one is None or total <= 0 else one / total for one in shares]
    return _bars(
        blocks, shares, "Displacement by block", "share of V, %",
        "How much of what merging costs, V, arises where. Point at a bar for the pair that agrees least there.",
        (("Displacement", [number(one.displacement) for one in blocks]), ("Share of V", [percent(x) for x in shares])),
    )  # fmt: skip


def _cancelled(blocks: Sequence[BlockFacts]) -> str:
    shares = [one.cancelled for one in blocks]
    return _bars(
        blocks, shares, "Cancellation by block", "cancelled, %",
        "Share of the experts’ magnitude that is lost in their sum.", (("Cancelled", [percent(x) for x in shares]),),
    )  # fmt: skip


def _bars(
    blocks: Sequence[BlockFacts], shares: Sequence[Value], title: str, up: str, note: str,
    columns: Sequence[tuple[str, Sequence[str]]],
) -> str:  # fmt: skip
    titles = [f"{safe(one.name)}: {percent(share)}{_least(one)}" for one, share in zip(blocks, shares, strict=True)]
    known = [
        (shown, safe(one.name)) for one, x in zip(blocks, shares, strict=True) if (shown := drawable(x)) is not None
    ]
    most = f"most, {percent(max(known)[0])}, in {max(known)[1]}" if known else "not known"
    said = f"{title}: {len(blocks)} blocks, {most}"
    values = [None if one is None else 100 * one for one in shares]
    drawing = draw.bars(_ticks(blocks), values, titles, said, (_across(blocks), up))
    rows = [
        (draw.name(one.name), *(cells[i] for _, cells in columns), number(one.cosine, "+.3f"), _between(one))
        for i, one in enumerate(blocks)
    ]
    head = ("Block", *(name for name, _ in columns), "Least cosine", "between")
    return draw.figure(title, note, drawing, draw.table(head, rows, words=(len(head) - 1,)))


def _least(block: BlockFacts) -> str:
    if block.pair is None or drawable(block.cosine) is None:
        return ""
    return f"; agree least: {safe(block.pair[0])} and {safe(block.pair[1])}, cosine {number(block.cosine, '+.3f')}"


def _between(block: BlockFacts) -> str:
    return " – ".join(draw.name(one) for one in block.pair) if block.pair else "–"


def _lengths(diagnosis: Diagnosis, blocks: Sequence[BlockFacts]) -> str:
    names = [one.name for one in diagnosis.experts]
    cells = [[one.norms[k] if k < len(one.norms) else None for one in blocks] for k in range(len(names))]
    known = [shown for row in cells for value in row if (shown := drawable(value)) is not None]
    shade = Shading(0.0, draw.reach_of(known, 0.0, 0.0))
    ends = f"from {number(min(known))} to {number(max(known))}" if known else "not known"
    said = f"Lengths of {len(names)} experts’ task vectors in {len(blocks)} blocks: {ends}"
    drawing = draw.strips(names, _ticks(blocks), cells, shade, (said, _across(blocks), "expert, by number"))
    rows = [(draw.name(one.name), *(number(row[i]) for row in cells)) for i, one in enumerate(blocks)]
    numbers = draw.table(("Block", *map(draw.name, names)), rows)
    return draw.figure(
        "Length by block and expert",
        "How far each expert moved each block, ‖τ‖; the stronger the colour, the farther.",
        drawing,
        numbers,
    )


def measured(diagnosis: Diagnosis) -> str:
    """Return what probe data said, if there were any."""
    probes = diagnosis.probes
    if probes is None:
        return ""
    parts = (_losses(probes), _scans(probes), _candidates(diagnosis, probes), _saturation(probes))
    return f"<section><h2>What probe data say</h2>{''.join(parts)}</section>"


def _losses(probes: ProbeFacts) -> str:
    if not probes.tasks:
        return ""
    scale = draw.scale_of([value for one in probes.tasks for value in (one.base, one.own, one.merged)])
    rows = [Line(draw.name(one.task), _marks(one, scale)) for one in probes.tasks]
    key = draw.legend((("base", "base"), ("own", "own expert"), ("merged", "merged, with the weights given")))
    said = "Losses by task: " + "; ".join(
        f"{draw.clipped(one.task, _SHORT)}: base {number(one.base, '.3f')}, own expert {number(one.own, '.3f')}, "
        f"merged {number(one.merged, '.3f')}"
        for one in probes.tasks
    )
    note = "A merge keeps an expert where its mark lies near the expert’s own; near the base’s, it has lost it."
    drawing = key + draw.lines(rows, scale, said, "loss, nats a token")
    return draw.figure("Loss of each task: base, expert, merge", note, drawing, _tasks(probes))


def _marks(task: ProbedTask, scale: draw.Scale) -> str:
    values = (("base", "base", task.base), ("own", "own expert", task.own), ("merged", "merged", task.merged))
    marks = [
        draw.mark(kind, scale.at(shown), 15, f"{words}: {number(value, '.3f')}")
        for kind, words, value in values
        if (shown := drawable(value)) is not None
    ]
    return draw.link(scale, [value for *_, value in values]) + "".join(marks)


def _tasks(probes: ProbeFacts) -> str:
    head = (
        "Task",
        "Rows",
        "Base",
        "Own expert",
        "Merged",
        "Gain kept",
        "Barrier",
        "Curvature",
        "Heterogeneity",
        "Noise",
    )
    rows = [
        (draw.name(one.task), str(one.rows), number(one.base, ".3f"), number(one.own, ".3f"), number(one.merged, ".3f"),
         _kept(one), number(one.barrier, ".3f"), number(one.curvature, ".3g"), number(one.heterogeneity, ".3g"),
         number(one.noise, ".3g"))
        for one in probes.tasks
    ]  # fmt: skip
    return draw.table(head, rows)


def _kept(task: ProbedTask) -> str:
    gain = task.base - task.own
    return percent((task.base - task.merged) / gain, ".0f") if gain > 0 else "–"


def _scans(probes: ProbeFacts) -> str:
    if not probes.tasks:
        return ""
    drawn = [_scan(probes.points, one) for one in probes.tasks]
    first, rest = drawn[: draw.MOST_ROWS], drawn[draw.MOST_ROWS :]
    shown = _multiples(first) + (draw.folded(f"{len(rest)} more", _multiples(rest)) if rest else "")
    head = ("Task", "own expert", *(f"{number(point, '.3g')} of the way" for point in probes.points))
    rows = [
        (draw.name(one.task), number(one.own, ".4f"), *(number(value, ".4f") for value in _padded(one, probes.points)))
        for one in probes.tasks
    ]
    note = (
        "Loss along the straight way between the two; each picture has its own scale. The dashed line joins the ends. "
        "A red line marks a barrier: how far the way rises above it."
    )
    return draw.figure("From each expert to the merge", note, shown, draw.table(head, rows))


def _multiples(drawn: Sequence[str]) -> str:
    return f'<div class="multiples">{"".join(drawn)}</div>'


def _padded(task: ProbedTask, points: Sequence[float]) -> list[Value]:
    return [task.scan[i] if i < len(task.scan) else None for i in range(len(points))]


def _scan(points: Sequence[float], task: ProbedTask) -> str:
    """Return a task's way from its expert to the merge."""
    known = [(x, value) for x, value in zip(points, _padded(task, points), strict=True) if 0 < x <= 1]
    way: list[tuple[float, Value]] = [(0.0, task.own), *known]
    scale = draw.scale_of([value for _, value in way])
    kinds = ["own", *["dot"] * (len(way) - 2), "merged"]
    marks = tuple(
        (x, value, kind, f"{number(x, '.3g')} of the way: {number(value, '.4f')}")
        for (x, value), kind in zip(way, kinds, strict=False)
    )
    start, end = drawable(way[0][1]), drawable(way[-1][1])
    chord = ""
    if start is not None and end is not None:
        chord = draw.segment("chord", scale, _SMALL, (0, start), (way[-1][0], end)) + _barrier(way, task, scale)
    body = draw.curve(draw.Curve(marks), _SMALL, scale, under=chord) + draw.foot(
        [number(x, ".3g") for x, _ in way], [x for x, _ in way], _SMALL + 16
    )
    said = (
        f"Loss of {draw.clipped(task.task, _SHORT)} from its expert to the merge: "
        f"{', '.join(number(value, '.3f') for _, value in way)}; barrier {number(task.barrier, '.3f')}"
    )
    facts = f'<p class="up">barrier {number(task.barrier, ".3f")}, curvature {number(task.curvature, ".3g")}</p>'
    frame = draw.framed(body, _SMALL, said, "share of the way", "loss, nats a token")
    return f"<div><h4>{draw.name(task.task)}</h4>{facts}{frame}</div>"


def _barrier(way: Sequence[tuple[float, Value]], task: ProbedTask, scale: draw.Scale) -> str:
    """Return a mark where the way rises most above the line between its ends, if it does."""
    start, end, last = drawable(way[0][1]), drawable(way[-1][1]), way[-1][0]
    if start is None or end is None or not last > 0 or not (drawable(task.barrier) or 0.0) > 0:
        return ""
    line = {x: start + (end - start) * x / last for x, _ in way}
    rises = [(shown - line[x], x, shown) for x, value in way if (shown := drawable(value)) is not None]
    rise, x, top = max(rises)
    return draw.segment("barrier", scale, _SMALL, (x, line[x]), (x, top)) if rise > 0 else ""


def _candidates(diagnosis: Diagnosis, probes: ProbeFacts) -> str:
    if not probes.candidates:
        return ""
    mean = _mean([one.merged for one in probes.tasks])
    means = [value for one in probes.candidates for value in (one.mean, one.measured_mean) if value is not None]
    scale = draw.scale_of([mean, *means, *(one.mean for one in probes.methods)], zero=True)
    rows = [
        Line(
            safe(one.name),
            draw.span(scale, 0.0, one.mean, "mark given" if one.kind == "given" else "mark")
            + draw.upright(scale, mean)
            + _measured(scale, one.measured_mean),
            number(one.mean if one.measured_mean is None else one.measured_mean, ".3f"),
        )
        for one in probes.candidates
    ]
    tried = [
        Line(safe(one.name), draw.upright(scale, mean) + _measured(scale, one.mean),
             number(one.mean, ".3f"))
        for one in probes.methods
    ]  # fmt: skip
    said = "Mean losses, the best first: " + "; ".join(
        f"{draw.clipped(one.name, _SHORT)}: {number(one.mean, '.3f')} predicted"
        + ("" if one.measured_mean is None else f", {number(one.measured_mean, '.3f')} measured")
        for one in probes.candidates[: draw.MOST_ROWS]
    )
    note = (
        "Bars: mean loss of all tasks as a quadratic model of the probes has it, which promises nothing. The best of "
        "each kind was tried on the probe rows, and every method that was asked for: marks. Orange: the weights given, "
        f"whose measured mean, {number(mean, '.3f')}, is the dashed line."
    )
    drawing = draw.lines([*tried, *rows], scale, said, "mean loss, nats a token")
    head = (
        "Merge",
        "Measured mean loss",
        "Predicted mean loss",
        "Worst rise",
        "of",
        *(f"Weight of {draw.name(one.name)}" for one in diagnosis.experts),
    )
    cells = [
        (draw.name(one.name), number(one.mean, ".3f"), "–", number(one.worst, ".3f"), draw.name(one.worst_task),
         *["–"] * len(diagnosis.experts))
        for one in probes.methods
    ]  # fmt: skip
    cells += [
        (draw.name(one.name), number(one.measured_mean, ".3f"), number(one.mean, ".3f"),
         number(one.worst, ".3f"), draw.name(one.worst_task),
         *(number(value, ".3g") for value in one.weights), *["–"] * (len(diagnosis.experts) - len(one.weights)))
        for one in probes.candidates
    ]  # fmt: skip
    return draw.figure("Merges that could be made instead", note, drawing, draw.table(head, cells, words=(4,)))


def _measured(scale: draw.Scale, value: Value) -> str:
    """Return the mark of a measured mean on its row."""
    shown = drawable(value)
    return "" if shown is None else draw.mark("merged", scale.at(shown), 15.0)


def _mean(values: Sequence[float]) -> Value:
    known = [shown for value in values if (shown := drawable(value)) is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None


def _saturation(probes: ProbeFacts) -> str:
    """Return the curve of mean losses by number of experts, the next one's predicted."""
    curve: list[Value] = list(probes.saturation)
    if not curve:
        return ""
    count, gain = len(curve), drawable(probes.next_gain)
    last = drawable(curve[-1])
    if gain is not None and last is not None:
        curve.append(last - gain)
    places = [i / max(1, len(curve) - 1) for i in range(len(curve))]
    kinds = ["dot" if i < count else "next" for i in range(len(curve))]
    titles = [f"{i + 1}: {number(value, '.4f')}" for i, value in enumerate(curve)]
    scale, labels = draw.scale_of(curve), [str(i + 1) for i in range(len(curve))]
    marks = draw.Curve(tuple(zip(places, curve, kinds, titles, strict=True)), dashed_from=count)
    body = draw.curve(marks, _LARGE, scale) + draw.foot(labels, places, _LARGE + 16)
    more = f"; one more expert like these: {number(curve[-1], '.3f')}" if len(curve) > count else ""
    ends = f"{number(probes.saturation[0], '.3f')} with one expert, {number(probes.saturation[-1], '.3f')} with {count}"
    note = "Mean loss of all tasks under averages of random experts, as the quadratic model has it"
    drawing = draw.framed(body, _LARGE, f"{note}: {ends}{more}", "experts averaged", "mean loss, nats a token")
    rows = [(label, number(value, ".4f"), "" if i < count else "one more like these") for i, (label, value) in
            enumerate(zip(labels, curve, strict=True))]  # fmt: skip
    dashed = "; dashed: one more expert like these" if more else ""
    return draw.figure(
        "What one more expert brings",
        f"{note}{dashed}.",
        drawing,
        draw.table(("Experts", "Mean loss", ""), rows, words=(2,)),
    )
