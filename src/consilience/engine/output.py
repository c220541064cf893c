"""OUT appears whole or not at all.

Work happens in OUT.partial, beside OUT. Weights are written there under names no loader knows, without their headers;
the headers, the final names and the model's other files come last, then everything is flushed and the folder renamed.
"""

import contextlib
import errno
import json
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from consilience.checkpoints.dtypes import TORCH_NAMES
from consilience.checkpoints.files import regular_size
from consilience.checkpoints.json_files import read_object
from consilience.checkpoints.open import SAFETENSORS_INDEX, WEIGHT_SUFFIXES
from consilience.engine.plan import Plan, TensorPlan
from consilience.errors import InputError, MachineError

#: The folder of an output that holds what Consilience has to say about it.
OURS = "consilience"
JOURNAL, PLAN = "journal.jsonl", "plan.json"
#: Holds a learned method's state until the merge is complete.
LEARNING = "learning"


def partial_path(out: Path) -> Path:
    """Return the folder that work towards ``out`` is done in."""
    return out.with_name(out.name + ".partial")


def _inputs(plan: Plan) -> list[Path]:
    """Return every file and folder the merge reads, by its own name and by where its symlinks lead."""
    found: list[Path] = []
    for model in plan.models:
        found += [part.path for part in (model.checkpoint, model.adapter) if part is not None and part.path is not None]
        found += [Path(file) for file, _, _ in model.identity()]
    donor = plan.alignment.donor.folder
    found += side_files(donor) if donor is not None else []
    return list(dict.fromkeys(place for path in found for place in (path.absolute(), path.resolve())))


def _refuse_nesting(out: Path, plan: Plan) -> None:
    """Refuse an OUT (or OUT.partial) that is, lies in or holds anything the merge reads."""
    inputs = _inputs(plan)
    for place in (out.absolute(), partial_path(out.absolute())):
        real = place.parent.resolve() / place.name
        for path in inputs:
            if real == path or real in path.parents or (path.is_dir() and path in real.parents):
                raise InputError(f"{place}: is, or lies in, or holds the input {path}; choose another OUT")


def _refuse_occupied(out: Path, folder_output: bool, force: bool) -> None:
    """Refuse to replace what stands at OUT without ``force``, or what is not of OUT's kind."""
    if out.is_symlink():
        raise InputError(f"{out}: is a symbolic link; name the place it points to, or choose another OUT")
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        if out.exists() and not folder_output:
            raise InputError(f"{out}: is a folder, and this merge writes a file; choose another OUT")
        return
    if not force:
        raise InputError(f"{out}: exists and is not empty; choose another OUT, or pass --force to replace it")
    if not (out.is_dir() if folder_output else out.is_file()):
        kind = "folder" if folder_output else "file"
        raise InputError(f"{out}: exists and is not a {kind}, which this merge writes; choose another OUT")


def _refuse_foreign(partial: Path) -> None:
    """Refuse an OUT.partial that no run of ours left: it would be deleted."""
    if not partial.exists() and not partial.is_symlink():
        return
    ours = partial / OURS
    left = ours.is_dir() and ((ours / PLAN).exists() or not (ours / "lineage.json").exists())
    if partial.is_symlink() or not partial.is_dir() or not (left or not any(partial.iterdir())):
        raise InputError(f"{partial}: is in the way and was not left by an unfinished merge; move it elsewhere")


def _refuse_side_files(folder: Path) -> None:
    """Refuse what cannot be copied from the donor's folder: links to folders, dangling links, pipes, devices."""
    for top, folders, _ in os.walk(folder):
        folders[:] = [f for f in folders if not f.startswith(".")]
        linked = [f for f in sorted(folders) if os.path.islink(os.path.join(top, f))]
        if linked:
            raise InputError(f"{top}/{linked[0]}: is a link to a folder, which may lead anywhere; copy or remove it")
    for path in side_files(folder):
        regular_size(path)
        if path.name == OURS and path.parent == folder:
            raise InputError(f"{path}: has the name of the folder a merge adds to its output; rename it")


def _make_parents(place: Path) -> list[Path]:
    """Make the folders above OUT.partial and return those that were not there, the innermost first.

    OUT.partial itself is tried out: permissions, odd file systems and long names fail here, not after the work.
    """
    made = [parent for parent in place.parents if not parent.exists()]
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        if not place.exists():
            place.mkdir()
            place.rmdir()
    except OSError:
        discard_folders(made)
        raise
    return made


