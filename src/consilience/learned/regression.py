"""Where a correction starts: each layer's least-squares fit to what the experts' layers do on their own rows.

    min_W  sum_k 1/n_k || X_k (W - tau_k)^T ||^2  +  lambda || W - sum_k alpha_k tau_k ||^2,     tau_k = L_k R_k
    W = sum_k L_k Z_k,    Z_k = R_k (G_k + lambda alpha_k I) (sum_j G_j + lambda I)^-1,    G_k = X_k^T X_k / n_k

X_k [n_k, n] are the inputs of the layer at the tokens of expert k's rows while the model is expert k. This is RegMean
(Jin et al. 2023, arXiv:2212.09849) on task vectors, drawn to Task Arithmetic instead of shrinking off-diagonal entries.
Whatever the weights, W lies in the columns of the experts' updates, so it is a correction: dR_k = Z_k - alpha_k R_k and
dL = 0. No gradient is needed; of the experts one forward pass is.
"""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from consilience.coefficients.coefficients import Alpha
from consilience.errors import InputError
from consilience.learned.gram import pass_tokens, tokens_of
from consilience.learned.inputs import leaders, passes, watched
from consilience.student.calibration import batches, each_expert
from consilience.student.student import Student

if TYPE_CHECKING:
    from consilience.learned.correction import Correction
    from consilience.learned.run import Workshop

#: Tokens of an expert's rows that are looked at, and bytes of Gram matrices of one pass over them.
TOKENS, BYTES = 8192, 1 << 30


@dataclass
class _Inputs:
    """Gram matrices of what layers are given: several layers are given the same tensor.

    ``leader`` maps every layer that was called to the first that got the same input; ``now`` [n, n] are sums over the
    rows of one expert, ``total`` those of all experts in equal shares.
    """

    layers: Mapping[str, Any]
    leader: dict[str, str] = field(default_factory=dict[str, str])
    wanted: set[str] = field(default_factory=set[str])
    mask: Any = None
    count: int = 0
    now: dict[str, Any] = field(default_factory=dict[str, Any])
    total: dict[str, Any] = field(default_factory=dict[str, Any])

    def add(self, name: str, x: Any) -> None:
        """Add the tokens of a batch to a leader's sums."""
        rows = tokens_of(x, self.mask)
        # Nearly equal inputs need more than autocast's bfloat16.
        with torch.autocast(x.device.type, enabled=False):
            rows = rows if rows.dtype == torch.float64 else rows.float()
            gram = rows.T @ rows
        self.now[name] = self.now[name] + gram if name in self.now else gram

    def finish(self) -> dict[str, Any]:
        """Return the Gram matrices of an expert's rows, and begin the next one's."""
        done = {name: gram / self.count for name, gram in self.now.items()}
        for name, gram in done.items():
            self.total[name] = self.total[name] + gram if name in self.total else gram
        self.now, self.count = {}, 0
        return done


def start_by_regression(shop: "Workshop", correction: "Correction", alpha: Alpha, ridge: float) -> None:
    """Set a correction's right sides to the solution of every layer's regression, given coefficients.

    Args:
        shop: the student and its rows; the student holds an expert's weights afterwards.
        correction: of its layers; those that are not called stay at 0.
        alpha: [K, N] coefficients at the start.
        ridge: lambda, as a part of the mean of the diagonal of sum_k G_k.

    Raises:
        InputError: inputs of a layer are not finite.
    """
    inputs = _Inputs(correction.layers)
    rows = _rows(shop)
    shop.run.progress.phase("regression", len(rows) * len(shop.student.bank.experts), "passes")
    _find_leaders(shop, inputs, rows)
    for wanted in _passes(inputs):
        inputs.total = {}
        followers = {lead: [n for n in inputs.leader if inputs.leader[n] == lead] for lead in wanted}
        sides: dict[str, Any] = {n: [] for names in followers.values() for n in names}
        for expert, chosen in rows.items():
            _read(shop, inputs, expert, chosen, wanted)
            grams = inputs.finish()
            for lead, names in followers.items():
                for name in names:
                    own = correction.directions(name, expert)
                    gram = grams.get(lead)  # None: the rows of this expert do not come by (a mixture's router chose)
                    sides[name].append(torch.zeros_like(own) if gram is None else own @ gram.to(own.dtype))
        for lead, names in followers.items() if inputs.total else ():
            _solve(shop.student, correction, alpha, ridge, inputs.total[lead], {n: sides[n] for n in names})


