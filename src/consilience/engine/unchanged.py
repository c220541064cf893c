"""Inputs that change while they are merged: no file may be installed that mixes two states of them."""

from collections.abc import Sequence
from pathlib import Path

from consilience.checkpoints.files import Stamp, stamp
from consilience.engine.lineage import fingerprints, tensor_fingerprint
from consilience.engine.plan import Plan
from consilience.engine.stream import Piece
from consilience.engine.worker import Record
from consilience.errors import InputError
from consilience.experts.block import Marks
from consilience.experts.expert_set import Opened
from consilience.experts.model import Model
from consilience.kernels.fingerprint import MASK


def check_files(plan: Opened) -> None:
    """Compare every input file's size, modification time and inode with what they were when the merge was planned.

    Raises:
        InputError: names the file that changed.
    """
    check_stamps([before for model in plan.models for before in model.stamps()])


def check_stamps(stamps: Sequence[Stamp], work: str = "merge") -> None:
    """Compare files' sizes, modification times and inodes with what they were; ``work`` is what was made of them.

    Raises:
        InputError: names the file that changed.
    """
    for before in stamps:
        if not _same_but_for_status(before, _now(before)):
            raise _changed(before.path, work)


def check_unchanged(plan: Plan, first: dict[Piece, Marks], records: dict[Piece, Record]) -> None:
    """Make sure that every input was the same from the plan to the last pass.

    Beyond ``check_files``, where the time of the last change of a file's status differs, as after ``chmod``, ``ln`` or
    a write whose time was set back, the tensors are read again and their fingerprints compared. What was read in
    several passes must have been the same in the first and the last.

    Args:
        plan: what was merged.
        first: fingerprint sums of the first pass over each piece that was read more than once.
        records: what is known of every piece after the last pass.

    Raises:
        InputError: names the file that changed.
    """
    for piece, marks in first.items():
        tensor = plan.tensors[piece[0]]
        for source, before, after in zip((tensor.base, *tensor.rows), marks, records[piece].inputs, strict=True):
            if [sums & MASK for sums in before] != [sums & MASK for sums in after] and source.storage is not None:
                assert source.dense is not None
                raise _changed(source.storage.stamps()[source.dense.file].path)
    check_files(plan)
    for model in plan.models:
        for before in model.stamps():
            if _now(before) != before and not _same_values(plan, model, before, records):
                raise _changed(before.path)


def check_still(opened: Opened) -> None:
    """Make sure that models whose values were read once are what they were when they were opened.

    Raises:
        InputError: names the file that changed.
    """
    check_files(opened)
    for before in (before for model in opened.models for before in model.stamps()):
        if _now(before) != before:
            raise _changed(before.path)


def _same_but_for_status(before: Stamp, after: Stamp | None) -> bool:
    return after is not None and after._replace(changed=before.changed) == before


def _now(before: Stamp) -> Stamp | None:
    try:
        return stamp(Path(before.path))
    except OSError:
        return None


def _changed(path: str, work: str = "merge") -> InputError:
    verb = "merged" if work == "merge" else "used"
    return InputError(f"{path}: changed while it was being {verb}; leave it alone and run the {work} again")


def _same_values(plan: Plan, model: Model, before: Stamp, records: dict[Piece, Record]) -> bool:
    """Read a model's tensors of one file again; an adapter's small files are not worth the trouble."""
    checkpoint = model.checkpoint
    if checkpoint is None or before not in checkpoint.storage.stamps():
        return False
    known = fingerprints(plan, records)[0].get(model.name, {})
    number = checkpoint.storage.stamps().index(before)
    return all(
        known[tensor.name] == tensor_fingerprint(checkpoint, tensor)
        for tensor in checkpoint.tensors.values()
        if tensor.file == number and tensor.name in known
    )
