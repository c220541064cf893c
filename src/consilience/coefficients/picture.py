"""Pictures of coefficients and of importance: heat maps over depth and type of tensor, bars where there is no depth."""

import io
import warnings
from collections import Counter
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from consilience.coefficients.coefficients import Coefficients
from consilience.coefficients.groups import Group
from consilience.coefficients.listing import Place, count, fold_kinds, place_of, short_kinds, tensor_means
from consilience.errors import InputError, printable
from consilience.workdir import write_file

Grid = npt.NDArray[np.float64]
#: A file may name any number of experts; a picture has room for these.
_MOST_PANELS = 24
_DIVERGING, _SEQUENTIAL = "RdBu_r", "viridis"
_EMPTY = "#ececec"
#: What lies beyond is drawn here: the arithmetic of colours and axes overflows long before numbers do.
_LARGEST = 1e30
_IMPORTANCE = "Importance of each group (its share)"
#: Colour bars get this width, titles and block numbers this height (inches).
_BAR_WIDTH, _HEAD_HEIGHT = 1.1, 0.62


def picture(
    coefficients: Coefficients, path: Path | str | None = None, importance: Mapping[str, float] | None = None
) -> bytes:
    """Draw the coefficients; return the PNG file's bytes, and write them to ``path`` if given.

    Where each group lies in one module, every expert gets a heat map: depth against type of tensor. Colours are shared
    and centred on the anchor (``facts["alphabar"]``, one number per expert, else 0); anchors that differ are
    subtracted. A chunked group shows its mean over elements and its number of chunks; a dash marks groups that were
    not learned while others were. Other groupings are drawn as bars from the anchor.

    Args:
        coefficients: what to draw.
        path: file to write, in PNG whatever its name.
        importance: share of each group by its name, drawn below on its own scale; default: ``facts["importance"]``,
            where the method that found the coefficients left it.

    Raises:
        InputError: matplotlib is not installed, or there are no groups.
    """
    with _drawing():
        if not coefficients.count:
            raise InputError("these coefficients have no groups: there is nothing to draw")
        view = _view(coefficients)
        importance = _stored(coefficients) if importance is None else importance
        sheet = _sheet([_group_place(group) for group in coefficients.groups])
        figure = _bars(view, importance) if sheet is None else _maps(view, sheet, importance)
        return _png(figure, path)


def importance_picture(importance: Mapping[str, float], path: Path | str | None = None) -> bytes:
    """Draw the importance of groups over depth and type of tensor, with its sums by depth and by type.

    Args:
        importance: share of each group by its name; names of tensors or modules tell their place.
        path: file to write, in PNG whatever its name.

    Raises:
        InputError: matplotlib is not installed, or there are no groups.
    """
    with _drawing():
        if not importance:
            raise InputError("there is no importance to draw: no groups")
        shares = np.array(list(importance.values()), np.float64)
        sheet = _sheet([place_of(name) for name in importance])
        return _png(_shares(list(importance), shares) if sheet is None else _marginals(sheet, shares), path)


@contextmanager
def _drawing() -> Generator[None, None, None]:
    """Draw names as they are: no formulas in dollar signs, no warnings about characters that the font lacks."""
    try:
        import matplotlib as mpl
    except ImportError:
        raise InputError("pictures need matplotlib; install it with: pip install 'consilience[report]'") from None
    with warnings.catch_warnings(), mpl.rc_context({"text.parse_math": False, "text.usetex": False, "font.size": 9}):
        warnings.simplefilter("ignore")
        yield


def _png(figure: Any, path: Path | str | None) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120, metadata={"Software": ""})
    if path is not None:
        write_file(Path(path).resolve(), buffer.getvalue())
    return buffer.getvalue()


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(max(width, 4.5), height), layout="constrained", facecolor="white")


def _label(text: str, longest: int = 34) -> str:
    """Return a stranger's name as it can be drawn."""
    text = printable(text)
    return text if len(text) <= longest else f"{text[: longest // 2]}…{text[-(longest - longest // 2 - 1) :]}"


@dataclass(frozen=True)
class _View:
    """What is drawn of coefficients: values [K, G] (means over elements) and the number they are centred on."""

    experts: tuple[str, ...]
    names: tuple[str, ...]
    values: Grid
    sizes: Grid
    marks: tuple[str, ...]
    centre: float
    scale: str
    title: str
    note: str

    @property
    def reach(self) -> float:
        """How far the colours go to either side of the centre."""
        away = float(np.abs(self.values - self.centre).max())
        return away if away > 0 else max(abs(self.centre), 0.1)


