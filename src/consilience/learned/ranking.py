"""Rank classification as what is minimised: the share of target rows whose labelled choice is not ranked first.

    error(alpha) = 1 - accuracy,    accuracy = mean over rows of [ label = argmax_c log p(c | prompt; theta(alpha)) ]

It moves in steps of one row and has no gradient: optimizers that only evaluate can lower it, others cannot.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from consilience.coefficients.coefficients import Alpha
from consilience.errors import InputError
from consilience.learned.run import Run, Workshop, base_folder
from consilience.learned.settings import Learning
from consilience.optimizers.gradient import Terms
from consilience.student.calibration import Sample
from consilience.student.student import Student
from consilience.tasks.encoding import encode
from consilience.tasks.rows import Task


@dataclass(frozen=True, eq=False)
class Ranking:
    """The share of wrong rows as a function of the coefficients, as ``consilience evaluate`` counts them.

    ``samples`` are the target's rows, ``batch`` is how many choices go through the model together.
    """

    student: Student
    tokenizer: Any
    samples: Sequence[Sample]
    batch: int

    def evaluate(self, alpha: Alpha, chosen: Sequence[int], *, gradient: bool) -> tuple[Terms, Alpha | None]:
        """Return ``error`` on the chosen rows, and no gradient.

        Raises:
            InputError: a log-probability is not finite.
        """
        from consilience.tasks.metrics import rank_accuracy

        assert not gradient
        self.student.set(alpha)
        task = Task("target", tuple(self.samples[i].row for i in chosen))
        kind = "bfloat16" if self.student.settings.precision == "mixed" else "float32"
        found = rank_accuracy(self.student.model, self.tokenizer, task, batch_size=self.batch, dtype=kind)
        return {"error": found.correct.count(False) / found.n_examples}, None


def make_ranking(shop: Workshop, rows: int) -> Ranking:
    """Return the target's rank classification.

    Args:
        shop: the student and its samples.
        rows: how many of the training rows the samples are; 0: all.

    Raises:
        InputError: a row has nothing to rank, or does not suit the model; the message names FILE:LINE.
    """
    from consilience.tasks.load import load_tokenizer
    from consilience.tasks.readout import decoder_start

    run, model = shop.run, shop.student.model
    tokenizer = load_tokenizer(base_folder(run.plan), trust_remote_code=run.machine.trust_remote_code)
    start = decoder_start(model) if getattr(model.config, "is_encoder_decoder", False) else None
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    tasks = [task for task in run.target(rows) if task is not None]
    found = [one for task in tasks for one in encode(task, tokenizer, decoder_start=start, context=context)]
    widest = max(len(one.inputs) + len(one.source) for one in found)
    return Ranking(shop.student, tokenizer, shop.samples, max(1, shop.tokens // widest))


def check_score(run: Run, learning: Learning) -> None:
    """Refuse an accuracy that cannot be had, before anything is read but the rows.

    Raises:
        InputError: the optimizer follows a gradient or chooses mu by the noise of a loss, or a row has no choices.
    """
    if learning.score != "accuracy":
        return
    if learning.takes_gradient:
        raise InputError(
            f"optimizer: {learning.optimizer} follows a gradient and an accuracy has none; use spsa or cma, or "
            "score=loss"
        )
    if learning.descent.spsa.tune_mu:
        raise InputError("tune_mu: an accuracy has no noise to choose mu by; set mu itself, or use score=loss")
    for task in run.target(learning.data.samples):
        for index, row in enumerate(task.rows if task is not None else ()):
            if task is not None and row.choices is None:
                raise InputError(
                    f"{task.where(index)}: score=accuracy ranks choices and this row has none; give it choices and a "
                    "label, or use score=loss"
                )
