"""What a merged model's folder holds: weight files, under working names until all is there, and what comes along."""

import contextlib
import json
import os
import shutil
import threading
from collections.abc import Collection, Generator, Iterator
from pathlib import Path
from typing import Any, cast

from consilience.checkpoints.dtypes import TORCH_NAMES
from consilience.checkpoints.files import Descriptors, check_link, copy_file
from consilience.checkpoints.json_files import read_object
from consilience.checkpoints.open import SAFETENSORS_INDEX, WEIGHT_SUFFIXES
from consilience.checkpoints.packed import CONFIG_KEYS, QUANTIZATION_FILE, quantises_when_run, without_quantization
from consilience.engine.chosen_files import ChosenFiles, chosen_files, output_configs
from consilience.engine.plan import Plan, TensorPlan
from consilience.errors import InputError, MachineError
from consilience.experts.ties import keeps_flag, untied
from consilience.workdir import OURS, write_json

#: In OUT.partial: finished segments, the merge they belong to, and a learned method's state until OUT is complete.
JOURNAL, PLAN, LEARNING = "journal.jsonl", "plan.json", "learning"


def inputs(plan: Plan) -> list[Path]:
    """Return every file and folder the merge reads."""
    found = [path for stage in plan.stages.values() for path in inputs(stage)]
    for model in plan.models:
        found += [part.path for part in (model.checkpoint, model.adapter) if part is not None and part.path is not None]
        found += [Path(entry.path) for entry in model.stamps()]
    return found + beside(plan)


def beside(plan: Plan) -> list[Path]:
    """Return the files beside the weights that the output is made from."""
    donor = plan.alignment.donor.folder
    return [] if donor is None else [*side_files(donor), *chosen_files(plan).copied.values()]


def check_side_files(folder: Path) -> None:
    """Refuse what cannot be copied from the donor's folder: links that lead out of it, pipes, devices.

    Raises:
        InputError: names the file.
    """
    try:
        _refuse_side_files(folder)
    except OSError as error:
        raise InputError(f"{error.filename or folder}: cannot be read ({error.strerror}); restore it") from None


def _refuse_side_files(folder: Path) -> None:
    for top, folders, _ in os.walk(folder):
        folders[:] = [f for f in folders if not f.startswith(".")]
        linked = [f for f in sorted(folders) if os.path.islink(os.path.join(top, f))]
        if linked:
            raise InputError(f"{top}/{linked[0]}: is a link to a folder, which may lead anywhere; copy or remove it")
    for path in side_files(folder):
        check_link(path, folder)
        if path.name == OURS and path.parent == folder:
            raise InputError(f"{path}: has the name of the folder a merge adds to its output; rename it")


def check_plan(out: Path, plan: Plan, *, folder: bool) -> None:
    """Refuse an OUT that cannot hold what is planned, and files beside the base that cannot be copied.

    Args:
        out: where the output goes.
        plan: what is merged.
        folder: whether the output is a folder (else a flat state dict).

    Raises:
        InputError: names the output or the file.
    """
    if not folder and out.suffix != ".safetensors":
        raise InputError(f"{out}: a flat state dict is written to one file; name it with the ending .safetensors")
    if not folder and plan.alignment.private:
        name = next(iter(plan.alignment.private))
        raise InputError(f"{out}: a single file has no place for {name!r}'s private tensors; merge folders instead")
    donor = plan.alignment.donor.folder
    if donor is not None:
        check_side_files(donor)


def check_space(out: Path, size: int, written: int = 0) -> None:
    """Refuse to start what cannot fit: ``size`` bytes, of which ``written`` are there.

    Raises:
        MachineError: the disk has less free space than the output still needs.
    """
    free = shutil.disk_usage(out.absolute().parent).free
    need = size - written + (8 << 20)
    if free < need:
        raise MachineError(
            f"{out}: needs {need / 1e9:.2f} GB of disk and {free / 1e9:.2f} GB are free; free some, then run the same "
            "command again"
        )


class FileSink:
    """The output's weight files under their working names in OUT.partial; offsets are final from the start."""

    def __init__(self, work: Path, plan: Plan) -> None:
        self.plan = plan
        self.paths = part_paths(work, plan)
        self._lock = threading.Lock()
        self._dirty: set[int] = set()
        self._descriptors = Descriptors(self.paths, os.O_RDWR | os.O_CREAT)
        for number, file in enumerate(plan.layout.files):
            with self._opened(number) as descriptor:
                os.ftruncate(descriptor, file.size)

    @contextlib.contextmanager
    def _opened(self, number: int) -> Generator[int]:
        taken = self._descriptors.take(number)
        try:
            yield taken.number
        except OSError as error:
            error.filename = str(self.paths[number])
            raise
        finally:
            self._descriptors.release(taken)

    def write(self, tensor: TensorPlan, start: int, data: Any) -> None:
        """Put ``data`` at byte ``start`` of the tensor."""
        view, position = memoryview(data), tensor.offset + start
        self._dirty.add(tensor.file)
        with self._opened(tensor.file) as descriptor:
            while view.nbytes:
                count = os.pwrite(descriptor, view, position)
                view, position = view[count:], position + count

    def read(self, file: int, position: int, out: Any) -> None:
        """Fill ``out`` from a file (for verification)."""
        view = memoryview(out)
        with self._opened(file) as descriptor:
            while view.nbytes:
                count = os.preadv(descriptor, [view], position)
                if count <= 0:
                    raise OSError(5, "output file ended early", str(self.paths[file]))
                view, position = view[count:], position + count

    def flush(self) -> None:
        """Make everything written so far survive a crash of the machine."""
        with self._lock:
            dirty, self._dirty = self._dirty, set()
            for file in dirty:
                with self._opened(file) as descriptor:
                    os.fdatasync(descriptor)

    def finish(self, result: Path) -> list[Path]:
        """Write the headers, flush, and move the files to the result under their final names; return them."""
        final = final_paths(result, self.plan)
        for number, file in enumerate(self.plan.layout.files):
            with self._opened(number) as descriptor:
                os.pwrite(descriptor, file.header, 0)
                os.fsync(descriptor)
            final[number].parent.mkdir(exist_ok=True, parents=True)
            self.paths[number].rename(final[number])
        return final

    def close(self) -> None:
        """Close the files."""
        self._descriptors.close()


