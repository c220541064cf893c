"""The whole merge: plan, stream into OUT.partial, verify, install as OUT."""

import contextlib
import shutil
import threading
import time
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from consilience.checkpoints.checkpoint import raw
from consilience.checkpoints.files import stamp
from consilience.checkpoints.json_files import read_object
from consilience.checkpoints.safetensors_file import encode_header
from consilience.coefficients import save_coefficients
from consilience.engine import output
from consilience.engine.card import licences, render_card
from consilience.engine.differences import by_level
from consilience.engine.effect import effect_notes
from consilience.engine.journal import Journal, read_journal
from consilience.engine.lineage import lineage
from consilience.engine.load_check import LoadCheck, check_model
from consilience.engine.output import JOURNAL, LEARNING, PLAN, FileSink
from consilience.engine.plan import CORRECTION, Plan
from consilience.engine.stream import Piece, Streamer, check_copies, integer_notes, thread_count
from consilience.engine.summary import Summary, below_unit, rounding
from consilience.engine.unchanged import check_files, check_stamps, check_unchanged
from consilience.engine.verify import verify_headers, verify_segment
from consilience.engine.worker import Record
from consilience.errors import InputError, MachineError, one_line
from consilience.progress import NullProgress, Progress
from consilience.workdir import OURS, Workdir, json_text, workdir, write_file, write_json


def recipe_value(plan: Plan) -> dict[str, Any]:
    """Return the resolved recipe: what was given, with names, seed and every default that counts spelled out."""
    if plan.own_recipe is not None:
        return plan.own_recipe
    value: dict[str, Any] = plan.recipe.model_dump(mode="json", exclude_defaults=True)
    value = {"merge_method": plan.recipe.merge_method} | value | {"seed": plan.recipe.seed}
    names = iter([expert.name for expert in plan.experts])
    whole = [name for name, parameter in plan.method.parameters.items() if parameter.kind == "integer"]
    for key in whole:  # YAML's 10 was read as the number 10.0
        if isinstance(value.get("parameters", {}).get(key), float):
            value["parameters"][key] = int(value["parameters"][key])
    for entry in value.get("models", []):
        if plan.method.base == "unused" or entry["model"] != plan.recipe.base_model:
            entry["name"] = next(names)
    return value


def recipe_text(plan: Plan) -> str:
    """Return the resolved recipe as YAML, after those of the merges that it starts from.

    Comments before it say what of the recipe as it was read was replaced.
    """
    made = (place / OURS / "recipe.yaml" for place in plan.made.values())
    before = [path.read_text(encoding="utf-8") for path in made if path.is_file()]
    told = "".join(f"# {one_line(override.note)}\n" for override in plan.recipe.overrides)
    own = told + yaml.safe_dump(recipe_value(plan), sort_keys=False, allow_unicode=True)
    return "---\n".join([*before, own])


def _resume(work: Workdir, plan: Plan) -> dict[Piece, Record]:
    """Return the finished segments of an interrupted run of the same plan; discard any other partial output."""
    marker = work.path / PLAN
    try:
        same = marker.exists() and read_object(marker).get("digest") == plan.digest
    except InputError:
        same = False
    parts, final = output.part_paths(work.path, plan), output.final_paths(work.result, plan)
    for part, path in zip(parts, final, strict=True):
        if same and path.is_file() and not part.exists():  # stopped between renaming and installing
            path.rename(part)
    if same and all(path.is_file() for path in parts):
        return {(r.tensor, r.segment): r for r in read_journal(work.path / JOURNAL, plan)}
    marker.unlink(missing_ok=True)  # first: what is left must not be taken for this plan's
    work.remove_result()
    for path in (work.path / JOURNAL, *work.path.glob("weights-*.part")):
        path.unlink(missing_ok=True)
    write_file(marker, json_text({"digest": plan.digest}))
    return {}


def _write_heads(folder: Path, plan: Plan) -> None:
    """Write each expert's private tensors to ``heads/NAME.safetensors``."""
    for expert in plan.experts:
        names = plan.alignment.private.get(expert.name, [])
        if not names:
            continue
        sources = {name: expert.source(name) for name in names if _has(expert, name)}
        tensors = [(n, s.dense.plain, s.dense.shape) for n, s in sources.items() if s.dense is not None]
        header, _ = encode_header(tensors, {"format": "pt"})
        folder.mkdir(exist_ok=True)
        with open(folder / f"{expert.name}.safetensors", "wb") as file:
            file.write(header)
            for name, *_ in tensors:
                source = sources[name]
                assert source.dense is not None
                assert source.storage is not None
                file.write(raw(source.storage, source.dense, 0, source.dense.numel).data)


