"""A model brought into the order of another one's units, and what that is worth: the door to ``alignment``.

Whether two networks can be averaged shows on the line between them. With L a loss,

    barrier = L((theta_base + theta_model) / 2) - (L(theta_base) + L(theta_model)) / 2

is measured before and after matching, on what is given: a loss of the caller's, labels, or inputs alone, where L is the
divergence KL(q || p_theta) from the mean q of the two ends' predictions. Small cosines and barriers that stay say that
matching does not help, and the report says so.

Source: the barrier is Frankle et al. 2020, arXiv:1912.05671, and Entezari et al. 2022, arXiv:2110.06296.
"""

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from consilience.errors import InputError
from consilience.mixing.alignment import Aligned, align
from consilience.mixing.shared_parts import shared_parts
from consilience.mixing.symmetry import Axes, Indices, State, Symmetry, symmetry_of_axes
from consilience.mixing.symmetry_trace import symmetry_of_module
from consilience.mixing.target import cross_entropy, run

Loss = Callable[[nn.Module], float]

#: Outputs of a permuted network may differ by this share of their largest value: sums in another order.
_ROUNDING = 1e-3
#: A barrier of this share of the ends' mean loss or less is none.
_NO_BARRIER = 0.02


@dataclass(frozen=True)
class Line:
    """A loss at both ends of the line between two networks, and at its midpoint before and after matching."""

    measure: str
    base: float
    model: float
    midpoint_before: float
    midpoint: float

    @property
    def barrier_before(self) -> float:
        """By how much the midpoint was worse than the ends' mean."""
        return self.midpoint_before - (self.base + self.model) / 2

    @property
    def barrier(self) -> float:
        """By how much the midpoint is worse than the ends' mean after matching."""
        return self.midpoint - (self.base + self.model) / 2