def part_paths(work: Path, plan: Plan) -> list[Path]:
    """Return the weight files' names while they are written: no loader takes them for a model's."""
    return [work / f"weights-{i:05d}.part" for i in range(len(plan.layout.files))]


def final_paths(result: Path, plan: Plan) -> list[Path]:
    """Return the weight files' final names: in the result's folder, or the result itself."""
    if plan.alignment.donor.folder is None:
        return [result]
    return [result / file.name for file in plan.layout.files]


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


def output_size(plan: Plan) -> int:
    """Return the bytes of a merged model with all that comes along."""
    return plan.layout.size + sum(file.stat().st_size for file in beside(plan))


def weights_in_subfolders(folder: Path, modules: Collection[str] = ()) -> list[str]:
    """Return the weight files below the folder's top level, besides the model's ``modules``: other formats of it."""
    found = (path.relative_to(folder) for path in _files(folder) if path.name.endswith(WEIGHT_SUFFIXES))
    return [str(path) for path in found if len(path.parts) > 1 and path.parent.as_posix() not in modules]


def _set_dtype(config: dict[str, Any], name: str) -> None:
    for key in ("dtype", "torch_dtype"):
        if key in config:
            config[key] = name
    for key, value in config.items():
        if isinstance(value, dict) and key not in CONFIG_KEYS:
            _set_dtype(cast(dict[str, Any], value), name)


def output_config(config: dict[str, Any], plan: Plan) -> dict[str, Any]:
    """Return the base's config made true of the output: its dtype, what it ties, and what it says of quantisation."""
    packed = plan.alignment.packed
    config = cast(dict[str, Any], json.loads(json.dumps(config)))
    config = untied(config) if plan.alignment.untied_config else config
    if not packed.weights and not quantises_when_run(config):
        config = without_quantization(config)
    config = plan.alignment.heads.config(config)
    config = plan.alignment.vocabulary.config(config)
    kinds = {t.out_dtype.name for t in plan.tensors if t.out_dtype.mergeable and t.name not in packed.parts}
    if plan.recipe.output_dtype and len(kinds) == 1:
        name = TORCH_NAMES[next(iter(kinds))]
        if "dtype" not in config and "torch_dtype" not in config:
            config["torch_dtype"] = name
        _set_dtype(config, name)
    return config


def tie_notes(plan: Plan) -> list[str]:
    """Say what becomes of the config's word about ties where the output is untied."""
    alignment = plan.alignment
    if alignment.untied_config:
        return ["config.json says tie_word_embeddings: false"]
    checkpoint = alignment.donor.checkpoint
    if alignment.untied and checkpoint is not None and keeps_flag(checkpoint.config):
        return [
            "config.json keeps tie_word_embeddings, by which this architecture scales its outputs: transformers 5 "
            "loads the untied tensors apart all the same, older versions do not"
        ]
    return []


def write_chosen(result: Path, chosen: ChosenFiles) -> None:
    """Write the files that a recipe takes from other models than the base."""
    for name, source in chosen.copied.items():
        (result / name).parent.mkdir(parents=True, exist_ok=True)
        copy_file(source, result / name, source.parents[len(Path(name).parts) - 1])
    for name, content in chosen.written.items():
        if isinstance(content, str):
            (result / name).write_text(content, encoding="utf-8")
        else:
            write_json(result / name, content)


def copy_side_files(result: Path, plan: Plan) -> None:
    """Bring every non-weight file along, the donor's or those chosen; write the config and the shard index."""
    folder = plan.alignment.donor.folder
    assert folder is not None
    chosen = chosen_files(plan)
    for source in side_files(folder):
        name = source.relative_to(folder)
        (result / name).parent.mkdir(parents=True, exist_ok=True)
        if str(name) == "config.json":
            write_json(result / name, output_config(output_configs(plan)[0] or read_object(source), plan))
        elif not chosen.replaces(name) and (str(name) != QUANTIZATION_FILE or plan.alignment.packed.weights):
            copy_file(source, result / name, folder)
    write_chosen(result, chosen)
    main = [t for t in plan.tensors if not plan.layout.files[t.file].beginning]
    names = {t.name: plan.layout.files[t.file].name for t in main}
    if len(set(names.values())) > 1:
        total = sum(t.nbytes for t in main)
        write_json(result / SAFETENSORS_INDEX, {"metadata": {"total_size": total}, "weight_map": names})
