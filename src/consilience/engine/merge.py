"""The whole merge: plan, stream into OUT.partial, verify, install as OUT."""

import contextlib
import fcntl
import os
import shutil
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from consilience.checkpoints.json_files import read_object
from consilience.checkpoints.safetensors_file import encode_header
from consilience.coefficients import save_coefficients
from consilience.engine import output
from consilience.engine.card import licences, render_card
from consilience.engine.journal import Journal, read_journal
from consilience.engine.lineage import lineage
from consilience.engine.output import JOURNAL, LEARNING, OURS, PLAN, FileSink
from consilience.engine.plan import Plan
from consilience.engine.stream import Piece, Streamer, check_ties, integer_notes, thread_count
from consilience.engine.summary import Summary, below_unit, rounding
from consilience.engine.verify import verify_headers, verify_segment
from consilience.engine.worker import Record
from consilience.errors import InputError, MachineError
from consilience.progress import NullProgress, Progress


def raise_file_limit() -> None:
    """Allow as many open files as the system lets this process have (many experts times many shards)."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def recipe_text(plan: Plan) -> str:
    """Return the resolved recipe as YAML: what was given, with every model's name and the seed spelled out."""
    value: dict[str, Any] = plan.recipe.model_dump(mode="json", exclude_defaults=True)
    value = {"merge_method": plan.recipe.merge_method} | value | {"seed": plan.recipe.seed}
    names = iter([expert.name for expert in plan.experts])
    whole = [name for name, parameter in plan.method.parameters.items() if parameter.kind == "integer"]
    for key in whole:  # YAML's 10 was read as the number 10.0
        if isinstance(value.get("parameters", {}).get(key), float):
            value["parameters"][key] = int(value["parameters"][key])
    for entry in value["models"]:
        if plan.method.base == "unused" or entry["model"] != plan.recipe.base_model:
            entry["name"] = next(names)
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True)


