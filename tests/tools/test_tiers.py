"""Every test is run by exactly one of ``make test`` and ``make test-all``, and CI runs both."""

import re
import shlex

from tools.lockfile import ROOT


def command(target: str) -> list[str]:
    """Return the command line of pytest in a target of the Makefile."""
    rule = re.search(rf"^{target}:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert rule is not None
    (line,) = (line for line in rule[1].splitlines() if "-m pytest" in line)
    return shlex.split(line)


def test_the_tiers_are_each_others_complement() -> None:
    quick, rest = command("test"), command("test-all")
    assert quick[:-1] == rest[:-1]
    assert quick[-2] == "-m"
    assert (quick[-1], rest[-1]) == ("not slow", "slow")


def test_ci_runs_the_checks_and_both_tiers() -> None:
    lines = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if line.startswith("make ")] == ["make check", "make test", "make test-all"]


def test_the_newest_versions_are_tried_on_everything() -> None:
    assert "not slow" not in command("test-newest")
    assert "slow" not in command("test-newest")
