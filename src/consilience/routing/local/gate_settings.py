"""How gates are trained, as data."""

from dataclasses import asdict, dataclass

from consilience.training.settings import Precision, Settings


@dataclass(frozen=True, slots=True)
class GateSettings:
    """How gates are trained: AdamW, its rate rising linearly, then constant.

    Steps, rate, warm-up, no weight decay and the clip are those of PHATGOOSE's code, whose batches hold 1024 rows.
    (GLIDER's has 200 steps; mttl's has 100 of 4 rows at 1e-3, with a warm-up of 0.1.)

    Attributes:
        steps: optimizer steps.
        learning_rate: the peak.
        warmup: share of the steps to warm up over.
        batch_size: rows in a step.
        weight_decay: decoupled, as a share of v per unit of learning rate.
        clip: bound on the Euclidean norm of the gradient of all gates.
        precision: "mixed" computes in bfloat16 under autocast, "float32" in float32; v is float32 in either.
        seed: of the order of rows.

    Raises:
        InputError: a value is out of its range.
    """

    steps: int = 100
    learning_rate: float = 5e-3
    warmup: float = 0.06
    batch_size: int = 8
    weight_decay: float = 0.0
    clip: float = 1.0
    precision: Precision = "mixed"
    seed: int = 0

    def __post_init__(self) -> None:
        Settings(**asdict(self))  # the same names have the same ranges

    def learning_rate_at(self, step: int) -> float:
        """Learning rate of ``step`` (from 0): peak * min(1, (step + 1) / W), W = max(1, round(warmup * steps))."""
        return self.learning_rate * min(1.0, (step + 1) / max(1, round(self.warmup * self.steps)))
