"""The page of real files is what the tests register."""

from tests.real_files.table import PAGE, render


def test_the_page_is_current() -> None:
    assert PAGE.read_text(encoding="utf-8") == render(), "python -m tests.real_files.table rewrites it"