def discard_folders(made: list[Path]) -> None:
    """Leave nothing behind: remove the folders ``made`` for OUT as far as they are empty."""
    for parent in made:
        with contextlib.suppress(OSError):
            parent.rmdir()


def check_destination(
    out: Path, plan: Plan, force: bool, create: bool = True, folder: bool | None = None
) -> list[Path]:
    """Refuse an OUT that would overwrite or nest with something; with ``create``, make its parent folder.

    Args:
        out: where the output goes.
        plan: what is merged.
        force: replace a non-empty ``out``.
        create: make the folders above ``out``.
        folder: whether the output is a folder (by default it is what the donor is).

    Returns:
        The folders that were made, the innermost first: what ``discard`` takes away again.

    Raises:
        InputError: OUT exists and is not empty (without ``force``), is or lies in an input, or cannot be created.
        MachineError: the disk is full or failed.
    """
    donor = plan.alignment.donor.folder
    if out.name in ("", ".."):
        raise InputError(f"{out}: is not a name to write to; name a new folder")
    folder = donor is not None if folder is None else folder
    if not folder and out.suffix != ".safetensors":
        raise InputError(f"{out}: a flat state dict is written to one file; name it with the ending .safetensors")
    if not folder and plan.alignment.private:
        name = next(iter(plan.alignment.private))
        raise InputError(f"{out}: a single file has no place for {name!r}'s private tensors; merge folders instead")
    if donor is not None:
        _refuse_side_files(donor)
    try:
        _refuse_nesting(out, plan)
        _refuse_occupied(out, folder, force)
        _refuse_foreign(partial_path(out))
        return _make_parents(partial_path(out.absolute())) if create else []
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
            raise MachineError(f"{out}: cannot be made ({error.strerror}); mend it, then run this again") from None
        raise InputError(f"{out}: cannot be made ({error.strerror}); choose another OUT") from None


def check_space(out: Path, plan: Plan, written: int) -> None:
    """Refuse to start what cannot fit.

    Raises:
        MachineError: the disk has less free space than the output still needs.
    """
    free = shutil.disk_usage(out.absolute().parent).free
    need = plan.layout.size - written + (8 << 20)
    if free < need:
        raise MachineError(
            f"{out}: needs {need / 1e9:.2f} GB of disk and {free / 1e9:.2f} GB are free; free some, then run the same "
            "command again"
        )


class FileSink:
    """The output's weight files under their working names; offsets are final from the start."""

    def __init__(self, partial: Path, plan: Plan) -> None:
        self.partial, self.plan = partial, plan
        self.paths = [partial / f"weights-{i:05d}.part" for i in range(len(plan.layout.files))]
        self._lock = threading.Lock()
        self._dirty: set[int] = set()
        self._descriptors: list[int] = []
        for path, file in zip(self.paths, plan.layout.files, strict=True):
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            self._descriptors.append(descriptor)
            os.ftruncate(descriptor, file.size)

    def write(self, tensor: TensorPlan, start: int, data: Any) -> None:
        """Put ``data`` at byte ``start`` of the tensor."""
        view, position = memoryview(data), tensor.offset + start
        self._dirty.add(tensor.file)
        try:
            while view.nbytes:
                count = os.pwrite(self._descriptors[tensor.file], view, position)
                view, position = view[count:], position + count
        except OSError as error:
            error.filename = str(self.paths[tensor.file])
            raise

    def read(self, file: int, position: int, out: Any) -> None:
        """Fill ``out`` from a file (for verification)."""
        view = memoryview(out)
        while view.nbytes:
            count = os.preadv(self._descriptors[file], [view], position)
            if count <= 0:
                raise OSError(5, "output file ended early", str(self.paths[file]))
            view, position = view[count:], position + count

    def flush(self) -> None:
        """Make everything written so far survive a crash of the machine."""
        with self._lock:
            dirty, self._dirty = self._dirty, set()
            for file in dirty:
                os.fdatasync(self._descriptors[file])

    def finish(self) -> list[Path]:
        """Write the headers, flush, and give the files their final names; return them."""
        final: list[Path] = []
        for number, file in enumerate(self.plan.layout.files):
            os.pwrite(self._descriptors[number], file.header, 0)
            os.fsync(self._descriptors[number])
            final.append(self.paths[number].rename(self.partial / file.name))
        return final

    def close(self) -> None:
        """Close the files."""
        for descriptor in self._descriptors:
            os.close(descriptor)
        self._descriptors.clear()


