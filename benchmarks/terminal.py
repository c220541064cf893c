"""What a benchmark shows on the terminal: progress, tables, where the results are."""

import sys
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table as RichTable

from benchmarks.tables import Table


def make_console() -> Console:
    """Return a console as wide as the terminal, or as 120 characters without one."""
    return Console() if sys.stdout.isatty() else Console(width=120)


def make_progress(console: Console) -> Progress:
    """Return a bar with its task's name, count and time."""
    columns = (TextColumn("{task.description:<44}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console)


def show_table(console: Console, table: Table) -> None:
    """Show a table, its cells without Markdown."""
    shown = RichTable(title=table.title, caption=table.note or None, title_justify="left", caption_justify="left")
    for number, name in enumerate(table.header):
        shown.add_column(escape(name), justify="left" if number < table.text else "right")
    for row in table.body:
        shown.add_row(*(escape(cell.replace("`", "").replace("*", "")) for cell in row))
    console.print(shown)


def show_page(console: Console, path: Path) -> None:
    """Show the page beside the results in ``path``, and where both are."""
    page = path.with_suffix(".md")
    console.print(page.read_text(encoding="utf-8"), markup=False)
    show_place(console, path, page.name)


def show_place(console: Console, path: Path, page: str) -> None:
    """Show where results and their page are."""
    console.print(f"[dim]{escape(str(path))} and {escape(page)} beside it[/dim]")
