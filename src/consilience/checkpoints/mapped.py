"""A stored tensor as torch sees it, without a copy: the pages of its file, which are the page cache's."""

import torch
from torch import Tensor

from consilience.checkpoints.checkpoint import Storage, TensorInfo
from consilience.checkpoints.dtypes import TORCH_NAMES


def mapped(storage: Storage, tensor: TensorInfo) -> Tensor:
    """Return a tensor in the dtype it is stored in, not to be written to; a copy if it does not lie at its boundary.

    Raises:
        InputError: the file has become shorter.
    """
    held = storage.view(tensor)
    aligned = held if held.ctypes.data % tensor.dtype.itemsize == 0 else held.copy()
    return torch.from_numpy(aligned).view(getattr(torch, TORCH_NAMES[tensor.dtype.name])).view(tensor.shape)
