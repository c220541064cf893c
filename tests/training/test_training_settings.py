import math
from typing import Any

import pytest

from consilience.errors import InputError
from consilience.training import Settings


def test_the_rate_rises_linearly_then_falls_as_a_cosine():
    settings = Settings(learning_rate=2.0, steps=100, warmup=0.1)
    assert [settings.learning_rate_at(step) for step in (0, 4, 9, 10)] == pytest.approx([0.2, 1.0, 2.0, 2.0])
    assert settings.learning_rate_at(55) == pytest.approx(1.0)
    assert settings.learning_rate_at(99) == pytest.approx(1 + math.cos(math.pi * 89 / 90))


@pytest.mark.parametrize("warmup", [0.0, 1.0])
def test_the_rate_is_positive_at_the_ends_of_warmup(warmup: float):
    settings = Settings(learning_rate=1.0, steps=3, warmup=warmup)
    assert all(0 < settings.learning_rate_at(step) <= 1 for step in range(3))


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": 0},
        {"steps": 1.5},
        {"batch_size": 0},
        {"seed": -1},
        {"lora_rank": 0},
        {"learning_rate": 0.0},
        {"learning_rate": math.nan},
        {"clip": -1},
        {"weight_decay": -0.1},
        {"warmup": 2},
        {"precision": "float16"},
        {"lora_alpha": 16.0},
        {"target_modules": ("q_proj",)},
        {"target_modules": (), "lora_rank": 4},
    ],
)
def test_what_is_out_of_range_is_named(wrong: dict[str, Any]):
    values: dict[str, Any] = {"learning_rate": 1e-3, "steps": 10}
    with pytest.raises(InputError, match=next(iter(wrong))):
        Settings(**(values | wrong))


def test_alpha_is_twice_the_rank_unless_given():
    assert Settings(learning_rate=1.0, steps=1, lora_rank=8).alpha == 16
    assert Settings(learning_rate=1.0, steps=1, lora_rank=8, lora_alpha=4).alpha == 4
