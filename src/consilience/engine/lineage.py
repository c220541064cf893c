"""Where an output comes from: inputs by fingerprint, recipe, versions, seed."""

import hashlib
import platform
from dataclasses import asdict
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from consilience import __version__
from consilience.checkpoints.checkpoint import Checkpoint, TensorInfo, raw
from consilience.checkpoints.json_files import read_object
from consilience.engine.plan import Plan
from consilience.engine.stream import Piece
from consilience.engine.worker import Record
from consilience.experts.model import Model, Source
from consilience.kernels.fingerprint import digest, mix
from consilience.workdir import OURS


def model_fingerprint(tensors: dict[str, str]) -> str:
    """Return one fingerprint of a set of named tensors' fingerprints; files and their order do not matter."""
    text = "\n".join(f"{name} {value}" for name, value in sorted(tensors.items()))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def tensor_fingerprint(checkpoint: Checkpoint, tensor: TensorInfo) -> str:
    """Read a tensor and return its fingerprint."""
    step, width = 1 << 19, tensor.plain.itemsize
    buffer = np.empty(min(step, tensor.numel) * width, np.uint8)
    low = high = 0
    for start in range(0, tensor.numel, step):
        stop = min(tensor.numel, start + step)
        found = mix(raw(checkpoint.storage, tensor, start, stop, buffer[: (stop - start) * width]), start * width)
        low, high = low + found[0], high + found[1]
    return digest(low, high, tensor.nbytes)


def checkpoint_fingerprints(checkpoint: Checkpoint) -> dict[str, str]:
    """Read a checkpoint and return every tensor's fingerprint."""
    return {name: tensor_fingerprint(checkpoint, tensor) for name, tensor in checkpoint.tensors.items()}


def fingerprints(plan: Plan, records: dict[Piece, Record]) -> tuple[dict[str, dict[str, str]], dict[str, str]]:
    """Return the tensors' fingerprints of every input that was read (by model name) and of the output."""
    sums: dict[tuple[str, str, int], list[int]] = {}  # an input tensor may be read for several of the output
    sizes: dict[tuple[str, str], int] = {}

    def collect(model: str, name: str, nbytes: int, mark: list[int]) -> None:
        total = sums.setdefault((model, name, record.tensor), [0, 0])
        total[0] += mark[0]
        total[1] += mark[1]
        sizes[(model, name)] = nbytes

    for record in records.values():
        tensor = plan.tensors[record.tensor]
        collect("", tensor.name, tensor.nbytes, record.output)
        sources: list[tuple[str, Source]] = [
            (plan.alignment.owner(tensor.name), tensor.base),
            *zip(tensor.row_names, tensor.rows, strict=True),
        ]
        for (name, source), mark in zip(sources, record.inputs, strict=True):
            if source.dense is not None and any(mark):
                collect(name, source.dense.name, source.dense.nbytes, mark)
    inputs: dict[str, dict[str, str]] = {}
    output: dict[str, str] = {}
    for (model, name, _), (low, high) in sums.items():
        (inputs.setdefault(model, {}) if model else output)[name] = digest(low, high, sizes[(model, name)])
    for tensor in plan.tensors:
        output.setdefault(tensor.name, digest(0, 0, 0))
    return inputs, output


def _model_entry(model: Model, tensors: dict[str, str]) -> dict[str, Any]:
    entry: dict[str, Any] = {"name": model.name, "reference": model.reference}
    if tensors:
        entry |= {"tensors_read": len(tensors), "fingerprint": model_fingerprint(tensors)}
    if model.adapter is not None:
        own = checkpoint_fingerprints(model.adapter.checkpoint)
        entry |= {"adapter_tensors": len(own), "adapter_fingerprint": model_fingerprint(own)}
    entry["files"] = [{"file": file.rsplit("/", 1)[-1], "bytes": size} for file, size, _ in model.identity()]
    return entry


def versions() -> dict[str, str]:
    """Return the versions of what computed the output."""
    names = ("numpy", "numba", "safetensors")
    return {"consilience": __version__, "python": platform.python_version()} | {n: metadata.version(n) for n in names}


def _lineage_of(made: Path) -> dict[str, Any]:
    """Return the lineage of what another merge made, without the list of its files, which are gone by then."""
    document = made / OURS / "lineage.json"
    return {k: v for k, v in read_object(document).items() if k != "files"} if document.is_file() else {}


def lineage(plan: Plan, records: dict[Piece, Record]) -> tuple[dict[str, Any], str]:
    """Return the lineage document and the output's fingerprint."""
    inputs, output = fingerprints(plan, records)
    whole = model_fingerprint(output)
    document = {
        "format": 1,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "method": plan.method.name,
        "source": plan.method.source,
        "seed": plan.recipe.seed,
        "stochastic_rounding": plan.stochastic,
        "allow_nonfinite": plan.allow_nonfinite,
        "shard_size": plan.shard_size,
        "versions": versions(),
        "models": [_model_entry(model, inputs.get(model.name, {})) for model in plan.models],
        "differences": [asdict(one) for one in plan.differences],
        "output": {"fingerprint": whole, "tensors": output},
    }
    if plan.recipe.overrides:
        document["overrides"] = [asdict(one) for one in plan.recipe.overrides]
    if plan.statistics:
        document["statistics"] = [
            ({} if plan.method.collect else {"folder": str(one.path)})  # collected in a folder that goes
            | {key: value for key, value in asdict(one.facts).items() if key != "alias"}
            for one in plan.statistics
        ]
    if plan.alignment.tokens is not None:
        document["vocabulary"] = plan.alignment.tokens.facts()
    if plan.stacking is not None:
        document["slices"] = [asdict(one) for one in plan.stacking.slices]
    if plan.made:
        document["stages"] = {name: _lineage_of(place) for name, place in plan.made.items()}
    if plan.alignment.untied:
        document["untied"] = plan.alignment.untied
    return document, whole
