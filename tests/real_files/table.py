"""Write docs/real-files.md from the tests that register in it: ``python -m tests.real_files.table``."""

import importlib
import sys
from pathlib import Path

from tests.real_files.support import TABLE

PAGE = Path("docs/real-files.md")
KINDS = {
    1: "A tie is a fact of the model, not of names",
    2: "Quantised and packed weights",
    3: "Facts of one layer are decided per layer",
    4: "Rank and alpha patterns",
    5: "Adapter files are adapters however they are named",
    6: "What is written is what its own loader opens",
    7: "What makes an expert usable travels or is named",
    8: "Names",
    9: "Arrays",
    10: "Ignored or assumed without a word",
    11: "Class and words of an error",
    12: "False statements",
}
HEAD = """# Real files

Files as people have them, taken from what users report to the libraries that make them. Every row is a test in
`tests/real_files`: the files are built by the library itself (or byte for byte as it writes them), and the expected
value comes from outside Consilience. *Before* is what commit e1e4e04 made of them.

*{count} inputs, {families} model families and libraries; {faults} of them were wrong or wrongly refused before.*
"""


def render() -> str:
    """Return the page: one table a kind."""
    for path in sorted(Path("tests/real_files").glob("test_*.py")):
        importlib.import_module(f"tests.real_files.{path.stem}")
    table = list(dict.fromkeys(TABLE))  # a module may be imported under two names
    faults = sum(row.before != "right" for row in table)
    lines = [HEAD.format(count=len(table), families=len({row.family for row in table}), faults=faults)]
    for kind, title in KINDS.items():
        rows = sorted((row for row in table if row.kind == kind), key=lambda row: (row.family, row.option, row.test))
        if rows:
            lines += [
                f"## {kind}. {title}\n",
                "| files of | with | expected value | before | now |",
                "|---|---|---|---|---|",
            ]
            lines += [f"| {r.family} | {r.option} | {r.expected} | {r.before} | {r.now} |" for r in rows] + [""]
    return "\n".join(lines)


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
    sys.stdout.write(f"wrote {PAGE}\n")
