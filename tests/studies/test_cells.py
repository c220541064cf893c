import json
import platform
import subprocess
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from consilience.errors import InputError
from studies import cells as cells_module
from studies.cells import Cell, Study, Tables, build_tables, check_study, finished, main, run_cell, versions


def double(setting: dict[str, Any]) -> dict[str, Any]:
    if setting.get("fail"):
        raise RuntimeError("no such luck\nsecond line")
    return {"y": 2 * setting["x"]}


def page(done: Sequence[Cell]) -> str:
    return "| id | y |\n|---|---|\n" + "".join(f"| {cell.id} | {cell.result['y']} |\n" for cell in done)


def make(
    cells: Sequence[tuple[str, dict[str, Any]]] = (("a", {"x": 1, "seed": 7}), ("b", {"x": 2})), **changes: Any
) -> Study:
    settings: dict[str, Any] = {"name": "demo", "cells": cells, "run": double, "tables": page}
    return Study(**(settings | changes))


@pytest.fixture
def register(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Run the command line on one study and return its exit status."""

    def run(study: Any, *arguments: str) -> int:
        module = types.ModuleType("a_module_of_studies")
        module.STUDY = study  # pyright: ignore[reportAttributeAccessIssue]
        monkeypatch.setitem(sys.modules, "a_module_of_studies", module)
        return main(["--results", str(tmp_path), *arguments], registered=["a_module_of_studies.STUDY"])

    return run


def read(tmp_path: Path, identity: str) -> dict[str, Any]:
    return json.loads((tmp_path / "cells" / "demo" / f"{identity}.json").read_text())


def test_a_cell_s_file_says_what_where_and_when(tmp_path: Path, register: Any):
    assert register(make()) == 0
    cell = read(tmp_path, "a")
    assert (cell["study"], cell["id"], cell["setting"], cell["result"]) == ("demo", "a", {"x": 1, "seed": 7}, {"y": 2})
    assert cell["seed"] == 7
    assert read(tmp_path, "b")["seed"] is None
    assert cell["date"].endswith("+00:00")
    assert cell["seconds"] >= 0
    assert {"processor", "cores", "memory_gib", "system"} <= set(cell["hardware"])
    assert cell["versions"]["python"] == platform.python_version()
    assert {"torch", "numpy", "consilience", "revision"} <= set(cell["versions"])
    assert "| a | 2 |\n| b | 4 |" in (tmp_path / "demo.md").read_text()
    assert "2 of 2 cells" in (tmp_path / "demo.md").read_text()


def test_only_missing_cells_run(tmp_path: Path, register: Any):
    ran: list[int] = []

    def run(setting: dict[str, Any]) -> dict[str, Any]:
        ran.append(setting["x"])
        return {"y": 0}

    assert register(make(run=run)) == 0
    (tmp_path / "cells" / "demo" / "b.json").unlink()
    assert register(make(run=run)) == 0
    assert ran == [1, 2, 2]


def test_tables_are_built_from_cells_alone(tmp_path: Path, register: Any):
    register(make(), "--only", "b")
    (tmp_path / "demo.md").unlink()
    never = make(run=lambda _: pytest.fail("a cell ran"))
    assert register(never, "--tables") == 0
    text = (tmp_path / "demo.md").read_text()
    assert "| b | 4 |" in text
    assert "1 of 2 cells" in text
    assert "| a |" not in text


@pytest.mark.slow
def test_pages_are_the_same_bytes_every_time_and_hold_pictures(tmp_path: Path, register: Any):
    study = make(tables=lambda done: Tables(page(done), {"plot.svg": b"<svg/>"}))
    register(study)
    first = (tmp_path / "demo.md").read_bytes()
    register(study, "--tables")
    assert (tmp_path / "demo.md").read_bytes() == first
    assert (tmp_path / "demo" / "plot.svg").read_bytes() == b"<svg/>"
    with pytest.raises(InputError, match="picture"):
        build_tables(make(tables=lambda _: Tables("", {"../x.svg": b""})), tmp_path)


def test_no_page_without_cells(tmp_path: Path, register: Any):
    assert register(make(), "--tables") == 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_failing_cell_is_reported_and_the_rest_goes_on(
    tmp_path: Path, register: Any, capsys: pytest.CaptureFixture[str]
):
    study = make([("a", {"x": 1}), ("bad", {"x": 1, "fail": True}), ("c", {"x": 3})])
    assert register(study) == 1
    said = capsys.readouterr()
    assert "demo/bad: RuntimeError: no such luck" in said.err
    assert "1 of 3 cells failed" in said.err
    assert "Traceback" not in said.err
    assert {p.name for p in (tmp_path / "cells" / "demo").iterdir()} == {"a.json", "c.json"}
    assert "| c | 6 |" in (tmp_path / "demo.md").read_text()
    assert register(study, "--debug") == 1
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("result", [{"y": float("nan")}, {"y": {1, 2}}, {"y": object()}])
def test_a_result_that_is_not_json_is_a_failure(tmp_path: Path, register: Any, result: Any):
    assert register(make([("a", {"x": 1})], run=lambda _: result)) == 1
    assert not (tmp_path / "cells").exists()


def test_an_interrupt_keeps_finished_cells(tmp_path: Path, register: Any):
    def run(setting: dict[str, Any]) -> dict[str, Any]:
        if setting["x"] == 2:
            raise KeyboardInterrupt
        return {"y": 0}

    assert register(make(run=run)) == 130
    assert [p.name for p in (tmp_path / "cells" / "demo").iterdir()] == ["a.json"]
    assert (tmp_path / "demo.md").exists()


@pytest.mark.slow
def test_a_changed_setting_is_an_error_that_says_so(tmp_path: Path, register: Any, capsys: pytest.CaptureFixture[str]):
    register(make())
    before = (tmp_path / "cells" / "demo" / "a.json").read_bytes()
    for arguments in ([], ["--tables"], ["--list"]):
        assert register(make([("a", {"x": 5, "seed": 7}), ("b", {"x": 2})]), *arguments) == 2
        said = capsys.readouterr().err
        assert "a.json: was run with another setting (x changed); give the cell a new id, or delete the file" in said
    assert (tmp_path / "cells" / "demo" / "a.json").read_bytes() == before
    # The same values in other Python types are the same setting.
    register(make([("t", {"x": 1, "pair": (1, 2)})]))
    assert register(make([("t", {"pair": [1, 2], "x": 1})])) == 0


@pytest.mark.slow
def test_a_damaged_cell_is_an_error(tmp_path: Path, register: Any, capsys: pytest.CaptureFixture[str]):
    register(make())
    for damage in ("", "{", "[]", '{"setting": {}}'):
        (tmp_path / "cells" / "demo" / "a.json").write_text(damage)
        assert register(make()) == 2
        assert "a.json: damaged" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"cells": [("a", {}), ("a", {})]}, "are one file; rename"),
        ({"cells": [("a", {}), ("A", {})]}, "'a' and 'A' are one file"),
        ({"cells": [("../a", {})]}, "id '../a' must be letters"),
        ({"cells": [(".a", {})]}, "must be letters"),
        ({"cells": [("", {})]}, "must be letters"),
        ({"cells": [("x" * 121, {})]}, "at most 120"),
        ({"cells": [("a", {"x": float("inf")})]}, "the setting of 'a' is not JSON"),
        ({"cells": [("a", {"x": Path()})]}, "not JSON"),
        ({"name": "a/b"}, "study 'a/b'"),
    ],
)
def test_wrong_studies_are_refused_before_anything_runs(
    changes: dict[str, Any], said: str, tmp_path: Path, register: Any
):
    with pytest.raises(InputError, match=said):
        check_study(make(**changes))
    assert register(make(**changes)) == 2
    assert list(tmp_path.iterdir()) == []


@given(st.text(min_size=1, max_size=20))
def test_an_accepted_id_is_a_plain_file_name(identity: str):
    try:
        check_study(make([(identity, {})]))
    except InputError:
        return
    assert Path(f"{identity}.json").name == f"{identity}.json"
    assert identity.isascii()
    assert not identity.startswith((".", "-"))


def test_studies_are_chosen_and_listed(tmp_path: Path, register: Any, capsys: pytest.CaptureFixture[str]):
    register(make(), "demo", "--only", "a*")
    capsys.readouterr()
    assert register(make(), "--list") == 0
    assert capsys.readouterr().out.splitlines() == ["demo/a  0 s", "demo/b  missing"]
    assert register(make(), "--list", "--only", "b") == 0
    assert capsys.readouterr().out.splitlines() == ["demo/b  missing"]
    assert register(make(), "demos") == 2
    assert "demos: no such study; did you mean 'demo'?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("registered", "said"),
    [
        (["no_such_module.STUDY"], "does not import"),
        (["studies.cells.NOTHING"], "does not import"),
        (["studies.cells.ROOT"], "not a Study"),
        (["NOTHING"], "does not import"),
    ],
)
def test_wrong_registrations(registered: list[str], said: str, capsys: pytest.CaptureFixture[str], tmp_path: Path):
    assert main(["--results", str(tmp_path)], registered=registered) == 2
    assert said in capsys.readouterr().err


@pytest.mark.slow
def test_the_time_limit_begins_no_cell_that_would_pass_it(
    tmp_path: Path, register: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    clock = [0.0]
    monkeypatch.setattr(cells_module.time, "perf_counter", lambda: clock[0])

    def run(_: dict[str, Any]) -> dict[str, Any]:
        clock[0] += 40
        return {"y": 0}

    study = make([(name, {"x": 1}) for name in "abcd"], run=run)
    # After two cells 80 s have gone and a third would end at 120 s.
    assert register(study, "--limit-minutes", "1.9") == 0
    assert sorted(finished(study, tmp_path)) == ["a", "b"]
    assert "demo/c: not begun" in capsys.readouterr().err


def test_a_setting_cannot_be_changed_by_the_run(tmp_path: Path):
    def run(setting: dict[str, Any]) -> dict[str, Any]:
        setting["x"] = 9
        return {"y": 0}

    cell = run_cell(make(run=run), "a", {"x": 1}, tmp_path)
    assert cell.setting == {"x": 1}
    assert finished(make([("a", {"x": 1})]), tmp_path)["a"].result == {"y": 0}


def test_a_full_disk_ends_the_run(
    tmp_path: Path, register: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "cells").touch()  # a file where the folder should be
    assert register(make()) == 1
    assert "cannot be read" in capsys.readouterr().err
    (tmp_path / "cells").unlink()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cells_module, "write_file", full)
    assert register(make()) == 1
    assert "a.json: cannot be written (No space left on device)" in capsys.readouterr().err


def test_the_revision_says_whether_code_was_changed(tmp_path: Path):
    def git(*arguments: str) -> None:
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *arguments], cwd=tmp_path, check=True)

    assert versions(tmp_path / "absent")["revision"] is None
    git("init", "-q")
    (tmp_path / "code.py").write_text("1")
    git("add", ".")
    git("commit", "-qm", "x")
    clean = versions(tmp_path)["revision"]
    assert clean is not None
    assert len(clean) == 40
    (tmp_path / "docs" / "results").mkdir(parents=True)
    (tmp_path / "docs" / "results" / "cell.json").write_text("{}")
    assert versions(tmp_path)["revision"] == clean
    (tmp_path / "code.py").write_text("2")
    assert versions(tmp_path)["revision"] == f"{clean}+changes"


def test_the_module_runs(tmp_path: Path):
    command = [sys.executable, "-m", "studies.cells", "--list", "--results", str(tmp_path)]
    assert subprocess.run(command, cwd=cells_module.ROOT).returncode == 0
