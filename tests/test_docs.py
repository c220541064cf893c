"""The documentation is true: every method has a page with its parameters, and what the docs tell people to do works."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from consilience import load_routed
from consilience.cli.app import app
from consilience.coefficients import load_coefficients
from consilience.methods import load, names

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = [*sorted(DOCS.rglob("*.md")), *sorted(ROOT.glob("*.md"))]
ADAPTER = "adapter_model.safetensors"
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


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_inside_the_repository_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page}: {target}"


def typed(text: str) -> tuple[list[str], list[str]]:
    """Return a console block's commands (after ``$``, to the last line that ends in a backslash) and its output."""
    commands: list[str] = []
    output: list[str] = []
    for line in text.splitlines():
        if commands and commands[-1].endswith("\\"):
            commands[-1] += "\n" + line
        elif line.startswith("$ "):
            commands.append(line[2:])
        else:
            output.append(line)
    return commands, output


def run_page(page: Path, folder: Path) -> None:
    """Do what a page says, in one shell in ``folder``: write its named files, type its commands, run its Python.

    The shell finds ``consilience`` and this Python only once the page activates the environment, and the output that a
    page shows must be there.
    """
    (folder / ".venv").symlink_to(sys.prefix)
    script, shown = ["set -ex"], dict[int, list[str]]()
    for number, (language, file, text) in enumerate(BLOCK.findall(page.read_text())):
        if file:
            (folder / file).write_text(text)
        elif language == "console":
            commands, shown[number] = typed(text)
            script += [f"exec > output-{number}", *commands]
        elif language == "python":
            script += [f"python - <<'END-{number}'", text, f"END-{number}"]
    ours = str(Path(sys.executable).parent)
    path = os.pathsep.join(entry for entry in os.environ["PATH"].split(os.pathsep) if entry != ours)
    modules = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        ["bash", "-c", "\n".join(script)],
        cwd=folder,
        env=os.environ | {"PATH": path, "PYTHONPATH": modules.rstrip(os.pathsep)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{page.name}: {done.stderr[-3000:]}"
    for number, lines in shown.items():
        output = (folder / f"output-{number}").read_text().splitlines()
        for line in lines:
            assert line in output, f"{page.name}: {line!r} is not in the output"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_commands_have_the_options_that_pages_give_them(page: Path) -> None:
    group = typer.main.get_command(app)
    for block in re.findall(r"^```(?:bash|console)?\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            if line.removeprefix("$ ").startswith("consilience "):
                command, _, _ = line.removeprefix("$ ").partition(" > ")
                parse(group, shlex.split(command, comments=True)[1:])


def parse(command: Any, words: list[str]) -> None:
    """Let a command, and the command below it that ``words`` name, take them apart, without running either."""
    context = command.make_context(command.name, words)
    if hasattr(command, "resolve_command"):
        _, inner, rest = command.resolve_command(context, [*context._protected_args, *context.args])
        parse(inner, rest)


@pytest.mark.real
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_the_readme_s_adapter_is_the_weighted_sum_of_the_two(tmp_path: Path, real_base: Path) -> None:
    (tmp_path / "suites").symlink_to(ROOT / "suites")
    (tmp_path / "base").symlink_to(real_base)
    run_page(ROOT / "README.md", tmp_path)

    def load() -> Any:
        return AutoModelForCausalLM.from_pretrained(real_base, dtype=torch.float32).eval()

    by_hand = load()
    weights = {name: parameter.data for name, parameter in by_hand.named_parameters()}
    for name, weight in {"pronounce": 0.7, "sentiment": 0.3}.items():
        folder = ROOT / "suites" / "language" / "adapters" / name
        config, factors = json.loads((folder / "adapter_config.json").read_text()), load_file(folder / ADAPTER)
        for key in factors:
            if ".lora_A." in key:
                update = factors[key.replace("lora_A", "lora_B")].double() @ factors[key].double()
                target = weights[key.removeprefix("base_model.model.").replace(".lora_A.", ".")]
                target += (weight * config["lora_alpha"] / config["r"] * update).float()
    adapted = PeftModel.from_pretrained(load(), tmp_path / "merged-adapter").eval()
    tokens = torch.tensor([[1, 4093, 198, 2020, 314, 260, 2355, 13129]])
    with torch.no_grad():
        expected, found = by_hand(tokens).logits, adapted(tokens).logits
        with adapted.disable_adapter():
            base = adapted(tokens).logits
    assert (found - expected).abs().max() < 1e-3
    assert (expected - base).abs().max() > 1


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
def test_the_alignment_tutorial_does_what_it_says(tmp_path: Path) -> None:
    run_page(DOCS / "tutorial-align.md", tmp_path)
    base, aligned = (torch.load(tmp_path / "base.pt", weights_only=True), load_file(tmp_path / "aligned.safetensors"))
    report = json.loads((tmp_path / "report.json").read_text())
    distance = sum(
        float((base[name].double() - value).square().sum()) for name, value in aligned.items() if name != "2.bias"
    )
    assert report["distance"] == pytest.approx(distance)
    assert report["distance"] < report["distance_before"]


@pytest.mark.slow
@pytest.mark.real
def test_the_routing_tutorial_does_what_it_says(tmp_path: Path, real_base: Path) -> None:
    (tmp_path / "suites").symlink_to(ROOT / "suites")
    (tmp_path / "base").symlink_to(real_base)
    run_page(DOCS / "tutorial-glider.md", tmp_path)
    routing = load_routed(tmp_path / "routed").routing
    queries = [
        "Translate into Spanish: Peace be with you.",
        "Calculate 6 * 7.",
        "Translate into Spanish: The house is white.",
    ]
    said = routing.asked.semantics(queries, routing.settings)
    assert said.scale.tolist() == pytest.approx([89, 1, 14], abs=1)
    assert said.cosines.amax(-1).tolist() == pytest.approx([0.47, 0.06, 0.22], abs=0.01)
    assert (tmp_path / "routing.html").read_text().startswith("<!")
    assert (tmp_path / "collapsed" / "model.safetensors").is_file()
    assert not (tmp_path / "gated" / "consilience" / "experts" / "translate").exists()


@pytest.mark.slow
@pytest.mark.real
def test_the_page_of_mixtures_does_what_it_says(tmp_path: Path, real_base: Path) -> None:
    (tmp_path / "suites").symlink_to(ROOT / "suites")
    (tmp_path / "base").symlink_to(real_base)
    run_page(DOCS / "moe.md", tmp_path)
    lineage = json.loads((tmp_path / "mixture" / "consilience" / "lineage.json").read_text())
    assert lineage["mixture"]["experts"] == ["pronounce", "translate"]
    assert all(np.mean(expert["first"]) > 0.8 for expert in lineage["mixture"]["routing"])
    assert "opened by transformers" in lineage["loader"]


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
