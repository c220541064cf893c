"""The loss of a batch on response tokens only.

The output layer is a fifth of a small model with a large vocabulary, and most of its rows would be thrown away: a hook
hands it the states at scored positions only. What the model does to its logits afterwards (a scale, a cap) still
happens, so this holds for any architecture.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from consilience.tasks.encoding import Encoded

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Batch:
    """B rows padded on the right, with N scored tokens.

    ``ids`` [B, T]; the token ``targets[j]`` is predicted at (``rows[j]``, ``columns[j]``); ``tasks[j]`` is the task of
    its row. There is no attention mask: under causal attention nothing that counts comes after the padding.
    """

    ids: "Tensor"
    rows: "Tensor"
    columns: "Tensor"
    targets: "Tensor"
    tasks: "Tensor"


def collate(examples: Sequence[Encoded], tasks: Sequence[int], device: Any = "cpu") -> Batch:
    """Pad labelled sequences, the i-th of task ``tasks[i]``, to one batch."""
    import torch

    ids = torch.zeros(len(examples), max(len(one.inputs) for one in examples), dtype=torch.long)
    for i, one in enumerate(examples):
        ids[i, : len(one.inputs)] = torch.tensor(one.inputs)
    rows = [i for i, one in enumerate(examples) for _ in one.positions]
    columns = [position for one in examples for position in one.positions]
    targets = [token for one in examples for token in one.targets]
    lists = (rows, columns, targets, [tasks[i] for i in rows])
    return Batch(ids.to(device), *(torch.tensor(values).to(device) for values in lists))


def token_losses(model: Any, batch: Batch) -> "Tensor":
    """Nats of every scored token [N], in float32; ``model`` is a causal language model of transformers."""
    import torch

    head = model.get_output_embeddings()

    def narrow(_module: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return (inputs[0][batch.rows, batch.columns][None], *inputs[1:])

    handle = head.register_forward_pre_hook(narrow)
    try:
        logits = model(input_ids=batch.ids, use_cache=False).logits[0]
    finally:
        handle.remove()
    return torch.nn.functional.cross_entropy(logits.float(), batch.targets, reduction="none")


def batch_loss(nats: "Tensor", tasks: "Tensor") -> tuple["Tensor", dict[int, float]]:
    """Return the mean over the batch's tasks of each one's mean loss per token, and those means by task.

    Tasks count alike, however long their answers are; with one task it is the mean over tokens. ``nats`` and ``tasks``
    are [N].
    """
    import torch

    means = {int(task): nats[tasks == task].mean() for task in torch.unique(tasks)}
    return torch.stack(list(means.values())).mean(), {task: float(mean.detach()) for task, mean in means.items()}
