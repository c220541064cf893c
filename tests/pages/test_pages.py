"""What all pages share: the policy, and slots that a stranger's text cannot fill."""

import re
import sys
from pathlib import Path

import pytest

from consilience.pages.page import compose


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A package with a report's own rules and body."""
    folder = tmp_path / "made_up_report"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "own.css").write_text(".own { color: red; }\n")
    (folder / "own.html").write_text("<main>@@first@@ and @@second@@</main>\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, folder.name, raising=False)
    return folder.name


@pytest.mark.parametrize("scripted", [False, True])
def test_a_page_loads_nothing_from_outside_and_runs_scripts_only_where_it_has_them(
    package: str, scripted: bool
) -> None:
    text = compose(package, "own", "T", {"first": "1", "second": "2"}, scripted=scripted)
    (policy,) = re.findall(r'<meta http-equiv="Content-Security-Policy" content="([^"]*)">', text)
    rules = dict(rule.split(maxsplit=1) for rule in policy.split("; "))
    scripts = {"script-src": "'unsafe-inline'"} if scripted else {}
    assert rules == {"default-src": "'none'", "style-src": "'unsafe-inline'", "img-src": "data:"} | scripts
    assert text.index("http-equiv") < text.index("<title>T</title>") < text.index("<style>")


def test_own_rules_come_last_and_what_looks_like_a_slot_stays(package: str) -> None:
    evil = "@@first@@ @@body@@ @@policy@@ \\1"
    text = compose(package, "own", evil, {"first": evil, "second": "2"})
    assert f"<title>{evil}</title>" in text
    assert text.endswith(f"<body>\n<main>{evil} and 2</main>\n</body>\n</html>\n")
    assert re.search(r"\.own \{ color: red; \}\n</style>", text)


def test_every_slot_is_filled(package: str) -> None:
    with pytest.raises(KeyError, match="second"):
        compose(package, "own", "T", {"first": "1"})