def _view(coefficients: Coefficients) -> _View:
    means = tensor_means(coefficients)
    groups = coefficients.groups
    sizes = np.array([group.numel for group in groups], np.float64)
    values = np.stack(
        [sum(means[name][0] / group.numel * means[name][1] for name, _ in group.tensors) for group in groups], axis=1
    )
    anchors = _anchors(coefficients)
    centre, scale = anchors[0], "coefficient"
    if len(set(anchors)) > 1:
        values = values - np.array(anchors)[:, None]
        centre, scale = 0.0, "coefficient less its anchor"
    some = any(group.learned for group in groups) and not all(group.learned for group in groups)
    marks = tuple(str(g.chunks) if g.chunks > 1 else "–" if some and not g.learned else "" for g in groups)
    notes = ["number: chunks (drawn: their mean)"] if any(group.chunks > 1 for group in groups) else []
    notes += ["–: not learned"] if some else []
    values = np.clip(values, -_LARGEST, _LARGEST)
    method = coefficients.facts.get("method")
    title = f"{_label(method)}: " if isinstance(method, str) else ""
    counts = f"{count(coefficients.count, 'coefficient')} per expert in {count(len(groups), 'group')}"
    names = tuple(group.name for group in groups)
    return _View(coefficients.experts, names, values, sizes, marks, centre, scale, title + counts, ";  ".join(notes))


def _anchors(coefficients: Coefficients) -> list[float]:
    """Return one anchor per expert; facts come from a file, so what is not a list of numbers counts as none."""
    found: Any = coefficients.facts.get("alphabar")
    experts = len(coefficients.experts)
    if isinstance(found, list | tuple) and len(cast(list[Any], found)) == experts:
        numbers = cast(list[Any], found)
        if all(isinstance(n, int | float) and not isinstance(n, bool) and abs(n) <= _LARGEST for n in numbers):
            return [float(n) for n in numbers]
    return [0.0] * experts


def _stored(coefficients: Coefficients) -> dict[str, float] | None:
    """Return the importance among the facts, if it is one finite number >= 0 per group."""
    found: Any = coefficients.facts.get("importance")
    if not isinstance(found, dict):
        return None
    shares = [cast(dict[str, Any], found).get(group.name) for group in coefficients.groups]
    if any(not isinstance(share, int | float) or not 0 <= share <= _LARGEST for share in shares):
        return None
    return {
        group.name: float(share) for group, share in zip(coefficients.groups, cast(list[float], shares), strict=True)
    }


def _group_place(group: Group) -> Place | None:
    """Return where a group lies if it lies in one module."""
    names = [name for name, _ in group.tensors]
    if len(names) == 1:
        return place_of(names[0])
    modules = {name.rpartition(".")[0] for name in names}
    module = modules.pop()
    return place_of(module) if module and not modules else None


@dataclass(frozen=True)
class _Sheet:
    """Columns are the blocks of each tower (the last: tensors outside blocks), rows the kinds of tensors."""

    columns: tuple[tuple[str, int | None], ...]
    rows: tuple[str, ...]
    cells: tuple[tuple[int, int], ...]

    def sums(self, values: Grid) -> Grid:
        """Return [rows, columns]: the sum of the groups of each cell; NaN where there is none."""
        grid, held = np.zeros((len(self.rows), len(self.columns))), np.zeros((len(self.rows), len(self.columns)), bool)
        for cell, value in zip(self.cells, values, strict=True):
            grid[cell] += value
            held[cell] = True
        return np.where(held, grid, np.nan)

    def means(self, values: Grid, sizes: Grid) -> Grid:
        """Return [rows, columns]: the mean of the groups of each cell, weighted by ``sizes``."""
        return self.sums(values * sizes) / self.sums(sizes)

    def marks(self, marks: Sequence[str]) -> dict[tuple[int, int], str]:
        """Return the marks of cells that hold one group."""
        held = Counter(self.cells)
        return {cell: mark for cell, mark in zip(self.cells, marks, strict=True) if held[cell] == 1}

    @property
    def x_label(self) -> str:
        """What the columns are."""
        towers = list(dict.fromkeys(tower for tower, block in self.columns if block is not None))
        named = [_label(tower, 24) for tower in towers if tower]
        more = " | …" if len(named) > 4 else ""
        text = f"block of {' | '.join(named[:4])}{more}" if named else "block"
        return text + ("  (out: outside blocks)" if self.columns[-1][1] is None else "")


