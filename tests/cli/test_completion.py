"""Shells complete commands, options, methods, recipe keys and experts; where a file is wanted they do so themselves."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from consilience.__main__ import run
from consilience.cli.completion import candidates
from consilience.methods.registry import load, names

RECIPE = "merge_method: dare_ties\nbase_model: base\nmodels: [{model: x/math}, {model: code, name: programs}]\n"


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "r.yaml").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("consilience ali", ["align"]),
        ("consilience route ex", ["explain", "extract"]),
        ("consilience merge r.yaml out --stoch", ["--stochastic-rounding"]),
        ("consilience merge r.yaml out --dtype bf", ["bfloat16"]),
        ("consilience merge r.yaml out --method dare_t", ["dare_ties"]),
        ("consilience merge r.yaml out --set den", ["density="]),
        ("consilience merge r.yaml out --set math.", [f"math.{key}=" for key in ("weight", "density")]),
        ("consilience merge r.yaml out --set pro", ["programs."]),
        ("consilience merge r.yaml out --set normalize=", ["normalize=true", "normalize=false"]),
        ("consilience merge r.yaml out --set rescale=l", ["rescale=l1"]),
        ("consilience merge r.yaml out --sweep method=ties,iso_ct", ["method=ties,iso_cts"]),
        ("consilience merge r.yaml out --tokenizer ", ["base", "math", "programs"]),
        ("consilience merge b out -e x/one -e two=y --set one.w", ["one.weight="]),
        ("consilience merge b out -e x/one --calibration o", ["one="]),
        ("consilience merge b out --method slerp --set ", ["t="]),
        ("consilience merge r.ya", []),  # a file
        ("consilience merge b out -e na", []),
        ("consilience merge gone.yaml out --set wei", ["weight="]),
        ("consilience merge 'r.yaml", []),
        ("consilience zzz", []),
    ],
)
def test_candidates(line: str, found: list[str]) -> None:
    assert candidates(line) == found


def test_all_methods_and_all_their_keys_are_there() -> None:
    assert candidates("consilience merge r.yaml out --method ") == names()
    keys = [f"{key}=" for key, one in load("dare_ties").parameters.items() if one.effective]
    assert candidates("consilience merge r.yaml out --set ") == [*keys, "math.", "programs."]


def test_what_is_given_already_is_offered_again_only_if_it_may_be() -> None:
    found = candidates("consilience merge r.yaml out --seed 3 --set weight=1 --s")
    assert "--seed" not in found
    assert "--set" in found


def test_unfinished_lines_are_no_errors(capsys: pytest.CaptureFixture[str]) -> None:
    Path("bad.yaml").write_text("merge_method: [")
    for line in ("consilience merge bad.yaml out --set we", "consilience merge b o --method tise --set we", "'", "\\"):
        assert run(["complete", "--", line]) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize(
    ("line", "replies"),
    [
        ("consilience merge r.yaml out --method dare_t", ["dare_ties"]),
        ("consilience merge r.yaml out --set den", ["density="]),
        ("consilience merge r.yaml out --set rescale=l", ["l1"]),  # bash breaks words at "="
        ("consilience merge r.y", []),
    ],
)
def test_bash_asks_as_the_script_says(line: str, replies: list[str], tmp_path: Path) -> None:
    command = tmp_path / "bin" / "consilience"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m consilience "$@"\n')
    command.chmod(0o755)
    program = (
        f"source <(consilience completion bash); COMP_LINE={line!r}; COMP_POINT={len(line)}; _consilience; "
        "printf '%s\\n' \"${COMPREPLY[@]}\"; complete -p consilience"
    )
    environment = os.environ | {"PATH": f"{command.parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", program], env=environment, capture_output=True, text=True, check=True)
    *found, registered = done.stdout.splitlines()
    assert [reply for reply in found if reply] == replies
    assert registered == "complete -o default -F _consilience consilience"
    assert done.stderr == ""


def test_other_shells(capsys: pytest.CaptureFixture[str]) -> None:
    for shell, word in (("zsh", "compdef"), ("fish", "complete --command consilience")):
        assert run(["completion", shell]) == 0
        assert word in capsys.readouterr().out
    assert run(["completion", "bahs"]) == 2
    assert "'bash'" in capsys.readouterr().err
