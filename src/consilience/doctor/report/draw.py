"""Pieces of a page that needs no other file: numbers, tables, and pictures as inline SVG.

Most pictures have no view box: places along the width are percentages and heights are pixels, so that a picture fits a
narrow screen while its text keeps its size. Colours come from the page's style, so that they follow light and dark.
Values that are missing or not finite are left out of pictures, and are a dash in words.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from unicodedata import east_asian_width

from consilience.errors import printable

Value = float | None
#: Beyond this, and below its inverse, a picture cannot tell values apart.
_LARGEST = 1e300
#: Rows of a table or chart before the rest is folded away.
MOST_ROWS = 20
#: Numbers along the foot of a picture.
_MOST_MARKS = 8
#: Cells of a matrix by the most rows that they suit: pixels, size of the text (0: none), decimals.
_CELLS = ((6, 56, 12, 3), (12, 46, 12, 2), (20, 34, 10, 2), (40, 16, 0, 0))
#: Width of a matrix too large for these.
_MATRIX = 640
#: Round numbers that colours reach to.
_REACHES = (1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0)
#: Pixels beside a matrix for names, and for numbers alone.
_NAMED, _NUMBERED = 116, 30
#: A map of more cells than this has no words on each.
_MOST_TITLES = 3000


def safe(text: str) -> str:
    """Return a text for HTML; what cannot be seen, or would turn the text around it, is shown by its number."""
    return escape(printable(text))


def name(text: str) -> str:
    """Return a stranger's name for HTML, kept apart from the direction of the text around it."""
    return f"<bdi>{safe(text)}</bdi>"


def clipped(text: str, width: int) -> str:
    """Return a text's first ``width`` columns, for HTML; wide characters count twice."""
    shown, left = "", width
    for c in printable(text):
        left -= 2 if east_asian_width(c) in "WF" else 1
        if left < 0:
            return escape(shown[:-1]) + "…"
        shown += c
    return escape(shown)


def number(value: Value, form: str = ".4g", unit: str = "") -> str:
    """Return a number in words; a dash where there is none."""
    if value is None or not math.isfinite(value):
        return "–"
    text = format(value, form)
    if text.startswith(("-", "+")) and not text.strip("+-0."):
        text = text[1:]
    return text.replace("-", "−") + unit


def percent(value: Value, form: str = ".1f") -> str:
    """Return a share as a percentage."""
    return number(None if value is None else 100 * value, form, "\N{NO-BREAK SPACE}%")


def drawable(value: Value) -> Value:
    """Return what can be drawn of a value."""
    if value is None or not math.isfinite(value):
        return None
    return 0.0 if abs(value) < 1 / _LARGEST else min(max(value, -_LARGEST), _LARGEST)


@dataclass(frozen=True)
class Scale:
    """An axis from ``low`` to ``high`` with a number at every ``step``."""

    low: float
    high: float
    step: float

    def at(self, value: float) -> float:
        """Return a value's place, 0 to 1."""
        return min(max((value / 2 - self.low / 2) / (self.high / 2 - self.low / 2), 0.0), 1.0)

    def ticks(self) -> list[float]:
        """Return where numbers stand."""
        first, count = round(self.low / self.step), round(self.high / self.step - self.low / self.step)
        return [(first + i) * self.step for i in range(count + 1)]


def scale_of(values: Sequence[Value], *, zero: bool = False) -> Scale:
    """Return an axis for values; ``zero``: it holds 0 as well."""
    found = [shown for value in values if (shown := drawable(value)) is not None] + [0.0] * zero or [0.0]
    low, high = min(found), max(found)
    if high / 2 - low / 2 <= 1e-9 * max(abs(low), abs(high)):
        room = abs(high) / 10 or 1.0
        low, high = (low - room, high + room) if not zero or low else (low, high + room)
    rough = (high / 2 - low / 2) / 2
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next((unit * one for one in (1.0, 2.0, 2.5, 5.0) if unit * one >= rough), unit * 10)
    return Scale(math.floor(low / step) * step, math.ceil(high / step) * step, step)