@contextlib.contextmanager
def claimed(partial: Path) -> Generator[None]:
    """Hold OUT.partial for this run alone, making it if need be.

    Raises:
        InputError: another run holds it, or it is somebody else's folder; neither is touched.
    """
    partial.mkdir(exist_ok=True)
    descriptor = os.open(partial, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{partial}: another merge is writing there; wait for it, or choose another OUT") from None
        # A run that was killed before it wrote its plan leaves an empty folder of ours.
        if any(path != partial / OURS for path in partial.rglob("*")) and not (partial / OURS / PLAN).exists():
            raise InputError(f"{partial}: is in the way and was not made by Consilience; move it elsewhere")
        yield
    finally:
        os.close(descriptor)


def _resume(partial: Path, plan: Plan) -> dict[Piece, Record]:
    """Return the finished segments of an interrupted run of the same plan; discard any other partial output."""
    marker = partial / OURS / PLAN
    try:
        same = marker.exists() and read_object(marker).get("digest") == plan.digest
    except InputError:
        same = False
    weights = [partial / f"weights-{i:05d}.part" for i in range(len(plan.layout.files))]
    for path, file in zip(weights, plan.layout.files, strict=True):
        if same and (partial / file.name).is_file() and not path.exists():  # stopped between renaming and installing
            (partial / file.name).rename(path)
    if same and all(path.is_file() for path in weights):
        return {(r.tensor, r.segment): r for r in read_journal(partial / OURS / JOURNAL, plan)}
    for path in [*partial.iterdir(), *(partial / OURS).glob("*")]:
        if path not in (partial / OURS, partial / OURS / LEARNING):  # what was learned is worth more than bytes merged
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    (partial / OURS).mkdir(exist_ok=True)
    output.write_json(marker, {"digest": plan.digest})
    return {}


def _write_heads(folder: Path, plan: Plan) -> None:
    """Write each expert's private tensors to ``heads/NAME.safetensors``."""
    for expert in plan.experts:
        names = plan.alignment.private.get(expert.name, [])
        if not names:
            continue
        sources = {name: expert.source(name) for name in names if _has(expert, name)}
        tensors = [(n, s.dense.dtype, s.dense.shape) for n, s in sources.items() if s.dense is not None]
        header, _ = encode_header(tensors, {"format": "pt"})
        folder.mkdir(exist_ok=True)
        with open(folder / f"{expert.name}.safetensors", "wb") as file:
            file.write(header)
            for name, *_ in tensors:
                source = sources[name]
                assert source.dense is not None
                assert source.storage is not None
                raw = np.empty(source.dense.nbytes, np.uint8)
                source.storage.read(source.dense, 0, raw)
                file.write(raw.data)


def _has(expert: Any, name: str) -> bool:
    in_model = expert.checkpoint is not None and name in expert.checkpoint.tensors
    return in_model or (expert.adapter is not None and name in expert.adapter.whole)


def _verify(plan: Plan, sink: FileSink, records: dict[Piece, Record], threads: int, progress: Progress) -> None:
    from concurrent.futures import ThreadPoolExecutor
    from threading import local

    held = local()

    def one(record: Record) -> int:
        if not hasattr(held, "buffer"):
            held.buffer = np.empty(1 << 22, np.uint8)
        return verify_segment(plan, sink, record, held.buffer)

    progress.phase("verifying", sum(tensor.nbytes for tensor in plan.tensors), "bytes")
    with ThreadPoolExecutor(threads) as pool:
        for nbytes in pool.map(one, list(records.values())):
            progress.advance(nbytes)


def _write_papers(partial: Path, plan: Plan, document: dict[str, Any], text: str, card: str) -> None:
    """Write everything but the weights: lineage, recipe, heads, the donor's other files, the card."""
    ours = partial / OURS
    _write_heads(ours / "heads", plan)
    output.write_json(ours / "lineage.json", document)
    (ours / "recipe.yaml").write_text(text, encoding="utf-8")
    if plan.coefficients is not None:
        save_coefficients(ours, plan.coefficients)
    shutil.rmtree(ours / LEARNING, ignore_errors=True)
    if plan.alignment.donor.folder is not None:
        output.copy_side_files(partial, plan)
        (partial / "README.md").write_text(card, encoding="utf-8")
    output.sync_tree(partial)


def _install(partial: Path, out: Path, plan: Plan, files: list[Path]) -> None:
    """Rename the folder (or its one file) to OUT."""
    if plan.alignment.donor.folder is not None:
        output.install(partial, out)
    else:
        output.install(files[0], out)
        shutil.rmtree(partial)


def run_merge(
    plan: Plan,
    out: Path,
    *,
    force: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Summary:
    """Carry a plan out: after it, OUT is complete, verified and on disk, or (on any error) absent.

    An error of the machine or an interrupt keeps OUT.partial, and the same call continues there; an error of the input
    leaves nothing behind.

    Raises:
        InputError: OUT is not free, or the data cannot be merged.
        MachineError: the disk is full or failed; the partial output is kept.
        KeyboardInterrupt: passed on; the partial output is kept.
    """
    if plan.unlearned:
        raise InputError(
            f"{plan.where}: method {plan.method.name!r} has not learned its coefficients yet; call merge_recipe, which "
            "learns first"
        )
    started = time.perf_counter()
    made = output.check_destination(out, plan, force)
    raise_file_limit()
    partial = output.partial_path(out)
    try:
        check_ties(plan)
        with claimed(partial):
            try:
                records = _resume(partial, plan)
                sizes = {r.tensor: plan.tensors[r.tensor] for r in records.values()}
                output.check_space(out, plan, sum(t.nbytes for t in sizes.values()))
                return _run(plan, out, partial, records, thread_count(threads), progress or NullProgress(), started)
            except InputError:
                shutil.rmtree(partial, ignore_errors=True)
                raise
    except InputError:
        output.discard_folders(made)
        raise
    except OSError as error:
        place = f"{error.filename}: " if error.filename else f"{partial}: "
        raise MachineError(f"{place}{error.strerror or error}; mend it, then run the same command again") from error


def _run(
    plan: Plan, out: Path, partial: Path, records: dict[Piece, Record], threads: int, progress: Progress, started: float
) -> Summary:
    resumed = len(records)
    sink = FileSink(partial, plan)
    try:
        streamer = Streamer(plan, sink, threads=threads, progress=progress)
        streamer.done = dict(records)
        with Journal(partial / OURS / JOURNAL, sink.flush) as journal:
            streamer.on_record = journal.add
            records = streamer.run()
        if journal.failure is not None:
            raise journal.failure
        sink.flush()
        try:
            _verify(plan, sink, records, threads, progress)
        except MachineError:
            (partial / OURS / JOURNAL).unlink()  # what it says is on disk is not: a rerun starts over
            raise
        notes = [*plan.alignment.notes, *integer_notes(plan), *licences(plan)[1], *_policy_notes(plan)]
        document, fingerprint = lineage(plan, records)
        document["notes"] = notes
        text = recipe_text(plan)
        _write_papers(partial, plan, document, text, render_card(plan, out.name, fingerprint, text, notes))
        files = sink.finish()
    finally:
        sink.close()
    verify_headers(plan, files)
    _install(partial, out, plan, files)
    error, of = rounding(plan, records)
    return Summary(
        out=str(out),
        method=plan.method.name,
        tensors=len(plan.tensors),
        merged=sum(t.program is not None for t in plan.tensors),
        parameters=sum(t.numel for t in plan.tensors),
        bytes_written=plan.layout.size,
        bytes_read=sum(t.bytes_read for t in plan.tensors),
        seconds=time.perf_counter() - started,
        resumed_segments=resumed,
        below_unit=below_unit(plan, records),
        rounding=error,
        rounding_of=of,
        fingerprint=fingerprint,
        notes=tuple(notes),
    )


def _policy_notes(plan: Plan) -> list[str]:
    notes: list[str] = []
    running = sum(t.name.endswith((".running_mean", ".running_var")) and t.program is not None for t in plan.tensors)
    if running:
        notes.append(
            f"{running} BatchNorm statistics were averaged, not extrapolated; re-estimate them on data before use"
        )
    folder = plan.alignment.donor.folder
    left = output.weights_in_subfolders(folder) if folder is not None else []
    if left:
        notes.append(
            f"weights in subfolders of the base are not part of the merge and were left behind: {', '.join(left[:5])}"
        )
    return notes