@dataclass(frozen=True)
class AlignmentReport:
    """What matching did.

    Attributes:
        groups: groups of units that may be reordered, and ``units`` in them, of which ``moved`` changed places.
        units: see ``groups``.
        moved: see ``groups``.
        tensors: tensors that were compared: those a group moves that are of one shape in both.
        elements: their elements; ``share``: of all the model's.
        share: see ``elements``.
        unshared: one line for each module of the model that the base has otherwise, or not at all.
        distance_before: squared distance of the compared tensors.
        distance: the same after matching.
        cosine_before: cosine of the compared tensors; None: one of them is zero.
        cosine: the same after matching.
        changed: largest change of the model's outputs on the inputs, as a share of the largest; None: not checked.
        line: losses along the line; None: not measured.
        folded: whether the model's first layer was changed to take the base's input normalisation.
    """

    groups: int
    units: int
    moved: int
    tensors: int
    elements: int
    share: float
    unshared: tuple[str, ...]
    distance_before: float
    distance: float
    cosine_before: float | None
    cosine: float | None
    changed: float | None = None
    line: Line | None = None
    folded: bool = False

    @property
    def verdict(self) -> str:
        """Say in a sentence whether matching helps, as far as it was measured."""
        if not self.moved:
            return "the units are in one order already: matching changes nothing, so merge the two as they are"
        if self.line is None:
            return (
                "whether the two can be averaged was not measured: closer weights do not show it; give rows or inputs"
            )
        before, after, ends = self.line.barrier_before, self.line.barrier, (self.line.base + self.line.model) / 2
        if after <= _NO_BARRIER * abs(ends):
            return "the midpoint is as good as the ends: merge the aligned model"
        if after >= before:
            return (
                f"matching does not help: the midpoint is {after:.3g} worse than the ends, and was {before:.3g}; do "
                "not average these two, but distil them (cs.distill) or let a router choose"
            )
        return (
            f"matching removes {1 - after / before:.0%} of the barrier, and the midpoint is still {after:.3g} worse "
            "than the ends: do not average these two, but distil them (cs.distill) or let a router choose"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON, barriers and verdict included."""
        line = self.line
        barriers = {} if line is None else {"barrier_before": line.barrier_before, "barrier": line.barrier}
        plain = asdict(self) | {"unshared": list(self.unshared)}
        return plain | {"line": None if line is None else asdict(line) | barriers, "verdict": self.verdict}

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> "AlignmentReport":
        """Return what ``to_dict`` returned plain values of."""
        own = {key: value for key, value in plain.items() if key != "verdict"}
        if own["line"] is not None:
            own["line"] = Line(**{key: own["line"][key] for key in Line.__dataclass_fields__})
        own["unshared"] = tuple(own["unshared"])
        return cls(**own)

    def lines(self) -> list[str]:
        """Return the report for a terminal."""
        cosines = "" if self.cosine is None else f", cosine {self.cosine_before:.3f} -> {self.cosine:.3f}"
        lines = [
            f"{self.moved} of {self.units} units in {self.groups} groups changed places",
            f"{self.tensors} tensors compared ({self.share:.1%} of the model): squared distance "
            f"{self.distance_before:.4g} -> {self.distance:.4g}{cosines}",
        ]
        lines += [f"not compared: {text}" for text in self.unshared]
        if self.folded:
            lines.append("the first layer was folded to the base's input normalisation")
        if self.changed is not None:
            lines.append(f"same outputs: they change by {self.changed:.1e} of the largest")
        else:
            lines.append("same outputs: not checked (no network to run): only the stated axes vouch for it")
        if self.line is not None:
            line = self.line
            lines += [
                f"{line.measure}: base {line.base:.4f}, model {line.model:.4f}, midpoint {line.midpoint_before:.4f} -> "
                f"{line.midpoint:.4f}",
                f"barrier {line.barrier_before:.4f} -> {line.barrier:.4f}",
            ]
        return [*lines, self.verdict]


@dataclass(frozen=True)
class AlignedModel:
    """A model in the base's order of units: ``state``, ``permutations`` by group as of ``permute``, and the report."""

    state: dict[str, Tensor]
    permutations: dict[str, Indices]
    report: AlignmentReport


def align_networks(
    base: nn.Module | State,
    model: nn.Module | State,
    *,
    module: nn.Module | None = None,
    inputs: Any = None,
    labels: Tensor | None = None,
    loss: Loss | None = None,
    axes: Axes | None = None,
    seed: int = 0,
) -> AlignedModel:
    """Match a model's units to a base's, in memory; see ``consilience.align``.

    Raises:
        InputError: the symmetry cannot be found, or is not one; the two do not meet; or a setting has no effect.
    """
    network = module if module is not None else next((one for one in (model, base) if isinstance(one, nn.Module)), None)
    states = [_state(base, "base"), _state(model, "model")]
    if network is None and (inputs is not None or loss is not None):
        raise InputError("module: inputs and loss need the network that computes; pass module=, or the networks")
    if labels is not None and inputs is None:
        raise InputError("labels: have no effect without inputs; give both, or neither")
    if axes is None and (network is None or inputs is None):
        raise InputError(
            "axes: which units may be reordered is found by tracing a module on inputs; pass module= and inputs=, or "
            "state the axes"
        )
    if axes is not None:
        symmetry = symmetry_of_axes(axes, states[1])
    else:
        assert network is not None
        if not isinstance(inputs, Tensor):
            raise InputError("inputs: a module is traced on one tensor; state the axes, or give a module of one input")
        symmetry = symmetry_of_module(network, inputs[:2])
    aligned = align(states[0], states[1], symmetry, seed=seed)
    changed = line = None
    if network is not None:
        scratch = Scratch(network)
        if inputs is not None:
            changed = check_same(scratch, states[1], aligned.state, inputs)
        measured = None if not scratch.holds(states[0]) else _measure(scratch, states, inputs, labels, loss)
        if measured is not None:
            line = along_line(scratch, *measured, states[0], states[1], aligned.state)
    found = report(states[0], states[1], symmetry, aligned, changed, line)
    return AlignedModel(aligned.state, aligned.permutations, found)


def _state(value: Any, name: str) -> dict[str, Tensor]:
    if isinstance(value, nn.Module):
        return value.state_dict()
    if not isinstance(value, Mapping) or not all(
        isinstance(each, Tensor) for each in cast(Mapping[Any, Any], value).values()
    ):
        raise InputError(
            f"{name}: is a {type(value).__name__}; give a torch module, a state dict of tensors, or a path"
        )
    return dict(cast(Mapping[str, Tensor], value))


class Scratch:
    """A copy of a network that states are loaded into, in float32 at least, in eval mode."""

    def __init__(self, network: nn.Module, *, copied: bool = True) -> None:
        self.network = (copy.deepcopy(network) if copied else network).eval()
        if any(value.is_floating_point() and value.dtype.itemsize < 4 for value in self.network.state_dict().values()):
            self.network.float()

    def holds(self, state: State) -> bool:
        """Whether a state has the network's names and shapes."""
        own = self.network.state_dict()
        return own.keys() == state.keys() and all(value.shape == state[name].shape for name, value in own.items())

    def load(self, state: State) -> nn.Module:
        """Return the network with a state.

        Raises:
            InputError: the state has other names or shapes.
        """
        try:
            self.network.load_state_dict(dict(state))
        except RuntimeError as error:
            raise InputError(f"module: the state does not fit it ({str(error).splitlines()[-1].strip()})") from None
        return self.network


def check_same(scratch: Scratch, before: State, after: State, inputs: Any) -> float:
    """Return the largest change of a network's outputs between two states, as a share of the largest output.

    Raises:
        InputError: it is more than rounding: the axes are no symmetry of the network.
    """
    with torch.no_grad():
        outputs = [run(scratch.load(state), inputs).double() for state in (before, after)]
    scale = float(outputs[0].abs().max())
    changed = float((outputs[0] - outputs[1]).abs().max()) / (scale or 1.0)
    if not changed <= _ROUNDING:
        raise InputError(
            f"axes: the model's outputs change by {changed:.2g} of the largest once its units are reordered, so what "
            "is stated is no symmetry of it; check which axes belong together"
        )
    return changed


def _measure(
    scratch: Scratch, states: list[dict[str, Tensor]], inputs: Any, labels: Tensor | None, loss: Loss | None
) -> tuple[str, Loss] | None:
    """Return what is measured along the line; None: nothing can be."""
    if loss is not None:
        return "loss", loss
    if inputs is None:
        return None
    if labels is not None:
        return "cross entropy", lambda network: float(cross_entropy(run(network, inputs), labels))
    with torch.no_grad():
        ends = [run(scratch.load(state), inputs).double().log_softmax(-1) for state in states]
    if ends[0].ndim < 2 or ends[0].shape[-1] < 2:
        return None  # no classes, so no divergence
    mean = torch.logaddexp(*ends) - math.log(2)
    return "divergence", lambda network: _divergence(mean, run(network, inputs))


def _divergence(mean: Tensor, outputs: Tensor) -> float:
    """Return KL(q || p) in nats, the mean over rows; ``mean`` is ln q."""
    return float((mean.exp() * (mean - outputs.double().log_softmax(-1))).sum(-1).mean())


def along_line(scratch: Scratch, measure: str, loss: Loss, base: State, model: State, aligned: State) -> Line:
    """Measure a loss at both ends and at the midpoint before and after matching.

    Raises:
        InputError: the loss is not finite at an end.
    """
    points = (base, model, midpoint(base, model), midpoint(base, aligned))
    with torch.no_grad():
        losses = [float(loss(scratch.load(point))) for point in points]
    for name, value in zip(("base", "model"), losses, strict=False):
        if not math.isfinite(value):
            raise InputError(f"{name}: its {measure} is {value}; check the rows, the inputs' normalisation and dtype")
    return Line(measure, *losses)


def midpoint(one: State, other: State) -> dict[str, Tensor]:
    """Return the mean of two states in float32 at least; integers are the first one's."""
    wide = {name: torch.promote_types(value.dtype, torch.float32) for name, value in one.items()}
    return {
        name: torch.lerp(value.to(wide[name]), other[name].to(wide[name]), 0.5) if value.is_floating_point() else value
        for name, value in one.items()
    }


def report(
    base: State,
    model: State,
    symmetry: Symmetry,
    aligned: Aligned,
    changed: float | None,
    line: Line | None,
    *,
    folded: bool = False,
) -> AlignmentReport:
    """Put together what matching did."""
    elements = sum(model[name].numel() for name in aligned.names)
    unshared = shared_parts([base, model]).unshared
    cosines = [None if math.isnan(value) else value for value in (aligned.cosine_before, aligned.cosine)]
    return AlignmentReport(
        groups=len(symmetry.groups),
        units=sum(group.size for group in symmetry.groups),
        moved=aligned.moved,
        tensors=len(aligned.names),
        elements=elements,
        share=elements / max(1, sum(value.numel() for value in model.values())),
        unshared=tuple(f"{part or '(top level)'}: {why}" for part, why in unshared.items()),
        distance_before=aligned.distance_before,
        distance=aligned.distance,
        cosine_before=cosines[0],
        cosine=cosines[1],
        changed=changed,
        line=line,
        folded=folded,
    )
