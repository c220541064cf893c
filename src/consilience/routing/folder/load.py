"""Load a routed model, and add or remove an expert of one on disk."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

from consilience.checkpoints.files import path_of
from consilience.errors import InputError
from consilience.routing.folder import store
from consilience.routing.instructions.semantics import Instructions
from consilience.routing.model import Routing
from consilience.tasks.load import load_model, load_tokenizer, require_transformers
from consilience.workdir import OURS


def load_routed(
    folder: Path | str,
    *,
    base: str | None = None,
    device: str = "cpu",
    dtype: str = "auto",
    trust_remote_code: bool = False,
    allow_endpoint: bool = False,
) -> Any:
    """Load a routed model: a ``transformers`` model with ``routing`` (``consilience.routing.model.Routing``) on top.

    ``generate``, batches of mixed tasks, caches and pipelines work as with the base. ``model.tokenizer`` is the base's.

    Args:
        folder: what ``consilience route build`` made.
        base: where the base is, if it has moved.
        device: a torch device.
        dtype: of the weights, such as "float32"; "auto": as the base's are stored.
        trust_remote_code: run ``.py`` files that come with the base.
        allow_endpoint: let queries go to the endpoint that describes them, if the model was built with one.

    Raises:
        InputError: the folder is malformed, or its base is not there or another model.
        MachineError: not enough memory.
    """
    require_transformers("routing")
    folder = path_of(folder, "folder")
    description = store.read_description(folder)
    place = store.find_base(description.base, folder, base)
    if dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise InputError(f"dtype {dtype!r}: use auto, float32, bfloat16 or float16")
    tokenizer = load_tokenizer(place, trust_remote_code=trust_remote_code)
    experts = [store.read_expert(folder, name) for name in description.experts]
    model = load_model(place, device=device, trust_remote_code=trust_remote_code, dtype=dtype).requires_grad_(False)
    semantics = None
    if description.instructions is not None:

        def plain() -> AbstractContextManager[None]:
            return model.routing.silent()

        semantics = read_semantics(folder, description, model, tokenizer, plain, allow_endpoint=allow_endpoint)
    Routing(model, experts, description.settings, tokenizer, semantics)
    model.tokenizer = tokenizer
    return model


def read_semantics(
    folder: Path,
    description: store.Description,
    model: Any,
    tokenizer: Any,
    plain: Callable[[], AbstractContextManager[None]],
    *,
    allow_endpoint: bool = False,
) -> Instructions:
    """Return the global router of a routed model's folder; ``plain`` switches the experts of ``model`` off.

    Raises:
        InputError: it is malformed.
    """
    where = str(folder / OURS / store.ROUTING)
    return Instructions.load(
        description.instructions,
        store.read_instructions(folder, str(description.tensors)),
        model,
        tokenizer,
        plain=plain,
        where=f"{where}: instructions",
        allow_endpoint=allow_endpoint,
    )