def table(
    head: Sequence[str], rows: Sequence[Sequence[str]], *, words: Sequence[int] = (), fold: int | None = None
) -> str:
    """Return a table of cells that are HTML: the first heads its row, columns in ``words`` hold text, others numbers.

    Rows beyond ``fold`` are folded away.
    """
    kinds = ["" if not i or i in words else ' class="n"' for i in range(len(head))]
    columns = "".join(f'<th scope="col"{kind}>{cell}</th>' for cell, kind in zip(head, kinds, strict=True))
    lines = [_row(cells, kinds) for cells in rows]
    start = f'<div class="wide"><table><thead><tr>{columns}</tr></thead><tbody>'
    end = "</tbody></table></div>"
    first, rest = (lines, []) if fold is None else (lines[:fold], lines[fold:])
    return start + "".join(first) + end + (folded(f"{len(rest)} more", start + "".join(rest) + end) if rest else "")


def _row(cells: Sequence[str], kinds: Sequence[str]) -> str:
    others = "".join(f"<td{kind}>{cell}</td>" for cell, kind in zip(cells[1:], kinds[1:], strict=True))
    return f'<tr><th scope="row">{cells[0]}</th>{others}</tr>'


def folded(summary: str, inner: str) -> str:
    """Return HTML that is seen once it is asked for."""
    return f"<details><summary>{summary}</summary>{inner}</details>"


def figure(title: str, note: str, drawing: str, numbers: str) -> str:
    """Return a picture with its title, how to read it, and its numbers, if any, folded away; all are HTML."""
    below = folded("The numbers", numbers) if numbers else ""
    return f'<figure><figcaption><h3>{title}</h3><p class="hint">{note}</p></figcaption>{drawing}{below}</figure>'


def bar(value: Value, longest: float) -> str:
    """Return a bar as long as a value's share of the longest."""
    shown = drawable(value)
    width = 100 * min(max(shown / longest, 0.0), 1.0) if shown is not None and longest > 0 else 0.0
    return f'<span class="bar"><span style="width:{width:.2f}%"></span></span>'


def _picture(body: str, height: int, said: str) -> str:
    return f'<svg role="img" aria-label="{said}" width="100%" height="{height}">{body}</svg>'


def framed(body: str, height: int, said: str, across: str, up: str) -> str:
    """Return a picture between the words of its axes, all of which are HTML."""
    drawn = _picture(body, height, said)
    return f'<div class="plot"><p class="up">{up}</p>{drawn}<p class="across">{across}</p></div>'


def _levels(scale: Scale, height: int) -> str:
    """Return lines across, and their numbers to the left."""
    drawn: list[str] = []
    for tick in scale.ticks():
        y = height * (1 - scale.at(tick))
        drawn.append(f'<line class="grid" x1="0" x2="100%" y1="{y:.1f}" y2="{y:.1f}"/>')
        drawn.append(f'<text x="-10" y="{y + 4:.1f}" text-anchor="end">{number(tick)}</text>')
    return "".join(drawn)


def foot(labels: Sequence[str], places: Sequence[float], y: float) -> str:
    """Return labels (HTML) below a picture, as many as fit a narrow screen."""
    step = next(one for one in _steps() if len(labels) <= one * _MOST_MARKS)
    shown = list(zip(labels, places, strict=True))[::step]
    return "".join(f'<text x="{100 * x:.2f}%" y="{y:.0f}" text-anchor="middle">{text}</text>' for text, x in shown)


def _steps() -> list[int]:
    return [one * 10**power for power in range(9) for one in (1, 2, 5)]


