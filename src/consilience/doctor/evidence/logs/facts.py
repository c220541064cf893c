"""What a file says of a training run, key by key: names of many frameworks folded to one, values checked."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from consilience.errors import InputError, nearest

#: Numbers beyond this are mistakes: no run has as many steps, or so large a learning rate.
LARGEST = 1e12
#: Words for a value that is left to somebody else.
_UNSET = frozenset(["", "auto", "none", "null", "~"])

#: Whole numbers and the least they can be; those of ``_OPEN`` are unset where they are smaller (``max_steps: -1``).
_COUNTS = {
    "steps": 0, "planned_steps": 1, "batch_size": 1, "batch_per_device": 1, "devices": 1, "accumulation": 1, "rows": 1,
    "lora_rank": 1,
}  # fmt: skip
_OPEN = frozenset(["planned_steps", "planned_epochs"])
#: Numbers and the least they can be.
_NUMBERS = {
    "learning_rate": 0.0, "warmup_steps": 0.0, "warmup_ratio": 0.0, "least_rate": 0.0, "least_share": 0.0,
    "epochs": 0.0, "planned_epochs": 0.0, "weight_decay": 0.0, "clip": 0.0, "lora_alpha": 0.0, "noise_scale": 0.0,
    "length": 0.0, "final_loss": -LARGEST, "cycles": 0.0, "decay_power": 0.0, "timescale": 0.0,
}  # fmt: skip
#: The greatest that numbers can be: beyond it they are mistakes.
_MOST = {"warmup_ratio": 1.0, "learning_rate": 1e3, "least_rate": 1e3, "steps": 1e10, "planned_steps": 1e10}
_TEXTS = ("schedule", "optimizer")
FIELDS = (*_COUNTS, *_NUMBERS, *_TEXTS, "adapter", "data")

_ALIASES = {
    "steps": ("global_step", "num_steps"),
    "planned_steps": ("max_steps", "total_steps", "max_train_steps", "num_training_steps", "train_steps"),
    "batch_size": ("global_batch_size", "total_batch_size", "total_train_batch_size", "effective_batch_size"),
    "batch_per_device": (
        "per_device_train_batch_size", "micro_batch_size", "per_gpu_train_batch_size",
        "train_micro_batch_size_per_gpu", "per_device_batch_size",
    ),
    "devices": ("world_size", "num_processes", "num_gpus", "num_devices"),
    "accumulation": ("gradient_accumulation_steps", "gradient_accumulation", "accumulate_grad_batches", "grad_accum"),
    "rows": ("num_rows", "num_samples", "num_examples", "train_samples", "num_train_samples", "dataset_size"),
    "lora_rank": ("lora_r",),
    "learning_rate": ("lr", "peak_learning_rate", "peak_lr", "base_lr", "initial_lr", "max_lr"),
    "warmup_steps": ("num_warmup_steps", "lr_warmup_steps"),
    "warmup_ratio": ("warmup", "warmup_share"),
    "least_rate": ("min_lr", "min_learning_rate", "lr_end"),
    "least_share": ("min_lr_rate", "min_lr_ratio", "cosine_min_lr_ratio"),
    "cycles": ("num_cycles",),
    "decay_power": ("power",),
    "epochs": ("epoch",),
    "planned_epochs": ("num_train_epochs", "num_epochs", "max_epochs"),
    "clip": ("max_grad_norm", "gradient_clip_val", "gradient_clipping"),
    "noise_scale": ("gradient_noise_scale", "gns"),
    "schedule": ("lr_scheduler_type", "lr_scheduler", "scheduler"),
    "optimizer": ("optim", "optimizer_name", "optimiser"),
    "adapter": ("finetuning_type", "use_peft", "peft_type"),
    "data": ("dataset", "datasets", "dataset_name", "train_file", "train_data"),
}  # fmt: skip
_FIELD_OF = {alias: field for field, aliases in _ALIASES.items() for alias in aliases} | {name: name for name in FIELDS}
#: Arguments of the schedule that some frameworks nest.
_NESTED = "lr_scheduler_kwargs"
#: Words for kinds of training.
_KINDS = {
    "lora": "lora", "qlora": "lora", "dora": "lora", "rslora": "lora", "true": "lora", "false": "full", "full": "full",
    "freeze": "freeze",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Fact:
    """A value and where it was read from, as ``file: key``."""

    value: Any
    source: str


def fold(key: str) -> str:
    """Return a key in lower case, its separators as single underscores."""
    return re.sub(r"[^a-z0-9]+", "_", key.lower()).strip("_")


def number(value: Any) -> float | None:
    """Return a finite number that a value is or spells (``"5e-5"``), within +-1e12; else None."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        found = float(value)
    except (ValueError, OverflowError):
        return None
    return found if math.isfinite(found) and abs(found) <= LARGEST else None


