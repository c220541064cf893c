"""docs/differences.md lists what the code compares, row by row."""

from pathlib import Path

from consilience.engine.differences import FURTHER
from consilience.experts.facts import FACTS, IGNORED

PAGE = Path(__file__).resolve().parents[1] / "docs" / "differences.md"


def _keys(text: str) -> str:
    return text.replace("*", "\\*").replace("|", "\\|")


def facts() -> list[str]:
    """Return the table of facts."""
    head = ["| fact | of | read from | difference | chosen by |", "|---|---|---|---|---|"]
    return head + [
        f"| `{fact.kind}` | {fact.title}: {_keys(fact.keys)} | {_keys(fact.files)} | {fact.level} | "
        + (f"`{fact.option}` |" if fact.option else "- |")
        for fact in FACTS
    ]


def further() -> list[str]:
    """Return the table of differences that are no facts of a file."""
    head = ["| difference | what is compared | level | what to do |", "|---|---|---|---|"]
    return head + [f"| `{kind}` | {compared} | {level} | {mend} |" for kind, level, compared, mend in FURTHER]


def test_the_page_lists_every_fact_as_the_code_has_it() -> None:
    page = PAGE.read_text(encoding="utf-8")
    for table in (facts(), further()):
        assert "\n".join(table) in page, "\n".join(["the page must hold:", *table])


def test_the_page_lists_the_keys_that_are_not_compared() -> None:
    page = PAGE.read_text(encoding="utf-8")
    listed = ", ".join(f"`{key}`" for key in sorted(IGNORED))
    assert listed in page.replace("\n", " "), f"the page must hold: {listed}"
