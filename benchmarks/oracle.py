"""An independent float64 reference of the benchmarked methods, to show that what was timed was the right merge.

    python -m benchmarks.oracle ties MERGED BASE EXPERT EXPERT EXPERT

It shares no code with the library: headers are parsed here, formulas are written as in the papers, ranks come from a
stable sort. Meant for small checkpoints. Random methods (DARE) have no single right answer and are left out.
"""

import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
METHODS = ("linear", "task_arithmetic", "slerp", "ties")


@dataclass(frozen=True)
class Agreement:
    """How far a merged checkpoint is from the reference.

    Arguments:
        error: ||merged - exact|| / ||exact - reference model||, over all tensors together; the reference model is the
            base (the first expert for `linear`).
        rounding: the same for the exact merge rounded to bf16, which no bf16 output can beat by more than luck.
        differing: share of elements whose bf16 value is not the rounded exact one.
        missing: names in the inputs that the output lacks.
    """

    error: float
    rounding: float
    differing: float
    missing: tuple[str, ...]


def header(path: Path) -> tuple[dict[str, Any], int]:
    """Return the entries of a safetensors file by tensor name, and where its data start."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        entries: dict[str, Any] = json.loads(file.read(length))
    entries.pop("__metadata__", None)
    return entries, 8 + length


def read(folder: Path) -> dict[str, Array]:
    """Return every tensor of a bf16 safetensors checkpoint as float64."""
    tensors: dict[str, Array] = {}
    for path in sorted(folder.glob("*.safetensors")):
        entries, start = header(path)
        raw = path.read_bytes()
        for name, entry in entries.items():
            if entry["dtype"] != "BF16":
                raise ValueError(f"{path}: tensor {name} is {entry['dtype']}, expected BF16")
            first, last = entry["data_offsets"]
            bits = np.frombuffer(raw[start + first : start + last], "<u2").astype(np.uint32) << 16
            tensors[name] = bits.view(np.float32).astype(np.float64).reshape(entry["shape"])
    return tensors


def to_bf16(values: Array) -> Array:
    """Round to bfloat16, ties to even, straight from float64 (so without double rounding)."""
    _, exponent = np.frexp(values)
    step = np.exp2(np.maximum(exponent, -125) - 8.0)
    return np.round(values / step) * step


def trimmed(delta: Array, density: float) -> Array:
    """Keep the floor(density * n) largest magnitudes, the earlier index first among equals."""
    flat = delta.ravel()
    keep = np.argsort(-np.abs(flat), kind="stable")[: max(1, math.floor(density * flat.size))]
    out = np.zeros_like(flat)
    out[keep] = flat[keep]
    return out.reshape(delta.shape)


def merged(method: str, base: Array, experts: Sequence[Array], parameters: Mapping[str, float]) -> Array:
    """Return the exact merge of one tensor.

    Raises:
        ValueError: no reference for ``method``.
    """
    weight = parameters.get("weight", 1.0)
    if method == "linear":
        return sum(experts, np.zeros_like(base)) / len(experts)
    deltas = [expert - base for expert in experts]
    if method == "task_arithmetic":
        return base + weight * sum(deltas, np.zeros_like(base))
    if method == "slerp":
        t = parameters["t"]
        (expert,) = experts
        cosine = float(np.vdot(base, expert) / (np.linalg.norm(base) * np.linalg.norm(expert)))
        if abs(cosine) > 0.9995:
            return (1 - t) * base + t * expert
        angle = math.acos(cosine)
        return (math.sin((1 - t) * angle) * base + math.sin(t * angle) * expert) / math.sin(angle)
    if method == "ties":
        kept = [trimmed(delta, parameters["density"]) for delta in deltas]
        sign = np.where(sum(kept, np.zeros_like(base)) >= 0, 1.0, -1.0)
        agreeing = [np.sign(delta) == sign for delta in kept]
        count = sum((a.astype(np.float64) for a in agreeing), np.zeros_like(base))
        total = sum((np.where(a, delta, 0.0) for a, delta in zip(agreeing, kept, strict=True)), np.zeros_like(base))
        return base + total / np.maximum(count, 1.0)
    raise ValueError(f"no reference for {method}; there is one for {', '.join(METHODS)}")


def agreement(
    method: str, out: Path, base: Path, experts: Sequence[Path], parameters: Mapping[str, float]
) -> Agreement:
    """Compare the checkpoint ``out`` with the exact merge of ``base`` and ``experts``."""
    actual, origin, models = read(out), read(base), [read(expert) for expert in experts]
    error = rounding = norm = 0.0
    differing = count = 0
    missing: list[str] = []
    for name, start in origin.items():
        if name not in actual:
            missing.append(name)
            continue
        stack = [model[name] for model in models]
        exact = merged(method, start, stack, parameters)
        rounded = to_bf16(exact)
        reference = stack[0] if method == "linear" else start
        error += float(np.square(actual[name] - exact).sum())
        rounding += float(np.square(rounded - exact).sum())
        norm += float(np.square(exact - reference).sum())
        differing += int(np.count_nonzero(actual[name] != rounded))
        count += exact.size
    scale = max(norm, 1e-300)
    return Agreement(math.sqrt(error / scale), math.sqrt(rounding / scale), differing / max(count, 1), tuple(missing))


def main() -> None:
    """Compare one merged folder made with the benchmark's parameters."""
    from benchmarks.merge import METHODS as BENCHMARKED

    method, out, base, *experts = sys.argv[1:]
    print(agreement(method, Path(out), Path(base), [Path(e) for e in experts], BENCHMARKED[method].parameters))


if __name__ == "__main__":
    main()
