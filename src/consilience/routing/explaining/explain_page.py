"""An explanation as one HTML page that needs no network and no other file.

Python writes what stands still (figures, shares, tokens) and embeds the weights; the page's script draws the map of
tokens and layers on a canvas, so that a long text in a deep model costs no more than what is seen of it.
"""

import base64
import json
import re
import zlib
from collections.abc import Mapping, Sequence
from html import escape
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np

from consilience.pages.page import compose
from consilience.routing.explaining.explain_text import sentences

if TYPE_CHECKING:
    from consilience.routing.explaining.explain_tokens import Token
    from consilience.routing.explaining.explanation import Explanation, Part, Shares

#: Experts with a colour of their own (Okabe and Ito's, which colour-blind readers tell apart); the others are grey.
COLOURS = 7
#: Rows of the table of experts before the rest is folded away.
_MOST_ROWS = 12
#: A segment of at least this share has room for its number.
_LABELLED = 0.06
_ROLES = {"template": "Chat template", "prompt": "Prompt", "answer": "Answer"}
_PARTS = {
    "text": "Prompt and answer",
    "encoder": "What the encoder reads: the prompt",
    "decoder": "What the decoder writes: the answer",
}
#: What HTML forbids, and what would turn the text around it: neither may act, and both are shown.
_UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def page(explanation: "Explanation") -> str:
    """Return the page."""
    short = " ".join(explanation.prompt.split())
    title = f"Which expert took which token: {_safe(short if len(short) <= 60 else short[:59] + '…')}"
    slots = {
        "prompt": _safe(explanation.prompt),
        "answer": _safe(explanation.answer) or "(nothing)",
        "sentences": "".join(f"<p>{_safe(sentence)}</p>" for sentence in sentences(explanation)),
        "count": str(len(explanation.experts)),
        "experts": _experts(explanation),
        "cosines": _cosines(explanation),
        "blocks": _stacks(explanation, explanation.by_block),
        "kinds": _stacks(explanation, explanation.by_kind),
        "tokens": "".join(_strip(explanation, i, part) for i, part in enumerate(explanation.parts)),
        "data": _embedded(data(explanation)),
    }
    return compose("consilience.routing.explaining", "explain_page", title, slots, scripted=True)


def data(explanation: "Explanation") -> dict[str, Any]:
    """Return what the script gets: every part's weights as bytes round(255 w) [layers, tokens, K], deflated, base64."""
    settings = explanation.settings
    experts = len(explanation.experts)
    return {
        "experts": list(explanation.experts),
        "ranking": list(explanation.ranking),
        "used": experts if settings.top_p or settings.fallback == "mean" else min(settings.top_k or experts, experts),
        "parts": [
            {
                "name": part.name,
                "tokens": [_shown(token.text) for token in part.tokens],
                "roles": [token.role for token in part.tokens],
                "layers": [[layer.name, layer.block, layer.kind] for layer in part.layers],
                "weights": _packed(part),
            }
            for part in explanation.parts
        ],
    }


def _packed(part: "Part") -> str:
    values = np.rint(part.weights * 255).clip(0, 255).astype(np.uint8)
    return base64.b64encode(zlib.compress(values.tobytes())).decode()