def read_facts(
    values: Mapping[Any, Any], where: str, *, known: Mapping[str, str] | None = None, strict: bool = False
) -> dict[str, Fact]:
    """Return the facts in a mapping by field, the first of a field's aliases that is set.

    Args:
        values: keys of any framework.
        where: names the file.
        known: more aliases, or (with an empty field) keys that mean something else in this file.
        strict: whether a key that no field has is an error.

    Raises:
        InputError: names ``where`` and the key whose value is of the wrong kind or out of its range.
    """
    fields = {**_FIELD_OF, **(known or {})}
    found: dict[str, Fact] = {}
    for key, value in _flat(values):
        field = fields.get(fold(key), "")
        if not field:
            if strict:
                raise InputError(
                    f"{where}: unknown key {key!r}{nearest(key, list(FIELDS)) or '; use ' + ', '.join(FIELDS)}"
                )
            continue
        field, parsed = _parsed(field, value, f"{where}: {key}")
        if parsed is not None and field not in found:
            found[field] = Fact(parsed, f"{where}: {key}")
    return found


def _flat(values: Mapping[Any, Any]) -> list[tuple[str, Any]]:
    nested: Any = values.get(_NESTED)
    inner = cast(Mapping[Any, Any], nested) if isinstance(nested, Mapping) else {}
    return [(str(key), value) for key, value in (*values.items(), *inner.items()) if key != _NESTED]


def _parsed(field: str, value: Any, where: str) -> tuple[str, Any]:
    """Return the field a value belongs to and the value, None where it is not set."""
    if value is None or (isinstance(value, str) and fold(value) in _UNSET and field != "adapter"):
        return field, None
    if field == "data":
        return field, _names(value)
    if field == "adapter":
        return field, _kind(value)
    if field in _TEXTS:
        return field, value if isinstance(value, str) else None
    return _numeric(field, value, where)


def _numeric(field: str, value: Any, where: str) -> tuple[str, float | int | None]:
    found = number(value)
    if found is None:
        raise InputError(f"{where}: {value!r} is not a number to use; restore it, or leave it out")
    if field == "warmup_steps" and 0 < found < 1:
        return "warmup_ratio", found
    least = _COUNTS.get(field, _NUMBERS.get(field, 0.0))
    if found < least or found > _MOST.get(field, LARGEST):
        if found < least and (field in _OPEN or field == "steps"):
            return field, None
        raise InputError(f"{where}: {value!r} is out of its range; restore it, or leave it out")
    if field in _COUNTS and found != int(found):
        raise InputError(f"{where}: {value!r} must be a whole number; restore it, or leave it out")
    return field, int(found) if field in _COUNTS else found


def _kind(value: Any) -> str | None:
    """Return ``lora``, ``full`` or ``freeze``; an empty word is axolotl's for all weights."""
    word = fold(str(value)) if isinstance(value, str | bool) else None
    return "full" if word == "" else _KINDS.get(word or "")


def _names(value: Any) -> tuple[str, ...] | None:
    """Return the names of data sets: words with commas between, or a list of words or of mappings with a path."""
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(",") if part.strip()) or None
    if not isinstance(value, Sequence):
        return None
    names: list[str] = []
    for entry in cast(Sequence[Any], value):
        name = entry
        if isinstance(entry, Mapping):
            keys = cast(Mapping[str, Any], entry)
            name = keys.get("path", keys.get("name"))
        if isinstance(name, str):
            names.append(name)
    return tuple(names) or None


def same(left: Any, right: Any) -> bool:
    """Whether two files say the same: numbers to six digits, words but for case and separators."""
    if isinstance(left, str) and isinstance(right, str):
        return fold(left) == fold(right)
    if isinstance(left, int | float) and isinstance(right, int | float):
        return math.isclose(left, right, rel_tol=1e-6)
    return left == right
