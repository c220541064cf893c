"""SIGKILL before every state-changing call: OUT is never torn, a rerun ends well, nothing is lost or left behind."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kills.commands import COMMANDS, Command

ROOT = Path(__file__).resolve().parents[2]
QUICK = ("force", "adapter")
ENVIRONMENT = os.environ | {
    "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests" / "tasks"), os.environ.get("PYTHONPATH", "")]),
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    # Commands run in forks, in which a new thread of the loader finds torch's thread pool gone.
    "HF_DEACTIVATE_ASYNC_LOAD": "1",
}


@pytest.mark.parametrize(
    "kind", [kind if kind in QUICK else pytest.param(kind, marks=pytest.mark.slow) for kind in COMMANDS]
)
def test_a_kill_before_any_change_is_made_good_by_the_same_command(kind: str, tmp_path: Path) -> None:
    script = ROOT / "tests" / "kills" / "harness.py"
    ended = subprocess.run(
        [sys.executable, str(script), kind, str(tmp_path)], env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr[-2000:]


def start(command: Command) -> "subprocess.Popen[str]":
    """Start a command in a process of its own; kernels come from the cache."""
    return subprocess.Popen(
        [sys.executable, "-m", "consilience", *command.arguments],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["merge", "flat", "adapter", "adapter-svd", "learned", "route-build", "train"])
def test_of_two_runs_at_once_one_wins_and_the_other_says_so(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    command = COMMANDS[kind]
    command.prepare()
    both = [start(command) for _ in range(2)]
    ended = [(*one.communicate(timeout=300), one.returncode) for one in both]
    assert sorted(status for *_, status in ended) == [0, 2], ended
    (loser,) = (err for _, err, status in ended if status == 2)
    assert loser.count("\n") == 1
    assert "another run is writing there" in loser or "exists and is not empty" in loser
    assert (tmp_path / command.out).exists()
    assert not [path.name for path in tmp_path.iterdir() if path.suffix in (".partial", ".done", ".kept", ".replaced")]