def bars(
    labels: Sequence[str], values: Sequence[Value], titles: Sequence[str], said: str, words: tuple[str, str]
) -> str:
    """Return bars side by side; labels, titles and words (across, up) are HTML."""
    height, count = 180, len(values)
    scale = scale_of(values, zero=True)
    ground = scale.at(0)
    drawn: list[str] = []
    for i, (value, title) in enumerate(zip(values, titles, strict=True)):
        shown = drawable(value)
        top = ground if shown is None else scale.at(shown)
        y, tall = height * (1 - max(top, ground)), height * abs(top - ground)
        width, gap = min(100 / count, 12.0), min(100 / count, 12.0) * 0.1
        drawn.append(
            f'<rect class="mark" x="{width * i + gap:.3f}%" width="{width - 2 * gap:.3f}%" y="{y:.1f}" '
            f'height="{tall:.1f}"><title>{title}</title></rect>'
        )
    places = [min(100 / count, 12.0) * (i + 0.5) / 100 for i in range(count)]
    body = _levels(scale, height) + "".join(drawn) + foot(labels, places, height + 16)
    return framed(body, height, said, *words)


@dataclass(frozen=True)
class Shading:
    """How values are coloured: from ``middle``, towards one colour or two, fully at a distance of ``reach``.

    ``two`` is whether values below the middle have a colour, ``shares`` whether they are shares, and ``flipped``
    whether the colours change sides.
    """

    middle: float
    reach: float
    two: bool = False
    shares: bool = False
    flipped: bool = False

    def cell(self, value: Value) -> str:
        """Return the class and colour of a cell."""
        shown = drawable(value)
        if shown is None:
            return 'class="unknown"'
        share = min(max((shown - self.middle) / self.reach, -1.0), 1.0) if self.reach > 0 else 0.0
        return f'class="{"under" if (share < 0) != self.flipped else "over"}" style="--w:{abs(share):.3f}"'

    def key(self) -> str:
        """Return what the colours mean."""
        low = self.middle - self.reach if self.two else self.middle
        ends = [self.said(low), self.said(self.middle + self.reach)]
        kind = f"ramp{' two' * self.two}{' flipped' * self.flipped}"
        middle = f" (no colour: {self.said(self.middle)})" if self.two else ""
        return f'<p class="key">{ends[0]}<span class="{kind}"></span>{ends[1]}{middle}</p>'

    def said(self, value: Value) -> str:
        """Return an end's number."""
        return percent(value, ".3g") if self.shares else number(value, ".3g")


def reach_of(values: Sequence[Value], middle: float, least: float) -> float:
    """Return how far values lie from the middle, rounded up, and at least ``least``."""
    away = [abs(shown - middle) for value in values if (shown := drawable(value)) is not None]
    far = max([least, *away])
    unit = 10.0 ** math.floor(math.log10(far)) if far > 0 else 1.0
    return next((unit * one for one in _REACHES if unit * one >= far * (1 - 1e-9)), unit * 10)


def matrix(names: Sequence[str], cells: Sequence[Sequence[Value]], shade: Shading, said: str) -> str:
    """Return a square map of pairs; the diagonal is blank. ``said`` is HTML, names are not."""
    count = len(names)
    size, text, decimals = _cell(count)
    left, top = (_NAMED if text else _NUMBERED), 20
    drawn = [_heads(names, size, left, top, bool(text))]
    for i, row in enumerate(cells):
        for j, value in enumerate(row):
            drawn.append(_square(i, j, value, shade, (left + j * size, top + i * size, size, text, decimals)))
    width, height = left + count * size, top + count * size
    svg = f'<svg role="img" aria-label="{said}" width="{width:.0f}" height="{height:.0f}">{"".join(drawn)}</svg>'
    return f'<div class="wide">{svg}</div>{shade.key()}'


def _cell(count: int) -> tuple[float, int, int]:
    """Return pixels, size of the text, and decimals of a cell of a matrix."""
    for most, size, text, decimals in _CELLS:
        if count <= most:
            return size, text, decimals
    return max(_MATRIX / count, 2.0), 0, 0


def _heads(names: Sequence[str], size: float, left: int, top: int, named: bool) -> str:
    """Return numbers above, and numbers and names to the left."""
    step = 1 if named else next(one for one in _steps() if one * size >= 22)
    drawn: list[str] = []
    for k, one in enumerate(names):
        if k % step:
            continue
        middle = size * (k + 0.5)
        words = f"{clipped(one, 13)} {k + 1}" if named else str(k + 1)
        full = f"<title>{k + 1} {safe(one)}</title>"
        drawn.append(f'<text x="{left + middle:.1f}" y="{top - 6}" text-anchor="middle">{k + 1}{full}</text>')
        drawn.append(f'<text x="{left - 6}" y="{top + middle + 4:.1f}" text-anchor="end">{words}{full}</text>')
    return "".join(drawn)