def write_json(path: Path, value: Any) -> None:
    """Write readable JSON; what is not Unicode text (a file's odd name) becomes a JSON escape."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    path.write_text(text, encoding="utf-8", errors="backslashreplace")


def _files(folder: Path) -> Iterator[Path]:
    """Walk a model's files in order, past hidden folders, training checkpoints and our own."""
    for top, folders, files in os.walk(folder):
        folders[:] = sorted(
            f for f in folders if not f.startswith(".") and f != OURS and not f.startswith("checkpoint-")
        )
        yield from (Path(top) / name for name in sorted(files))


def side_files(folder: Path) -> list[Path]:
    """Return the folder's files that travel with a merged model: all but weights, indices, its card and VCS files."""
    left_out = (*WEIGHT_SUFFIXES, ".index.json")
    papers = ("README.md", "trainer_state.json")
    return [
        f
        for f in _files(folder)
        if not f.name.endswith(left_out) and not f.name.startswith(".git") and f.name not in papers
    ]


def weights_in_subfolders(folder: Path) -> list[str]:
    """Return the weight files below the folder's top level: other modules, or other formats of the same model."""
    found = (path.relative_to(folder) for path in _files(folder) if path.name.endswith(WEIGHT_SUFFIXES))
    return [str(path) for path in found if len(path.parts) > 1]


def _set_dtype(config: dict[str, Any], name: str) -> None:
    for key in ("dtype", "torch_dtype"):
        if key in config:
            config[key] = name
    for value in config.values():
        if isinstance(value, dict):
            _set_dtype(cast(dict[str, Any], value), name)


def output_config(config: dict[str, Any], plan: Plan) -> dict[str, Any]:
    """Return the base's config made true of the output: its dtype, and no stale quantisation entries."""
    config = cast(dict[str, Any], json.loads(json.dumps(config)))
    for key in ("quantization_config", "compression_config"):
        config.pop(key, None)
    kinds = {t.out_dtype.name for t in plan.tensors if t.out_dtype.mergeable}
    if plan.recipe.output_dtype and len(kinds) == 1:
        name = TORCH_NAMES[next(iter(kinds))]
        if "dtype" not in config and "torch_dtype" not in config:
            config["torch_dtype"] = name
        _set_dtype(config, name)
    return config


def copy_side_files(partial: Path, plan: Plan) -> None:
    """Bring every non-weight file of the donor along, and write the config and the shard index."""
    folder = plan.alignment.donor.folder
    assert folder is not None
    for source in side_files(folder):
        target = partial / source.relative_to(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.name != "config.json" or source.parent != folder:
            shutil.copyfile(source, target)
        else:
            write_json(target, output_config(read_object(source), plan))
    if len(plan.layout.files) > 1:
        names = {t.name: plan.layout.files[t.file].name for t in plan.tensors}
        total = sum(t.nbytes for t in plan.tensors)
        write_json(partial / SAFETENSORS_INDEX, {"metadata": {"total_size": total}, "weight_map": names})


def sync_tree(folder: Path) -> None:
    """Flush every file and folder below ``folder``."""
    for top, _, files in os.walk(folder):
        for path in (*(Path(top) / name for name in files), Path(top)):
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def _free_name(path: Path) -> Path:
    """Return a name beside ``path`` that nothing has."""
    number, found = 1, path.with_name(path.name + ".replaced")
    while found.exists() or found.is_symlink():
        number += 1
        found = path.with_name(f"{path.name}.replaced-{number}")
    return found


def install(finished: Path, out: Path) -> None:
    """Rename ``finished`` (a folder or file) to OUT; what stood there is removed only once the new one is in place.

    Plan and journal go last: while they are there, a rerun knows OUT.partial as a merge's own and continues it.
    """
    previous: Path | None = None
    if finished.is_dir() and out.is_dir() and any(out.iterdir()):
        previous = _free_name(out)
        out.rename(previous)
    try:
        os.replace(finished, out)
    except OSError:
        if previous is not None:
            previous.rename(out)
        raise
    if out.is_dir():
        for name in (JOURNAL, PLAN):
            (out / OURS / name).unlink(missing_ok=True)
    descriptor = os.open(out.absolute().parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    if previous is not None:
        shutil.rmtree(previous)
