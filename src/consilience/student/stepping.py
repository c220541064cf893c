"""A model block by block: what one block makes of states that are given to it, with all the model passes it besides.

A pass through block i is a pass through the whole model in which other blocks return what they are given and block i
gets the states instead of its own input; the pass ends with its output. So masks, positions and whatever else a model
makes for its blocks are its own, whichever model it is.
"""

from collections.abc import Callable
from typing import Any

import torch

from consilience.errors import InputError
from consilience.student.student import blocks_of


class _Reached(Exception):
    """Ends a pass: ``value`` is what it was for."""

    def __init__(self, value: Any) -> None:
        super().__init__()
        self.value = value


class Stepper:
    """The blocks of a model, each of which takes hidden states first, and returns them first.

    Attributes:
        blocks: the modules, in order.
    """

    def __init__(self, model: Any, where: str) -> None:
        self.model, self.where = model, where
        self.blocks: list[Any] = list(blocks_of(model))
        self._tuples: list[int] = []

    def probe(self, inputs: dict[str, Any]) -> None:
        """Run the model once, and check that block by block gives the same states.

        Raises:
            InputError: it does not.
        """
        outputs: list[Any] = []
        handles = [block.register_forward_hook(lambda _m, _a, out: outputs.append(out)) for block in self.blocks]
        try:
            with torch.no_grad():
                self.model(**inputs, use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        self._tuples = [len(out) if isinstance(out, tuple) else 0 for out in outputs]
        if len(outputs) == len(self.blocks):
            states = self.first(inputs)
            for index in range(len(self.blocks)):
                states = None if states is None else self.through(index, inputs, states)
            expected = _states(outputs[-1])
            if states is not None and expected is not None and states.shape == expected.shape:
                error, size = float((states - expected).norm()), float(expected.norm())
                if error <= 1e-4 * size:
                    return
        raise InputError(
            f"{self.where}: {type(self.model).__name__} does not give the same states when its blocks are run one at a "
            "time, so layers cannot be merged one after another; use regmean"
        )

    def first(self, inputs: dict[str, Any]) -> Any:
        """Return the states that the first block is given [B, T, n]."""

        def taken(*args: Any, **named: Any) -> Any:
            raise _Reached(args[0] if args else named.get("hidden_states"))

        return self._run(0, inputs, taken)

    def through(self, index: int, inputs: dict[str, Any], states: Any) -> Any:
        """Return the states that a block makes of the given ones, [B, T, n] both."""
        own = self.blocks[index].forward

        def swapped(*args: Any, **named: Any) -> Any:
            if args:
                raise _Reached(_states(own(states, *args[1:], **named)))
            raise _Reached(_states(own(**(named | {"hidden_states": states}))))

        return self._run(index, inputs, swapped)

    def _run(self, index: int, inputs: dict[str, Any], forward: Callable[..., Any]) -> Any:
        for number, block in enumerate(self.blocks):
            block.forward = forward if number == index else _passing(self._tuples[number])
        try:
            with torch.no_grad():
                self.model(**inputs, use_cache=False)
        except _Reached as reached:
            return reached.value
        finally:
            for block in self.blocks:
                del block.forward
        return None


def _passing(length: int) -> Callable[..., Any]:
    """Return a block that returns what it is given, in the form of its output: a tuple, or (0) the states alone."""

    def passing(*args: Any, **named: Any) -> Any:
        states = args[0] if args else named.get("hidden_states")
        return (states, *([None] * (length - 1))) if length else states

    return passing


def _states(output: Any) -> Any:
    value = output[0] if isinstance(output, tuple) else output
    return value if isinstance(value, torch.Tensor) else None