def _square(i: int, j: int, value: Value, shade: Shading, place: tuple[float, float, float, int, int]) -> str:
    x, y, size, text, decimals = place
    look = 'class="self"' if i == j else shade.cell(value)
    gap = 1 if size > 8 else 0
    rect = f'<rect {look} x="{x:.1f}" y="{y:.1f}" width="{size - gap:.1f}" height="{size - gap:.1f}"'
    if i == j:
        return rect + "/>"
    words = percent(value, f".{max(0, decimals - 2)}f") if shade.shares else number(value, f".{decimals or 3}f")
    rect += f"><title>{i + 1} and {j + 1}: {words}</title></rect>"
    if not text:
        return rect
    words = words.removesuffix("\N{NO-BREAK SPACE}%")
    return rect + (
        f'<text class="in" x="{x + size / 2:.1f}" y="{y + size / 2 + text / 3:.1f}" text-anchor="middle" '
        f'font-size="{text}">{words}</text>'
    )


def strips(
    names: Sequence[str],
    labels: Sequence[str],
    cells: Sequence[Sequence[Value]],
    shade: Shading,
    words: tuple[str, ...],
) -> str:
    """Return a map with a row for each name and a column for each label; words are HTML: what it says, across, up."""
    said, across, up = words
    tall = 22 if len(names) <= MOST_ROWS else 10
    wide = min(100 / max(1, len(labels)), 12.0)
    titled = len(names) * len(labels) <= _MOST_TITLES
    drawn: list[str] = []
    for k, (one, row) in enumerate(zip(names, cells, strict=True)):
        y = tall * k
        if tall > 12 or k % 5 == 0:
            drawn.append(f'<text x="-10" y="{y + tall / 2 + 4:.0f}" text-anchor="end">{k + 1}</text>')
        for i, value in enumerate(row):
            title = f"<title>{k + 1} {safe(one)}, {labels[i]}: {number(value)}</title>" if titled else ""
            place = f'x="{wide * i:.3f}%" width="{wide * 0.96:.3f}%" y="{y}" height="{tall - 1}"'
            drawn.append(f"<rect {shade.cell(value)} {place}>{title}</rect>")
    height = tall * len(names)
    places = [wide * (i + 0.5) / 100 for i in range(len(labels))]
    body = "".join(drawn) + foot(labels, places, height + 16)
    return framed(body, height, said, across, up) + shade.key()


@dataclass(frozen=True)
class Line:
    """One row of a chart: its label (HTML), what is drawn on it, and the number beside it."""

    label: str
    body: str
    beside: str = ""


def lines(rows: Sequence[Line], scale: Scale, said: str, words: str) -> str:
    """Return rows under each other on one axis; beyond ``MOST_ROWS`` they are folded away. Words are HTML."""
    first, rest = rows[:MOST_ROWS], rows[MOST_ROWS:]
    drawn = _lines(first, scale, said, words)
    return drawn + (folded(f"{len(rest)} more", _lines(rest, scale, said, words)) if rest else "")


def _lines(rows: Sequence[Line], scale: Scale, said: str, words: str) -> str:
    grid = "".join(
        f'<line class="grid" x1="{100 * scale.at(tick):.2f}%" x2="{100 * scale.at(tick):.2f}%" y1="0" y2="30"/>'
        for tick in scale.ticks()
    )
    ends = "".join(
        f'<text x="{100 * scale.at(tick):.2f}%" y="14" text-anchor="middle">{number(tick)}</text>'
        for tick in scale.ticks()
    )
    parts = [
        f'<div class="label">{row.label}</div><svg width="100%" height="30" aria-hidden="true">{grid}{row.body}</svg>'
        f'<div class="n">{row.beside}</div>'
        for row in rows
    ]
    foot = (
        f'<div class="label hint">{words}</div><svg width="100%" height="20" aria-hidden="true">{ends}</svg><div></div>'
    )
    return f'<div class="lines" role="img" aria-label="{said}">{"".join(parts)}{foot}</div>'


