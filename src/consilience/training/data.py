"""The rows to train on, as sequences."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from consilience.checkpoints.json_files import read_object
from consilience.errors import InputError
from consilience.tasks.encoding import Encoded, encode
from consilience.tasks.load import load_tokenizer
from consilience.tasks.rows import Task, load_tasks


@dataclass(frozen=True, slots=True)
class Examples:
    """A task and its rows as sequences, one a row."""

    task: Task
    sequences: tuple[Encoded, ...]


def read_examples(folder: Path, tasks: Sequence[Task | str | Path]) -> list[Examples]:
    """Read and encode the tasks' rows for the model in ``folder``.

    Raises:
        InputError: there is no task, two have one name, or a row is wrong or has no response.
    """
    read = load_tasks(tasks)
    for task in read:
        for index, row in enumerate(task.rows):
            if not row.labelled:
                raise InputError(f"{task.where(index)}: has no response to learn; add one or drop the row")
    tokenizer = load_tokenizer(folder)
    config = read_object(folder / "config.json")
    context = config.get("max_position_embeddings")
    limit = context if isinstance(context, int) else None
    size = config.get("vocab_size")
    rows = size if isinstance(size, int) else None
    return [Examples(task, right(task, encode(task, tokenizer, context=limit, vocabulary=rows))) for task in read]


def right(task: Task, examples: Sequence[Encoded]) -> tuple[Encoded, ...]:
    """Return one sequence a row: of choices, the right one."""
    return tuple(one for one in examples if one.candidate in (None, task.rows[one.row].gold))
