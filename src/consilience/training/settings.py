"""What a training run is told, checked before any work, and its learning-rate schedule."""

from dataclasses import dataclass
from typing import Any, Literal, get_args

from consilience.errors import InputError
from consilience.numbers import is_number
from consilience.training.step import cosine

Precision = Literal["mixed", "float32"]


@dataclass(frozen=True, slots=True)
class Settings:
    """The settings of a run that decide its result; ``fine_tune`` says what each means.

    Raises:
        InputError: a setting is out of its range.
    """

    learning_rate: float
    steps: int
    lora_rank: int | None = None
    lora_alpha: float | None = None
    target_modules: tuple[str, ...] | None = None
    batch_size: int = 8
    warmup: float = 0.06
    weight_decay: float = 0.0
    clip: float = 1.0
    seed: int = 0
    precision: Precision = "mixed"

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("batch_size", 1), ("seed", 0), ("lora_rank", 1)):
            value: Any = getattr(self, name)
            optional = name == "lora_rank" and value is None
            if not optional and (not isinstance(value, int) or isinstance(value, bool) or value < least):
                raise InputError(f"{name} = {value!r}: give a whole number of at least {least}")
        for name in ("learning_rate", "clip", "lora_alpha"):
            value = getattr(self, name)
            if not (name == "lora_alpha" and value is None) and not (is_number(value) and value > 0):
                raise InputError(f"{name} = {value!r}: give a number above 0")
        if not is_number(self.weight_decay) or self.weight_decay < 0:
            raise InputError(f"weight_decay = {self.weight_decay!r}: give a number of at least 0")
        if not is_number(self.warmup) or not 0 <= self.warmup <= 1:
            raise InputError(f"warmup = {self.warmup!r}: give the share of the steps to warm up over, 0 to 1")
        if self.precision not in get_args(Precision):
            raise InputError(f"precision = {self.precision!r}: give one of {', '.join(get_args(Precision))}")
        if self.lora_rank is None and (self.lora_alpha is not None or self.target_modules is not None):
            name = "lora_alpha" if self.lora_alpha is not None else "target_modules"
            raise InputError(f"{name}: only an adapter has it; give lora_rank too, or leave it out")
        if self.target_modules is not None and not self.target_modules:
            raise InputError("target_modules: names no module; name some, or leave it out for every linear layer")

    @property
    def alpha(self) -> float:
        """The adapter's alpha: as given, else twice the rank."""
        return 2.0 * (self.lora_rank or 0) if self.lora_alpha is None else self.lora_alpha

    def learning_rate_at(self, step: int) -> float:
        """The rate of ``step`` (from 0): linear over the ``warmup``, a step or more, then half a cosine to 0."""
        return cosine(step, self.steps, max(1, round(self.warmup * self.steps)), self.learning_rate)
