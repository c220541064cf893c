"""Add an expert to a routed model on disk, or remove one: the others' files stay as they are."""

import shutil
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from consilience.engine.output import OURS
from consilience.errors import InputError
from consilience.recipe.schema import DataPaths
from consilience.routing.expert import Expert, read_factors
from consilience.routing.folder import store
from consilience.routing.folder.build import Base, Work, described, source_of
from consilience.routing.folder.load import read_semantics
from consilience.routing.folder.recipe import RoutedEntry
from consilience.routing.install import check_fit
from consilience.routing.local.gate_settings import GateSettings
from consilience.tasks.load import require_transformers


def add_expert(
    folder: Path | str,
    name: str,
    adapter: Path | str,
    *,
    data: Path | str | None = None,
    instruction: str | None = None,
    base: str | None = None,
    device: str = "cpu",
    trust_remote_code: bool = False,
    progress: bool = False,
) -> store.Description:
    """Add an adapter to a routed model. Until the last step, which replaces ``routing.json``, it is the model it was.

    Gates are trained with the settings of the first expert's.

    Args:
        folder: the routed model.
        name: of the new expert.
        adapter: a PEFT LoRA adapter on the same base.
        data: the expert's own rows, for gates, mean activations and instructions.
        instruction: what it does, in words.
        base: where the base is, if it has moved.
        device: where the base runs, if it is needed.
        trust_remote_code: run ``.py`` files that come with the base.
        progress: show bars.

    Raises:
        InputError: the name is taken, the adapter does not fit, or rows are missing; nothing has changed.
        MachineError: memory or disk ran out; nothing has changed.
    """
    require_transformers("routing")
    folder = Path(folder)
    description = store.read_description(folder)
    if name in description.experts:
        raise InputError(f"{folder}: has an expert {name!r} already; choose another name")
    paths = None if data is None else DataPaths(train=str(data))
    entry = RoutedEntry(model=str(adapter), name=name, data=paths, instruction=instruction)
    source = source_of(name, entry, None, "arguments")
    place = store.find_base(description.base, folder, base)
    held = Base(place, device, trust_remote_code)
    expert = Expert(name, read_factors(source.adapter))
    check_fit(held()[0], expert)
    gates = _gate_settings(description)
    state = folder / OURS / "unfinished" / name
    work = Work(held, description.settings, gates, state, progress)
    rows = work.rows(source, "arguments")
    router = None
    if description.instructions is not None:
        router = read_semantics(folder, description, *held(), nullcontext)
        router.add(described(held, source))
    made, record = work.vectors(expert, rows)
    found = description
    if router is not None:
        written = store.write_instructions(folder, router.tensors())
        found = replace(description, instructions=router.to_dict(), tensors=written)
    shutil.rmtree(store.expert_folder(folder, name), ignore_errors=True)
    store.write_expert(folder, name, source.adapter, made)
    records = dict(description.records)
    if record:
        records["gates"] = {**records.get("gates", {}), name: record}
    found = replace(found, experts=(*description.experts, name), records=records)
    store.write_description(folder, found)
    _tidy(folder, found)
    return found


def remove_expert(folder: Path | str, name: str) -> store.Description:
    """Remove an expert of a routed model, and its files.

    Raises:
        InputError: there is no such expert, or no other.
    """
    folder = Path(folder)
    description = store.read_description(folder)
    if name not in description.experts:
        raise InputError(f"{folder}: has no expert {name!r}; there are {', '.join(description.experts)}")
    if len(description.experts) == 1:
        raise InputError(f"{folder}: {name!r} is its only expert; add another first")
    found = description
    if description.instructions is not None:
        instructions, tensors = _left(description, store.read_instructions(folder, str(description.tensors)), name)
        found = replace(description, instructions=instructions, tensors=store.write_instructions(folder, tensors))
    records = dict(description.records)
    if name in records.get("gates", {}):
        records["gates"] = {key: value for key, value in records["gates"].items() if key != name}
    kept = tuple(one for one in description.experts if one != name)
    found = replace(found, experts=kept, records=records)
    store.write_description(folder, found)
    shutil.rmtree(store.expert_folder(folder, name), ignore_errors=True)
    _tidy(folder, found)
    return found


def _left(
    description: store.Description, tensors: Mapping[str, Tensor], name: str
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the global router's values without one expert's text and vector; nothing else changes."""
    values = dict(description.instructions or {})
    values["experts"] = [one for one in values["experts"] if one["name"] != name]
    rows = [row for row, one in enumerate(description.experts) if one != name]
    return values, {**tensors, "experts": tensors["experts"][rows]}


def _gate_settings(description: store.Description) -> GateSettings:
    """Return the settings that the model's gates were trained with."""
    records: Mapping[str, Any] = description.records.get("gates", {})
    first = next(iter(records.values()), None)
    return GateSettings() if first is None else GateSettings(**first["settings"])


def _tidy(folder: Path, description: store.Description) -> None:
    """Remove what ``routing.json`` does not speak of any more."""
    shutil.rmtree(folder / OURS / "unfinished", ignore_errors=True)
    for path in (folder / OURS).glob("instructions-*.safetensors"):
        if path.name != description.tensors:
            path.unlink()
