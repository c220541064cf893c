"""An explanation as plain text of at most 100 columns: figures, bars, a table over depth, and the tokens."""

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from math import exp
from typing import TYPE_CHECKING

from consilience.coefficients.listing import count
from consilience.errors import printable

if TYPE_CHECKING:
    from consilience.routing.explaining.explanation import Explanation, Part, Shares

WIDTH = 100
_BAR, _NAME = 28, 24
#: A word and the spaces behind it; 40 characters take 80 columns at most, and so fit a line.
_WORD = re.compile(r"\S{1,40}\s*|\s+")
#: Experts with a line or a column of their own, and rows of a table; ``--json`` has all of them.
_MOST_LINES, _MOST_COLUMNS, _MOST_ROWS = 16, 6, 40


def text(explanation: "Explanation") -> str:
    """Return the text."""
    lines = [
        *_wrapped("Prompt  ", [printable(explanation.prompt)]),
        *_wrapped("Answer  ", [printable(explanation.answer)]),
        "",
        *(line for sentence in sentences(explanation) for line in _wrapped("", [sentence])),
        "",
        *_bars(explanation),
        *_cosines(explanation),
        "",
        *_table("mean weight in %", explanation, explanation.by_block),
        "",
        *_table("mean weight in %", explanation, explanation.by_kind),
    ]
    for part in explanation.parts:
        lines += ["", *_tokens(explanation, part)]
    return "\n".join(line.rstrip() for line in lines) + "\n"


def sentences(explanation: "Explanation") -> list[str]:
    """Return what the figures say, for somebody who never saw them."""
    everywhere, said = explanation.shares, explanation.by_role.get("answer", explanation.shares)
    first, most = explanation.ranking[0], int(said.argmax())
    tokens, layers = (sum(len(getattr(p, key)) for p in explanation.parts) for key in ("tokens", "layers"))
    settings = explanation.settings
    used = f"top {settings.top_k}" if settings.top_k else "all of them"
    used = f"top p = {settings.top_p:g}" if settings.top_p else used
    used += ", and all by their mean" if settings.fallback == "mean" else ""
    scale = explanation.scale
    told = "instructions do not count" if scale is None else f"instructions count {scale:.4g} times"
    if explanation.recognised is not None:
        told += f" (recognised to {explanation.recognised:.0%}, the rest is the experts' mean)"
    mine, best = (printable(explanation.experts[k]) for k in (most, first))
    found = [
        f"At the answer's tokens “{mine}” has most of the weight, {said[most]:.1%}; over all tokens it is “{best}”, "
        f"{everywhere[first]:.1%}.",
        f"Where a token is routed, it is shared by {exp(explanation.entropy):.1f} of {len(explanation.experts)} experts"
        f" (exp of the mean entropy, {explanation.entropy:.2f} nats).",
        f"{count(tokens, 'token')}, {count(layers, 'routed layer')} in {count(len(explanation.by_block), 'block')}; "
        f"local router {settings.local}, {told}, experts used: {used}.",
    ]
    if explanation.cosines is not None and explanation.threshold is not None:
        nearest = int(explanation.cosines.argmax())
        found.append(
            f"The query is nearest to what “{printable(explanation.experts[nearest])}” was made for: its cosine is "
            f"{explanation.cosines[nearest]:.2f}, and queries at {explanation.threshold:.2f} are half recognised."
        )
    if explanation.left_out:
        found.append(f"{count(len(explanation.left_out), 'layer')} left out: they do not see every token.")
    return found


def _bars(explanation: "Explanation") -> list[str]:
    roles = explanation.by_role
    head = "".join(f"{name:>10}" for name in ("all", *roles))
    lines = [f"{'Experts, by their share':<{_NAME + 6}}{head}"]
    shown, others = _split(explanation, _MOST_LINES)
    for k in shown:
        values = [explanation.shares[k], *(shares[k] for shares in roles.values())]
        bar = "█" * round(_BAR * float(explanation.shares[k]))
        lines.append(f"{_named(explanation, k, _NAME)}{_percents(values, 10)}  {bar}")
    if others:
        values = [explanation.shares[others].sum(), *(shares[others].sum() for shares in roles.values())]
        lines.append(f"{f'    the {len(others)} others':<{_NAME + 6}}{_percents(values, 10)}")
    return lines


