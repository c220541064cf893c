"""What learned methods share of their parameters, and the settings that a run of learning is made of."""

from dataclasses import dataclass, field, replace
from typing import Annotated, Literal

from consilience.learned.data import Data
from consilience.learned.loop import Loop
from consilience.methods.signature import Default, PerExpert, Range
from consilience.objectives.objective import Objective
from consilience.optimizers.anchor import AnchorSettings
from consilience.optimizers.parameterisation import SpaceSettings
from consilience.optimizers.settings import GRADIENT, Descent, OptimizerName
from consilience.optimizers.spaces import BlendSpace

Grouping = Annotated[str, Default("tensor"), "what shares a coefficient: global, block, module, tensor, or re:PATTERN"]
#: Lists of patterns that ``exclude`` knows by name. ``vision``: the towers, as transformers' models name them; experts
#: seldom tune them, and a few prompts say little about them. ``official``: the released code of Expert Merging.
PATTERNS: dict[str, tuple[str, ...]] = {
    "none": (),
    "vision": ("vision_model", "vision_tower", "visual.blocks", "visual.patch_embed", "vision_encoder"),
    "official": ("re:^vision_model", "lm_head", "norm", "embed_tokens", "bias"),
}
Exclude = Annotated[
    tuple[str, ...],
    Default(("vision",)),
    "tensors that keep the base's value: vision, official, none, or filters as in recipes",
]
Precision = Annotated[
    Literal["float32", "mixed", "bfloat16", "float64"],
    Default("mixed"),
    "float32; mixed: bfloat16 products; bfloat16: weights too",
]
Checkpoint = Annotated[bool, Default(False), "recompute activations in the backward pass: less memory, more time"]
Tokens = Annotated[int, Default(4096), Range(1), "most padded tokens in one forward pass"]
Samples = Annotated[int, Default(0), Range(0), "use the first rows of each expert's calibration file; 0: all"]
Holdout = Annotated[float, Default(0.0), Range(0, 0.9), "share of each expert's rows held out for early stopping"]
Patience = Annotated[int, Default(4), Range(1), "held-out checks (one every five steps) without a new best that end it"]
Responses = Annotated[
    Literal["given", "none", "generate"],
    Default("given"),
    "responses in the rows: use them, ignore them, or let the expert generate its own",
]
ResponseTokens = Annotated[int, Default(64), Range(1), "most tokens of a generated response"]
Positions = Annotated[
    Literal["all", "response"], Default("all"), "compare all tokens, or where a response is predicted"
]
Score = Annotated[
    Literal["loss", "accuracy"],
    Default("loss"),
    "loss: of the target's responses; accuracy: share of rows whose labelled choice is ranked first (no gradient)",
]


@dataclass(frozen=True, kw_only=True)
class Start:
    """What shares a coefficient, and the coefficients that learning starts from."""

    alphabar: Annotated[PerExpert, Default(0.3), "anchor and start: the Task Arithmetic coefficient"]
    grouping: Grouping = "tensor"
    exclude: Exclude = ("vision",)


@dataclass(frozen=True, kw_only=True)
class Compute:
    """How the model runs."""

    precision: Precision = "mixed"
    checkpoint: Checkpoint = False
    batch_tokens: Tokens = 4096


@dataclass(frozen=True, kw_only=True)
class Learning:
    """What is minimised, over which coefficients, how, and on which rows.

    ``score``: of a target, what is minimised instead of the objective: the share of rows ranked wrongly.
    ``keep``: how many experts are mixed, those that alone do best; 0: all.
    """

    space: SpaceSettings | BlendSpace = field(default_factory=SpaceSettings)
    anchor: AnchorSettings = field(default_factory=AnchorSettings)
    objective: Objective = field(default_factory=Objective)
    data: Data = field(default_factory=Data)
    optimizer: OptimizerName = "adam"
    descent: Descent = field(default_factory=Descent)
    loop: Loop = field(default_factory=Loop)
    compute: Compute = field(default_factory=Compute)
    score: Literal["loss", "accuracy"] = "loss"
    keep: int = 0

    @property
    def rows(self) -> Data:
        """How rows are read, by everything that has a say in it."""
        judged = "logit" in self.objective.weights
        return replace(self.data, holdout=self.loop.stopping.holdout, judged=judged, tokens=self.compute.batch_tokens)

    @property
    def takes_gradient(self) -> bool:
        """Whether the optimizer follows the loss's own gradient."""
        return self.optimizer in GRADIENT
