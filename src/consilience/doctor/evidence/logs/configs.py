"""Settings a run was given or wrote down: YAML of axolotl, LLaMA-Factory and TRL, PEFT's config, our own record."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from consilience.checkpoints.json_files import read_object
from consilience.doctor.evidence.logs.curve import collect
from consilience.doctor.evidence.logs.facts import read_facts
from consilience.doctor.evidence.logs.reading import Reading, read_bytes
from consilience.doctor.evidence.logs.trainer import OTHERWISE
from consilience.errors import InputError
from consilience.recipe.yaml_file import SIZE_LIMIT, parse_yaml
from consilience.training.record import read_record

#: One of these makes a YAML file the settings of a training run.
_TELLING = frozenset(["learning_rate", "batch_per_device", "planned_epochs", "planned_steps", "accumulation"])


def read_config(path: Path) -> Reading:
    """Read a YAML config of a training run.

    Raises:
        InputError: the file is no YAML mapping, has none of a training run's settings, or a value is of the wrong kind.
    """
    found = read_any_config(path)
    if not found.facts:
        raise InputError(f"{path}: says nothing of a training run; name a config with its learning_rate and batch size")
    return found


def read_any_config(path: Path) -> Reading:
    """Return what a YAML file says of a training run: nothing, if it is not a training run's.

    Raises:
        InputError: the file is no YAML, or a value of a training run's settings is of the wrong kind.
    """
    try:
        text = read_bytes(path, SIZE_LIMIT).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise InputError(f"{path}: is not UTF-8 text; is it a config?") from None
    value = parse_yaml(text, str(path))
    if not isinstance(value, Mapping):
        return Reading()
    facts = read_facts(cast(Mapping[Any, Any], value), str(path), known=OTHERWISE)
    return Reading(facts) if _TELLING & set(facts) else Reading()


def read_adapter_config(path: Path) -> Reading:
    """Read what PEFT's ``adapter_config.json`` says: that an adapter was trained, its rank and alpha.

    Raises:
        InputError: the file is no JSON object, or a value is of the wrong kind.
    """
    config = read_object(path)
    kept = {key: config[key] for key in ("peft_type", "r", "lora_alpha") if key in config}
    return Reading(read_facts(kept, str(path), known={"r": "lora_rank"}))


def read_own_record(path: Path) -> Reading:
    """Read ``consilience/training.json``, the record of ``consilience.training``.

    Raises:
        InputError: the file is no such record.
    """
    record = read_record(path)
    kept = ("learning_rate", "steps", "batch_size", "weight_decay", "clip", "optimizer", "schedule", "final_loss")
    try:
        rows, drawn = sum(task.rows for task in record.tasks), sum(task.drawn for task in record.tasks)
        more: dict[str, Any] = {
            "planned_steps": record.steps, "epochs": drawn / rows if rows else None, "rows": rows or None,
            "warmup_steps": max(1, round(record.warmup * record.steps)),
            "adapter": "full" if record.lora_rank is None else "lora", "lora_rank": record.lora_rank,
            "lora_alpha": record.lora_alpha, "data": [task.name for task in record.tasks],
        }  # fmt: skip
        points = [(point.step, {"loss": point.loss}) for point in record.curve]
    except (TypeError, ValueError, OverflowError) as error:
        raise InputError(f"{path}: is no record of a training ({error}); restore it") from None
    facts = read_facts({name: getattr(record, name) for name in kept} | more, str(path))
    return Reading(facts, collect(points, str(path)))