def _rows(shop: "Workshop") -> dict[int, list[int]]:
    """Return samples to look at by expert, spread over all of its own."""
    out: dict[int, list[int]] = {}
    for expert, chosen in each_expert([shop.samples[i] for i in shop.learn]):
        own = [shop.learn[i] for i in chosen]
        step = -(-sum(len(shop.samples[i].encoded.inputs) for i in own) // TOKENS)
        out[expert] = own[::step]
    return out


def _run(shop: "Workshop", inputs: _Inputs, chosen: Sequence[int]) -> Iterator[None]:
    tokens = pass_tokens([shop.samples[i] for i in chosen], shop.tokens)
    for batch in batches(shop.samples, chosen, tokens, packed=shop.reader.packs):
        given, where, _ = shop.reader.inputs(batch)
        mask = given["attention_mask"]
        inputs.mask = mask.bool() if mask.ndim == 2 and len(batch.samples) > 1 else None
        inputs.count += int(mask.sum()) if mask.ndim == 2 else mask.shape[-1]
        with shop.student.compute():
            shop.reader.readout.states(given, where)
        yield


def _find_leaders(shop: "Workshop", inputs: _Inputs, rows: Mapping[int, Sequence[int]]) -> None:
    first = next(iter(rows.values()))[:1]
    inputs.leader = leaders(inputs.layers, lambda: deque(_run(shop, inputs, first), maxlen=0).clear())
    inputs.count = 0


def _passes(inputs: _Inputs) -> Iterator[list[str]]:
    # Gram matrices of one expert and of all, in float32.
    return passes({name: 8 * inputs.layers[name].in_features ** 2 for name in inputs.leader.values()}, BYTES)


def _read(shop: "Workshop", inputs: _Inputs, expert: int, chosen: Sequence[int], wanted: Sequence[str]) -> None:
    shop.student.become(expert)
    with watched(inputs.layers, wanted, inputs.add):
        for _ in _run(shop, inputs, chosen):
            shop.run.progress.advance(1)
    for name, gram in inputs.now.items():
        if not bool(gram.isfinite().all()):
            raise InputError(
                f"{shop.student.bank.experts[expert]}: its activations at {name!r} are not finite; use "
                "precision=float32"
            )


def _solve(
    student: Student, correction: "Correction", alpha: Alpha, ridge: float, total: Any, sides: Mapping[str, list[Any]]
) -> None:
    """Set dR of the layers that share an input; ``sides`` are R_k G_k of every expert."""
    lift = ridge * total.double().diagonal().mean()
    whole = total.double() + lift * torch.eye(len(total), dtype=torch.float64, device=total.device)
    factor = torch.linalg.cholesky(whole)
    for name, parts in sides.items():
        first = int(student.bank.extents[name].indices[0])
        scale = torch.tensor(alpha[:, first], dtype=torch.float64, device=total.device)
        own = [correction.directions(name, k).double() for k in range(len(parts))]
        pulled = [part.double() + lift * scale[k] * r for k, (part, r) in enumerate(zip(parts, own, strict=True))]
        solved = torch.cholesky_solve(torch.cat(pulled).T, factor).T
        moved = solved - torch.cat([scale[k] * r for k, r in enumerate(own)])
        right = correction.parameters[f"{name}.right"]
        right.data.copy_(moved)
