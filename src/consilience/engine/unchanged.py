"""Inputs that change while they are merged: no file may be installed that mixes two states of them."""

from pathlib import Path

from consilience.checkpoints.files import Stamp, stamp
from consilience.engine.block import Marks
from consilience.engine.kernels.fingerprint import MASK
from consilience.engine.lineage import fingerprints, tensor_fingerprint
from consilience.engine.plan import Plan
from consilience.engine.stream import Piece
from consilience.engine.worker import Record
from consilience.errors import InputError
from consilience.experts.model import Model


def check_unchanged(plan: Plan, first: dict[Piece, Marks], records: dict[Piece, Record]) -> None:
    """Compare every input file with what it was when the merge was planned.

    Size, modification time and inode must be the same. Where only the time of the last change of status differs, as
    after ``chmod``, ``ln`` or a write whose time was set back, the tensors are read again and their fingerprints
    compared. What was read in several passes must have been the same in the first and the last.

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
    for model in plan.models:
        for before in model.stamps():
            after = _now(before)
            if after == before:
                continue
            touched = after is not None and after._replace(changed=before.changed) == before
            if not touched or not _same_values(plan, model, before, records):
                raise _changed(before.path)


def _now(before: Stamp) -> Stamp | None:
    try:
        return stamp(Path(before.path))
    except OSError:
        return None


def _changed(path: str) -> InputError:
    return InputError(f"{path}: changed while it was being merged; leave it alone and run the merge again")


def _same_values(plan: Plan, model: Model, before: Stamp, records: dict[Piece, Record]) -> bool:
    """Read a model's tensors of one file again; an adapter's small files are not worth the trouble."""
    checkpoint = model.checkpoint
    if checkpoint is None or before not in checkpoint.storage.stamps():
        return False
    known = fingerprints(plan, records)[0].get(model.name, {})
    number = checkpoint.storage.stamps().index(before)
    return all(
        known[name] == tensor_fingerprint(checkpoint, tensor)
        for name, tensor in checkpoint.tensors.items()
        if tensor.file == number and name in known
    )