def _sheet(places: Sequence[Place | None]) -> _Sheet | None:
    """Lay groups out by depth and kind, if their names tell it."""
    known = [place for place in places if place is not None]
    if len(known) < len(places) or all(place.block is None for place in known):
        return None
    towers = list(dict.fromkeys(place.tower for place in known if place.block is not None))
    columns: list[tuple[str, int | None]] = [
        (tower, block)
        for tower in towers
        for block in sorted({p.block for p in known if p.tower == tower and p.block is not None})
    ]
    outside = list(dict.fromkeys(place.kind for place in known if place.block is None))
    kinds = list(dict.fromkeys(place.kind for place in known if place.block is not None))
    merged = fold_kinds(kinds)
    labels = short_kinds(merged.values())
    row_of = {("in", kind): labels[merged[kind]] for kind in kinds}
    row_of |= {("out", kind): _outside_label(kind, outside) for kind in outside}
    rows = tuple(dict.fromkeys(row_of.values()))
    if outside:
        columns.append(("", None))
    row_index = {row: number for number, row in enumerate(rows)}
    column_index = {column: number for number, column in enumerate(columns)}
    cells = tuple(
        (
            row_index[row_of["in" if place.block is not None else "out", place.kind]],
            column_index[(place.tower if place.block is not None else "", place.block)],
        )
        for place in known
    )
    return _Sheet(tuple(columns), rows, cells)


def _outside_label(kind: str, outside: Sequence[str]) -> str:
    return kind.removesuffix(".weight") if len(outside) <= 8 else f"{len(outside)} others"


def _extent(sheet: _Sheet) -> tuple[float, float]:
    """Return a heat map's width and height in inches."""
    rows, columns = len(sheet.rows), len(sheet.columns)
    return min(max(0.3 * columns, 1.8), 15.0), min(max(0.24 * rows, 0.7), 12.0)


def _label_width(labels: Iterable[str]) -> float:
    return 0.25 + 0.075 * max((len(_label(label)) for label in labels), default=0)


