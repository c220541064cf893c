"""mergekit 0.1.5 in an environment of its own, and its recipe for each method that is compared.

    python -m benchmarks.mergekit_env                                  # make the environment
    python -m benchmarks.mergekit_env ties OUT BASE EXPERT EXPERT ...  # and run one merge

torch, safetensors and transformers have the versions in requirements.lock, so both programs run on the same ones.
"""

import subprocess
import sys
import tempfile
import venv
from collections.abc import Mapping
from pathlib import Path

from benchmarks.synthetic import ROOT
from tools.lockfile import pin

VENV = ROOT / ".cache" / "mergekit-venv"
REQUIREMENTS = (*(pin(name) for name in ("torch", "safetensors", "transformers")), "mergekit==0.1.5")
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
"""Nothing is looked up on a hub: the inputs are local folders."""
WITHOUT_BASE = frozenset({"linear"})


def ensure(folder: Path = VENV) -> Path:
    """Return the path of `mergekit-yaml`, after making its environment if that is absent or out of date."""
    stamp = folder / "requirements.txt"
    wanted = "\n".join(REQUIREMENTS)
    program = folder / "bin" / "mergekit-yaml"
    if not (program.exists() and stamp.exists() and stamp.read_text(encoding="utf-8") == wanted):
        venv.create(folder, with_pip=True)
        pip = [folder / "bin" / "python", "-m", "pip", "install", "--quiet"]
        subprocess.run([*pip, *REQUIREMENTS], check=True)
        stamp.write_text(wanted, encoding="utf-8")
    return program


def versions(folder: Path = VENV) -> dict[str, str]:
    """Return the versions of what matters for speed in that environment."""
    code = (
        "import importlib.metadata as m; "
        "print(*(f'{p}={m.version(p)}' for p in ('mergekit', 'torch', 'safetensors', 'transformers')))"
    )
    answer = subprocess.run([folder / "bin" / "python", "-c", code], check=True, capture_output=True, text=True)
    return dict(pair.split("=", 1) for pair in answer.stdout.split())


def recipe(method: str, base: Path, experts: Mapping[str, Path], parameters: Mapping[str, float]) -> str:
    """Return mergekit's YAML for one merge.

    Arguments:
        method: mergekit's name of it.
        base: the base's folder; left out for methods that average the models themselves.
        experts: the experts' folders.
        parameters: ``weight`` and ``density`` go to every expert, the others to the merge.
    """
    own = {key: value for key, value in parameters.items() if key in ("weight", "density", "gamma")}
    shared = {key: value for key, value in parameters.items() if key not in own}
    lines = [f"merge_method: {method}", "dtype: bfloat16"]
    if method not in WITHOUT_BASE:
        lines.append(f"base_model: {base}")
    lines.append("models:")
    if method == "slerp":
        lines.append(f"  - model: {base}")
    for path in experts.values():
        lines.append(f"  - model: {path}")
        if own:
            lines += ["    parameters:", *(f"      {key}: {value}" for key, value in own.items())]
    if shared:
        lines += ["parameters:", *(f"  {key}: {value}" for key, value in shared.items())]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Make the environment; with arguments, also run one merge with weight 0.3 and density 0.5."""
    program = ensure()
    if len(sys.argv) == 1:
        print(program)
        return
    method, out, base, *experts = sys.argv[1:]
    parameters = {"slerp": {"t": 0.5}, "linear": {"weight": 1.0}, "task_arithmetic": {"weight": 0.3}}
    text = recipe(
        method,
        Path(base).resolve(),
        {Path(expert).name: Path(expert).resolve() for expert in experts},
        parameters.get(method, {"weight": 0.3, "density": 0.5}),
    )
    with tempfile.NamedTemporaryFile("w", suffix=".yaml", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        subprocess.run([program, file.name, out], check=True)


if __name__ == "__main__":
    main()
