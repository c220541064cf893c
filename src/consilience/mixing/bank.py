"""Experts of one architecture as the rows of a matrix, and their blends as one product with it.

    theta(alpha) = sum_k alpha_k theta_k            simplex, affine
    theta(alpha) = theta_0 + sum_k alpha_k (theta_k - theta_0)      with a base, whose row has the rest of the weight

Source: GLUE (arXiv:2512.22467): both points of a step come from one [2, K] x [K, P] product over the bank.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from consilience.coefficients.coefficients import Alpha
from consilience.coefficients.spectrum import Spectrum
from consilience.errors import InputError
from consilience.mixing.layout import Layout, Slot, Span, lay_out

StateDict = Mapping[str, Tensor]
#: Columns of the bank that are in float64 at a time.
_COLUMNS = 1 << 16


@dataclass(frozen=True, eq=False)
class Blends:
    """Room for R blends: ``parameters`` [R, P] and float ``buffers`` [R, B]."""

    parameters: Tensor
    buffers: Tensor

    @property
    def room(self) -> int:
        """R."""
        return self.parameters.shape[0]


@dataclass(frozen=True, eq=False)
class ExpertBank:
    """K experts' floating-point tensors, each expert once; nothing here is written to after it is made.

    ``matrix`` [K, P] holds parameters and ``buffers`` [K, B] float buffers, both with the base's row last if there is
    one; ``copied`` holds the tensors that are not averaged, as the first expert has them.
    """

    names: tuple[str, ...]
    layout: Layout
    matrix: Tensor
    buffers: Tensor
    copied: dict[str, Tensor]
    dtypes: dict[str, torch.dtype]
    has_base: bool

    @classmethod
    def of(
        cls,
        states: Mapping[str, StateDict],
        module: nn.Module,
        *,
        grouping: str = "global",
        base: StateDict | None = None,
        device: torch.device | str | None = None,
        exclude: Sequence[str] = (),
    ) -> "ExpertBank":
        """Copy the experts' tensors into a bank, in float32 (float64 if the module has float64 parameters).

        Args:
            states: state dicts by the experts' names; each is asked for once, read and never written to, so that a
                mapping that loads them as they are asked for needs memory for one.
            module: a module of their architecture; its values do not count.
            grouping: which parameters share a coefficient; see ``consilience.coefficients.groups``.
            base: theta_0, if coefficients multiply task vectors.
            device: where the bank lies; None: where the module's first parameter is.
            exclude: patterns of parameters whose coefficients are not learned.

        Raises:
            InputError: there is no expert, names or shapes are not the module's, tied tensors differ, or a value is
                NaN or infinite.
        """
        if not states:
            raise InputError("experts: there are none; give at least one state dict")
        layout = lay_out(module, grouping, exclude)
        kinds = {value.dtype for value in module.parameters() if value.is_floating_point()}
        dtype = torch.float64 if torch.float64 in kinds else torch.float32
        place = device if device is not None else next(module.parameters()).device
        rows = len(states) + (base is not None)
        matrix, buffers = (
            torch.empty(rows, slots[-1].stop if slots else 0, dtype=dtype, device=place)
            for slots in (layout.parameters, layout.buffers)
        )
        copied: dict[str, Tensor] = {}
        for row, name in enumerate(states):
            state = check_state(states[name], f"expert {name!r}")
            _read(f"expert {name!r}", state, layout, matrix[row], buffers[row])
            copied = copied or {name: state[name].detach().clone() for name in layout.copied}
        if base is not None:
            check_state(base, "base")
            _read("base", base, layout, matrix[-1], buffers[-1])
        dtypes = {name: value.dtype for name, value in module.state_dict().items() if name in layout.names}
        return cls(tuple(states), layout, matrix, buffers, copied, dtypes, base is not None)

    @property
    def count(self) -> int:
        """N, the number of coefficients per expert."""
        return self.layout.count

    @property
    def learned(self) -> npt.NDArray[np.bool_]:
        """Which coefficients [N] move."""
        return np.array([group.learned for group in self.layout.groups])

    @property
    def numel(self) -> int:
        """P, the number of parameters."""
        return self.matrix.shape[1]

    def table(self, weights: Sequence[float] | Alpha) -> Alpha:
        """Return weights [K], one an expert, as coefficients [K, N]."""
        return np.repeat(np.asarray(weights, np.float64).reshape(-1, 1), self.count, 1)

    def room(self, count: int) -> Blends:
        """Return room for ``count`` blends."""
        return Blends(self.matrix.new_empty(count, self.numel), self.buffers.new_empty(count, self.buffers.shape[1]))

    def blends(self, points: Sequence[Alpha], into: Blends | None = None) -> Blends:
        """Return the blends of R points [K, N]: one pass over the bank, [R, K] x [K, P] (a slice of it per group).

        Args:
            points: R tables of coefficients.
            into: room to use again; blends go to its first R rows.

        Raises:
            ValueError: a point is not [K, N], or there is no room for R of them.
        """
        weights = self._weights(points)
        into = into or self.room(len(points))
        if into.room < len(points):
            raise ValueError(f"{len(points)} points, and room for {into.room}")
        with torch.no_grad():
            _product(weights, self.matrix, self.layout.spans, into.parameters[: len(points)])
            _product(weights, self.buffers, self.layout.buffer_spans, into.buffers[: len(points)])
            if bool((weights < 0).any()):
                self._keep_variances(into.buffers[: len(points)])
        return into

    def _weights(self, points: Sequence[Alpha]) -> Tensor:
        """Return the rows' weights [R, K, N]; the base's are what the experts' leave of 1."""
        shape = (len(self.names), self.count)
        for point in points:
            if point.shape != shape:
                raise ValueError(f"coefficients have shape {point.shape}, and the bank needs {shape}")
        weights = np.stack([np.asarray(point, np.float64) for point in points])
        if self.has_base:
            weights = np.concatenate([weights, 1 - weights.sum(1, keepdims=True)], 1)
        return torch.from_numpy(weights).to(self.matrix)

    def _keep_variances(self, rows: Tensor) -> None:
        """Raise running variances to the experts' least: outside the hull a combination may be negative."""
        for slot in self.layout.buffers:
            if slot.name in self.layout.variances:
                part = slice(slot.start, slot.stop)
                rows[:, part] = torch.maximum(rows[:, part], self.buffers[:, part].amin(0))

    def slopes(self, gradient: Tensor) -> Alpha:
        """Return dL/dalpha [K, N] for dL/dtheta [P]: ``<theta_k, gradient>`` over each group (of tau_k with a base)."""
        found = [self.matrix[:, s.start : s.stop] @ gradient[s.start : s.stop] for s in self.layout.spans]
        table = torch.stack(found, 1).double().cpu().numpy()
        return table[:-1] - table[-1:] if self.has_base else table

    def spectrum(self) -> Spectrum:
        """Return how far apart the experts are, in float64, in one pass over the bank; of what is learned."""
        experts, rows = len(self.names), self.matrix.shape[0]
        gram = np.zeros((self.count, experts, experts))
        centred = np.zeros((self.count, rows, rows))
        learned = self.learned
        for span in self.layout.spans:
            if not learned[span.index]:
                continue
            for start in range(span.start, span.stop, _COLUMNS):
                block = self.matrix[:, start : min(start + _COLUMNS, span.stop)].to(torch.float64, copy=True)
                gram[span.index] += (block[:experts] @ block[:experts].T).cpu().numpy()
                block -= block[:experts].mean(0)
                centred[span.index] += (block @ block.T).cpu().numpy()
        return Spectrum(gram, centred)

    def state(self, alpha: Alpha) -> dict[str, Tensor]:
        """Return the state dict of a blend, in tensors of its own and in the module's dtypes; ties stay ties."""
        return self.state_of(self.blends([alpha]))

    def state_of(self, blends: Blends, row: int = 0) -> dict[str, Tensor]:
        """Return the state dict of one of some blends; see ``state``."""
        found = {name: value.clone() for name, value in self.copied.items()}
        for slots, values in ((self.layout.parameters, blends.parameters), (self.layout.buffers, blends.buffers)):
            for slot in slots:
                value = slot.of(values[row]).to(self.dtypes[slot.name], copy=True)
                found |= dict.fromkeys(slot.names, value)
        return {name: found[name] for name in self.dtypes}


