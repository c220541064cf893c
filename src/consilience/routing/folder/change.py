"""Add an expert to a routed model on disk, or remove one: the others' files stay as they are."""

import fcntl
import os
import shutil
from collections.abc import Generator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from consilience.engine.output import OURS
from consilience.errors import InputError, MachineError
from consilience.progress import Progress, ProgressOption, open_progress
from consilience.recipe.schema import DataPaths
from consilience.routing.expert import Expert, read_factors
from consilience.routing.folder import store
from consilience.routing.folder.build import Base, Source, Work, described, source_of
from consilience.routing.folder.load import read_semantics
from consilience.routing.folder.recipe import RoutedEntry
from consilience.routing.install import check_fit
from consilience.routing.local.gate_settings import GateSettings
from consilience.routing.values import read_settings
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
    progress: ProgressOption = False,
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
        progress: as ``build_routed`` takes it.

    Raises:
        InputError: the name is taken, the adapter does not fit, or rows are missing; nothing has changed.
        MachineError: memory or disk ran out; nothing has changed.
    """
    require_transformers("routing")
    folder = Path(folder)
    source = _source(folder, name, adapter, data, instruction)
    with _changing(folder) as description, open_progress(progress) as shown:
        if name in description.experts:
            raise InputError(f"{folder}: has an expert {name!r} already; choose another name")
        return _add(folder, description, source, base, device, trust_remote_code, shown)


def _source(folder: Path, name: str, adapter: Path | str, data: Path | str | None, instruction: str | None) -> Source:
    if instruction is not None and not instruction.strip():
        raise InputError("instruction: is empty; say what the expert does, or leave it out")
    paths = None if data is None else DataPaths(train=str(data))
    # The name is not the entry's, which would judge it before source_of can say what is wrong with it.
    source = source_of(name, RoutedEntry(model=str(adapter), data=paths, instruction=instruction), None, "arguments")
    if folder.resolve() in source.adapter.resolve().parents:
        raise InputError(f"{source.adapter}: lies in the routed model itself; copy it elsewhere first")
    return source


def _add(
    folder: Path,
    description: store.Description,
    source: Source,
    base: str | None,
    device: str,
    trust_remote_code: bool,
    progress: Progress,
) -> store.Description:
    name = source.name
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
    store.write_expert(folder, name, source.adapter, made)
    records = dict(description.records)
    if record:
        records["gates"] = {**records.get("gates", {}), name: record}
    found = replace(found, experts=(*description.experts, name), records=records)
    store.write_description(folder, found)
    shutil.rmtree(state, ignore_errors=True)
    with suppress(OSError):  # another expert's training is unfinished
        state.parent.rmdir()
    return found


def remove_expert(folder: Path | str, name: str) -> store.Description:
    """Remove an expert of a routed model, and its files.

    Raises:
        InputError: there is no such expert, or no other.
    """
    folder = Path(folder)
    with _changing(folder) as description:
        if name not in description.experts:
            raise InputError(f"{folder}: has no expert {name!r}; there are {', '.join(description.experts)}")
        if len(description.experts) == 1:
            raise InputError(f"{folder}: {name!r} is its only expert; add another first")
        return _remove(folder, description, name)


def _remove(folder: Path, description: store.Description, name: str) -> store.Description:
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
    return found


@contextmanager
def _changing(folder: Path) -> Generator[store.Description]:
    """Read ``routing.json`` and hold the folder for this change alone; before and after it, leftovers are removed.

    Raises:
        InputError: another run is changing the folder.
        MachineError: the disk is full or failed; the model is as it was, or as it was to be.
    """
    from safetensors import SafetensorError

    store.read_description(folder)
    descriptor = os.open(folder / OURS, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{folder}: another run is changing it; wait for that, then run this again") from None
        description = _tidy(folder)
        try:
            yield description
        finally:
            _tidy(folder)
    except (OSError, SafetensorError) as error:
        raise MachineError(f"{folder}: cannot be written ({error}); mend it, then run this again") from error
    finally:
        os.close(descriptor)


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
    return GateSettings() if first is None else read_settings(GateSettings, first["settings"], "records: gates")


def _tidy(folder: Path) -> store.Description:
    """Remove what ``routing.json`` does not speak of, and return what it says.

    Unfinished trainings stay, for the runs that end them.
    """
    description, ours = store.read_description(folder), folder / OURS
    for path in (ours / store.EXPERTS).glob("*"):
        if path.name not in description.experts:
            shutil.rmtree(path, ignore_errors=True)
    for path in (*ours.glob("instructions-*.safetensors"), *ours.glob("*.new")):
        if path.name != description.tensors:
            path.unlink(missing_ok=True)
    return description
