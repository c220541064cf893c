"""Named tensors on disk: open from headers alone, read any slice without reading the rest."""

from consilience.checkpoints.checkpoint import Checkpoint, MemoryStorage, TensorInfo
from consilience.checkpoints.dtypes import DTYPES, DType
from consilience.checkpoints.open import open_checkpoint

__all__ = ["DTYPES", "Checkpoint", "DType", "MemoryStorage", "TensorInfo", "open_checkpoint"]