def _product(weights: Tensor, matrix: Tensor, spans: Iterable[Span], out: Tensor) -> None:
    for span in spans:
        part = slice(span.start, span.stop)
        torch.mm(weights[:, :, span.index], matrix[:, part], out=out[:, part])


def check_state(state: Any, where: str) -> StateDict:
    """Return a state dict.

    Raises:
        InputError: it is something else.
    """
    if isinstance(state, Mapping):
        return cast(StateDict, state)
    hint = "; pass its state_dict()" if isinstance(state, nn.Module) else ""
    raise InputError(f"{where}: is a {type(state).__name__}, not a state dict{hint}")


def _read(who: str, state: StateDict, layout: Layout, row: Tensor, buffers: Tensor) -> None:
    """Check a state dict and copy it to its row."""
    _check(who, state, layout)
    with torch.no_grad():
        for slots, values in ((layout.parameters, row), (layout.buffers, buffers)):
            for slot in slots:
                slot.of(values).copy_(_finite(who, slot.name, _tied(who, state, slot)))


def _tied(who: str, state: StateDict, slot: Slot) -> Tensor:
    """Return the value of a tensor that a state dict may hold under several names."""
    present = [name for name in slot.names if name in state]
    value = state[present[0]]
    for name in present[1:]:
        if state[name].data_ptr() != value.data_ptr() and not torch.equal(state[name], value):
            raise InputError(
                f"{who}: {present[0]!r} and {name!r} are one tensor in the module and differ here; untie "
                "them in the module, or make them equal"
            )
    return value


def _finite(who: str, name: str, value: Tensor) -> Tensor:
    if not bool(torch.isfinite(value).all()):
        raise InputError(f"{who}: {name!r} holds NaN or Inf; leave it out or mend its file")
    return value


def _check(who: str, state: StateDict, layout: Layout) -> None:
    """Check names, shapes and kinds against the module's."""
    slots = (*layout.parameters, *layout.buffers)
    missing = [slot.name for slot in slots if not any(name in state for name in slot.names)]
    missing += [name for name in layout.copied if name not in state]
    if missing:
        raise InputError(f"{who}: has no {missing[0]!r}, which the module has; give a full state dict")
    extra = [name for name in state if name not in layout.names and not name.endswith("_extra_state")]
    if extra:
        raise InputError(f"{who}: has {extra[0]!r}, which the module has not; drop it from the state dict")
    for slot in slots:
        for name in slot.names:
            if name in state:
                _check_tensor(who, name, state[name], slot)


def _check_tensor(who: str, name: str, value: Tensor, slot: Slot) -> None:
    if tuple(value.shape) != slot.shape:
        raise InputError(
            f"{who}: {name!r} is {list(value.shape)}, and the module's is {list(slot.shape)}; mix experts "
            "of one architecture"
        )
    if not value.is_floating_point():
        raise InputError(f"{who}: {name!r} is {value.dtype}, not floating point; dequantise it first")