def _cosines(explanation: "Explanation") -> list[str]:
    if explanation.cosines is None:
        return []
    shown, _ = _split(explanation, _MOST_LINES)
    lines = ["", "Cosine of the query's instruction with each expert's"]
    return lines + [f"{_named(explanation, k, _NAME)}{explanation.cosines[k]:>10.4f}" for k in shown]


def _table(title: str, explanation: "Explanation", rows: "Mapping[str, Shares]") -> list[str]:
    shown, others = _split(explanation, _MOST_COLUMNS)
    heads = [_clip(f"{explanation.numbers[k]} {printable(explanation.experts[k])}", 9) for k in shown]
    heads += ["others"] if others else []
    lines = [f"{title:<{_NAME + 4}}" + "".join(" " + _padded(head, 9, left=True) for head in heads)]
    for name, values in list(rows.items())[:_MOST_ROWS]:
        cells = [*values[shown], *([values[others].sum()] if others else [])]
        lines.append(f"  {_padded(_clip(printable(name), _NAME), _NAME)}  {_percents(cells, 10, '')}")
    if len(rows) > _MOST_ROWS:
        lines.append(f"  ... and {len(rows) - _MOST_ROWS} more; --json lists all")
    return lines


def _tokens(explanation: "Explanation", part: "Part") -> list[str]:
    """Return a part's tokens: a number tells the expert that took most of those behind it."""
    lines = [f"Tokens of the {part.name}, behind the number of the expert with most of their weight over all layers"]
    top = part.by_token.argmax(-1).tolist()
    numbers = [explanation.numbers[k] for k in top]
    pairs = zip(part.tokens, numbers, strict=True)
    for role, run in groupby(pairs, key=lambda pair: pair[0].role):
        pieces: list[str] = []
        for number, own in groupby(run, key=lambda pair: pair[1]):
            pieces += [f"[{number}]", *(printable(token.text) for token, _ in own), " "]
        lines += _wrapped(f"  {role:<9} ", pieces)
    return lines


def _split(explanation: "Explanation", most: int) -> tuple[list[int], list[int]]:
    """Return the experts that are shown, and those that are summed."""
    return list(explanation.ranking[:most]), list(explanation.ranking[most:])


def _named(explanation: "Explanation", k: int, width: int) -> str:
    number = f"{explanation.numbers[k]:>3} "
    return number + _padded(_clip(printable(explanation.experts[k]), width), width) + "  "


def _percents(values: Iterable[float], width: int, unit: str = " %") -> str:
    return "".join(f"{100 * float(value):>{width - len(unit)}.1f}{unit}" for value in values)


def columns(text: str) -> int:
    """Return how many columns of a terminal a text takes."""
    marks = sum(unicodedata.category(c) in ("Mn", "Me") for c in text)
    return len(text) + sum(unicodedata.east_asian_width(c) in "WF" for c in text) - marks


def _clip(text: str, width: int) -> str:
    if columns(text) <= width:
        return text
    while columns(text) > width - 1:
        text = text[:-1]
    return f"{text}…"


def _padded(text: str, width: int, *, left: bool = False) -> str:
    room = " " * (width - columns(text))
    return room + text if left else text + room


def _wrapped(first: str, pieces: Sequence[str]) -> list[str]:
    """Return pieces joined in lines, broken between words; later lines are set in as far as the first piece."""
    lines, line, indent = list[str](), first, " " * len(first)
    for word in (word for piece in pieces for word in _words(piece)):
        if columns(line) + columns(word.rstrip()) > WIDTH:
            lines.append(line)
            line = indent
        line += word
    return [*lines, line] if line.strip() else lines


def _words(piece: str) -> list[str]:
    """Cut behind the spaces of a text, which stay with the words before them, and within words that are long."""
    return _WORD.findall(piece)
