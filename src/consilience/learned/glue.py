"""GLUE: convex weights of experts, learned on a small labelled target with forward passes only."""

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Literal

from consilience.coefficients import Coefficients
from consilience.errors import InputError
from consilience.learned.data import Data
from consilience.learned.loop import EarlyStopping, Loop
from consilience.learned.settings import Checkpoint, Compute, Exclude, Learning, Samples, Score, Tokens
from consilience.methods.signature import Default, PerExpert, Range, learned_method
from consilience.objectives.objective import Objective
from consilience.objectives.target import Target
from consilience.optimizers.settings import CmaSettings, Descent, SpsaSettings
from consilience.optimizers.spaces import BlendSpace

if TYPE_CHECKING:
    from consilience.learned.run import Run


@learned_method(
    source="GLUE, arXiv:2512.22467; no code is public, and the paper's text that could be had gives no step sizes",
    data="target: labelled rows to learn from, and others to stop by",
)
def glue(
    run: "Run",
    *,
    alphabar: Annotated[PerExpert, Default(1.0), Range(0), "start, divided by the sum over experts (paper: uniform)"],
    granularity: Annotated[
        Literal["global", "block", "tensor"], Default("global"), "one weight per expert, or one per block or tensor"
    ],
    space: BlendSpace,
    keep: Annotated[
        int, Default(0), Range(0), "experts that are mixed, those that alone do best on the rows held out; 0: all"
    ],
    exclude: Exclude,
    score: Score,
    positions: Annotated[
        Literal["all", "response"], Default("response"), "positions that go through the head; labelled ones count"
    ],
    samples: Samples,
    optimizer: Annotated[
        Literal["spsa", "cma", "adam", "adamw", "sgd"],
        Default("spsa"),
        "spsa, cma: forward passes only; the others follow the full gradient",
    ],
    learning_rate: Annotated[
        float,
        Default(0.1),
        Range(0),
        "step size: in logits on the simplex, else in weights",
    ],
    schedule: Annotated[
        Literal["constant", "linear", "cosine", "restarts"], Default("constant"), "how the learning rate falls"
    ],
    mu: Annotated[float, Default(0.05), Range(1e-6), "spsa: half the distance between its two points"],
    tune_mu: Annotated[bool, Default(False), "spsa: choose mu by the noise of the loss before the first step"],
    directions: Annotated[int, Default(1), Range(1), "spsa: directions averaged in a step, two evaluations each"],
    most_directions: Annotated[
        int, Default(0), Range(0), "spsa: average more directions, up to these, while noisy; 0: no"
    ],
    law: Annotated[
        Literal["rademacher", "gaussian", "sphere", "coordinate", "orthogonal"],
        Default("rademacher"),
        "spsa: directions",
    ],
    perturb: Annotated[
        Literal["logits", "weights"],
        Default("logits"),
        "spsa: what the two points differ in; weights make the step exponentiated gradient",
    ],
    normalise: Annotated[bool, Default(True), "spsa: divide slopes by their running root mean square"],
    cma: CmaSettings,
    batch: Annotated[int, Default(16), Range(0), "target rows of a step, the same for all its evaluations; 0: all"],
    steps: Annotated[int, Default(60), Range(0), "most optimizer steps"],
    stopping: EarlyStopping,
    precision: Annotated[
        Literal["float32", "mixed", "float64"],
        Default("float32"),
        "float32; mixed: bfloat16 products, which may drown the difference of two evaluations",
    ],
    checkpoint: Checkpoint,
    batch_tokens: Tokens,
) -> Coefficients:
    """Learn the mixture of experts from which fine-tuning on a target starts best, without a backward pass.

    theta(alpha) = theta_0 + sum_k alpha_k tau_k  ( = sum_k alpha_k theta_k where the alpha_k sum to 1)
    minimise over alpha = softmax(beta)  - log p(response | prompt) on the target's rows, or the share ranked wrongly

    Two evaluations of the same rows, at beta + mu u and beta - mu u, give the step's slope along a random u. Known
    disagreement: the paper perturbs alpha in one place and updates beta in another; ``perturb`` has both readings. Its
    one direction a step is known; mu, learning rate, steps and batch are not, and the defaults are ours.
    """
    from consilience.learned.learning import learn_coefficients
    from consilience.learned.ranking import check_score
    from consilience.learned.run import groups_of
    from consilience.learned.spectrum import spectrum

    spsa = SpsaSettings(
        mu=mu,
        tune_mu=tune_mu,
        directions=directions,
        most_directions=most_directions,
        law=law,
        perturb="w" if perturb == "logits" else "alpha",
        normalise=normalise,
    )
    learning = Learning(
        space=space,
        objective=Objective(terms=(Target(1.0),), total="mean"),
        data=Data(positions=positions, samples=samples),
        optimizer=optimizer,
        descent=Descent("sgd", learning_rate, schedule=schedule, spsa=spsa, cma=cma),
        loop=Loop(batch=batch, steps=steps, stopping=stopping),
        compute=Compute(precision=precision, checkpoint=checkpoint, batch_tokens=batch_tokens),
        score=score,
        keep=keep,
    )
    if keep > len(run.experts):
        raise InputError(f"keep: {keep} of {len(run.experts)} experts cannot be kept; choose at most as many")
    check_score(run, learning)
    total = sum(alphabar)
    if not total > 0 or (space.space in ("simplex", "hierarchical") and not all(alphabar)):
        raise InputError("alphabar: start weights must be above 0; leave it out to start at the mean of the experts")
    start = groups_of(run, granularity, exclude, [weight / total for weight in alphabar])
    found = learn_coefficients(run, start, learning)
    sums = found.alpha.sum(0)
    # Off the simplex there is no entropy, and no number that JSON could hold.
    own = {key: value for key, value in spectrum(run, found.groups).facts(found.alpha).items() if value == value}
    return replace(found, facts=found.facts | {"sum": [float(sums.min()), float(sums.max())], **own})
