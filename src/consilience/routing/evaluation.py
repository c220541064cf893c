"""Measure a routed model, and beside it what routing is compared with: the base, one expert, the experts' mean.

What a row is routed by is its prompt: never its answer, and never its task's name.
"""

from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from consilience.errors import InputError, nearest
from consilience.progress import ProgressOption, open_progress
from consilience.routing.model import Routing
from consilience.tasks.encoding import encode, vocabulary_of
from consilience.tasks.evaluation import evaluate
from consilience.tasks.results import Evaluation
from consilience.tasks.rows import Task, load_tasks

#: How a model is used for one task.
Use = Callable[[Task], AbstractContextManager[None]]


def evaluate_routed(
    model: Any,
    tasks: Sequence[Task | Path | str],
    *,
    beside: Iterable[str] = (),
    batch_size: int = 32,
    max_examples: int | None = None,
    max_tokens: int | None = None,
    dtype: Literal["float32", "bfloat16"] = "float32",
    seed: int = 0,
    progress: ProgressOption = False,
) -> list[Evaluation]:
    """Measure a routed model on tasks, then its rivals with the same weights in memory.

    Args:
        model: a routed model.
        tasks: rows, as ``consilience.evaluate`` takes them.
        beside: names of experts, "base", "uniform" (every expert has weight 1 / K), "own" (the expert that is called as
            the task is: what a router can hope for, where every task has one).
        batch_size: sequences of a forward pass.
        max_examples: use the first rows of each task only.
        max_tokens: score the first tokens of each row only.
        dtype: of matrix products.
        seed: of the bootstrap intervals.
        progress: as ``consilience.evaluate`` takes it.

    Raises:
        InputError: a task or a rival is wrong.
    """
    routing: Routing = model.routing
    named = load_tasks(tasks)
    uses = [(name, _use(routing, name, named)) for name in beside]
    queries = prompts_of(model, named, max_examples, max_tokens)
    uses.insert(0, ("routed", lambda task: routing.expecting(queries)))
    found: list[Evaluation] = []
    with open_progress(progress) as shown:
        for name, use in uses:
            parts: list[Evaluation] = []
            for task in named:
                with use(task), _learning(model):
                    parts.append(
                        evaluate(
                            model,
                            [task],
                            tokenizer=model.tokenizer,
                            name=name,
                            batch_size=batch_size,
                            max_examples=max_examples,
                            max_tokens=max_tokens,
                            dtype=dtype,
                            seed=seed,
                            progress=shown,
                        )
                    )
            found.append(replace(parts[0], results=tuple(result for part in parts for result in part.results)))
    return found


@contextmanager
def _learning(model: Any) -> Generator[None]:
    """Let parameters require gradients within: autocast keeps the bfloat16 copy of a weight for such alone."""
    before = [(one, one.requires_grad) for one in model.parameters()]
    for one, _ in before:
        one.requires_grad_(True)
    try:
        yield
    finally:
        for one, was in before:
            one.requires_grad_(was)


def _use(routing: Routing, name: str, tasks: Sequence[Task]) -> Use:
    """Return how a rival uses the model."""
    if name == "base":
        return lambda task: routing.plain()
    if name == "uniform":
        count = len(routing.names)
        return lambda task: routing.only([1 / count] * count)
    if name == "own":
        lost = [task.name for task in tasks if task.name not in routing.names]
        if lost:
            raise InputError(f"own: no expert is called {lost[0]!r}; the experts are {', '.join(routing.names)}")
        return lambda task: routing.only(task.name)
    if name not in routing.names:
        known = ["base", "uniform", "own", *routing.names]
        raise InputError(f"{name!r}: there is no such expert{nearest(name, known)}; use {', '.join(known)}")
    return lambda task: routing.only(name)


def prompts_of(
    model: Any, tasks: Sequence[Task], max_examples: int | None = None, max_tokens: int | None = None
) -> dict[tuple[int, ...], str]:
    """Return the query of every sequence that measuring runs the model on, by the sequence's ids.

    An encoder's inputs are the query themselves.
    """
    config, texts = model.config, model.routing.asked.texts
    if getattr(config, "is_encoder_decoder", False):
        return {}
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    found: dict[tuple[int, ...], str] = {}
    for task in tasks:
        for one in encode(
            task,
            model.tokenizer,
            max_tokens=max_tokens,
            max_examples=max_examples,
            context=getattr(text, "max_position_embeddings", None),
            vocabulary=vocabulary_of(model),
        ):
            if one.targets:
                found[one.inputs] = texts(one.inputs[: one.positions[0] + 1])
    return found