def _has(expert: Any, name: str) -> bool:
    in_model = expert.checkpoint is not None and name in expert.checkpoint.tensors
    return in_model or (expert.adapter is not None and name in expert.adapter.whole)


def _verify(plan: Plan, sink: FileSink, records: dict[Piece, Record], threads: int, progress: Progress) -> None:
    held = threading.local()

    def one(record: Record) -> int:
        if not hasattr(held, "buffer"):
            held.buffer = np.empty(1 << 22, np.uint8)
        return verify_segment(plan, sink, record, held.buffer)

    progress.phase("verifying", sum(tensor.nbytes for tensor in plan.tensors), "bytes")
    with ThreadPoolExecutor(threads) as pool:
        for nbytes in pool.map(one, list(records.values())):
            progress.advance(nbytes)


def _write_papers(result: Path, plan: Plan, document: dict[str, Any], text: str, card: str) -> None:
    """Write everything but the weights: lineage, recipe, heads, the donor's other files, the card."""
    ours = result / OURS
    ours.mkdir()
    _write_heads(ours / "heads", plan)
    write_json(ours / "lineage.json", document)
    (ours / "recipe.yaml").write_text(text, encoding="utf-8")
    if plan.coefficients is not None:
        save_coefficients(ours, plan.coefficients)
    if plan.correction is not None:
        shutil.copytree(plan.correction, ours / CORRECTION)
    output.copy_side_files(result, plan)
    (result / "README.md").write_text(card, encoding="utf-8")


def check_learned(plan: Plan) -> None:
    """Refuse a plan whose coefficients are still to be learned, statistics to be collected, or models to be made.

    Raises:
        InputError: names the method, or the stage.
    """
    if plan.stages:
        raise InputError(
            f"{plan.where}: stage {next(iter(plan.stages))!r} has not been merged yet; call merge_recipe, which does "
            "that first"
        )
    if plan.unlearned:
        raise InputError(
            f"{plan.where}: method {plan.method.name!r} has not learned from its rows yet; call merge_recipe, which "
            "learns first"
        )


def run_merge(
    plan: Plan,
    out: Path,
    *,
    force: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
    check: LoadCheck | None = None,
) -> Summary:
    """Carry a plan out: after it, OUT is complete, verified and on disk, or (on any error) absent.

    An error of the machine or an interrupt keeps OUT.partial, and the same call continues there; an error of the input
    leaves nothing behind.

    Raises:
        InputError: OUT is not free, or the data cannot be merged.
        MachineError: the disk is full or failed; the partial output is kept.
        KeyboardInterrupt: passed on; the partial output is kept.
    """
    check_learned(plan)
    with merge_workdir(plan, out, force=force) as work:
        loader = check_model(plan, check or LoadCheck(), progress) if work.delivered is None else ""
        return merge_in(plan, work, loader=loader, threads=threads, progress=progress)


@contextlib.contextmanager
def merge_workdir(
    plan: Plan, out: Path, *, force: bool, digest: str = "", folder: bool | None = None
) -> Generator[Workdir]:
    """Hold OUT for a merge; see ``workdir``. ``digest`` and ``folder`` are the plan's and its donor's by default."""
    folder = plan.alignment.donor.folder is not None if folder is None else folder
    output.check_plan(out, plan, folder=folder)
    check_copies(plan)
    named = output.inputs(plan)
    identity, keep = digest or plan.digest, (LEARNING,)
    with workdir(out, identity, folder=folder, force=force, inputs=named, keep=keep, summarised=True) as work:
        yield work


def merge_in(
    plan: Plan, work: Workdir, *, loader: str, threads: int | None = None, progress: Progress | None = None
) -> Summary:
    """Merge in a folder that is held, and deliver; if an earlier run had delivered, return what that one reported.

    ``loader`` is what ``check_model`` said of the plan.
    """
    if work.delivered is not None:
        summary = Summary.from_dict(work.delivered)
    else:
        started = time.perf_counter()
        summary = stream_in(plan, work, loader=loader, threads=threads, progress=progress)
        summary = replace(summary, seconds=time.perf_counter() - started)
        work.deliver(summary.to_dict())
    return replace(summary, notes=(*summary.notes, *work.notes))


