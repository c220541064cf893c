"""Command lines: the parser, and the types of its arguments."""

import argparse
import os
from collections.abc import Callable, Sequence


def make_parser(module: str, about: str | None) -> argparse.ArgumentParser:
    """Return a parser for ``python -m MODULE`` that is described by the first line of its docstring."""
    return argparse.ArgumentParser(prog=f"python -m {module}", description=(about or "").split("\n", 1)[0])


def positive(text: str) -> int:
    """Parse a positive whole number."""
    if not text.strip().isdigit() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


def thread_counts(text: str) -> tuple[int, ...]:
    """Parse a comma-separated list of numbers of threads, none of them larger than the number of cores."""
    values = tuple(dict.fromkeys(positive(part) for part in text.split(",")))
    available = len(os.sched_getaffinity(0))
    if wrong := [value for value in values if value > available]:
        raise argparse.ArgumentTypeError(f"{wrong[0]} threads, and there are {available} cores")
    return values


def names_of(known: Sequence[str]) -> Callable[[str], tuple[str, ...]]:
    """Return the type of a comma-separated list of ``known`` names."""

    def parse(text: str) -> tuple[str, ...]:
        names = tuple(part.strip() for part in text.split(",") if part.strip())
        if unknown := [name for name in names if name not in known]:
            raise argparse.ArgumentTypeError(f"unknown {', '.join(unknown)}; known are {', '.join(known)}")
        return names

    return parse
