"""What a coefficients file says: the values by expert, by type of tensor and by depth, as an object and as text."""

import json
import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from consilience.coefficients.coefficients import Coefficients

#: ``model.layers.3.mlp.up_proj.weight``: what precedes the first number, the number, what follows it.
_PLACE = re.compile(r"(?:(.*?)\.)?(\d{1,9})\.(.+)", re.DOTALL)
_THIRDS = ("first third", "middle third", "last third")
_OUTSIDE = "outside blocks"
#: Printed before the other facts, in this order.
_LEADING = ("method", "objective", "steps", "samples")
#: With more kinds than this, numbers inside a kind are not told apart.
_MOST_KINDS = 24
#: Longer tables are cut in text; ``--json`` has all of them.
_MOST_ROWS = 40


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor sits: ``block`` number (None: outside blocks) of ``tower``, and its ``kind`` within the block."""

    tower: str
    block: int | None
    kind: str


def place_of(name: str) -> Place:
    """Return the place that a tensor's (or module's) name tells."""
    match = _PLACE.fullmatch(name)
    if match is None:
        return Place("", None, name)
    return Place(match[1] or "", int(match[2]), match[3])


def short_kinds(kinds: Iterable[str]) -> dict[str, str]:
    """Return each kind's shortest distinct name: its last dotted parts, ``.weight`` left out where nothing is lost."""
    kinds = list(dict.fromkeys(kinds))
    bare = {kind: kind.removesuffix(".weight") or kind for kind in kinds}
    if len(set(bare.values())) < len(kinds):
        bare = {kind: kind for kind in kinds}
    endings: dict[str, int] = {}
    for label in bare.values():
        for ending in _endings(label):
            endings[ending] = endings.get(ending, 0) + 1
    return {kind: next((e for e in _endings(label) if endings[e] == 1), label) for kind, label in bare.items()}


def _endings(label: str) -> list[str]:
    """Return the dotted endings of a label, shortest first (six at most: names come from strangers)."""
    parts = label.rsplit(".", 6)
    return [".".join(parts[start:]) for start in range(len(parts) - 1, -1, -1)]


def fold_kinds(kinds: Iterable[str]) -> dict[str, str]:
    """Return each kind with the numbers inside it (experts of a mixture, say) as ``*``, if there are many kinds."""
    kinds = list(dict.fromkeys(kinds))
    if len(kinds) <= _MOST_KINDS:
        return {kind: kind for kind in kinds}
    return {kind: re.sub(r"(?<![^.])\d+(?![^.])", "*", kind) for kind in kinds}


