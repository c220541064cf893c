"""Arithmetic: sums, differences and small products, from the generators of reasoning-gym."""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from suites.language.gym import generator
from suites.language.rows import Row

N_ITEMS = 10000
"""How many items each generator gives; about half have the terms of another and are dropped."""


def terms_key(expression: str) -> str:
    """The numbers and signs of an expression, sorted, without parentheses: equal for 3 + 4, ( 4 + 3 ) and 4 + 3."""
    return " ".join(sorted(re.findall(r"[^\s()]+", expression)))


def expression_rows(items: Iterable[dict[str, Any]]) -> Iterator[Row]:
    """A row for each item of a generator of expressions."""
    for item in items:
        yield Row(terms_key(item["metadata"]["expression"]), item["question"], item["answer"])


def arithmetic_rows(_work: Path) -> Iterator[Row]:
    """Sums of two or three numbers below 100, and expressions of two or three terms between -9 and 9."""
    yield from expression_rows(generator("arithmetic.chain_sum", N_ITEMS, max_terms=3, max_digits=2))
    yield from expression_rows(
        generator(
            "arithmetic.basic_arithmetic",
            N_ITEMS,
            max_terms=3,
            max_digits=1,
            operators=["+", "-", "*"],
            allow_negation=False,
        )
    )
