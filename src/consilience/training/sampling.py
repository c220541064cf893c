"""Which rows every batch holds: a pure function of the step, so that a run resumes anywhere without a saved state.

Row g of the whole run (g = step * batch size + place in the batch) comes from task g mod K, and is that task's draw
number g div K: equal shares whatever the sizes of the tasks. A task's draws are passes over all its rows, each pass in
a fresh order seeded by (seed, task, pass); a task with few rows is passed over more often.
"""

import random
from collections.abc import Sequence
from functools import lru_cache


@lru_cache(maxsize=64)
def _order(n: int, seed: int, task: int, number: int) -> tuple[int, ...]:
    """Return the order of a task's rows in pass ``number``."""
    rows = list(range(n))
    random.Random(f"{seed}/{task}/{number}").shuffle(rows)
    return tuple(rows)


def draw(sizes: Sequence[int], batch_size: int, step: int, seed: int) -> list[tuple[int, int]]:
    """Return the (task, row) pairs of a batch.

    Args:
        sizes: the number of rows of each of the K tasks.
        batch_size: rows in a batch; where K does not divide it, shares are equal over any K batches.
        step: the batch's number, from 0.
        seed: of the orders.
    """
    pairs: list[tuple[int, int]] = []
    for place in range(step * batch_size, (step + 1) * batch_size):
        drawn, task = divmod(place, len(sizes))
        number, index = divmod(drawn, sizes[task])
        pairs.append((task, _order(sizes[task], seed, task, number)[index]))
    return pairs
