"""One module that becomes any blend: its parameters are views of a blend's row, so that nothing is copied."""

import copy

import torch
from torch import Tensor, nn

from consilience.mixing.bank import Blends, ExpertBank


class Student:
    """A copy of a module whose parameters are re-pointed to rows of blends.

    R blends need R rows and one module. The module it is made from is left alone.
    """

    def __init__(self, module: nn.Module, bank: ExpertBank) -> None:
        self.bank = bank
        # Parameters are re-pointed before any use: copying the module's own would cost one more model.
        empty = bank.matrix.new_empty(0)
        memo: dict[int, nn.Parameter] = {
            id(value): nn.Parameter(empty) for value in module.parameters() if value.is_floating_point()
        }
        self.module = copy.deepcopy(module, memo).to(bank.matrix.device, bank.matrix.dtype).eval()
        parameters = dict(self.module.named_parameters(remove_duplicate=False))
        buffers = dict(self.module.named_buffers(remove_duplicate=False))
        self._parameters = [(slot, parameters[slot.name]) for slot in bank.layout.parameters]
        self._buffers = [(slot, buffers[slot.name]) for slot in bank.layout.buffers]
        self._gradient: Tensor | None = None
        with torch.no_grad():
            for name, value in bank.copied.items():
                (parameters[name] if name in parameters else buffers[name]).copy_(value)

    def show(self, blends: Blends, row: int = 0) -> nn.Module:
        """Become a blend, and return the module; it is valid until the blend's row is written to again."""
        values, buffers = blends.parameters[row], blends.buffers[row]
        for slot, parameter in self._parameters:
            parameter.data = slot.of(values)
        with torch.no_grad():
            for slot, buffer in self._buffers:
                buffer.copy_(slot.of(buffers))
        return self.module

    def gradient(self, loss: Tensor) -> Tensor:
        """Return dL/dtheta [P] of a loss of the blend that is shown; the tensor is written to again by the next call.

        All parameters count, whether or not the module froze them: what is learned are coefficients.
        """
        if self._gradient is None:
            self._gradient = torch.empty_like(self._parameters[0][1].new_empty(self.bank.numel))
        self._gradient.zero_()
        for slot, parameter in self._parameters:
            parameter.grad = slot.of(self._gradient)
        torch.autograd.backward(loss)
        for _, parameter in self._parameters:
            parameter.grad = None
        return self._gradient
