"""What a merge loads: no array library or loader that it has no use for."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

PROGRAM = """
import json, sys
from consilience.__main__ import run
status = run("merge base out -e x=x --method ties --set density=0.5".split())
unwanted = ["torch", "transformers", "scipy.linalg", "huggingface_hub"]
print(json.dumps([status, [name for name in unwanted if name in sys.modules], "numba.np.arraymath" in sys.modules]))
import scipy.linalg.cython_blas
import numba, numpy as np
print(json.dumps(numba.njit(lambda a, b: np.correlate(a, b))(np.arange(5.0), np.ones(2)).tolist()))
print(json.dumps(float(numba.njit(lambda a, b: np.dot(a, b))(np.arange(5.0), np.ones(5)))))
"""


def test_a_merge_loads_no_scipy_and_leaves_it_whole(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    base = rng.standard_normal((8, 8)).astype(np.float32)
    for name, values in (("base", base), ("x", base + 1)):
        (tmp_path / name).mkdir()
        save_file({"w": values}, tmp_path / name / "model.safetensors")
        (tmp_path / name / "config.json").write_text("{}")
    done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first, second, third = [json.loads(line) for line in done.stdout.splitlines()[-3:]]
    assert first == [0, [], True]
    assert second == [1.0, 3.0, 5.0, 7.0]
    assert third == 10.0
