"""A low-rank correction of a merge, in the directions that the experts' own updates span.

    theta^l = theta_0^l + sum_k alpha_k^l tau_k^l + dL R_0 + L_0 dR,        tau_k ~ L_k R_k at rank r
    L_0 = [L_1 ... L_K],  R_0 = [R_1; ...; R_K],  L_k = U_r S_r^(1/2),  R_k = S_r^(1/2) V_r^T   (tau_k = U S V^T)

dL [m, K r] and dR [K r, n] are trained; at 0 there is a gradient for both (``regression.py`` has a better start): these
are the first-order changes of the experts' factors, where a fresh adapter has to find its directions first.
Adapters of rank r or less keep theirs exactly; other task vectors are cut to rank r by a randomised SVD. Written down
it is a PEFT adapter of rank 2 K r: B = [dL, L_0], A = [R_0; dR].
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from consilience.engine.adapter_files import CONFIG, WEIGHTS, factor_names, lora_config
from consilience.errors import InputError
from consilience.experts.model import Source
from consilience.student.factored import layers_of, stored_factors
from consilience.student.student import BLEND, Student
from consilience.workdir import json_text, write_file

#: Of the randomised SVD: columns beyond the rank, and passes (each makes the larger directions stand out more).
_OVERSAMPLE, _PASSES = 8, 2


class Correction:
    """The trainable correction of a student's linear layers; ``parameters`` by name, ``layer.left`` and ``.right``.

    While it is not ``active``, or while the student plays an expert, the model is what it is without it.
    """

    def __init__(self, student: Student, rank: int, seed: int) -> None:
        able = [n for n, t in student.bank.tensors.items() if len(t.shape) == 2]
        layers = layers_of(student.model, student.parameters, able)
        if not layers:
            raise InputError(
                "correction_rank: the model has no linear layer of its own that an expert changes; use expert_merging"
            )
        self.student, self.active = student, True
        self.layers: dict[str, Any] = {}
        self.fixed: dict[str, tuple[Any, Any]] = {}
        self._ranks: dict[str, list[int]] = {}
        self.parameters: dict[str, Any] = {}
        for name, layer in layers.items():
            left, right, ranks = _directions(student, name, rank, seed)
            if left.shape[1] == 0:
                continue
            self.layers[name], self._ranks[name] = layer, ranks
            self.fixed[name] = left, right
            for side, like in (("left", left), ("right", right)):
                self.parameters[f"{name}.{side}"] = torch.zeros_like(like).requires_grad_(True)
            if name not in student.factored or not student.factored[name].takes_correction:
                layer.register_forward_hook(self._hook(name))
        self.turn(True)

    def turn(self, on: bool) -> None:
        """Turn the correction on or off."""
        self.active = on
        for name, sides in self.fixed.items():
            factored = self.student.factored.get(name)
            if factored is not None and factored.takes_correction:
                moved = (self.parameters[f"{name}.{side}"] for side in ("left", "right"))
                factored.correction = (*sides, *moved) if on else None

    def directions(self, name: str, expert: int) -> Any:
        """Return R_k [r, n] of a layer and an expert; r is 0 where the expert does not change it."""
        ranks = self._ranks[name]
        first = sum(ranks[:expert])
        return self.fixed[name][1][first : first + ranks[expert]]

    @property
    def rank(self) -> int:
        """The greatest rank of a layer's correction."""
        return max(2 * left.shape[1] for left, _ in self.fixed.values())

    def factors(self, name: str) -> tuple[Any, Any]:
        """Return B [m, 2 K r] and A [2 K r, n] of a layer."""
        left, right = self.fixed[name]
        moved_left, moved_right = (self.parameters[f"{name}.{side}"] for side in ("left", "right"))
        return torch.cat([moved_left, left], 1), torch.cat([right, moved_right], 0)

    def _hook(self, name: str) -> Any:
        def add(_module: Any, inputs: Any, output: Any) -> Any:
            if not self.active or self.student.held != BLEND:
                return output
            left, right = self.factors(name)
            x = inputs[0]
            if not torch.is_autocast_enabled(x.device.type):
                left, right = left.to(x.dtype), right.to(x.dtype)
            return output + ((x @ right.T) @ left.T).to(output.dtype)

        return add

    def write(self, folder: Path, base: str) -> None:
        """Write a PEFT adapter (float32); files that hold the same already stay as they are."""
        from safetensors.torch import save

        tensors: dict[str, Any] = {}
        ranks: dict[str, int] = {}
        for name in self.fixed:
            module = name.removesuffix(".weight")
            b, a = (side.detach().float().cpu().contiguous() for side in self.factors(name))
            at_a, at_b = factor_names(module)
            tensors |= {at_a: a, at_b: b}
            ranks[module] = a.shape[0]
        modules = [name.removesuffix(".weight") for name in self.student.parameters if name.endswith(".weight")]
        config = lora_config(ranks, modules, base=base, task_type=_task_type(self.student.model))
        folder.mkdir(parents=True, exist_ok=True)
        for path, content in (
            (folder / WEIGHTS, save(tensors, {"format": "pt"})),
            (folder / CONFIG, json_text(config)),
        ):
            data = content if isinstance(content, bytes) else content.encode()
            if not (path.is_file() and path.read_bytes() == data):
                write_file(path, data)