def _embedded(value: Any) -> str:
    """Return JSON that cannot end the script element it stands in."""
    text = json.dumps(value, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _safe(text: str) -> str:
    """Return a text for HTML."""
    return escape(_UNSEEN.sub(lambda match: _seen(match[0]), text))


def _shown(text: str) -> str:
    """Return a token's text with its line breaks made visible as well."""
    return _UNSEEN.sub(lambda match: _seen(match[0]), text.replace("\n", "⏎").replace("\t", "⇥")) or "·"


def _seen(c: str) -> str:
    """Return a picture of an ASCII control character, and the number of any other one."""
    return chr(0x2400 + ord(c)) if ord(c) < 32 else f"\\u{ord(c):04x}"


def _colour(explanation: "Explanation", k: int) -> str:
    """Return the class that gives an expert's colour."""
    return f"c{min(explanation.numbers[k], COLOURS + 1)}"


def _chip(explanation: "Explanation", k: int) -> str:
    """Return an expert's number on its colour."""
    return f'<span class="chip {_colour(explanation, k)}">{explanation.numbers[k]}</span>'


def _name(explanation: "Explanation", k: int) -> str:
    return f'<th scope="row">{_chip(explanation, k)} <bdi>{_safe(explanation.experts[k])}</bdi></th>'


def _bar(explanation: "Explanation", k: int, part: float) -> str:
    """Return a cell with a bar as long as ``part`` of it."""
    width = 100 * min(max(part, 0.0), 1.0)
    inner = f'<div class="{_colour(explanation, k)}" style="width:{width:.2f}%"></div>'
    return f'<td class="grow"><div class="bar">{inner}</div></td>'


def _percent(value: float) -> str:
    return f"{100 * value:.1f}&nbsp;%"


def _experts(explanation: "Explanation") -> str:
    """Return the table of experts, the largest share first, long ones folded."""
    roles = explanation.by_role
    heads = "".join(f'<th scope="col" class="n">{_ROLES[role]}</th>' for role in roles)
    head = f'<tr><th scope="col">Expert</th><th scope="col" class="n">All</th><td class="grow"></td>{heads}</tr>'
    rows = [_expert(explanation, k, [float(shares[k]) for shares in roles.values()]) for k in explanation.ranking]

    return _folded(rows, f'<table class="experts"><thead>{head}</thead><tbody>', "</tbody></table>")


def _folded(rows: Sequence[str], start: str, end: str) -> str:
    """Return a table; of a long one, the end is folded away."""
    first, rest = rows[:_MOST_ROWS], rows[_MOST_ROWS:]
    shown = f'<div class="wide">{start}{"".join(first)}{end}</div>'
    if not rest:
        return shown
    more = f'<div class="wide">{start}{"".join(rest)}{end}</div>'
    return f"{shown}<details><summary>{len(rest)} more experts</summary>{more}</details>"


def _expert(explanation: "Explanation", k: int, by_role: Sequence[float]) -> str:
    share = float(explanation.shares[k])
    cells = "".join(f'<td class="n">{_percent(value)}</td>' for value in by_role)
    bar = _bar(explanation, k, share)
    return f'<tr>{_name(explanation, k)}<td class="n">{_percent(share)}</td>{bar}{cells}</tr>'


def _cosines(explanation: "Explanation") -> str:
    """Return the section about instructions, if they count."""
    cosines = explanation.cosines
    if cosines is None:
        return ""
    known, rest = explanation.recognised, ""
    if known is not None:
        rest = (
            f" The question is recognised to <b>{known:.0%}</b>; the rest of the weight is shared by all experts alike."
        )
    what = "it, less the mean and divided by the standard deviation," if explanation.settings.standardise else "it"
    rows = [
        f'<tr>{_name(explanation, k)}<td class="n">{cosines[k]:.4f}</td>{_bar(explanation, k, float(cosines[k]))}</tr>'
        for k in np.argsort(-cosines, kind="stable").tolist()
    ]
    return (
        "<section><h2>What the question asks for</h2><p>Each expert has an instruction that says what it does. This is "
        "how close the question’s comes to each (cosine, at most 1). It favours the same experts at every token: "
        f"{what} is multiplied by <b>{explanation.scale:.4g}</b> and added to what each layer says itself.{rest}</p>"
        f"{_folded(rows, '<table>', '</table>')}</section>"
    )


def _stacks(explanation: "Explanation", rows: "Mapping[str, Shares]") -> str:
    """Return one bar for each row, cut by the experts' shares."""
    coloured, others = explanation.ranking[:COLOURS], list(explanation.ranking[COLOURS:])
    found: list[str] = []
    for name, shares in rows.items():
        values = [(str(n + 1), explanation.experts[k], float(shares[k])) for n, k in enumerate(coloured)]
        if others:
            values.append(("…", f"the {len(others)} others", float(shares[others].sum())))
        segments = "".join(_segment(n + 1, *value) for n, value in enumerate(values))
        found.append(f'<li><span class="row">{_safe(name)}</span><span class="stack">{segments}</span></li>')
    return f'<ul class="stacks">{"".join(found)}</ul>'


def _segment(colour: int, label: str, name: str, share: float) -> str:
    said = f"{_safe(name)} {100 * share:.1f} %"
    text = label if share >= _LABELLED else ""
    return (
        f'<span class="c{colour}" style="width:{100 * share:.2f}%" title="{said}">'
        f'<span aria-hidden="true">{text}</span><span class="unseen">{said};</span></span>'
    )


def _strip(explanation: "Explanation", index: int, part: "Part") -> str:
    """Return a part's tokens in reading order, in one block for each of the template, the prompt and the answer."""
    blocks: list[str] = []
    numbered = list(enumerate(part.tokens))
    for role, run in groupby(numbered, key=lambda pair: pair[1].role):
        tokens = "".join(_token(explanation, part, t, token) for t, token in run)
        text = f'<div class="strip" dir="auto" role="group" aria-label="{_ROLES[role]}">{tokens}</div>'
        folded = f"<details><summary>{_ROLES[role]}</summary>{text}</details>"
        blocks.append(folded if role == "template" else f"<h4>{_ROLES[role]}</h4>{text}")
    head = f"<h3>{_safe(_PARTS.get(part.name, part.name))}</h3>" if len(explanation.parts) > 1 else ""
    return f'{head}<div class="strips" data-part="{index}">{"".join(blocks)}</div>'


def _token(explanation: "Explanation", part: "Part", t: int, token: "Token") -> str:
    weights = part.by_token[t]
    k = int(weights.argmax())
    said = f"{_safe(explanation.experts[k])} {100 * float(weights[k]):.1f} %"
    kind = " special" if token.special else ""
    line = "\n" * ("\n" in token.text)
    return (
        f'<button type="button" tabindex="-1" class="token {_colour(explanation, k)}{kind}" data-t="{t}" '
        f'style="--w:{float(weights[k]):.3f}" title="{said}"><span>{escape(_shown(token.text))}</span>'
        f"<i>{explanation.numbers[k]}</i></button>{line}"
    )
