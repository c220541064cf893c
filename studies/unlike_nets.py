"""Can independently trained networks be merged? Eight ProteinMPNN networks, matched by ``consilience.align``.

Every pair cell matches one network to the reference and measures both, their midpoint before and after matching, with
and without repaired statistics, and the average of their predictions, which is what a midpoint would have to reach.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from studies.cells import Cell, Study

REFERENCE = "proteinmpnn_v_48_020"
OTHERS = tuple(
    f"{kind}_v_48_{noise}"
    for kind in ("proteinmpnn", "solublempnn")
    for noise in ("002", "010", "020", "030")
    if f"{kind}_v_48_{noise}" != REFERENCE
)
#: Backbones that losses are taken on, and others that statistics are repaired on.
MEASURED, PROBES = 8, 4
_CELLS = (
    *((f"pair-{name}", {"cell": "pair", "name": name, "seed": 0}) for name in OTHERS),
    ("noise", {"cell": "noise", "name": OTHERS[0], "seed": 0}),
    ("all", {"cell": "all", "seed": 0}),
)


def run(setting: dict[str, Any]) -> Mapping[str, Any]:
    """Run one cell."""
    return {"pair": _pair, "noise": _noise, "all": _all}[setting["cell"]](setting)


def _pair(setting: Mapping[str, Any]) -> Mapping[str, Any]:
    import consilience as cs
    from studies.protein_nets import AXES, network, proteins, weights

    ends = [weights(REFERENCE), weights(setting["name"])]
    data, probes = proteins(MEASURED, setting["seed"]), proteins(PROBES, setting["seed"] + 1)
    labels = data[1].flatten()
    found: Any = cs.align(
        ends[0], ends[1], module=network(), axes=AXES, inputs=data, labels=labels, seed=setting["seed"]
    )
    answers = [_answer(end, data) for end in ends]
    measured = {"ensemble": _losses(_mean(answers), answers, labels)}
    for name, other in (("raw", ends[1]), ("matched", found.state)):
        measured |= _averages(name, [ends[0], other], answers, data, probes)
    return {"report": found.report.to_dict(), "measured": measured, "unigram": _unigram(data[1])}


def _averages(
    name: str, states: Sequence[Mapping[str, Tensor]], answers: Sequence[Tensor], data: Any, probes: Any
) -> dict[str, Any]:
    """Measure the average of states, as it is and with repaired statistics."""
    from consilience.mixing import repair
    from studies.protein_nets import network

    average = {key: torch.stack([state[key] for state in states]).mean(0) for key in states[0]}
    repaired = repair(network(), average, states, probes)
    labels = data[1].flatten()
    return {
        name: _losses(_answer(average, data), answers, labels),
        f"{name}, repaired": _losses(_answer(repaired, data), answers, labels),
    }


def _noise(setting: Mapping[str, Any]) -> Mapping[str, Any]:
    """Match a network whose every tensor was shuffled: what the search alone makes of weights without any structure."""
    import consilience as cs
    from studies.protein_nets import AXES, weights

    random = torch.Generator().manual_seed(setting["seed"])
    shuffled = {
        name: value.flatten()[torch.randperm(value.numel(), generator=random)].reshape(value.shape)
        for name, value in weights(setting["name"]).items()
    }
    found: Any = cs.align(weights(REFERENCE), shuffled, axes=AXES, seed=setting["seed"])
    return {"report": found.report.to_dict()}


def _all(setting: Mapping[str, Any]) -> Mapping[str, Any]:
    import consilience as cs
    from studies.protein_nets import AXES, proteins, weights

    states = [weights(name) for name in (REFERENCE, *OTHERS)]
    data, probes = proteins(MEASURED, setting["seed"]), proteins(PROBES, setting["seed"] + 1)
    answers = [_answer(state, data) for state in states]
    labels = data[1].flatten()
    matched: list[Any] = [cs.align(states[0], state, axes=AXES, seed=setting["seed"]) for state in states[1:]]
    measured = {"ensemble": _losses(_mean(answers), answers, labels)}
    measured |= _averages("raw", states, answers, data, probes)
    measured |= _averages("matched", [states[0], *(one.state for one in matched)], answers, data, probes)
    own = [_losses(answer, answers, labels)["loss"] for answer in answers]
    return {"measured": measured, "own": own, "unigram": _unigram(data[1])}


def _answer(state: Mapping[str, Tensor], data: Any) -> Tensor:
    from studies.protein_nets import network

    module = network()
    module.load_state_dict(dict(state))
    with torch.no_grad():
        return module(*data).double()


def _mean(answers: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(answers)).logsumexp(0) - math.log(len(answers))


def _losses(answer: Tensor, ends: Sequence[Tensor], labels: Tensor) -> dict[str, float]:
    """Return the cross entropy on the designs, and KL from the mean of the ends' predictions, in nats a residue."""
    mean = _mean(ends)
    divergence = (mean.exp() * (mean - answer)).sum(-1).mean()
    return {
        "loss": round(float(torch.nn.functional.nll_loss(answer, labels)), 4),
        "divergence": round(float(divergence), 4),
    }


def _unigram(sequences: Tensor) -> float:
    """Return the entropy of the residues' frequencies: the loss of knowing no backbone."""
    shares = torch.bincount(sequences.flatten()).double() / sequences.numel()
    return round(float(-(shares[shares > 0] * shares[shares > 0].log()).sum()), 4)


def tables(cells: Sequence[Cell]) -> str:
    """Return the page."""
    from studies.unlike_nets_page import page

    return page(cells)


STUDY = Study("unlike_nets", _CELLS, run, tables)
