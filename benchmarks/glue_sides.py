"""What `benchmarks.glue_step` measures: nets, experts, the sides of a step.

python -m benchmarks.glue_sides SPEC.json FOUND.json        # one process of a run
"""

import importlib
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, cast

from pydantic import TypeAdapter

from benchmarks.measure import anonymous_bytes
from benchmarks.worker import work_on

#: Three depths of two kinds: the paper says that the savings grow with depth.
NETS = ("resnet20", "resnet56", "resnet110", "mobilenet_v2", "vit4", "vit8", "vit16")
SIDES = ("floor", "spsa", "gradient", "straightforward")
BATCH, CLASSES, SIZE = 64, 10, 32


@dataclass(frozen=True)
class Spec:
    """What a process is to do: ``sides`` in turn, ``repeat`` times after one that is not counted."""

    net: str
    k: int
    threads: int
    repeat: int
    sides: tuple[str, ...]
    costs: bool = False


@dataclass(frozen=True)
class Found:
    """What a process found: seconds of every step by side, the pair's losses by side, and predicted costs.

    ``imports_mb`` is its anonymous memory before there was any weight.
    """

    parameters: int = 0
    imports_mb: float = 0.0
    seconds: dict[str, list[float]] = field(default_factory=dict[str, list[float]])
    losses: dict[str, list[float]] = field(default_factory=dict[str, list[float]])
    costs: dict[str, float] = field(default_factory=dict[str, float])


def make_net(name: str) -> Any:
    """Return one of the vision suite's nets for colour images, with fresh weights."""
    import torch

    from suites.vision.nets import NetSpec, build

    specs = {
        "mobilenet_v2": NetSpec("mobilenet_v2", 0.5),
        **{f"resnet{depth}": NetSpec("resnet", 16, depth) for depth in (20, 56, 110)},
        **{f"vit{depth}": NetSpec("vit", 96, depth, patch=8, heads=4) for depth in (4, 8, 16)},
    }
    torch.manual_seed(0)
    common = {"size": SIZE, "channels": 3, "classes": CLASSES, "mean": (0.5,) * 3, "std": (0.5,) * 3}
    return build(TypeAdapter(NetSpec).validate_python(asdict(specs[name]) | common))


class Experts(Mapping[str, Any]):
    """K experts, the base with noise, each made when it is asked for."""

    def __init__(self, base: Mapping[str, Any], count: int) -> None:
        self.base, self.names = base, [f"expert{k}" for k in range(count)]

    def __len__(self) -> int:
        return len(self.names)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __getitem__(self, name: str) -> dict[str, Any]:
        import torch

        generator = torch.Generator().manual_seed(1 + self.names.index(name))

        def moved(value: Any) -> Any:
            if not value.is_floating_point():
                return value
            return value * (1 + 0.05 * torch.randn(value.shape, generator=generator))

        return {key: moved(value) for key, value in self.base.items()}


class Case:
    """What all sides share."""

    def __init__(self, spec: Spec) -> None:
        import torch

        self.net = make_net(spec.net).eval()
        self.experts = Experts(self.net.state_dict(), spec.k)
        generator = torch.Generator().manual_seed(9)
        self.images = torch.randn(BATCH, 3, SIZE, SIZE, generator=generator)
        self.labels = torch.randint(CLASSES, (BATCH,), generator=generator)
        high = torch.linspace(0.5, 1.5, spec.k, dtype=torch.float64)
        self.points = [(high / high.sum()).numpy(), (high.flip(0) / high.sum()).numpy()]

    def loss(self, optimizer: str) -> tuple[Any, Any]:
        """Return the package's loss and an optimizer of it."""
        from consilience.mixing.bank import ExpertBank
        from consilience.mixing.problem import TargetLoss
        from consilience.mixing.target import Target, Tensors
        from consilience.optimizers.anchor import Anchor
        from consilience.optimizers.make import make_optimizer
        from consilience.optimizers.parameterisation import parameterise
        from consilience.optimizers.settings import Descent

        bank = ExpertBank.of(self.experts, self.net)
        loss = TargetLoss(bank, self.net, Target(Tensors(self.images, self.labels), batch_size=BATCH))
        start = bank.table([1.0 / len(self.experts)] * len(self.experts))
        mapped = parameterise("softmax", start, [True])
        anchor = Anchor(mapped.start, mapped.learned, 0.0)
        return loss, make_optimizer(optimizer, Descent("sgd", 0.1, 100, schedule="constant"), mapped, anchor, 0)


