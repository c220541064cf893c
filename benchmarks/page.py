"""The Markdown page of one run: where it came from, how it was measured, tables, remarks."""

from collections.abc import Iterable, Mapping

from benchmarks.measure import NOISE
from benchmarks.tables import Table


def listed(facts: Mapping[str, str], between: str = " ") -> str:
    """Return names and values in a line, less the machine's class, which is in the file's name."""
    return ", ".join(f"{name}{between}{value}" for name, value in facts.items() if name != "class")


def measured(
    date: str, command: str, machine: str, versions: Mapping[str, str], settings: Mapping[str, str] | None = None
) -> str:
    """Return the sentences that open an introduction: when, how, where and with what the run was made."""
    said = f"Measured {date[:10]} with `{command}`. Machine: {machine}. Versions: {listed(versions)}."
    return f"{said} Settings: {listed(settings)}." if settings else said


def busy(other_cores: Iterable[float]) -> str:
    """Return the note on the times that are marked, or nothing if none is."""
    loaded = any(cores > NOISE for cores in other_cores)
    return f"† other work (or writeback) kept more than {NOISE} cores busy: an upper bound." if loaded else ""


def without_numbers(word: str, cases: Mapping[str, str]) -> str:
    """Return a remark on the cases that have no numbers, each with the reason, or nothing if there are none."""
    return f"{word}: " + "; ".join(f"{name} ({why})" for name, why in cases.items()) + "." if cases else ""


def markdown(table: Table) -> str:
    """Return a table under its title, followed by its note."""
    rules = ["---" if number < table.text else "---:" for number in range(len(table.header))]
    lines = [f"### {table.title}", "", "| " + " | ".join(table.header) + " |", "|" + "|".join(rules) + "|"]
    lines += ["| " + " | ".join(cells) + " |" for cells in table.body]
    return "\n".join(lines) + (f"\n\n{table.note}" if table.note else "")


def compose(source: str, command: str, introduction: str, tables: Iterable[Table], remarks: Iterable[str]) -> str:
    """Return a page.

    Arguments:
        source: name of the JSON that it is generated from.
        command: what generates it.
        introduction: the first paragraph.
        tables: in their order.
        remarks: the last paragraphs; empty ones are left out.
    """
    parts = [
        f"<!-- Generated from {source} by `{command}`; do not edit. -->",
        introduction,
        *map(markdown, tables),
        *filter(None, remarks),
    ]
    return "\n\n".join(parts) + "\n"
