"""Which of a base's stored tensors is the weight of a linear layer: told by its modules, without its weights."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from consilience.student.names import match_names, named_tensors
from consilience.tasks.load import explained, loader_of, quiet


@dataclass(frozen=True)
class Layout:
    """What a base's tensors are.

    ``linear`` maps stored tensors to the modules that LoRA adapts, ``kinds`` says what each of the others is, and
    ``modules`` has the names of all modules. ``task_type`` is PEFT's name of what the model does.
    """

    linear: Mapping[str, str]
    kinds: Mapping[str, str]
    modules: tuple[str, ...]
    task_type: str


def layout(folder: Path, shapes: Mapping[str, tuple[int, ...]], *, trust_remote_code: bool = False) -> Layout:
    """Return what the stored tensors of a base are.

    The output layer is not among ``linear``, as with PEFT's "all-linear", nor is a weight that two modules share.

    Args:
        folder: a Hugging Face folder.
        shapes: shape of every stored tensor.
        trust_remote_code: run ``.py`` files of the folder.

    Raises:
        InputError: its config names no model that transformers knows.
    """
    model = _outline(folder, trust_remote_code)
    held = named_tensors(model)
    uses = Counter(id(value) for value in held.values())
    names = match_names(shapes, {name: tuple(value.shape) for name, value in held.items()})
    linear: dict[str, str] = {}
    kinds = dict.fromkeys(shapes, "others")
    for stored, name in names.items():
        path, _, last = name.rpartition(".")
        kind = _kind(model, model.get_submodule(path), last)
        if kind == "linear" and uses[id(held[name])] == 1:
            linear[stored] = path
        else:
            kinds[stored] = "shared layers" if kind == "linear" else kind
    modules = tuple(name for name, _ in model.named_modules() if name)
    encodes = getattr(model.config, "is_encoder_decoder", False)
    return Layout(linear, kinds, modules, "SEQ_2_SEQ_LM" if encodes else "CAUSAL_LM")


def _kind(model: Any, module: Any, last: str) -> str:
    from torch import nn

    if isinstance(module, nn.Embedding):
        return "embeddings"
    if module is model.get_output_embeddings():
        return "output layer"
    if "norm" in type(module).__name__.lower():
        return "norms"
    if last == "bias":
        return "biases"
    return "linear" if type(module) is nn.Linear and last == "weight" else "others"


def _outline(folder: Path, trust_remote_code: bool) -> Any:
    """Build the model of a folder's config without weights."""
    import torch
    import transformers

    with quiet(), explained(str(folder), "its config.json names no model to build"), torch.device("meta"):
        config: Any = transformers.AutoConfig.from_pretrained(
            folder, trust_remote_code=trust_remote_code, local_files_only=True
        )
        return loader_of(config).from_config(config, trust_remote_code=trust_remote_code)