Step = Callable[[int], None]
Pair = Callable[[], list[float]]


def floor_side(case: Case) -> tuple[Step, Pair]:
    """Return the least that a step can do: one product and two forward passes."""
    import copy

    import torch

    names = [name for name, _ in case.net.named_parameters()]
    numel = sum(value.numel() for value in case.net.parameters())
    bank, rows = torch.empty(len(case.experts), numel), torch.empty(2, numel)
    for row, state in zip(bank, case.experts.values(), strict=True):
        torch.cat([state[name].reshape(-1) for name in names], out=row)
    modules = [copy.deepcopy(case.net), copy.deepcopy(case.net)]
    for row, module in zip(rows, modules, strict=True):
        start = 0
        for value in module.parameters():
            value.data = row[start : start + value.numel()].view(value.shape)
            start += value.numel()
    weights = torch.stack([torch.from_numpy(point) for point in case.points]).float()

    def pair() -> list[float]:
        with torch.no_grad():
            torch.mm(weights, bank, out=rows)
            return [float(torch.nn.functional.cross_entropy(module(case.images), case.labels)) for module in modules]

    return lambda number: (pair(), None)[1], pair


def spsa_side(case: Case) -> tuple[Step, Pair]:
    """Return the package's step by two evaluations."""
    loss, optimizer = case.loss("spsa")
    points = [loss.bank.table(point) for point in case.points]
    return lambda number: optimizer.step(loss, number), lambda: [terms["target"] for terms in loss.at(points, 0)]


def gradient_side(case: Case) -> tuple[Step, Pair]:
    """Return the package's step by backpropagation."""
    loss, optimizer = case.loss("sgd")
    points = [loss.bank.table(point) for point in case.points]
    return lambda number: optimizer.step(loss, number), lambda: [terms["target"] for terms in loss.at(points, 0)]


def straightforward_side(case: Case) -> tuple[Step, Pair]:
    """Return what one would write: for each point a pass over every expert's state dict, a load and a forward pass."""
    import copy

    import torch

    states, module = [*case.experts.values()], copy.deepcopy(case.net)

    def pair() -> list[float]:
        losses: list[float] = []
        with torch.no_grad():
            for point in case.points:
                merged = {
                    name: sum(float(w) * state[name] for w, state in zip(point, states, strict=True))
                    if value.is_floating_point()
                    else value
                    for name, value in states[0].items()
                }
                module.load_state_dict(cast(dict[str, Any], merged))
                losses.append(float(torch.nn.functional.cross_entropy(module(case.images), case.labels)))
        return losses

    return lambda number: (pair(), None)[1], pair


MAKERS: dict[str, Callable[[Case], tuple[Step, Pair]]] = {
    "floor": floor_side,
    "spsa": spsa_side,
    "gradient": gradient_side,
    "straightforward": straightforward_side,
}


def work(spec: Spec) -> Found:
    """Run the sides of a process in turn."""
    import torch

    torch.set_num_threads(spec.threads)
    imports = _imported()
    case = Case(spec)
    made = {side: MAKERS[side](case) for side in spec.sides}
    losses = {side: pair() for side, (_, pair) in made.items() if len(spec.sides) > 1}
    seconds: dict[str, list[float]] = {side: [] for side in spec.sides}
    for number in range(spec.repeat + 1):
        for side, (step, _) in made.items():
            begun = time.perf_counter()
            step(number)
            seconds[side].append(time.perf_counter() - begun)
    costs: dict[str, float] = {}
    if spec.costs:
        from consilience.mixing.cost import measure_cost

        cost = measure_cost(case.loss("sgd")[0], repeat=spec.repeat)
        costs = asdict(cost) | {"predicted": cost.break_even, "measured": cost.measured_break_even}
    parameters = sum(value.numel() for value in case.net.parameters())
    return Found(parameters, imports, {side: values[1:] for side, values in seconds.items()}, losses, costs)


def _imported() -> float:
    """Import what any side needs, compiler of torch's optimizers included, and return the anonymous memory in MB."""
    import torch

    for name in ("consilience.mixing", "suites.vision.nets"):
        importlib.import_module(name)
    torch.optim.SGD([torch.zeros(1, requires_grad=True)])
    return anonymous_bytes(os.getpid()) / 1e6


if __name__ == "__main__":
    work_on(sys.argv[1:], Spec, work)
