"""Parameters that learned methods share, as their signatures declare them."""

from typing import Annotated, Literal

from consilience.methods.signature import Default, Range

Grouping = Annotated[str, Default("tensor"), "what shares a coefficient: global, block, module, tensor, or re:PATTERN"]
#: Lists of patterns that ``exclude`` knows by name. ``vision``: the towers, as transformers' models name them; experts
#: seldom tune them, and a few prompts say little about them. ``official``: the released code of Expert Merging.
PATTERNS: dict[str, tuple[str, ...]] = {
    "none": (),
    "vision": ("*vision_model*", "*vision_tower*", "*visual.blocks*", "*visual.patch_embed*", "*vision_encoder*"),
    "official": ("re:vision_model.*", "re:.*lm_head.*", "re:.*norm.*", "re:.*embed_tokens.*", "re:.*bias.*"),
}
Exclude = Annotated[
    tuple[str, ...],
    Default(("vision",)),
    "tensors that keep the base's value: vision, official, none; globs; re:REGEX from the start of the name",
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
Answers = Annotated[
    int, Default(4), Range(1), "generate: answers that an expert gives to a prompt; one more is kept to judge by"
]
AnswerTemperature = Annotated[
    float, Default(1.0), Range(0), "generate: temperature at which answers are sampled; 0: greedy"
]
WrittenPrompts = Annotated[
    int, Default(0), Range(0), "generate: further prompts that the base writes in the manner of an expert's rows"
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
Mu = Annotated[float, Default(0.05), Range(1e-6), "spsa: half the distance between its two points"]
Directions = Annotated[int, Default(1), Range(1), "spsa: directions averaged in a step, two evaluations each"]
Sigma = Annotated[float, Default(0.1), Range(1e-6), "cma: standard deviation of the first generation"]
Population = Annotated[int, Default(0), Range(0), "cma: evaluations in a generation; 0: by the number of coefficients"]
