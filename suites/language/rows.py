"""A row of the language suite, the split that its key decides, and the files that rows are kept in.

Every row has a *key*, and the key's hash alone decides its split, so a newer version of a source can add rows but never
move one from the test split into training.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SPLIT_SEED = 0
TEST_SHARE = 0.08
VALIDATION_SHARE = 0.04
N_TEST = 120
N_VALIDATION = 60
N_CALIBRATION = 30
N_TRAIN = 8000


@dataclass(frozen=True)
class Row:
    """One instruction with its answer; ``choices`` and ``label`` are set for classification rows only."""

    key: str
    prompt: str
    response: str
    choices: tuple[str, ...] | None = None
    label: int | None = None

    def as_json(self) -> dict[str, Any]:
        """The row as it is written to JSONL (the key stays behind)."""
        out: dict[str, Any] = {"prompt": self.prompt, "response": self.response}
        if self.choices is not None:
            out |= {"choices": list(self.choices), "label": self.label}
        return out


@dataclass(frozen=True)
class Splits:
    """The three disjoint lists of rows of a domain."""

    train: list[Row]
    validation: list[Row]
    test: list[Row]


def _unit_hash(domain: str, key: str) -> float:
    digest = hashlib.blake2b(f"{SPLIT_SEED}/{domain}/{key}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2.0**64


def split(domain: str, rows: Iterable[Row]) -> Splits:
    """Split rows by the hash of their key; at most ``N_TRAIN``, ``N_VALIDATION`` and ``N_TEST`` of them.

    Rows that repeat the key or the prompt of an earlier row are dropped, so no prompt is in two splits. Classification
    splits take the same number of rows of each label, so that chance is 1/number of choices.
    """
    seen_keys: set[str] = set()
    seen_prompts: set[str] = set()
    unique: list[tuple[float, Row]] = []
    for row in rows:
        if row.key in seen_keys or row.prompt in seen_prompts:
            continue
        seen_keys.add(row.key)
        seen_prompts.add(row.prompt)
        unique.append((_unit_hash(domain, row.key), row))
    unique.sort(key=lambda pair: (pair[0], pair[1].key))
    validation_end = TEST_SHARE + VALIDATION_SHARE
    test = [row for u, row in unique if u < TEST_SHARE]
    validation = [row for u, row in unique if TEST_SHARE <= u < validation_end]
    train = [row for u, row in unique if u >= validation_end]
    return Splits(_take(train, N_TRAIN), _take(validation, N_VALIDATION), _take(test, N_TEST))


def _take(rows: Sequence[Row], n: int) -> list[Row]:
    labels = sorted({row.label for row in rows if row.label is not None})
    if not labels:
        return list(rows[:n])
    by_label = [[row for row in rows if row.label == label] for label in labels]
    each = min(n // len(labels), *(len(group) for group in by_label))
    # Interleaved, so that a prefix of the file is balanced too.
    return [row for group in zip(*(group[:each] for group in by_label), strict=True) for row in group]


def plain(text: str) -> str:
    """The words of ``text`` alone, in lower case: equal for texts that differ in punctuation, case or layout."""
    return " ".join(re.findall(r"\w+", text.lower()))


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write one JSON object a line, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".partial")
    temporary.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    temporary.replace(path)


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Read the rows of a JSONL file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]
