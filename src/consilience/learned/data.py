"""How a learned method reads the rows that it learns from."""

from dataclasses import dataclass
from typing import Literal

from consilience.student.calibration import Positions

Responses = Literal["given", "none", "generate"]


@dataclass(frozen=True, kw_only=True)
class Data:
    """How calibration rows are read; see the learned methods' parameters of the same names.

    ``holdout``: share held out; ``key``: which of an expert's files; ``judged``: rows are kept apart to compare the
    result with others on; ``tokens``: most padded tokens of a pass.
    """

    positions: Positions = "all"
    samples: int = 0
    responses: Responses = "given"
    answers: int = 1
    answer_temperature: float = 0.0
    written_prompts: int = 0
    own_prompts: int = 0
    response_tokens: int = 64
    holdout: float = 0.0
    key: Literal["calibration", "probe"] = "calibration"
    judged: bool = False
    tokens: int = 4096

    @property
    def further(self) -> int:
        """Answers to a prompt that nothing is learned from: one, if the result is judged and no prompt is held out.

        Greedy answers are all alike, so none of them is further.
        """
        drawn = self.responses == "generate" and self.answer_temperature > 0
        return int(self.judged and drawn and not self.holdout)
