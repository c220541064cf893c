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


@dataclass(frozen=True)
class Group:
    """Findings of one kind and severity: they are told together, the first in full."""

    findings: tuple[Finding, ...]

    @property
    def first(self) -> Finding:
        """The one that is told in full."""
        return self.findings[0]

    @property
    def others(self) -> tuple[str, ...]:
        """Whom the others concern, a pair as ``a - b``."""
        return tuple(" - ".join(one.experts) or "the set" for one in self.findings[1:])

    @property
    def advice(self) -> tuple[str, ...]:
        """What to do, each advice once."""
        return tuple(dict.fromkeys(one.mend for one in self.findings))


def grouped(findings: tuple[Finding, ...]) -> tuple[Group, ...]:
    """Return findings by severity and kind, in their order."""
    groups: dict[tuple[str, str], list[Finding]] = {}
    for one in findings:
        groups.setdefault((one.severity, one.kind), []).append(one)
    return tuple(Group(tuple(members)) for members in groups.values())


def ranked(findings: list[Finding]) -> tuple[Finding, ...]:
    """Return findings in the order in which they should be acted on."""
    return tuple(sorted(findings, key=lambda one: ORDER.index(one.severity)))
