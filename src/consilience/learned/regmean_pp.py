"""RegMean++: RegMean, each block by what it is given behind the blocks that are merged already."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from consilience.experts.stack import Stack
from consilience.learned.settings import Samples, Tokens
from consilience.methods.program import Floats, Update
from consilience.methods.regmean import nearest_outputs
from consilience.methods.signature import Default, Others, Range, matrix

if TYPE_CHECKING:
    from consilience.learned.run import Run


def _collect(run: "Run", folder: Path) -> list[Path]:
    from consilience.learned.sequential import collect_in_sequence

    return collect_in_sequence(run, folder)


@matrix(
    source="Nguyen et al. 2025, RegMean++, TMLR 2026, arXiv:2508.03121",
    copies=6,
    reads="gram",
    data="calibration: unlabelled rows of every expert",
    collect=_collect,
)
def regmean_pp(
    stack: Stack,
    grams: Iterable[Floats],
    *,
    lambda_: Annotated[float, Default(1.0), "multiplier of the merged task vector"],
    off_diagonal: Annotated[float, Default(0.9), Range(0, 1), "multiplier of the Gram matrices' off-diagonal entries"],
    ridge: Annotated[float, Default(1e-6), Range(0), "pull to the mean, as a part of the Gram matrices' mean diagonal"],
    others: Others,
    samples: Samples,
    precision: Annotated[
        Literal["float32", "mixed"], Default("float32"), "products of the forward passes: float32, or mixed: bfloat16"
    ],
    batch_tokens: Tokens,
) -> Floats | Update:
    """Merge linear layers by least squares on what they are given behind the layers that are merged already.

    tau^b = (sum_k tau_k^b G_k^b + c mean_k tau_k^b) (sum_k G_k^b + c I)^(-1),   b = 1, 2, ... the model's blocks

    G_k^b = mean x x^T over expert k's rows, as the merged embeddings and the merged blocks before b left them, gone
    through block b with expert k's weights; off-diagonal entries, c and theta are RegMean's. In the first block it is
    RegMean, where experts leave the embeddings alone.

    Known disagreements: codes take all rows of all experts through a model of one family that is written out for it;
    here the model's own blocks are run one at a time, whichever they are, and a trial shows that they can be. What is
    in no block (embeddings, the output layer, vision towers) is treated as tensors that are no matrices are.
    """
    del lambda_, others, samples, precision, batch_tokens  # the engine's, or of the collection
    return nearest_outputs(stack, grams, off_diagonal, ridge)