def span(scale: Scale, start: Value, end: Value, look: str) -> str:
    """Return a bar on a row, from one value to another."""
    a, b = drawable(start), drawable(end)
    if a is None or b is None:
        return ""
    low, high = sorted((scale.at(a), scale.at(b)))
    return f'<rect class="{look}" x="{100 * low:.2f}%" width="{100 * (high - low):.2f}%" y="6" height="18"/>'


def link(scale: Scale, values: Sequence[Value]) -> str:
    """Return the line from the least to the largest value of a row."""
    found = [scale.at(shown) for value in values if (shown := drawable(value)) is not None]
    if not found:
        return ""
    return f'<line class="way" x1="{100 * min(found):.2f}%" x2="{100 * max(found):.2f}%" y1="15" y2="15"/>'


def upright(scale: Scale, value: Value) -> str:
    """Return a dashed line through a row, at a value."""
    shown = drawable(value)
    if shown is None:
        return ""
    x = 100 * scale.at(shown)
    return f'<line class="chord" x1="{x:.2f}%" x2="{x:.2f}%" y1="0" y2="30"/>'


#: Marks by what they stand for, around their middle.
_SHAPES = {
    "base": '<circle class="hollow" r="5"/>',
    "own": '<rect class="own" x="-5" y="-5" width="10" height="10"/>',
    "merged": '<path class="merged" d="M0 -7 7 0 0 7 -7 0Z"/>',
    "dot": '<circle class="mark" r="4"/>',
    "next": '<circle class="hollow" r="4"/>',
}


def mark(kind: str, x: float, y: float, title: str = "") -> str:
    """Return a mark at a share of the width and a height in pixels; the title is HTML."""
    words = f"<title>{title}</title>" if title else ""
    return f'<svg class="at" x="{100 * x:.2f}%" y="{y:.1f}">{words}{_SHAPES[kind]}</svg>'


def legend(kinds: Sequence[tuple[str, str]]) -> str:
    """Return what marks stand for."""
    items = [
        f'<span><svg class="sample" width="16" height="16" aria-hidden="true">'
        f'<svg class="at" x="8" y="8">{_SHAPES[kind]}</svg></svg> {words}</span>'
        for kind, words in kinds
    ]
    return f'<p class="key">{"".join(items)}</p>'


@dataclass(frozen=True)
class Curve:
    """Points from left to right: ``(share of the width, value, kind of mark, title)``, and the looks of its lines."""

    points: tuple[tuple[float, Value, str, str], ...]
    dashed_from: int | None = None


def curve(found: Curve, height: int, scale: Scale, under: str = "") -> str:
    """Return a curve with its marks and levels, over what is drawn before it."""
    shown = [(i, x, drawable(y), kind, title) for i, (x, y, kind, title) in enumerate(found.points)]
    drawn = [_levels(scale, height), under]
    for (_, x, y, *_), (i, x2, y2, *_) in pairwise(shown):
        if y is not None and y2 is not None:
            dashed = found.dashed_from is not None and i >= found.dashed_from
            drawn.append(segment("chord" if dashed else "way", scale, height, (x, y), (x2, y2)))
    drawn += [mark(kind, x, height * (1 - scale.at(y)), title) for _, x, y, kind, title in shown if y is not None]
    return "".join(drawn)


def segment(look: str, scale: Scale, height: int, start: tuple[float, float], end: tuple[float, float]) -> str:
    """Return a line between two points."""
    y1, y2 = (height * (1 - scale.at(value)) for value in (start[1], end[1]))
    return f'<line class="{look}" x1="{100 * start[0]:.2f}%" x2="{100 * end[0]:.2f}%" y1="{y1:.1f}" y2="{y2:.1f}"/>'
