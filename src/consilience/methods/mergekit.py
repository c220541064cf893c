"""What mergekit's recipes may say that changes nothing, there or here: accepted, and said to be without effect."""

from typing import Annotated

from consilience.methods.signature import Default, NoEffect, PerExpert

_HELP = "accepted from mergekit recipes; has no effect"
#: mergekit's switch for smaller masks in memory.
Int8Mask = Annotated[bool, Default(False), NoEffect(), _HELP]
#: Task arithmetic neither trims nor drops.
UnusedDensity = Annotated[PerExpert, Default(1.0), NoEffect(), f"{_HELP}, there as here"]
UnusedRescale = Annotated[bool, Default(False), NoEffect(), f"{_HELP}, there as here"]

#: The parameters of mergekit 0.1.5's methods, and those of earlier versions that recipes still have.
PARAMETERS = frozenset((
    "weight", "normalize", "t", "nuslerp_flatten", "nuslerp_row_wise", "normalize_weights", "eps", "max_iter", "tol",
    "density", "lambda", "int8_mask", "rescale", "epsilon", "gamma", "select_topk", "filter_wise", "r", "alpha",
    "scale", "embed_slerp",
))  # fmt: skip
#: Those that mergekit does not do without.
REQUIRED = frozenset(("weight", "t"))
