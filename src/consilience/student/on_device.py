"""The two passes for a student on an accelerator: stored bytes travel once per tensor, arithmetic happens there.

    theta[s] = theta_0[s] + sum_k alpha[k, s] tau_k[s]          < g[s], tau_k[s] >

The same sums as the compiled blocks make for the CPU, in float32, one whole tensor at a time: what is held beside the
student is a few times its largest tensor.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from consilience.checkpoints.checkpoint import Bytes, Storage, TensorInfo, raw
from consilience.checkpoints.dtypes import TORCH_NAMES
from consilience.coefficients.coefficients import Alpha
from consilience.experts.block import Scratch
from consilience.experts.model import Source
from consilience.experts.stack import Stack


def suits(out: Any) -> bool:
    """Whether a tensor's passes run on the student's own device."""
    return out.device.type != "cpu"


def read_flat(info: TensorInfo, storage: Storage, buffer: Bytes | None = None) -> Any:
    """Return a stored tensor in its own type: flat, in this machine's memory, in ``buffer`` [nbytes] if given."""
    import torch

    kind = getattr(torch, TORCH_NAMES[info.plain.name])
    return torch.from_numpy(raw(storage, info, 0, info.numel, buffer)).view(kind)


def stored(info: TensorInfo, storage: Storage, device: Any) -> Any:
    """Return a stored tensor's values, flat and in float32, on a device."""
    return read_flat(info, storage).to(device).float()


def base(tensor: Stack, scratch: Scratch, device: Any) -> Any:
    """Return the base's values, with its own adapter if it has one."""
    info, storage = tensor.base.dense, tensor.base.storage
    assert info is not None
    assert storage is not None
    values = stored(info, storage, device)
    return values if tensor.base.pair is None else values + _product(tensor.base, scratch, device)


def _product(source: Source, scratch: Scratch, device: Any) -> Any:
    import torch

    assert source.pair is not None
    left, right = (torch.from_numpy(side).to(device) for side in scratch.factors(source, np.float32))
    return (source.pair.scale * (left @ right)).flatten()


def task_vector(source: Source, values: Any, scratch: Scratch) -> Any | None:
    """Return one expert's task vector on the device of the base's ``values``; None where the expert changes nothing."""
    delta: Any = None
    if source.dense is not None and source.storage is not None:
        delta = stored(source.dense, source.storage, values.device) - values
    if source.pair is not None:
        update = _product(source, scratch, values.device)
        delta = update if delta is None else delta + update
    return delta


def blend(tensor: Stack, alpha: Alpha, starts: Sequence[int], stops: Sequence[int], out: Any, scratch: Scratch) -> None:
    """Write the blend of one tensor into ``out``; ``alpha`` is [K, pieces]."""
    values = base(tensor, scratch, out.device)
    total = values.clone()
    for k, source in enumerate(tensor.rows):
        delta = task_vector(source, values, scratch)
        if delta is not None:
            for piece, (start, stop) in enumerate(zip(starts, stops, strict=True)):
                total[start:stop].add_(delta[start:stop], alpha=float(alpha[k, piece]))
    out.copy_(total)


def products(tensor: Stack, gradient: Any, starts: Sequence[int], stops: Sequence[int], scratch: Scratch) -> Alpha:
    """Return the inner products [pieces, K] of one tensor's gradient with the task vectors."""
    values = base(tensor, scratch, gradient.device)
    gradient = gradient.detach().float()
    out = np.zeros((len(starts), len(tensor.rows)))
    for k, source in enumerate(tensor.rows):
        delta = task_vector(source, values, scratch)
        if delta is not None:
            delta *= gradient
            for piece, (start, stop) in enumerate(zip(starts, stops, strict=True)):
                out[piece, k] = float(delta[start:stop].double().sum())
    return out
