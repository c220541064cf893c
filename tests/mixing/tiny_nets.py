"""Networks and targets small enough to check by hand."""

import copy
import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from consilience.mixing import LossOf, Target
from consilience.mixing.target import Tensors

State = dict[str, Tensor]


class Net(nn.Module):
    """Two blocks with batch normalisation and dropout; its head shares the first block's weight."""

    def __init__(self, *, dropout: float = 0.3) -> None:
        super().__init__()
        linears = [nn.Linear(6, 6), nn.Linear(6, 6)]
        self.embed = nn.Linear(5, 6)
        self.blocks = nn.ModuleList(
            nn.Sequential(linear, nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(dropout)) for linear in linears
        )
        self.head = nn.Linear(6, 6, bias=False)
        self.head.weight = linears[0].weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Point(nn.Module):
    """Its output for every row is its parameter."""

    def __init__(self, size: int = 4) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.zeros(size, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.theta.expand(len(x), -1)


def net(dtype: torch.dtype = torch.float32, **settings: float) -> Net:
    torch.manual_seed(0)
    return Net(**settings).to(dtype)


def scattered(module: nn.Module, count: int, scale: float = 0.3) -> dict[str, State]:
    """Return experts at random around a module: weights, running statistics and counters all differ."""
    found: dict[str, State] = {}
    for k in range(count):
        torch.manual_seed(100 + k)
        own = copy.deepcopy(module)
        with torch.no_grad():
            for value in own.parameters():
                value.add_(scale * torch.randn_like(value))
            for name, value in own.named_buffers():
                if value.is_floating_point():
                    value.copy_(torch.rand_like(value) + (0.5 if name.endswith("var") else -0.5))
                else:
                    value.fill_(10 + k)
        found[f"expert{k}"] = own.state_dict()
    return found


def labelled(rows: int = 24, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1_000 + seed)
    return torch.randn(rows, 5, dtype=dtype), torch.randint(6, (rows,))


def squared(outputs: Tensor, labels: Tensor) -> Tensor:
    return (outputs - labels).square().sum(-1).mean()


def towards(goal: Tensor) -> Target:
    """Return the target whose loss is ``||theta - goal||^2`` of a Point."""
    rows = Tensors(torch.zeros(4, 1), goal.expand(4, -1))
    return Target(rows, rows, LossOf(squared), batch_size=2)


def points(*values: list[float]) -> dict[str, State]:
    return {f"expert{k}": {"theta": torch.tensor(value, dtype=torch.float64)} for k, value in enumerate(values)}


def fingerprint(states: Mapping[str, Mapping[str, Tensor]]) -> str:
    found = hashlib.sha256()
    for state in states.values():
        for name, value in state.items():
            found.update(name.encode() + value.float().numpy().tobytes())
    return found.hexdigest()
