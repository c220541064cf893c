"""Open models and adapters with their own library, from headers alone: a process that answers one line by another.

``python -m consilience.engine.loader`` reads a request a line from standard input and writes a report a line to
standard output. Weights stay on torch's meta device, and the files that transformers is given are empty but for their
headers, so a request takes no memory to speak of, whatever the model's size.

A request is ``{"config", "tensors": {name: [dtype, shape]}, "code": folder or null}`` and, for an adapter on that
model, ``"adapter": {"config", "tensors"}``. The report names what is ``missing`` (made up at random by the library),
``unexpected`` (ignored) and ``mismatched`` (made up too), or the ``error`` that opening ended with.

Of a tokenizer a request is ``{"convert": folder, "to": folder}``, to save it in its fast form, or ``{"tokenizer":
folder}``, to compare its ids with those of ``expected.json`` in it.
"""

import json
import os
import select
import shutil
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any, TextIO

from consilience.checkpoints.dtypes import DTYPES
from consilience.checkpoints.safetensors_file import encode_header

#: Seconds without a request after which the process ends, and gives its memory back.
_IDLE = 60.0

Report = dict[str, Any]


def _skeleton(folder: Path, request: dict[str, Any]) -> None:
    """Write a model's folder whose weight file has its header, and a hole where its data would be."""
    (folder / "config.json").write_text(json.dumps(request["config"]), encoding="utf-8")
    tensors = {name: (DTYPES[dtype], tuple(shape)) for name, (dtype, shape) in request["tensors"].items()}
    header, offsets = encode_header([(n, dtype, shape) for n, (dtype, shape) in tensors.items()], {"format": "pt"})
    sizes = (_bytes(dtype, shape) for dtype, shape in tensors.values())
    with open(folder / "model.safetensors", "wb") as file:
        file.write(header)
        file.truncate(max((at + size for at, size in zip(offsets, sizes, strict=True)), default=len(header)))
    for path in Path(request["code"]).glob("*.py") if request["code"] else ():
        shutil.copyfile(path, folder / path.name)


def _bytes(dtype: Any, shape: tuple[int, ...]) -> int:
    elements = 1
    for size in shape:
        elements *= size
    return elements * dtype.itemsize


def _class(request: dict[str, Any]) -> Any:
    """Return the class that a config names: one of transformers, or the automatic one of its own code."""
    import transformers

    config = request["config"]
    if request["code"]:
        automatic = [key for key in config.get("auto_map") or {} if key.startswith("AutoModel")]
        return getattr(transformers, automatic[0] if automatic else "AutoModel")
    named = config.get("architectures") or []
    return getattr(transformers, named[0], transformers.AutoModel) if named else transformers.AutoModel


def _open_model(folder: Path, request: dict[str, Any]) -> Report:
    _, found = _class(request).from_pretrained(
        folder,
        device_map="meta",
        ignore_mismatched_sizes=True,
        output_loading_info=True,
        local_files_only=True,
        **({"trust_remote_code": True} if request["code"] else {}),
    )
    mismatched = sorted(str(key[0] if isinstance(key, tuple) else key) for key in found["mismatched_keys"])
    return {
        "missing": sorted(found["missing_keys"]),
        "unexpected": sorted(found["unexpected_keys"]),
        "mismatched": mismatched,
        "error": "; ".join(map(str, found.get("error_msgs") or ())),
    }


def _open_adapter(folder: Path, request: dict[str, Any]) -> Report:
    import peft
    import torch
    import transformers

    code = {"trust_remote_code": True} if request["code"] else {}
    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, **code)
    (folder / "adapter_config.json").write_text(json.dumps(request["adapter"]["config"]), encoding="utf-8")
    kind = _class(request)
    build = kind._from_config if hasattr(kind, "_from_config") else kind.from_config
    with torch.device("meta"):
        model = build(config, **(code if build.__name__ == "from_config" else {}))
        settings = peft.LoraConfig.from_pretrained(str(folder))
        adapted = peft.get_peft_model(model, settings, low_cpu_mem_usage=True)
    state = peft.get_peft_model_state_dict(adapted, save_embedding_layers=False)
    wanted = {name: list(value.shape) for name, value in state.items()}
    held = {name: shape for name, (_, shape) in request["adapter"]["tensors"].items()}
    return {
        "missing": sorted(wanted.keys() - held.keys()),
        "unexpected": sorted(held.keys() - wanted.keys()),
        "mismatched": sorted(name for name in wanted.keys() & held.keys() if wanted[name] != held[name]),
        "error": "",
    }


def _convert(request: dict[str, Any]) -> Report:
    """Save a tokenizer in its fast form; files that come with code are not run."""
    import transformers

    transformers.AutoTokenizer.from_pretrained(request["convert"], local_files_only=True).save_pretrained(request["to"])
    return {"error": ""}


def _open_tokenizer(request: dict[str, Any]) -> Report:
    """Open a tokenizer and compare its ids with those expected."""
    import transformers

    folder = Path(request["tokenizer"])
    expected: dict[str, int] = json.loads((folder / "expected.json").read_text(encoding="utf-8"))
    found = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True).get_vocab()
    missing = sorted(token for token in expected if token not in found)
    moved = sorted(token for token, number in expected.items() if found.get(token, number) != number)
    return {"missing": missing[:100], "mismatched": moved[:100], "unexpected": [], "error": ""}


def answer(request: dict[str, Any]) -> Report:
    """Return what opening a model, an adapter on it or a tokenizer comes to."""
    if "convert" in request or "tokenizer" in request:
        try:
            return _convert(request) if "convert" in request else _open_tokenizer(request)
        except Exception as error:  # as below
            return {"missing": [], "unexpected": [], "mismatched": [], "error": _first_line(error)}
    folder = Path(tempfile.mkdtemp(prefix="consilience-load-"))
    try:
        _skeleton(folder, request)
        return _open_adapter(folder, request) if request.get("adapter") else _open_model(folder, request)
    except Exception as error:  # whatever a library raises over a file is the answer
        return {"missing": [], "unexpected": [], "mismatched": [], "error": _first_line(error)}
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _first_line(error: Exception) -> str:
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first[:300]}"


def serve(requests: TextIO, reports: TextIO) -> None:
    """Answer requests until there are no more, or none came for a while."""
    warnings.simplefilter("ignore")
    while select.select([requests], [], [], _IDLE)[0] and (line := requests.readline()):
        reports.write(json.dumps(answer(json.loads(line))) + "\n")
        reports.flush()


if __name__ == "__main__":
    # What libraries print is no report.
    own = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(1, 2)
    serve(sys.stdin, own)