def thirds(places: Iterable[Place]) -> dict[Place, str]:
    """Return the third of its tower's blocks that each place lies in."""
    places = list(places)
    blocks: dict[str, set[int]] = {}
    for place in places:
        if place.block is not None:
            blocks.setdefault(place.tower, set()).add(place.block)
    third: dict[tuple[str, int], str] = {}
    for tower, held in blocks.items():
        for rank, block in enumerate(sorted(held)):
            # The middle of the block's share of the depth, so that two blocks are a first and a last.
            third[tower, block] = _THIRDS[(2 * rank + 1) * 3 // (2 * len(held))]
    return {place: _OUTSIDE if place.block is None else third[place.tower, place.block] for place in places}


def tensor_means(coefficients: Coefficients) -> dict[str, tuple[int, npt.NDArray[np.float64]]]:
    """Return every tensor's number of elements and mean coefficient [K] over them."""
    means: dict[str, tuple[int, npt.NDArray[np.float64]]] = {}
    for group in coefficients.groups:
        for name, numel in group.tensors:
            sizes = np.array([piece.stop - piece.start for piece in coefficients.pieces[name]], np.float64)
            means[name] = (numel, coefficients.of(name) @ (sizes / sizes.sum()))
    return means


def coefficient_facts(path: str, coefficients: Coefficients, *, values: bool = False) -> dict[str, Any]:
    """Return one JSON object about a coefficients file; ``values`` adds every group with its coefficients."""
    groups = coefficients.groups
    means = tensor_means(coefficients)
    places = {name: place_of(name) for name in means}
    depth = thirds(places.values())
    experts = list(coefficients.experts)
    learned = int(coefficients.learned.sum())
    facts: dict[str, Any] = {
        "path": path,
        "kind": "coefficients",
        "experts": experts,
        "groups": len(groups),
        "coefficients": coefficients.count,
        "learned": learned,
        "fixed": coefficients.count - learned,
        "chunked": sum(group.chunks > 1 for group in groups),
        "tensors": len(means),
        "parameters": sum(numel for numel, _ in means.values()),
    }
    excluded = coefficients.facts.get("excluded")
    if isinstance(excluded, list | int) and not isinstance(excluded, bool):
        facts["excluded"] = excluded if isinstance(excluded, int) else len(cast(list[Any], excluded))
    if coefficients.trimmed is not None:
        facts["trimmed"] = {"density": coefficients.trimmed.density, "elect": coefficients.trimmed.elect}
    if coefficients.count:
        facts["alpha"] = {
            name: {"mean": float(row.mean()), "min": float(row.min()), "max": float(row.max()), "std": float(row.std())}
            for name, row in zip(experts, coefficients.alpha, strict=True)
        }
        folded = fold_kinds(place.kind for place in places.values())
        facts["by_type"] = _table(experts, means, {name: folded[place.kind] for name, place in places.items()})
        facts["by_depth"] = _table(
            experts, means, {name: depth[place] for name, place in places.items()}, (*_THIRDS, _OUTSIDE)
        )
    facts["facts"] = coefficients.facts
    if values:
        facts["group_list"] = [
            {
                "name": group.name,
                "tensors": [name for name, _ in group.tensors],
                "parameters": group.numel,
                "learned": group.learned,
                "alpha": {
                    name: [float(value) for value in row[group.first : group.first + group.chunks]]
                    for name, row in zip(experts, coefficients.alpha, strict=True)
                },
            }
            for group in groups
        ]
    return facts


def _table(
    experts: Sequence[str],
    means: Mapping[str, tuple[int, npt.NDArray[np.float64]]],
    row_of: Mapping[str, str],
    order: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """Return one row per value of ``row_of``: its tensors and their mean coefficients, weighted by elements."""
    members: dict[str, list[str]] = {row: [] for row in order}
    for name, row in row_of.items():
        members.setdefault(row, []).append(name)
    table: list[dict[str, Any]] = []
    for row, names in members.items():
        if names:
            weights = np.array([means[name][0] for name in names], np.float64)
            mean = (weights / weights.sum()) @ np.stack([means[name][1] for name in names])
            table.append({"name": row, "tensors": len(names), "mean": dict(zip(experts, mean.tolist(), strict=True))})
    return table


def coefficient_lines(facts: Mapping[str, Any]) -> list[str]:
    """Return the object of ``coefficient_facts`` as lines of text."""
    lines = [
        f"{facts['path']}: coefficients of {count(len(facts['experts']), 'expert')}",
        f"  {count(facts['coefficients'], 'coefficient')} per expert in {count(facts['groups'], 'group')}: "
        f"{facts['learned']} learned, {facts['fixed']} fixed; {count(facts['chunked'], 'group')} in chunks",
        f"  {count(facts['tensors'], 'tensor')}, {facts['parameters']:,} parameters"
        + (f"; {facts['excluded']} excluded (the base's value)" if "excluded" in facts else ""),
    ]
    found: dict[str, Any] = facts["facts"]
    for key in (*_LEADING, *(key for key in found if key not in _LEADING)):
        counted = key == "excluded" and key in facts
        if key in found and not counted and (key in _LEADING or _short(found[key])):
            told = f"{brief(key)}: {brief(found[key], 1500)}"
            lines += textwrap.wrap(told, 112, initial_indent="  ", subsequent_indent="    ")
    lines += _answer_lines(found)
    if "trimmed" in facts:
        trimmed = facts["trimmed"]
        how = ", signs elected" if trimmed["elect"] else ""
        lines.append(f"  task vectors trimmed to density {trimmed['density']:g}{how}")
    if "alpha" in facts:
        columns = ("mean", "min", "max", "std")
        rows = [(name, [stats[column] for column in columns]) for name, stats in facts["alpha"].items()]
        lines += ["", *_text_table("expert", columns, rows)]
        for title, key in (
            ("by type of tensor, every parameter counting once", "by_type"),
            ("by depth, likewise", "by_depth"),
        ):
            names = [row["name"] for row in facts[key]]
            labels = short_kinds(names) if key == "by_type" else {name: name for name in names}
            rows = [(f"{labels[r['name']]} ({r['tensors']})", list(r["mean"].values())) for r in facts[key]]
            lines += ["", *_text_table(title, facts["experts"], rows[:_MOST_ROWS])]
            if len(rows) > _MOST_ROWS:
                lines.append(f"  ... and {len(rows) - _MOST_ROWS} more; --json lists all")
    for group in facts.get("group_list", []):
        chunks = len(next(iter(group["alpha"].values())))
        mark = "" if group["learned"] else "  fixed"
        lines += ["", f"  {group['name']}  {count(group['parameters'], 'parameter')}{mark}"]
        if group["tensors"] != [group["name"]]:
            lines += [f"    of {name}" for name in group["tensors"]]
        where = f" ({chunks} chunks)" if chunks > 1 else ""
        lines += [
            f"    {name}{where}: {' '.join(format(value, '.6g') for value in values)}"
            for name, values in group["alpha"].items()
        ]
    return lines


def _answer_lines(found: Mapping[str, Any]) -> list[str]:
    """Return what the experts answered, as far as it was kept: a wrong chat template is seen at once."""
    lines: list[str] = []
    rows = found.get("calibration")
    for name, told in cast(dict[str, Any], rows).items() if isinstance(rows, dict) else ():
        shown = cast(dict[str, Any], told).get("shown") if isinstance(told, dict) else None
        for one in cast(list[Any], shown) if isinstance(shown, list) else []:
            if isinstance(one, dict):
                given = cast(dict[str, Any], one)
                lines.append(f"  {name} is asked: {_quoted(given.get('prompt'))}")
                lines.append(f"  {' ' * len(name)} answers:  {_quoted(given.get('answer'))}")
    return ["", *lines] if lines else []


def _quoted(text: Any) -> str:
    return "nothing" if not text else json.dumps(brief(text, 150), ensure_ascii=False)


def count(number: int, noun: str) -> str:
    """Return ``1 group`` or ``2 groups``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _short(value: Any) -> bool:
    """Whether a fact fits a few lines: one value, a few of them, or a few of those by name (a method's parameters)."""
    if isinstance(value, dict):
        held = list(cast(dict[str, Any], value).values())
        return len(held) <= 60 and all(not isinstance(v, dict) and _short(v) for v in held)
    held = cast(list[Any], value) if isinstance(value, list) else [value]
    return len(held) <= 8 and all(
        not isinstance(v, list | dict) and (not isinstance(v, str) or len(v) <= 120) for v in held
    )


def brief(value: Any, longest: int = 200) -> str:
    """Return a fact as text, its middle cut out where it is longer than ``longest``."""
    text = str(value)
    if isinstance(value, dict):
        text = "; ".join(f"{brief(key)} {brief(held)}" for key, held in cast(dict[str, Any], value).items())
    elif isinstance(value, list):
        text = ", ".join(brief(held) for held in cast(list[Any], value))
    elif isinstance(value, float):
        text = f"{value:.6g}"
    return text if len(text) <= longest else f"{text[: longest - 50]} ... {text[-40:]}"


def _text_table(title: str, columns: Sequence[str], rows: Sequence[tuple[str, Sequence[float]]]) -> list[str]:
    first = max(len(title), *(min(len(name), 48) for name, _ in rows))
    widths = [max(min(len(column), 24), 9) for column in columns]
    heads = (f"{_fit(column, width):>{width}}" for column, width in zip(columns, widths, strict=True))
    lines = [f"  {title:<{first}}  {'  '.join(heads)}"]
    for name, values in rows:
        cells = (f"{value:>{width}.4g}" for value, width in zip(values, widths, strict=True))
        lines.append(f"  {_fit(name, first):<{first}}  {'  '.join(cells)}")
    return lines


def _fit(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[: width - 1]}…"