def stream_in(
    plan: Plan, work: Workdir, *, loader: str, threads: int | None = None, progress: Progress | None = None
) -> Summary:
    """Leave the merged model in ``work.result``, complete and verified.

    Raises:
        InputError: the data cannot be merged, or has changed meanwhile.
        MachineError: the disk is full or failed.
    """
    records = _resume(work, plan)
    resumed, threads, progress = len(records), thread_count(threads), progress or NullProgress()
    sizes = {r.tensor: plan.tensors[r.tensor] for r in records.values()}
    work.needs = output.output_size(plan)
    output.check_space(work.out, work.needs, sum(t.nbytes for t in sizes.values()))
    beside = [stamp(path) for path in output.beside(plan)]
    sink = FileSink(work.path, plan)
    try:
        streamer = Streamer(plan, sink, threads=threads, progress=progress)
        streamer.done = dict(records)
        with Journal(work.path / JOURNAL, sink.flush) as journal:
            streamer.on_record = journal.add
            records = _streamed(plan, streamer)
        if journal.failure is not None:
            raise journal.failure
        try:
            with ThreadPoolExecutor(1) as pool:  # the disk is busy with what the processor reads back
                flushed = pool.submit(sink.flush)
                _verify(plan, sink, records, threads, progress)
                flushed.result()
        except MachineError:
            (work.path / JOURNAL).unlink()  # what it says is on disk is not: a rerun starts over
            raise
        notes = [*plan.alignment.notes, *plan.notes, *by_level(plan.differences, "note"), *integer_notes(plan)]
        notes += [*licences(plan)[1], *_policy_notes(plan), *effect_notes(plan, records)]
        document, fingerprint = lineage(plan, records)
        document |= {"recipe": recipe_value(plan), "defaults": plan.defaults, "loader": loader, "notes": notes}
        document |= plan.facts
        text = recipe_text(plan)
        if work.folder:
            card = render_card(plan, work.out.name, fingerprint, text, notes)
            _write_papers(work.new_result(), plan, document, text, card)
            check_stamps(beside)
        files = sink.finish(work.result)
    finally:
        sink.close()
    verify_headers(plan, files)
    check_unchanged(plan, streamer.first, records)
    error, of = rounding(plan, records)
    return Summary(
        out=str(work.out),
        method=plan.method.name,
        tensors=len(plan.tensors),
        merged=sum(t.program is not None for t in plan.tensors),
        parameters=sum(t.numel for t in plan.tensors),
        bytes_written=plan.layout.size,
        bytes_read=sum(t.bytes_read for t in plan.tensors),
        seconds=0.0,
        resumed_segments=resumed,
        below_unit=below_unit(plan, records),
        rounding=error,
        rounding_of=of,
        fingerprint=fingerprint,
        notes=tuple(notes),
        warnings=tuple(by_level(plan.differences, "warning")),
        loader=loader,
        extra_passes=streamer.missed,
    )


def _streamed(plan: Plan, streamer: Streamer) -> dict[Piece, Record]:
    """Run the merge; what goes wrong because an input changed meanwhile is blamed on that."""
    try:
        return streamer.run()
    except (InputError, ArithmeticError, LookupError, ValueError):
        check_files(plan)
        raise


def _policy_notes(plan: Plan) -> list[str]:
    notes = output.tie_notes(plan)
    running = sum(t.name.endswith((".running_mean", ".running_var")) and t.program is not None for t in plan.tensors)
    if running:
        notes.append(
            f"{running} BatchNorm statistics were averaged, not extrapolated; re-estimate them on data before use"
        )
    folder = plan.alignment.donor.folder
    donor = plan.alignment.donor.checkpoint
    modules = donor.modules if donor is not None else ()
    left = output.weights_in_subfolders(folder, modules) if folder is not None else []
    if left:
        notes.append(
            f"weights in subfolders of the base are not part of the merge and were left behind: {', '.join(left[:5])}"
        )
    return notes
