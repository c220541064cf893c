"""What task vectors do to activations: inner products of their outputs, from one forward pass of every expert.

    gram[k, i, j] = 1/n_k < X_k tau_i^T, X_k tau_j^T >_F

X_k [n_k, in] is what a module is given at the n_k tokens of expert k's calibration rows while the model holds expert
k's weights. Nothing is differentiated and nothing of the size of a layer's activations is kept: each module's inputs
meet the task vectors as they go by, a block of rows at a time. Factored task vectors tau = L R are never multiplied
out: with P_i = X R_i^T,

    < P_i L_i^T, P_j L_j^T > = sum( (P_i^T P_j) * (L_i^T L_j) )            [r_i, r_j] matrices only.
"""

import contextlib
from collections.abc import Collection, Generator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from consilience.errors import InputError
from consilience.student.bank import Bank
from consilience.student.calibration import Batch, Sample, batches, each_expert
from consilience.student.low_rank import Factors
from consilience.student.student import Student

if TYPE_CHECKING:
    from torch import Tensor

    from consilience.learned.run import Workshop

Matrix = npt.NDArray[np.float64]
#: Bound on one block of outputs [K, rows, n] and on the block of task vectors that makes it, in bytes.
BLOCK_BYTES = 32 << 20


@dataclass(frozen=True)
class Use:
    """A module that multiplies its inputs by the merged matrix ``name``.

    ``kind``: "columns": X tau^T (Linear, stored [out, in]); "rows": X tau (Conv1D, stored [in, out]); "ids": the rows
    tau[ids] (Embedding).
    """

    name: str
    module: Any
    kind: Literal["columns", "rows", "ids"]


def uses_of(student: Student) -> list[Use]:
    """Return the modules that own a merged matrix; a tied matrix has several."""
    import torch
    from transformers.pytorch_utils import Conv1D

    kinds: Any = ((torch.nn.Linear, "columns"), (Conv1D, "rows"), (torch.nn.Embedding, "ids"))
    names = {id(student.parameters[name]): name for name in student.bank.tensors}
    found: list[Use] = []
    for module in student.model.modules():
        name = names.get(id(getattr(module, "weight", None)))
        kind = next((kind for one, kind in kinds if isinstance(module, one)), None)
        if name is not None and kind is not None:
            found.append(Use(name, module, kind))
    return found


def collect_grams(shop: "Workshop", experts: Collection[int]) -> dict[str, Matrix]:
    """Return ``gram`` [K, K, K] of every merged matrix that some module multiplies by, summed over its modules.

    Args:
        shop: the student and its samples; the student holds an expert's weights afterwards.
        experts: whose rows are read; the others' part is 0.

    Raises:
        InputError: an activation or a task vector is not finite.
    """
    student, count = shop.student, len(shop.student.bank.experts)
    uses = uses_of(student)
    out = {use.name: np.zeros((count, count, count)) for use in uses}
    shop.run.progress.phase("forward passes", sum(s.expert in experts for s in shop.samples), "samples")
    tokens = pass_tokens(shop.samples, shop.tokens)
    for expert, chosen in each_expert(shop.samples):
        if expert not in experts:
            continue
        student.become(expert)
        totals = [np.zeros((count, count)) for _ in uses]
        seen = [0 for _ in uses]
        for batch in batches(shop.samples, chosen, tokens):
            with _listening(student, uses, _mask(batch), totals, seen):
                inputs, where, _ = batch.inputs(student.model)
                shop.reader.readout.states(inputs, where)
            shop.run.progress.advance(len(batch.samples))
        for use, total, n in zip(uses, totals, seen, strict=True):
            if not np.isfinite(total).all():
                raise InputError(
                    f"{student.bank.experts[expert]}: its activations at {use.name!r} are not finite; use "
                    "precision=float32"
                )
            out[use.name][expert] += total / max(n, 1)
    return out


def _mask(batch: Batch) -> "Tensor | None":
    """Which of a padded batch's positions hold tokens [B, T]; None: all."""
    import torch

    widths = torch.tensor([len(sample.encoded.inputs) for sample in batch.samples])
    width = int(widths.max())
    return None if bool((widths == width).all()) else torch.arange(width) < widths[:, None]


