"""Rows that begin alike as one sequence: tokens that they share go through the model once, and nothing is padded.

The rows of a batch form a prefix tree. Its nodes make one sequence; each stands at the position that it has in its
rows, and attends to itself and its ancestors alone:

    rows        s u A x     s u A y     s u B
    nodes       s u A x y B
    positions   0 1 2 3 3 2             mask[i, j] = node j is node i, or an ancestor of it

Prompts of a task share a system prompt and often an instruction, several answers to a prompt share all of it: half of
the tokens or more. In a decoder nothing before a token depends on what comes after it, so the states are those of rows
that go through by themselves. This is for decoders that take positions and a mask of their own; whether a model's
states are the same that way is measured on a short probe, in the precision that is learned in.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from consilience.student.calibration import Batch

if TYPE_CHECKING:
    from consilience.student.student import Student
    from consilience.tasks.readout import Readout

Indices = npt.NDArray[np.int64]
#: A tree must have at most this share of the padded batch's tokens: its mask is dense, a padded batch's attention not.
LARGEST_SHARE = 0.9
#: Tokens of the probe: two shared, then three and two.
PROBE = 7
#: Largest difference of two states of the probe that is rounding, as a part of the largest state.
TOLERANCE = {"float64": 1e-9, "float32": 1e-4, "mixed": 3e-2, "bfloat16": 3e-2}


@dataclass(frozen=True, eq=False)
class PrefixTree:
    """Nodes of a prefix tree: token and depth of each [N], ``visible`` [N, N], and of every row the nodes it is."""

    tokens: Indices
    depth: Indices
    visible: npt.NDArray[np.bool_]
    rows: tuple[Indices, ...]


def prefix_tree(rows: Sequence[Sequence[int]]) -> PrefixTree:
    """Return the prefix tree of token ids; a node comes after its ancestors."""
    children: dict[tuple[int, int], int] = {}
    parents: list[int] = []
    tokens: list[int] = []
    depth: list[int] = []
    paths: list[Indices] = []
    for row in rows:
        at, path = -1, np.empty(len(row), np.int64)
        for place, token in enumerate(row):
            child = children.get((at, token))
            if child is None:
                child = children[at, token] = len(tokens)
                parents.append(at)
                tokens.append(token)
                depth.append(place)
            path[place] = at = child
        paths.append(path)
    visible = np.eye(len(tokens), dtype=np.bool_)
    for node, parent in enumerate(parents):
        if parent >= 0:
            visible[node] |= visible[parent]
    return PrefixTree(np.asarray(tokens), np.asarray(depth), visible, tuple(paths))


def tree_inputs(tree: PrefixTree, model: Any) -> dict[str, Any]:
    """Return a tree as a model's keyword arguments."""
    import torch

    visible = torch.from_numpy(tree.visible)[None, None].to(model.device)
    if model.config._attn_implementation == "eager":  # it adds the mask to the scores
        visible = torch.zeros_like(visible, dtype=model.dtype).masked_fill(~visible, torch.finfo(model.dtype).min)
    return {
        "input_ids": torch.from_numpy(tree.tokens)[None].to(model.device),
        "position_ids": torch.from_numpy(tree.depth)[None].to(model.device),
        "attention_mask": visible,
    }


def packed_inputs(batch: Batch, model: Any) -> tuple[dict[str, Any], tuple[Any, Any]] | None:
    """Return a batch's inputs as a prefix tree and its compared (0, node) pairs; None where that spares too little."""
    import torch

    encoded = [sample.encoded for sample in batch.samples]
    if any(sample.extra for sample in batch.samples) or any(one.source for one in encoded):
        return None
    tree = prefix_tree([one.inputs for one in encoded])
    if len(tree.tokens) > LARGEST_SHARE * len(encoded) * max(len(one.inputs) for one in encoded):
        return None
    compared = [nodes[list(one.positions)] for nodes, one in zip(tree.rows, encoded, strict=True)]
    nodes = torch.from_numpy(np.concatenate(compared)).to(model.device)
    return tree_inputs(tree, model), (torch.zeros_like(nodes), nodes)


def packs(student: "Student", readout: "Readout", probe: Batch) -> bool:
    """Whether a student's states of rows that are packed are those of rows by themselves."""
    import torch

    from consilience.tasks.encoding import Encoded
    from consilience.tasks.readout import padded
    from consilience.tasks.shared_prefix import plain_decoder

    ids = list(dict.fromkeys(probe.samples[0].encoded.inputs))[:PROBE]
    decoder = plain_decoder(readout)
    if decoder is None or not decoder.positions or len(ids) < PROBE or probe.samples[0].extra:
        return False
    rows = [tuple(ids[:5]), (*ids[:2], *ids[5:])]
    tree = prefix_tree(rows)
    nodes = torch.from_numpy(np.concatenate(tree.rows)).to(student.model.device)
    with torch.no_grad(), student.compute():
        if decoder.trunk(ids) is None:  # it has windows, or states that are not those of a position
            return False
        inputs, where, _ = padded(
            [Encoded(0, None, (), row, tuple(range(len(row))), ()) for row in rows], student.model
        )
        apart = readout.states(inputs, where)
        packed = readout.states(tree_inputs(tree, student.model), (torch.zeros_like(nodes), nodes))
    tolerance = TOLERANCE[student.settings.precision]
    return bool((packed - apart).abs().max() <= tolerance * apart.abs().max())
