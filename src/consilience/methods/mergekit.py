"""What mergekit's recipes may say that changes nothing, there or here: accepted, and said to be without effect."""

from typing import Annotated

from consilience.methods.signature import Default, NoEffect, PerExpert

_HELP = "accepted from mergekit recipes; has no effect"
#: mergekit's switch for smaller masks in memory.
Int8Mask = Annotated[bool, Default(False), NoEffect(), _HELP]
#: Task arithmetic neither trims nor drops.
UnusedDensity = Annotated[PerExpert, Default(1.0), NoEffect(), f"{_HELP}, there as here"]
UnusedRescale = Annotated[bool, Default(False), NoEffect(), f"{_HELP}, there as here"]
