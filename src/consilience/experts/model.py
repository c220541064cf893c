"""A base or an expert as values: a dense checkpoint, a LoRA adapter on a base, or both.

A *task vector* is the difference between an expert and the base. It stays in the form it came in: two dense slices and
a subtraction, or low-rank factors, as long as the method allows.
"""

from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from consilience.checkpoints.adapter import Adapter, LoraPair, open_adapter
from consilience.checkpoints.adapter_files import adapter_files
from consilience.checkpoints.checkpoint import Checkpoint, Storage, TensorInfo
from consilience.checkpoints.files import Stamp
from consilience.checkpoints.open import holds_model, open_checkpoint
from consilience.checkpoints.reference import resolve
from consilience.checkpoints.rows import Matrix
from consilience.experts.ties import ties_of


@dataclass(frozen=True, slots=True)
class Source:
    """Where one tensor of one model comes from.

    ``dense`` (None: the base's own value) plus the low-rank update ``pair``, if any.
    """

    storage: Storage | None = None
    dense: TensorInfo | None = None
    pair_storage: Storage | None = None
    pair: LoraPair | None = None

    @property
    def untouched(self) -> bool:
        """Whether this is the base's own value."""
        return self.dense is None and self.pair is None

    @property
    def nbytes(self) -> int:
        """Bytes read to make the tensor once."""
        factors = self.pair.a.nbytes + self.pair.b.nbytes if self.pair else 0
        return factors + (self.dense.stored_nbytes if self.dense else 0)


@dataclass(frozen=True)
class Model:
    """One participant of a merge. ``checkpoint`` is None for an adapter that stands on the recipe's base.

    ``names`` has, for tensors that were renamed after the base's files, what the model itself calls them, ``assembled``
    the tensors that its files hold in parts.
    """

    name: str
    reference: str
    checkpoint: Checkpoint | None
    adapter: Adapter | None = None
    names: dict[str, str] = field(default_factory=dict[str, str])
    assembled: dict[str, Matrix] = field(default_factory=dict[str, Matrix])

    @property
    def folder(self) -> Path | None:
        """The folder with this model's card, config and tokenizer."""
        if self.checkpoint is not None:
            return self.checkpoint.folder
        return self.adapter.folder if self.adapter else None

    def stamps(self) -> list[Stamp]:
        """Return the stamps of all files the model is read from, at the time they were opened."""
        parts = [self.checkpoint, self.adapter.checkpoint if self.adapter else None]
        return [entry for part in parts if part is not None for entry in part.storage.stamps()]

    def identity(self) -> list[tuple[str, int, int]]:
        """Return (file, size, modification time) of everything the model is read from."""
        return [(entry.path, entry.size, entry.modified) for entry in self.stamps()]

    def close(self) -> None:
        """Release files."""
        for part in (self.checkpoint, self.adapter.checkpoint if self.adapter else None):
            if part is not None:
                part.storage.close()

    @cached_property
    def ties(self) -> dict[str, str]:
        """Alias -> stored tensor for the other names, stored or not, of this model's tied tensors."""
        return ties_of(self.checkpoint) if self.checkpoint is not None else {}

    @property
    def named(self) -> dict[str, TensorInfo]:
        """This model's tensors by every name that ties give them."""
        tensors = self.checkpoint.tensors if self.checkpoint is not None else {}
        return {alias: replace(tensors[target], name=alias) for alias, target in self.ties.items()} | tensors

    def source(self, name: str, stand_in: str | None = None) -> Source:
        """Return where tensor ``name`` comes from.

        A model that does not hold it holds it under another name of the same tie, its own or else ``stand_in``.
        """
        dense = storage = pair = pair_storage = None
        if self.checkpoint is not None:
            tensors = self.checkpoint.tensors
            dense = tensors.get(name)
            if dense is None:
                names = (self.ties.get(name), stand_in)
                # None: of a module that this model does not have
                dense = next((tensors[other] for other in names if other in tensors), None)
            storage = self.checkpoint.storage if dense is not None else None
        if self.adapter is not None:
            pair_storage = self.adapter.checkpoint.storage
            if name in self.adapter.whole:
                dense, storage = self.adapter.whole[name], pair_storage
            pair = self.adapter.pairs.get(name)
        if name in self.assembled:
            storage, dense = self.assembled[name]
        return Source(storage, dense, pair_storage if pair else None, pair)

    def stored(self, name: str) -> Matrix | None:
        """Return a tensor as the model itself has it, and where; None: it is the base's, if any."""
        if name in self.assembled:
            return self.assembled[name]
        if self.adapter is not None and name in self.adapter.whole:
            return self.adapter.checkpoint.storage, self.adapter.whole[name]
        if self.checkpoint is not None and name in self.checkpoint.tensors:
            return self.checkpoint.storage, self.checkpoint.tensors[name]
        return None


def open_model(name: str, reference: str, root: Path | None = None, *, base: bool = False) -> Model:
    """Open a model, adapter or ``model+adapter`` by reference, from headers alone.

    A folder that holds both a model and an adapter is the adapter, and as a ``base`` the model.
    """
    found = resolve(reference, root)
    if found.adapter is not None:
        return Model(name, reference, open_checkpoint(found.model), open_adapter(found.adapter))
    if adapter_files(found.model) is None or (base and holds_model(found.model)):
        return Model(name, reference, open_checkpoint(found.model))
    return Model(name, reference, None, open_adapter(found.model))
