"""An expert's own rows, which its local router is made from."""

from collections.abc import Sequence

from consilience.errors import InputError
from consilience.tasks.encoding import Encoded
from consilience.training.data import Examples
from consilience.training.sampling import draw


def check_rows(name: str, examples: Sequence[Examples]) -> None:
    """Check that an expert's tasks have rows, all with responses.

    Raises:
        InputError: a task is empty, or a row has no response.
    """
    if not examples:
        raise InputError(f"expert {name!r}: has no rows of its own; give it a data file with responses")
    for one in examples:
        if not one.sequences:
            raise InputError(f"expert {name!r}: task {one.task.name} has no rows; give it a file with some")
        for sequence in one.sequences:
            if not sequence.targets:
                raise InputError(f"{one.task.where(sequence.row)}: has no response to learn; add one or drop the row")


def some_rows(examples: Sequence[Examples], count: int) -> list[tuple[int, Encoded]]:
    """Return at most ``count`` different rows, each with the number of its task: equal shares of tasks, seeded."""
    pairs = dict.fromkeys(draw([len(one.sequences) for one in examples], count, 0, 0))
    return [(task, examples[task].sequences[row]) for task, row in pairs]
