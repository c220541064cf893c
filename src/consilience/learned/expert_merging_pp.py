"""Expert Merging++: more coefficients where they matter."""

from typing import TYPE_CHECKING, Annotated, Literal

from consilience.coefficients import Coefficients, expand
from consilience.coefficients.importance import allocate, allocation_groups, importance
from consilience.learned.expert_merging import PRESETS, ExpertMerging, Preset
from consilience.learned.settings import Start
from consilience.methods.signature import Default, Range, learned_method

if TYPE_CHECKING:
    from consilience.learned.run import Run


@learned_method(
    source="Expert Merging++, arXiv:2509.25712 (ICLR 2026)",
    data="calibration: 5 to 10 unlabelled rows per expert",
    presets={**PRESETS, "official-code": {**PRESETS["official-code"], "stage_2": "anchor"}},
)
def expert_merging_pp(
    run: "Run",
    *,
    preset: Preset,
    start: Start,
    learning: ExpertMerging,
    budget: Annotated[
        float, Default(1.0), Range(0), "coefficients to hand out per expert, in units of the number of groups"
    ],
    kappa: Annotated[
        float, Default(1.0), Range(0), "how far they concentrate on important groups; 0: uniform (not published)"
    ],
    stage_2: Annotated[
        Literal["anchor", "stage_1"],
        Default("stage_1"),
        "where the second stage starts: the anchor, or the first's end",
    ],
) -> Coefficients:
    """Learn per tensor, measure each tensor's importance, cut important tensors into chunks, learn again.

    I_l = sum_k |alpha_k^l| ||tau_k^l||_1, normalised over layers;   m_l = floor(B L I_l^kappa / sum_j I_j^kappa)
    theta^l[s] = theta_0^l[s] + sum_k alpha_{k,s}^l tau_k^l[s],   s = 1 ... m_l contiguous chunks of the flat tensor

    A layer with m_l = 0 keeps one fixed coefficient per expert: the anchor's, or the first stage's where the second
    starts from it. The released code starts from the anchor again and takes m_l as given.
    """
    from consilience.learned.learning import learn_coefficients, start_of
    from consilience.student.bank import Bank

    anchor = start_of(run, start)
    first = learn_coefficients(run.inside("stage-1"), anchor, learning, compare=False)
    bank = Bank(run.plan, anchor.groups, threads=run.machine.threads)
    try:
        shares = importance(first, bank.l1())
    finally:
        bank.close()
    chunks = allocate(shares, budget, kappa)
    groups = allocation_groups(anchor.groups, chunks)
    begin = expand(first if stage_2 == "stage_1" else anchor, groups)
    found = learn_coefficients(run.inside("stage-2"), begin, learning, anchor=expand(anchor, groups).alpha)
    kept = ("history", "steps", "step", "seconds")
    facts = {"stage_1": {key: first.facts[key] for key in kept}, "importance": shares, "chunks": chunks}
    seconds = first.facts["seconds"] + found.facts["seconds"]
    return found.with_alpha(found.alpha, **facts, seconds=seconds)
