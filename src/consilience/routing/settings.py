"""How tokens are routed, as data."""

from dataclasses import dataclass
from typing import Literal, get_args

from consilience.errors import InputError
from consilience.numbers import is_number
from consilience.routing.values import PlainValues, check_choice

Local = Literal["phatgoose", "arrow", "average", "none"]
Fallback = Literal["local", "mean"]


@dataclass(frozen=True, slots=True)
class Settings(PlainValues):
    """How a token's local logits s and its query's similarities c become weights.

        z_k = s_k + a c_k,    w = softmax(z) over all experts, the top k kept and divided by their sum

    Attributes:
        local: what s is: "phatgoose" (learned gates), "arrow" (the experts' own directions), "average" (mean
            activations), or "none" (0).
        scale: a, the weight of instructions against local logits; 0 leaves instructions out; "adaptive" chooses it for
            every query between 0 and ``most_scale``. GLIDER's code has 100 for tasks the experts were trained on, else
            3.
        most_scale: the largest a that "adaptive" gives.
        fallback: what an adaptive scale leaves to queries that are no expert's. "local": local routing, for a is near 0
            there. "mean": the mean of all experts as well: with r = a / ``most_scale``, w is r times the above plus
            (1 - r) / K. The project's own; no published system has it.
        standardise: divide s and c, less their means, by their standard deviations over the experts, so that a has no
            unit. The published systems do not.
        top_k: experts that a token may use; 0: all.
        top_p: instead of ``top_k``, the fewest experts whose probabilities sum to at least this; 0: not used.
        temperature: of "arrow" and "average", whose logits are divided by it.

    Raises:
        InputError: a value is out of its range.
    """

    local: Local = "phatgoose"
    scale: float | Literal["adaptive"] = 0.0
    most_scale: float = 100.0
    fallback: Fallback = "local"
    standardise: bool = False
    top_k: int = 2
    top_p: float = 0.0
    temperature: float = 1.0

    def __post_init__(self) -> None:
        check_choice("local", self.local, get_args(Local))
        check_choice("fallback", self.fallback, get_args(Fallback))
        if self.scale != "adaptive" and not (is_number(self.scale) and float(self.scale) >= 0):
            raise InputError(f"scale: {self.scale!r} must be a number of at least 0, or adaptive")
        if not (is_number(self.most_scale) and self.most_scale >= 0):
            raise InputError(f"most_scale: {self.most_scale!r} must be a number of at least 0")
        if self.fallback == "mean" and (self.scale != "adaptive" or self.most_scale == 0):
            raise InputError(
                "fallback: mean needs scale: adaptive and a most_scale above 0, which say what queries are recognised; "
                "or give fallback: local"
            )
        if not (is_number(self.top_k) and float(self.top_k).is_integer() and self.top_k >= 0):
            raise InputError(f"top_k: {self.top_k!r} must be a whole number of at least 0 (0: all experts)")
        object.__setattr__(self, "top_k", int(self.top_k))
        if not (is_number(self.top_p) and 0 <= self.top_p <= 1):
            raise InputError(f"top_p: {self.top_p!r} must lie in [0, 1] (0: top_k is used)")
        if not (is_number(self.temperature) and self.temperature > 0):
            raise InputError(f"temperature: {self.temperature!r} must be a number above 0")
        if self.standardise not in (True, False):
            raise InputError(f"standardise: {self.standardise!r} must be true or false")

    @property
    def instructed(self) -> bool:
        """Whether queries' instructions count."""
        return self.scale == "adaptive" or self.scale > 0
