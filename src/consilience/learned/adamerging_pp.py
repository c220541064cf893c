"""AdaMerging++: AdaMerging on task vectors that TIES has trimmed and whose signs it has elected."""

from typing import TYPE_CHECKING, Annotated

from consilience.coefficients import Coefficients, Trimmed
from consilience.learned.adamerging import AdaMerging, learn_entropy
from consilience.methods.signature import Default, Range, learned_method

if TYPE_CHECKING:
    from consilience.learned.run import Run


@learned_method(
    source="AdaMerging++, arXiv:2310.02575 (ICLR 2024)",
    data="calibration: unlabelled rows of every expert's task",
)
def adamerging_pp(
    run: "Run",
    *,
    settings: AdaMerging,
    density: Annotated[
        float, Default(0.2), Range(1e-6, 1), "share of each task vector that survives, over all merged tensors"
    ],
    elect: Annotated[bool, Default(True), "also drop entries against the elected sign, as the official code does"],
) -> Coefficients:
    """Trim each task vector, drop the entries that the sign election outvotes, and learn as ``adamerging`` does.

    tau'_k = tau_k where |tau_k| is among the largest ``density`` share of the model's entries, else 0
    tau''_k = tau'_k where its sign is that of sum_j tau'_j (0 counts as +), else 0
    theta^l = theta_0^l + sum_k lambda_k^l tau''_k^l

    Known disagreements: accounts of the paper speak of trimming, the official code elects signs too (``elect=false``
    does not). Where trimmed entries cancel that code takes the model's majority sign, and it keeps one entry more.
    """
    return learn_entropy(run, settings, Trimmed(density, elect))