def _task_type(model: Any) -> str:
    return "SEQ_2_SEQ_LM" if getattr(model.config, "is_encoder_decoder", False) else "CAUSAL_LM"


def _directions(student: Student, name: str, rank: int, seed: int) -> tuple[Any, Any, list[int]]:
    """Return L_0 [m, sum r], R_0 [sum r, n] and every expert's r, in the precision that gradients are taken in."""
    tensor = student.bank.tensors[name]
    kind = torch.float64 if student.settings.precision == "float64" else torch.float32
    lefts: list[Any] = []
    rights: list[Any] = []
    ranks = [0] * len(tensor.rows)
    for expert, row in enumerate(tensor.rows):
        if row.untouched:
            continue
        only_pair = row.pair is not None and row.dense is None and tensor.base.pair is None
        left, right = _of_pair(row, rank) if only_pair else _of_weights(student, name, expert, rank, seed)
        lefts.append(left)
        rights.append(right)
        ranks[expert] = left.shape[1]
    m, n = tensor.shape
    left = torch.cat(lefts, 1) if lefts else torch.zeros(m, 0)
    right = torch.cat(rights, 0) if rights else torch.zeros(0, n)
    device = student.settings.device
    return left.to(device=device, dtype=kind), right.to(device=device, dtype=kind), ranks


def _of_pair(row: Source, rank: int) -> tuple[Any, Any]:
    """Cut scale B A to its largest ``rank`` directions, without the product: B = Q T, A^T = P S, then T S^T."""
    pair = row.pair
    assert pair is not None
    b, a = (side.double() for side in stored_factors(row))
    q, t = torch.linalg.qr(b * pair.scale)
    p, s = torch.linalg.qr(a.T)
    u, values, v = torch.linalg.svd(t @ s.T, full_matrices=False)
    return _balanced(q @ u, values, v @ p.T, rank)


def _of_weights(student: Student, name: str, expert: int, rank: int, seed: int) -> tuple[Any, Any]:
    """Cut an expert's task vector to its largest ``rank`` directions by a randomised SVD."""
    m, n = student.bank.tensors[name].shape
    own, base = torch.empty(m * n), torch.empty(m * n)
    student.bank.write(name, expert, own)
    student.bank.write(name, None, base)
    tau = (own - base).view(m, n)
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        u, values, v = torch.svd_lowrank(tau, q=min(rank + _OVERSAMPLE, m, n), niter=_PASSES)
    return _balanced(u, values, v.T, rank)


def _balanced(u: Any, values: Any, v: Any, rank: int) -> tuple[Any, Any]:
    """Return U_r S_r^(1/2), S_r^(1/2) V_r^T of the values that are not zero."""
    kept = min(rank, int((values > 1e-7 * values[0]).sum())) if len(values) and values[0] > 0 else 0
    root = values[:kept].sqrt()
    return u[:, :kept] * root, root[:, None] * v[:kept]


def state_of(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Return tensors as numpy arrays, by the same names."""
    return {name: value.detach().cpu().numpy().copy() for name, value in parameters.items()}