@contextlib.contextmanager
def _listening(
    student: Student, uses: list[Use], mask: "Tensor | None", totals: list[Matrix], seen: list[int]
) -> Generator[None]:
    """Within the context a forward pass adds every use's Gram matrix to ``totals`` and its tokens to ``seen``."""
    import torch

    handles: list[Any] = []
    device = torch.device(student.settings.device).type
    for number, use in enumerate(uses):

        def hook(_module: Any, args: Any, kwargs: Any, number: int = number, use: Use = use) -> None:
            x = tokens_of(args[0] if args else next(iter(kwargs.values())), mask, ids=use.kind == "ids")
            # Inner products of nearly equal vectors need more than autocast's bfloat16.
            with torch.autocast(device, enabled=False):
                totals[number] += gram(student.bank, use, x)
            seen[number] += len(x)

        handles.append(use.module.register_forward_pre_hook(hook, with_kwargs=True))
    try:
        with torch.no_grad(), student.compute():
            yield
    finally:
        for handle in handles:
            handle.remove()


def tokens_of(x: "Tensor", mask: "Tensor | None", *, ids: bool = False) -> "Tensor":
    """Return a module's inputs [n, in] (``ids``: [n]) without the positions that a mask [B, T] leaves out."""
    lead = x.shape if ids else x.shape[:-1]
    flat = x.reshape(-1) if ids else x.reshape(-1, x.shape[-1])
    # Anything laid out otherwise (an image's patches, what a router chose) is not by positions.
    if mask is not None and lead in (mask.shape, (mask.numel(),)):
        return flat[mask.reshape(-1).to(flat.device)]
    return flat


def pass_tokens(samples: Sequence[Sample], tokens: int) -> int:
    """Return the most padded tokens of a pass whose inputs are listened to.

    Two sides of different padding cannot be told apart by shape: encoder-decoder rows go through one by one.
    """
    return 1 if any(sample.encoded.source for sample in samples) else tokens


def gram(bank: Bank, use: Use, x: "Tensor") -> Matrix:
    """Return ``< X tau_i^T, X tau_j^T >`` [K, K] in float64; outputs are made in float32, or float64 where either is.

    Args:
        bank: the task vectors.
        use: what multiplies.
        x: inputs [n, in], or ids [n].
    """
    factors = bank.factors(use.name, x.device)
    found = _of_factors(factors, use, x, len(bank.experts)) if factors is not None else _of_blocks(bank, use, x)
    return found.cpu().numpy()


def _wide(values: "Tensor", x: "Tensor") -> "Tensor":
    """Return ``values`` on the inputs' device, in the wider of both types."""
    import torch

    kind = torch.promote_types(x.dtype, values.dtype) if x.is_floating_point() else values.dtype
    return values.to(x.device, kind)


def _of_factors(factors: Factors, use: Use, x: "Tensor", count: int) -> "Tensor":
    import torch

    left, right = _wide(factors.left, x), _wide(factors.right, x)
    if use.kind == "columns":
        p, q = x.to(right.dtype) @ right.T, left
    else:
        p, q = left[x] if use.kind == "ids" else x.to(left.dtype) @ left, right.T
    own = torch.nn.functional.one_hot(factors.expert, count).double()
    return own.T @ ((p.double().T @ p.double()) * (q.double().T @ q.double())) @ own


def _of_blocks(bank: Bank, use: Use, x: "Tensor") -> "Tensor":
    import torch

    count, (height, width) = len(bank.experts), bank.tensors[use.name].shape
    tokens = len(x) if use.kind == "columns" else 1
    size = max(1, BLOCK_BYTES // (4 * count * max(tokens, width)))
    total = torch.zeros((count, count), dtype=torch.float64, device=x.device)

    def add(outputs: "Tensor") -> None:
        y = outputs.flatten(1).double()
        total.addmm_(y, y.T)

    if use.kind == "ids":
        times = torch.bincount(x, minlength=height)
        here = times.cpu().numpy() > 0
        for first, stack in bank.rows(use.name, size, lambda low, high: bool(here[low:high].any())):
            own = times[first : first + stack.shape[1]].double()
            tau = _wide(torch.from_numpy(stack), x)
            add(tau[:, own > 0].double() * own[own > 0].sqrt()[:, None])
    elif use.kind == "columns":
        for _, stack in bank.rows(use.name, size):
            tau = _wide(torch.from_numpy(stack), x)
            add(tau @ x.to(tau.dtype).T)
    else:  # outputs are sums over blocks of rows, so they are kept: [K, n, out]
        outputs: Any = 0.0
        for first, stack in bank.rows(use.name, size):
            tau = _wide(torch.from_numpy(stack), x)
            outputs = outputs + x[:, first : first + tau.shape[1]].to(tau.dtype) @ tau
        add(outputs)
    return total
