"""The regression that a correction starts from: the minimiser of its own least-squares problem, layer by layer."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_distil import products, workshop
from tiny_experts import write_adapter, write_base, write_rows

from consilience.learned import regression
from consilience.learned.correction import Correction
from consilience.learned.regression import start_by_regression
from consilience.student.calibration import batches

NAMES = ("small", "large")
LINES = {"small": ["w1 w2 w3 w4 w5", "w4 w5", "w6 w7 w8 w9"], "large": ["w1 w2 w3 w9", "w11 w12 w13", "w20 w21"]}


@pytest.fixture(params=["weights", "activations"])
def zoo(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Two adapters, on a base where they are blended into weights or work on activations."""
    sizes: dict[str, Any] = {"hidden_size": 48, "intermediate_size": 96} if request.param == "activations" else {}
    base = write_base(tmp_path / "base", **sizes)
    for rank, name in enumerate(NAMES, 1):
        write_adapter(tmp_path / name, base, rank, rank=rank)
        write_rows(tmp_path / "rows" / f"{name}.jsonl", LINES[name])
    return tmp_path


def inputs_of(shop: Any, correction: Correction, expert: int) -> dict[str, torch.Tensor]:
    """A layer's inputs at each distinct prefix of an expert's rows, row by row, in float64."""
    seen: dict[str, dict[tuple[int, ...], torch.Tensor]] = {name: {} for name in correction.layers}
    own = [i for i in shop.learn if shop.samples[i].expert == expert]
    shop.student.become(expert)
    for batch in batches(shop.samples, own, 1):
        ids = batch.samples[0].encoded.inputs

        def hook(name: str, x: torch.Tensor, ids: tuple[int, ...] = ids) -> None:
            for place in range(len(ids)):
                seen[name][ids[: place + 1]] = x[0, place].double()

        handles = [
            layer.register_forward_pre_hook(lambda _m, args, name=name: hook(name, args[0]))
            for name, layer in correction.layers.items()
        ]
        with torch.no_grad():
            shop.student.model(input_ids=torch.tensor([ids]))
        for handle in handles:
            handle.remove()
    return {name: torch.stack(list(rows.values())) for name, rows in seen.items()}


@pytest.mark.parametrize("few", [False, True])
def test_it_solves_its_least_squares_problem(zoo: Path, few: bool, monkeypatch: pytest.MonkeyPatch):
    """By lstsq on all rows of all experts, stacked; also where Gram matrices take several passes."""
    if few:
        monkeypatch.setattr(regression, "BYTES", 1 << 15)
    shop = workshop(zoo, *NAMES)
    try:
        alpha = np.repeat([[0.3], [0.6]], shop.bank.count, 1)
        correction = Correction(shop.student, 3, seed=0)
        start_by_regression(shop, correction, alpha, 0.05)
        seen = [inputs_of(shop, correction, k) for k in range(2)]
    finally:
        shop.close()
    taus = [products(zoo / name) for name in NAMES]
    solved = 0
    for name, (left, _) in correction.fixed.items():
        own = [tau.get(name, torch.zeros(correction.layers[name].weight.shape)).double() for tau in taus]
        grams = [x[name].T @ x[name] / len(x[name]) for x in seen]
        ridge = 0.05 * sum(g.diagonal().mean() for g in grams)
        anchor = 0.3 * own[0] + 0.6 * own[1]
        stacked = [x[name] / len(x[name]) ** 0.5 for x in seen] + [ridge**0.5 * torch.eye(own[0].shape[1]).double()]
        targets = [s @ tau.T for s, tau in zip(stacked, [*own, anchor], strict=True)]
        wanted = torch.linalg.lstsq(torch.cat(stacked), torch.cat(targets)).solution.T
        made = anchor + left @ correction.parameters[f"{name}.right"].detach()
        torch.testing.assert_close(made, wanted, rtol=1e-6, atol=1e-8)
        assert not correction.parameters[f"{name}.left"].detach().any()
        solved += float((made - anchor).norm()) > 1e-3
    assert solved == len(correction.fixed)


def test_without_a_pull_one_expert_is_itself(zoo: Path):
    """Where an expert's rows span its inputs nothing else fits them; 1e-9 stands for no ridge."""
    shop = workshop(zoo, "small")
    try:
        correction = Correction(shop.student, 3, seed=0)
        start_by_regression(shop, correction, np.full((1, shop.bank.count), 0.5), 1e-9)
        x = inputs_of(shop, correction, 0)
    finally:
        shop.close()
    tau = products(zoo / "small")
    for name, (left, _) in correction.fixed.items():
        made = 0.5 * tau[name] + left @ correction.parameters[f"{name}.right"].detach()
        torch.testing.assert_close(x[name] @ made.T, x[name] @ tau[name].T, rtol=1e-4, atol=1e-5)
