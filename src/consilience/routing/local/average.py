"""Average activations: an expert is recognised by the mean of what its modules see on its own rows.

    v = m / ||m||,    m = mean over rows of the mean over the row's tokens of u          (the expert is on)

Source: the average-activation baseline of PHATGOOSE (arXiv:2402.05859), and mttl's, which this follows with its
``pool="mean"``. Known differences: mttl's default is the last token alone, of 10 rows; PHATGOOSE's code
has layer normalisation of u and v where tokens are routed, which ``scores`` has not.
"""

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from consilience.progress import ProgressOption, open_progress
from consilience.routing.expert import Expert
from consilience.routing.install import check_fit
from consilience.routing.layer import Experts, LowRank, routed
from consilience.routing.local.answers import answer_losses
from consilience.routing.local.borrowed import borrowed
from consilience.routing.local.own_rows import check_rows, some_rows
from consilience.routing.router import Router
from consilience.routing.settings import Settings
from consilience.routing.unit import unit
from consilience.routing.values import check_whole
from consilience.training.data import Examples

#: Rows that a mean is taken over.
ROWS = 64


@dataclass(eq=False)
class Mean:
    """A mean over rows of means over tokens, in float64; ``tokens`` and ``total`` are of the row that is under way."""

    rows: int
    value: Tensor
    tokens: int
    total: Tensor

    @classmethod
    def of_nothing(cls, width: int) -> "Mean":
        """Return the mean of no vector [width]."""
        return cls(0, torch.zeros(width, dtype=torch.float64), 0, torch.zeros(width, dtype=torch.float64))

    def see(self, u: Tensor) -> None:
        """Add a row's activations [..., width]."""
        flat = u.detach().reshape(-1, u.shape[-1])
        self.tokens += len(flat)
        self.total += flat.sum(0, dtype=torch.float64).cpu()

    def end_row(self) -> None:
        """Count the row; one that brought no token here does not count."""
        if self.tokens:
            self.rows += 1
            self.value += (self.total / self.tokens - self.value) / self.rows
        self.tokens, self.total = 0, torch.zeros_like(self.total)


def average_activations(
    model: Any,
    name: str,
    factors: Mapping[str, LowRank],
    examples: Sequence[Examples],
    *,
    rows: int = ROWS,
    progress: ProgressOption = False,
) -> dict[str, Tensor]:
    """Return v [in] of every module of an expert, in float32; 0 where no token came.

    Rows pass one by one, so that no padding counts: prompt and response, in equal shares of the tasks. The model is
    left as it was.

    Args:
        model: the base, a language model of transformers.
        name: of the expert.
        factors: the expert's, by module.
        examples: the expert's own tasks.
        rows: how many rows to use, if there are as many.
        progress: True for a bar (or lines) on standard error, a function called with (rows done, rows in all), or a
            ``Progress``.

    Raises:
        InputError: there is no row, a row has no response, or the expert does not fit the model.
    """
    check_whole("rows", rows, 1)
    check_rows(name, examples)
    chosen = some_rows(examples, rows)
    means = {module: Mean.of_nothing(one.shape[1]) for module, one in factors.items()}
    with torch.no_grad(), _watched(model, Expert(name, factors), means), open_progress(progress) as shown:
        shown.phase(f"mean activations of {name}", len(chosen), "rows")
        for task, sequence in chosen:
            answer_losses(model, [sequence], [task])
            for mean in means.values():
                mean.end_row()
            shown.advance()
    return {module: unit(mean.value).float() for module, mean in means.items()}


@contextmanager
def _watched(model: nn.Module, expert: Expert, means: Mapping[str, Mean]) -> Generator[None]:
    """Turn an expert on, and show its modules' inputs to the means."""
    check_fit(model, expert)
    router = Router((expert.name,), Settings(local="none"), fixed=torch.ones(1, 1))
    with borrowed(model) as replace:
        for name, factors in expert.factors.items():
            linear: Any = model.get_submodule(name)
            layer = routed(linear, Experts(name, [factors], torch.zeros(1, linear.in_features), linear.weight, router))
            layer.register_forward_pre_hook(lambda _, inputs, mean=means[name]: mean.see(inputs[0]))
            replace(name, layer)
        yield
