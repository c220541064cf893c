"""Adapters' files made what PEFT loads: tensors under its own names, on a model with the adapter's vocabulary size."""

import shutil
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from consilience.checkpoints.checkpoint import Checkpoint, TensorInfo
from consilience.checkpoints.json_files import read_object
from consilience.checkpoints.open import open_checkpoint
from consilience.checkpoints.peft_names import as_saved, sort_tensors, trained_whole
from consilience.errors import InputError

_FILES = ("adapter_model.safetensors", "adapter_model.bin")


def _opened(adapter: Path) -> Checkpoint | None:
    file = next((adapter / name for name in _FILES if (adapter / name).is_file()), None)
    return open_checkpoint(file) if file is not None else None


@contextmanager
def loadable(adapter: Path) -> Generator[Path]:
    """Yield a folder that PEFT reads: the adapter's own, or one with its tensors as ``save_pretrained`` names them.

    PEFT does not know names that training wrappers or another adapter's name changed.
    """
    checkpoint = _opened(adapter)
    if checkpoint is None:
        yield adapter
        return
    try:
        renames = as_saved(checkpoint.tensors)
        wrong = [old for old, new in renames.items() if old != new and new not in checkpoint.tensors]
        if not wrong:
            yield adapter
            return
        with TemporaryDirectory(prefix="consilience-adapter-") as folder:
            _write(checkpoint, renames, Path(folder))
            shutil.copy(adapter / "adapter_config.json", folder)
            yield Path(folder)
    finally:
        checkpoint.storage.close()


def _write(checkpoint: Checkpoint, renames: dict[str, str], folder: Path) -> None:
    import torch
    from safetensors.torch import save_file

    from consilience.checkpoints.dtypes import TORCH_NAMES

    state: dict[str, torch.Tensor] = {}
    for name, info in checkpoint.tensors.items():
        if info.dtype.name in TORCH_NAMES:
            kind = getattr(torch, TORCH_NAMES[info.dtype.name])
            state.setdefault(renames[name], torch.from_numpy(checkpoint.read(name)).view(kind).reshape(info.shape))
    save_file(state, folder / _FILES[0])


def resize_vocabulary(model: Any, adapter: Path) -> None:
    """Give a model the vocabulary size that an adapter's saved embedding or head has.

    Raises:
        InputError: new rows of one of the two are in no file.
    """
    checkpoint = _opened(adapter)
    if checkpoint is None:
        return
    try:
        whole = sort_tensors(checkpoint.tensors, str(adapter)).whole
    except InputError:
        return  # of another kind than LoRA: PEFT loads it or says why not
    finally:
        checkpoint.storage.close()
    layers = _vocabulary(model)
    before, saved = {}, dict[str, TensorInfo]()
    for name, layer in layers.items():
        before[name] = layer.weight.shape[0]
        if f"{name}.weight" in whole:
            saved[name] = whole[f"{name}.weight"]
    sizes = {info.shape[0] for name, info in saved.items() if info.shape[0] != before[name]}
    if len(sizes) != 1:
        return
    after = sizes.pop()
    config = read_object(adapter / "adapter_config.json")
    same = {id(layers[name].weight) for name in saved if not trained_whole(config, f"{name}.weight")}
    absent = {name: layer for name, layer in layers.items() if name not in saved and after > before[name]}
    lost = [name for name, layer in absent.items() if id(layer.weight) not in same]
    if lost:
        raise InputError(
            f"{adapter}: was trained on {after} tokens, and the rows of {lost[0]!r} that the base lacks are in no "
            "file; give the resized base that it was trained on"
        )
    model.resize_token_embeddings(after, mean_resizing=False)


def _vocabulary(model: Any) -> dict[str, Any]:
    """Return a model's input and output embeddings by module name."""
    found = [model.get_input_embeddings(), model.get_output_embeddings()]
    return {name: module for name, module in model.named_modules() if any(module is layer for layer in found)}
