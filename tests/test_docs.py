"""The documentation is true: every method has a page with its parameters, and what the docs tell people to do works."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from consilience.coefficients import load_coefficients
from consilience.methods import load, names

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
BLOCK = re.compile(r"^```(\w+)(?: file=(\S+))?\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("name", names())
def test_every_method_has_a_page_with_its_parameters_and_defaults(name: str) -> None:
    method = load(name)
    page = (DOCS / "methods" / f"{name}.md").read_text()
    for heading in ("## Equation", "## Parameters", "## Data and cost", "## Known disagreements", "## Source"):
        assert heading in page
    rows = dict(re.findall(r"^\| `(\w+)` \| (\S+) \|", page, re.MULTILINE))
    assert set(rows) == set(method.parameters)
    for parameter in method.parameters.values():
        default = parameter.default
        texts = ",".join(default) if isinstance(default, tuple) else str(default).lower()
        expected = texts if isinstance(default, bool | str | tuple) else f"{default:g}"
        assert rows[parameter.name] == expected
        scope = "per expert" if parameter.per_expert else "shared"
        assert re.search(rf"^\| `{parameter.name}` \| \S+ \| {scope} \|", page, re.MULTILINE)
    assert f"[{name}]({name}.md)" in (DOCS / "methods" / "README.md").read_text()


@pytest.mark.parametrize("page", [*sorted(DOCS.rglob("*.md")), ROOT / "README.md"], ids=lambda p: p.name)
def test_links_inside_the_repository_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page}: {target}"


def run_page(page: Path, folder: Path) -> None:
    """Do what a page says, in order, in ``folder``: write its named files, type its commands, run its Python."""
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    for language, file, text in BLOCK.findall(page.read_text()):
        if file:
            (folder / file).write_text(text)
        commands: list[list[str]] = []
        if language == "console":
            commands = [shlex.split(line[2:]) for line in text.splitlines() if line.startswith("$ ")]
        elif language == "python":
            commands = [["python", "-c", text]]
        for command in commands:
            done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
            assert done.returncode == 0, f"{page.name}: {shlex.join(command)[:200]}\n{done.stderr[-2000:]}"


@pytest.mark.real
def test_the_merge_tutorial_does_what_it_says(tmp_path: Path, real_base: Path) -> None:
    (tmp_path / "suites").symlink_to(ROOT / "suites")
    (tmp_path / "base").symlink_to(real_base)
    run_page(DOCS / "tutorial-merge.md", tmp_path)
    assert (tmp_path / "merged" / "model.safetensors").is_file()
    assert (tmp_path / "merged-adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.real
def test_the_glue_tutorial_does_what_it_says(tmp_path: Path, real_base: Path) -> None:
    (tmp_path / "suites").symlink_to(ROOT / "suites")
    (tmp_path / "base").symlink_to(real_base)
    run_page(DOCS / "tutorial-glue.md", tmp_path)
    found = load_coefficients(tmp_path / "mixed")
    assert found.alpha.shape == (2, 1)
    assert found.alpha.sum() == pytest.approx(1.0)


@pytest.mark.slow
@pytest.mark.real
def test_the_routing_tutorial_does_what_it_says(tmp_path: Path, real_base: Path) -> None:
    (tmp_path / "suites").symlink_to(ROOT / "suites")
    (tmp_path / "base").symlink_to(real_base)
    run_page(DOCS / "tutorial-glider.md", tmp_path)
    assert (tmp_path / "routing.html").read_text().startswith("<!")
    assert (tmp_path / "collapsed" / "model.safetensors").is_file()
    assert not (tmp_path / "gated" / "consilience" / "experts" / "translate").exists()


@pytest.mark.slow
@pytest.mark.real
def test_the_learning_tutorial_does_what_it_says(tmp_path: Path, real_base: Path) -> None:
    (tmp_path / "suites").symlink_to(ROOT / "suites")
    (tmp_path / "base").symlink_to(real_base)
    run_page(DOCS / "tutorial-expert-merging.md", tmp_path)
    found = load_coefficients(tmp_path / "learned")
    again = load_coefficients(tmp_path / "learned-f32")
    assert found.experts == ("pronounce", "translate", "code", "sentiment")
    assert np.ptp(found.alpha) > 0
    assert np.array_equal(found.alpha, again.alpha)
    assert found.facts["history"][-1]["loss"] < found.facts["history"][0]["loss"]
    assert (tmp_path / "coefficients.png").is_file()
    assert not (tmp_path / "learned.partial").exists()
