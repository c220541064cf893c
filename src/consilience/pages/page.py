"""A page from what all pages share, and a report's own rules and body.

The skeleton, ``page.html``, has the head, the colours and the rules that all pages share. A report's module has a
``NAME.css`` and a ``NAME.html`` beside it, the rules that it adds and the body. ``@@slot@@`` stands for what is filled
in.
"""

import re
from collections.abc import Mapping
from functools import cache
from importlib.resources import files

#: What a page may load: nothing from outside, whatever a stranger's text in it says.
_STILL = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
_SCRIPTED = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
_SLOT = re.compile(r"@@(\w+)@@")


def compose(package: str, name: str, title: str, slots: Mapping[str, str], *, scripted: bool = False) -> str:
    """Return a page.

    Args:
        package: where ``NAME.css`` and ``NAME.html`` are.
        name: NAME.
        title: of the page, as HTML.
        slots: what stands in the body for each of its slots, as HTML.
        scripted: whether scripts in the body run; else the page's policy forbids any.
    """
    whole = {
        "policy": _SCRIPTED if scripted else _STILL,
        "title": title,
        "rules": _read(package, f"{name}.css").rstrip(),
        "body": _filled(_read(package, f"{name}.html").rstrip(), slots),
    }
    return _filled(_read("consilience.pages", "page.html"), whole)


def _filled(template: str, slots: Mapping[str, str]) -> str:
    """Return a template with its slots filled; what looks like a slot in a filling stays as it is."""
    return _SLOT.sub(lambda match: slots[match[1]], template)


@cache
def _read(package: str, file: str) -> str:
    return (files(package) / file).read_text(encoding="utf-8")
