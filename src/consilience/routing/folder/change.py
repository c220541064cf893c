"""Add an expert to a routed model on disk, or remove one: the others' files stay as they are."""

import fcntl
import os
import shutil
from collections.abc import Generator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from consilience.checkpoints.files import stamp
from consilience.checkpoints.json_files import read_object
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
from consilience.workdir import OURS, digest_of, foreign_files, json_text, write_file, write_manifest

#: The mark of a change that has been made but not tidied up, and unfinished trainings of gates by expert.
CHANGE, UNFINISHED = "change.json", "unfinished"


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
    files = [stamp(path)[:3] for path in sorted(source.adapter.iterdir()) if path.is_file()]
    wanted = {"add": name, "adapter": files, "data": str(data), "instruction": instruction}
    with open_progress(progress) as shown, _changing(folder, digest_of(wanted)) as change:
        if change.done:
            return change.before
        if name in change.before.experts:
            raise InputError(f"{folder}: has an expert {name!r} already; choose another name")
        return _add(change, source, base, device, trust_remote_code, shown)


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
    change: "_Change",
    source: Source,
    base: str | None,
    device: str,
    trust_remote_code: bool,
    progress: Progress,
) -> store.Description:
    folder, description, name = change.folder, change.before, source.name
    place = store.find_base(description.base, folder, base)
    held = Base(place, device, trust_remote_code)
    expert = Expert(name, read_factors(source.adapter))
    check_fit(held()[0], expert)
    gates = _gate_settings(description)
    state = folder / OURS / UNFINISHED / name
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
    return change.apply(replace(found, experts=(*description.experts, name), records=records))


def remove_expert(folder: Path | str, name: str) -> store.Description:
    """Remove an expert of a routed model, and its files; others in its folder stay.

    Raises:
        InputError: there is no such expert, or no other.
    """
    folder = Path(folder)
    with _changing(folder, digest_of({"remove": name})) as change:
        if change.done:
            return change.before
        experts = change.before.experts
        if name not in experts:
            raise InputError(f"{folder}: has no expert {name!r}; there are {', '.join(experts)}")
        if len(experts) == 1:
            raise InputError(f"{folder}: {name!r} is its only expert; add another first")
        return _remove(change, name)


def _remove(change: "_Change", name: str) -> store.Description:
    folder, description = change.folder, change.before
    found = description
    if description.instructions is not None:
        instructions, tensors = _left(description, store.read_instructions(folder, str(description.tensors)), name)
        found = replace(description, instructions=instructions, tensors=store.write_instructions(folder, tensors))
    records = dict(description.records)
    if name in records.get("gates", {}):
        records["gates"] = {key: value for key, value in records["gates"].items() if key != name}
    kept = tuple(one for one in description.experts if one != name)
    return change.apply(replace(found, experts=kept, records=records))


@dataclass
class _Change:
    """A change of a folder that this run holds.

    ``foreign`` are the files in it that Consilience has not written, or that were changed since, with size and time;
    None where it has no list of its own. ``done`` says that an earlier run of the same ``digest`` had made the change
    and was killed before it had tidied up.
    """

    folder: Path
    digest: str
    before: store.Description
    foreign: dict[str, list[int]] | None
    done: bool = False

    def apply(self, found: store.Description) -> store.Description:
        """Replace ``routing.json``; the mark beside it says what for, until the folder is tidy."""
        mark = {"digest": self.digest, "routing": digest_of(found.to_dict()), "foreign": self.foreign}
        write_file(self.folder / OURS / CHANGE, json_text(mark))
        store.write_description(self.folder, found)
        return found


@contextmanager
def _changing(folder: Path, digest: str) -> Generator[_Change]:
    """Read ``routing.json`` and hold the folder for this change alone; before and after it, leftovers are removed.

    The mark of a change is removed as the very last thing.

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
        mark = _mark(folder)
        applied = mark is not None and mark.get("routing") == digest_of(description.to_dict())
        done = applied and mark is not None and mark.get("digest") == digest
        if mark is not None and not done:
            _finish(folder, mark)
        try:
            yield _Change(folder, digest, description, None if done else _foreign(folder), done)
        finally:
            _tidy(folder)
            mark = _mark(folder)
            if mark is not None:
                _finish(folder, mark)
    except (OSError, SafetensorError) as error:
        raise MachineError(
            f"{folder}: cannot be written ({error}); free space or fix the disk, then run this again"
        ) from error
    finally:
        os.close(descriptor)


def _mark(folder: Path) -> dict[str, Any] | None:
    path = folder / OURS / CHANGE
    return read_object(path) if path.is_file() else None


def _foreign(folder: Path) -> dict[str, list[int]] | None:
    """Return the files that are not ours, each with its size and time."""
    names = foreign_files(folder)
    return None if names is None else {name: _state(folder / name) for name in names}


def _state(path: Path) -> list[int]:
    try:
        status = path.lstat()
    except FileNotFoundError:
        return []
    return [status.st_size, status.st_mtime_ns]


def _finish(folder: Path, mark: dict[str, Any]) -> None:
    """After a change: remove its training's state, list the files that are ours, and remove the change's mark.

    Ours are, beside what was, the model's own files that this change has written.
    """
    description = store.read_description(folder)
    state = folder / OURS / UNFINISHED
    for path in state.glob("*"):
        if path.name in description.experts:
            shutil.rmtree(path)
    with suppress(OSError):  # there is none, or another expert's training is unfinished
        state.rmdir()
    name, before = f"{OURS}/{CHANGE}", mark.get("foreign")
    if isinstance(before, dict):
        known, own = cast(dict[str, Any], before), store.own_files(description)
        now = foreign_files(folder) or []
        theirs = {one for one in now if one not in own or known.get(one) == _state(folder / one)}
        write_manifest(folder, {*theirs, name})
    (folder / name).unlink()


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
        if path.name not in description.experts and path.is_dir():
            _remove_own(path)
    for path in (*ours.glob("instructions-*.safetensors"), *ours.glob("*.new")):
        if path.name != description.tensors:
            path.unlink(missing_ok=True)
    return description


def _remove_own(expert: Path) -> None:
    """Remove what an expert's folder has of ours, and the folder, unless somebody keeps files in it."""
    for name in store.EXPERT_FILES:
        for path in (expert / name, expert / f".{name}.new"):
            path.unlink(missing_ok=True)
    with suppress(OSError):
        expert.rmdir()