def _maps(view: _View, sheet: _Sheet, importance: Mapping[str, float] | None) -> Any:
    from matplotlib.colors import Normalize

    shown = view.experts[:_MOST_PANELS]
    width, height = _extent(sheet)
    left = _label_width(sheet.rows)
    extra = importance is not None
    across = 1 if extra else max(1, min(len(shown), int((16 - left - _BAR_WIDTH) / (width + 0.25))))
    down = -(-len(shown) // across)
    figure = _figure(
        left + across * (width + 0.25) + _BAR_WIDTH, (down + extra) * (height + _HEAD_HEIGHT) + 0.25 + 0.25 * 2
    )
    axes: Any = figure.subplots(down + extra, across, squeeze=False)
    norm = Normalize(view.centre - view.reach, view.centre + view.reach)
    marks = sheet.marks(view.marks)
    mesh = None
    for number, axis in enumerate(axes[:down].flat):
        if number >= len(shown):
            axis.set_axis_off()
            continue
        grid = sheet.means(view.values[number], view.sizes)
        mesh = _heat(axis, grid, _DIVERGING, norm)
        _write_marks(axis, grid, marks, mesh, (width, height))
        mean = float(view.values[number] @ view.sizes / view.sizes.sum())
        axis.set_title(f"{_label(shown[number])}   (mean over parameters {mean:.3g})", fontsize=9)
        _axis_labels(axis, sheet, (width, height), left=number % across == 0)
    bar = figure.colorbar(mesh, ax=list(axes[:down].flat), aspect=30, label=view.scale)
    bar.ax.axhline(view.centre, color="black", linewidth=1)
    if importance is not None:
        grid = sheet.sums(np.array([importance.get(name, 0.0) for name in view.names], np.float64))
        axis = axes[down, 0]
        below = _heat(axis, grid, _SEQUENTIAL, Normalize(0, float(np.nanmax(grid)) or 1.0))
        axis.set_title("importance", fontsize=9)
        _axis_labels(axis, sheet, (width, height), left=True)
        figure.colorbar(below, ax=[axis], aspect=12, label="share")
    _name_columns(figure, sheet.x_label)
    _titles(figure, view)
    return figure


def _name_columns(figure: Any, text: str) -> None:
    """Write below the whole figure: the panels may be narrower than the text."""
    figure.supxlabel(_label(text, int(figure.get_figwidth() / 0.08)), fontsize=8)


def _titles(figure: Any, view: _View) -> None:
    more = len(view.experts) - _MOST_PANELS
    note = ";  ".join(part for part in (view.note, f"{more} more experts not shown" if more > 0 else "") if part)
    figure.suptitle(view.title + (f"\n{note}" if note else ""), fontsize=10)


def _heat(axis: Any, grid: Grid, colours: str, norm: Any) -> Any:
    mesh = axis.pcolormesh(
        np.ma.masked_invalid(grid),
        cmap=colours,
        norm=norm,
        edgecolors="white",
        linewidth=0.4 if grid.size < 4000 else 0,
    )
    axis.invert_yaxis()
    axis.set_facecolor(_EMPTY)
    axis.tick_params(length=2, labelsize=7)
    for side in axis.spines.values():
        side.set_visible(False)
    return mesh


def _axis_labels(axis: Any, sheet: _Sheet, extent: tuple[float, float], *, left: bool) -> None:
    """Name rows and columns, as many as fit; a line parts the towers."""
    width, height = extent
    step = max(1, round(0.11 / (height / len(sheet.rows))))
    axis.set_yticks(np.arange(0, len(sheet.rows), step) + 0.5)
    axis.set_yticklabels([_label(row) for row in sheet.rows[::step]] if left else [])
    longest = max(len(str(block)) for _, block in sheet.columns if block is not None)
    step = max(1, -(-int(1000 * (0.07 * longest + 0.06)) // int(1000 * width / len(sheet.columns))))
    starts = [n for n, column in enumerate(sheet.columns) if n == 0 or column[0] != sheet.columns[n - 1][0]]
    ticks = [n for n in range(len(sheet.columns)) if (n - max(s for s in starts if s <= n)) % step == 0]
    texts = ["out" if (block := sheet.columns[n][1]) is None else str(block) for n in ticks]
    axis.set_xticks(np.array(ticks) + 0.5)
    axis.set_xticklabels(texts)
    for start in starts[1:]:
        axis.axvline(start, color="black", linewidth=0.8)


def _write_marks(
    axis: Any, grid: Grid, marks: Mapping[tuple[int, int], str], mesh: Any, extent: tuple[float, float]
) -> None:
    rows, columns = grid.shape
    for (row, column), mark in marks.items():
        # A digit is about 0.6 of the font's size wide.
        size = min(72 * extent[0] / columns / (0.6 * max(len(mark), 1) + 0.4), 72 * extent[1] / rows * 0.65, 8.0)
        if mark and size >= 3:
            red, green, blue, _ = mesh.to_rgba(grid[row, column])
            ink = "black" if 0.3 * red + 0.6 * green + 0.1 * blue > 0.5 else "white"
            axis.text(column + 0.5, row + 0.5, mark, ha="center", va="center", fontsize=size, color=ink)


def _bars(view: _View, importance: Mapping[str, float] | None) -> Any:
    """Draw one panel per expert with a bar per group; one panel for all experts where there is one group."""
    if len(view.names) == 1:
        shown = view.experts[:200]
        figure = _figure(min(1.5 + 0.9 * len(shown), 16), 3.6)
        axis = figure.subplots()
        _bar_panel(axis, view.values[: len(shown), 0], view.centre)
        _bar_labels(axis, shown, min(0.9 * len(shown), 14.5), "experts")
        axis.set_ylabel(view.scale)
        _titles(figure, view)
        return figure
    shown = view.experts[:_MOST_PANELS]
    width = min(max(0.3 * len(view.names), 3.0), 15.0)
    count = len(shown) + (importance is not None)
    figure = _figure(width + 1.2, 1.5 * count + 1.2)
    axes: Any = figure.subplots(count, 1, squeeze=False, sharex=True)[:, 0]
    low, high = view.values.min(), view.values.max()
    low, high = min(low, view.centre), max(high, view.centre)
    margin = 0.12 * (high - low) or 0.1
    for number, name in enumerate(shown):
        _bar_panel(axes[number], view.values[number], view.centre)
        axes[number].set_ylim(low - margin, high + margin)
        axes[number].set_title(_label(name), fontsize=9)
        for at, mark in enumerate(view.marks if len(view.names) <= 60 else ()):
            value = view.values[number, at]
            side = "bottom" if value >= view.centre else "top"
            axes[number].text(at, value, mark, ha="center", va=side, fontsize=7, clip_on=True)
    figure.supylabel(view.scale, fontsize=9)
    if importance is not None:
        axes[-1].bar(range(len(view.names)), [importance.get(name, 0.0) for name in view.names], color="tab:green")
        axes[-1].set_title("importance (share)", fontsize=9)
        axes[-1].tick_params(labelsize=7)
    _bar_labels(axes[-1], view.names, width)
    _titles(figure, view)
    return figure


def _bar_panel(axis: Any, values: Grid, centre: float) -> None:
    colours = np.where(values >= centre, "tab:red", "tab:blue")
    axis.bar(range(len(values)), values - centre, bottom=centre, color=colours.tolist(), width=0.8)
    axis.axhline(centre, color="black", linewidth=0.8)
    axis.grid(axis="y", linewidth=0.3)
    axis.set_axisbelow(True)
    axis.tick_params(labelsize=7)


def _bar_labels(axis: Any, names: Sequence[str], width: float, what: str = "groups") -> None:
    names, shared = _bare(names)
    if shared:
        axis.set_xlabel(f"{what} of {_label(shared)}", fontsize=8)
    step = max(1, -(-int(1000 * 0.14) // max(1, int(1000 * width / len(names)))))
    axis.set_xticks(range(0, len(names), step))
    texts = [_label(name) for name in names[::step]]
    flat = max(map(len, texts)) * 0.07 < width / len(names) * step
    axis.set_xticklabels(texts, rotation=0 if flat else 90, fontsize=7)
    axis.set_xlim(-0.7, len(names) - 0.3)


def _bare(names: Sequence[str]) -> tuple[list[str], str]:
    """Return names without the dotted parts that all of them begin with, and those parts."""
    split = [name.split(".", 8) for name in names]
    shared = 0
    while len(names) > 1 and all(len(parts) > shared + 1 and parts[shared] == split[0][shared] for parts in split):
        shared += 1
    return [".".join(parts[shared:]) for parts in split], ".".join(split[0][:shared])


def _shares(names: Sequence[str], shares: Grid) -> Any:
    width = min(max(0.3 * len(names), 3.0), 15.0)
    figure = _figure(width + 1, 3.6)
    axis = figure.subplots()
    axis.bar(range(len(names)), shares, color="tab:green")
    axis.set_ylabel("share of the importance")
    axis.tick_params(labelsize=7)
    _bar_labels(axis, names, width)
    figure.suptitle(_IMPORTANCE, fontsize=10)
    return figure


def _marginals(sheet: _Sheet, shares: Grid) -> Any:
    """Draw the heat map with its column sums above and its row sums to the right."""
    from matplotlib.colors import Normalize

    grid = sheet.sums(shares)
    width, height = _extent(sheet)
    height = max(height, 1.4)
    figure = _figure(_label_width(sheet.rows) + width + 1.6 + _BAR_WIDTH, height + 1.2 + 1.1)
    axes: Any = figure.subplots(2, 2, width_ratios=[width, 1.5], height_ratios=[1.2, height], squeeze=False)
    (above, corner), (axis, right) = axes
    corner.set_axis_off()
    mesh = _heat(axis, grid, _SEQUENTIAL, Normalize(0, float(np.nanmax(grid)) or 1.0))
    _axis_labels(axis, sheet, (width, height), left=True)
    above.bar(np.arange(grid.shape[1]) + 0.5, np.nansum(grid, axis=0), color="tab:green", width=0.85)
    above.set_xlim(0, grid.shape[1])
    above.set_xticks([])
    above.set_ylabel("by block", fontsize=8)
    right.barh(np.arange(grid.shape[0]) + 0.5, np.nansum(grid, axis=1), color="tab:green", height=0.85)
    right.set_ylim(grid.shape[0], 0)
    right.set_yticks([])
    right.set_xlabel("by type", fontsize=8)
    for side in (above, right):
        side.tick_params(labelsize=7)
        side.spines[["top", "right"]].set_visible(False)
    right.tick_params(axis="x", labelrotation=90)
    figure.colorbar(mesh, ax=[right], aspect=20, label="share", location="right")
    _name_columns(figure, sheet.x_label)
    figure.suptitle(_IMPORTANCE, fontsize=10)
    return figure
