"""What is wrong with experts, or worth knowing, as values: who, what, what to do, and how sure that is."""

from dataclasses import dataclass
from typing import Literal

Severity = Literal["stop", "warning", "note"]
Confidence = Literal["certain", "likely", "possible"]
ORDER: tuple[Severity, ...] = ("stop", "warning", "note")


@dataclass(frozen=True)
class Finding:
    """One thing that the doctor found.

    Attributes:
        severity: "stop" (a merge will fail or be worthless), "warning" (it will likely suffer) or "note".
        kind: a short name for programs.
        experts: whom it concerns; none: the set.
        what: what was found, with its figures.
        mend: what to do.
        effect: what the mend is expected to change, in words and figures; never a guarantee.
        confidence: "certain" (seen in the data), "likely" or "possible".
        places: tensors or blocks that it was seen in, the worst first.
    """

    severity: Severity
    kind: str
    experts: tuple[str, ...]
    what: str
    mend: str
    effect: str = ""
    confidence: Confidence = "certain"
    places: tuple[str, ...] = ()


def ranked(findings: list[Finding]) -> tuple[Finding, ...]:
    """Return findings in the order in which they should be acted on."""
    return tuple(sorted(findings, key=lambda one: ORDER.index(one.severity)))
