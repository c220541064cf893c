"""Expert Merging without backpropagation: the alignment loss on the four language experts, by SPSA and by gradient.

The experts, draws of ten unlabelled prompts, and measurements are those of ``studies.expert_merging``; what differs is
how many coefficients there are, where they may lie, and whether anything is differentiated.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from studies import expert_merging
from studies.cells import Cell, Study, Tables
from studies.expert_merging_tables import mean_kl, mean_loss

COMMON: dict[str, Any] = {"batch": 8, "gamma": 0.0, "hidden_weight": 0.0}
#: Evaluations of a step: 1 forward and 1 backward pass for the gradient, 2 forward passes a direction for SPSA.
SPSA: dict[str, Any] = {"optimizer": "spsa", "steps": 80, "learning_rate": 0.04, "mu": 0.05}
GRADIENT: dict[str, Any] = {"optimizer": "adam", "steps": 40, "learning_rate": 0.04}
SIMPLEX: dict[str, Any] = {"grouping": "global", "coefficients": "softmax", "alphabar": 0.25}
AFFINE: dict[str, Any] = SIMPLEX | {"coefficients": "affine"}
FREE: dict[str, Any] = {"grouping": "global", "coefficients": "real"}
BLOCKS: dict[str, Any] = {"grouping": "block", "coefficients": "real"}
#: label -> parameters besides COMMON; learning rates on the simplex are in logits.
RUNS: dict[str, dict[str, Any]] = {
    "simplex, SPSA (GLUE's form)": SIMPLEX | SPSA | {"learning_rate": 0.1, "mu": 0.1},
    "simplex, gradient": SIMPLEX | GRADIENT | {"learning_rate": 0.1},
    "affine, SPSA": AFFINE | SPSA,
    "one free coefficient an expert, SPSA": FREE | SPSA,
    "one free coefficient an expert, gradient": FREE | GRADIENT,
    "one an expert and block, SPSA, 4 directions": BLOCKS | SPSA | {"directions": 4, "steps": 40},
    "one an expert and block, gradient": BLOCKS | GRADIENT,
}


def _cells() -> list[tuple[str, dict[str, Any]]]:
    cells: list[tuple[str, dict[str, Any]]] = []
    for number in expert_merging.DRAWS:
        for label, parameters in RUNS.items():
            identity = "".join(c if c.isalnum() else "-" for c in label.lower()).replace("--", "-").strip("-")
            setting = {"kind": "learned", "experts": "lora", "label": f"language {label}", "method": "expert_merging"}
            cells.append((f"{identity}-{number}", setting | {"draw": number, "parameters": COMMON | parameters,
                                                           "seed": 0}))  # fmt: skip
    return cells


def tables(cells: Sequence[Cell]) -> Tables:
    """Build the page."""
    head = (
        "# Expert Merging without backpropagation\n\nThe alignment loss (KL of the logits, no anchor) on the four "
        "language adapters, ten unlabelled prompts per expert, minimised by SPSA (forward passes only) and by the "
        "gradient. Test rows as in [the Expert Merging study](expert_merging.md), ± over draws of the prompts. "
        "Settings are round numbers, not tuned.\n"
    )
    rows = ["| coefficients | draws | KL to the experts | test loss | forward passes of 8 prompts | backward |",
            "|---|---|---|---|---|---|"]  # fmt: skip
    for label, parameters in RUNS.items():
        found = [cell for cell in cells if cell.setting["label"] == f"language {label}"]
        if found:
            steps = parameters["steps"]
            forward = steps * (2 * parameters.get("directions", 1) if parameters["optimizer"] == "spsa" else 1)
            backward = 0 if parameters["optimizer"] == "spsa" else steps
            kl, loss = [mean_kl(cell.result) for cell in found], [mean_loss(cell.result) for cell in found]
            rows.append(f"| {label} | {len(found)} | {_spread(kl)} | {_spread(loss)} | {forward} | {backward} |")
    return Tables(head + "\n" + "\n".join(rows) + "\n")


def _spread(values: Sequence[float]) -> str:
    mean = f"{np.mean(values):.3f}"
    return f"{mean} ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else mean


STUDY = Study("glue_language", _cells(), expert_merging.run, tables)
