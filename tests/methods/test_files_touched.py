"""How many files one more thing takes: counted on things that are there, and said in docs/architecture.md."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "src" / "consilience"
#: What was added -> a pattern that finds it in code, and the most files it may take.
ADDED: dict[str, tuple[str, int]] = {
    "an element-wise method (`nearswap`)": (r"\bnearswap\b", 2),
    "a method with ranks (`breadcrumbs`)": (r"def breadcrumbs\b|methods\.breadcrumbs\b", 2),
    "a matrix method (`core_space`)": (r"\bcore_space\b", 2),
    "an objective's term (`Entropy`)": (r"class Entropy\b|entropy:Entropy", 2),
    "a storage format (FP8 with scales)": (r"class ScaledFloats\b|import ScaledFloats\b", 2),
}


def touched(pattern: str) -> list[str]:
    """Return the files of the package that say it, below ``src/consilience``."""
    found = [path for path in sorted(SOURCE.rglob("*.py")) if re.search(pattern, path.read_text())]
    return [str(path.relative_to(SOURCE)) for path in found]


@pytest.mark.parametrize("what", ADDED)
def test_one_more_takes_few_files_and_the_page_names_them(what: str) -> None:
    pattern, most = ADDED[what]
    files = touched(pattern)
    assert 0 < len(files) <= most, files
    row = f"| {what} | {', '.join(f'`{name}`' for name in files)} |"
    assert row in (ROOT / "docs" / "architecture.md").read_text(), row
