"""docs/coming-from-mergekit.md lists mergekit's methods as the registry and the stored comparison have them."""

import re
from pathlib import Path
from typing import Any

from test_recipes import ANSWERS, FAILS_THERE, MAKER, RECIPES, WRONG_THERE

from consilience.methods.mergekit import PARAMETERS
from consilience.methods.registry import MERGEKIT_METHODS, load

PAGE = Path(__file__).resolve().parents[2] / "docs" / "coming-from-mergekit.md"


def written(value: Any) -> str:
    return (
        str(value).lower()
        if isinstance(value, bool)
        else f"{value:g}"
        if isinstance(value, int | float)
        else str(value)
    )


def row(name: str) -> str:
    method = load(name)
    defaults = {key: parameter.default for key, parameter in method.parameters.items() if key in PARAMETERS}
    defaults |= dict(method.mergekit)
    parameters = ", ".join(f"`{key}` {written(value)}" for key, value in defaults.items() if value is not None)
    using = [stem for stem, text in RECIPES.items() if re.search(rf"^merge_method: [\"']?{name}\b", text, flags=re.M)]
    equal = sum(stem in ANSWERS and stem not in WRONG_THERE for stem in using)
    drawn = sum(stem in MAKER.RANDOM for stem in using)
    assert equal + drawn + sum(stem in FAILS_THERE or stem in WRONG_THERE for stem in using) == len(using)
    return f"| [{name}](methods/{name}.md) | {parameters or '-'} | {equal} | {drawn or '-'} |"


def table() -> str:
    """Return the table that the page must hold."""
    head = ["| method | parameters | recipes equal to mergekit's | recipes of random draws |", "|---|---|---|---|"]
    return "\n".join(head + [row(name) for name in sorted(MERGEKIT_METHODS)])


def test_the_page_has_all_methods() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert table() in page, f"the page must hold:\n{table()}"


def test_the_page_counts_the_recipes() -> None:
    assert f"{len(RECIPES)} recipes in the styles" in PAGE.read_text(encoding="utf-8")
