from collections import Counter

import pytest

from consilience.training.sampling import draw


def draws(sizes: list[int], batch_size: int, steps: int, seed: int = 0) -> list[list[tuple[int, int]]]:
    return [draw(sizes, batch_size, step, seed) for step in range(steps)]


def test_every_batch_holds_equal_shares_of_the_tasks():
    for batch in draws([100, 3, 7, 1], 8, 20):
        assert Counter(task for task, _ in batch) == {0: 2, 1: 2, 2: 2, 3: 2}


def test_shares_are_equal_over_k_batches_where_k_does_not_divide_the_batch():
    for start in range(0, 30, 3):
        part = draws([9, 9, 9], 4, 30)[start : start + 3]
        assert set(Counter(task for batch in part for task, _ in batch).values()) == {4}


def test_a_task_is_passed_over_whole_before_a_row_returns():
    rows = [row for batch in draws([5, 3], 4, 15) for task, row in batch if task == 1]
    passes = [rows[i : i + 3] for i in range(0, 30, 3)]
    assert all(sorted(one) == [0, 1, 2] for one in passes)
    assert len({tuple(one) for one in passes}) > 1  # in a fresh order each time


def test_the_order_depends_on_the_seed_and_the_task_alone():
    assert draws([50, 50], 8, 5) == draws([50, 50], 8, 5)
    assert draws([50, 50], 8, 5) != draws([50, 50], 8, 5, seed=1)
    first, second = ([row for batch in draws([50, 50], 8, 5) for task, row in batch if task == k] for k in (0, 1))
    assert first != second


@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_batch_smaller_than_the_number_of_tasks_takes_them_in_turn(batch_size: int):
    tasks = [task for batch in draws([4, 4, 4, 4], batch_size, 12) for task, _ in batch]
    assert tasks == [i % 4 for i in range(12 * batch_size)]
