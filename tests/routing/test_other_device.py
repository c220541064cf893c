"""Routing where activations are not in the computer's memory.

The device "meta" stands for an accelerator: it refuses values of two devices in one operation, and any step that would
have to wait for a value.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from routed_models import routed_llama, routed_t5
from torch import Tensor

from consilience.routing.layer import Experts
from consilience.routing.router import Similarity
from consilience.routing.settings import Settings

SETTINGS = [
    Settings("phatgoose"),
    Settings("arrow", scale=2.0, top_k=1),
    Settings("phatgoose", scale="adaptive", fallback="mean"),
    Settings("average", scale=3.0, standardise=True, top_k=0),
    Settings("none", scale=3.0, top_p=0.5),
]
WITHIN: dict[str, Any] = {
    "routed": lambda routing: nullcontext(),
    "without": lambda routing: routing.without("e1"),
    "only": lambda routing: routing.only([0.2, 0.3, 0.5]),
}


def similarity(queries: Sequence[str], settings: Settings) -> Similarity:
    """What a global router says, in the computer's memory as always."""
    return Similarity(torch.rand(len(queries), 3), torch.full((len(queries),), 2.0))


@pytest.mark.parametrize("kind", ["llama", "t5"])
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
@pytest.mark.parametrize("way", list(WITHIN))
@pytest.mark.parametrize("settings", SETTINGS)
def test_a_pass_neither_mixes_devices_nor_waits(
    settings: Settings, way: str, dtype: torch.dtype, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("consilience.routing.layer.DENSE_SHARE", -1.0)
    model = (routed_llama if kind == "llama" else routed_t5)(settings).to(dtype).to("meta")
    routing = model.routing
    routing.asked.semantics = similarity
    decoder: dict[str, Any] = {} if kind == "llama" else {"decoder_input_ids": torch.zeros(2, 4).long().to("meta")}
    within: AbstractContextManager[None] = WITHIN[way](routing)
    with torch.no_grad(), routing.queries(["a", "b"]), within:
        assert model(input_ids=torch.ones(2, 5).long().to("meta"), **decoder).logits.is_meta
    assert routing.router.excluded is None
    assert routing.router.fixed is None


def test_what_is_set_goes_to_a_device_once_for_all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    model = routed_llama(Settings("phatgoose", scale="adaptive", fallback="mean")).to("meta")
    model.routing.asked.semantics = similarity
    moved: list[torch.Size] = []
    original = Tensor.to

    def to(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        found = original(self, *args, **kwargs)
        if found.device != self.device:
            moved.append(self.shape)
        return found

    with torch.no_grad(), model.routing.queries(["a", "b"]), model.routing.without("e0"):
        monkeypatch.setattr(Tensor, "to", to)
        model(input_ids=torch.ones(2, 5).long().to("meta"))
    assert sum(isinstance(module, Experts) for module in model.modules()) > 3
    # The token ids, and of the two queries: biases, shares, and who is left out.
    assert sorted(map(tuple, moved)) == [(2,), (2, 3), (2, 5), (3,)]
