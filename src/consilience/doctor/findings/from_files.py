"""Findings from the files beside the weights: what differs from the base, other bases, earlier merges."""

from consilience.doctor.findings.finding import Finding, Severity
from consilience.engine.differences import Difference
from consilience.engine.plan import Plan
from consilience.experts.model import Model

#: Files that say that a model is a merge.
MERGED = ("consilience/lineage.json", "mergekit_config.yml", "mergekit_moe_config.yml")
_SEVERITY: dict[str, Severity] = {"error": "stop", "warning": "warning", "note": "note"}


def findings(plan: Plan) -> list[Finding]:
    """Return what the files of experts show beside the base's."""
    return [*(one for expert in plan.experts for one in _merged(expert)), *map(_differs, plan.differences)]


def _merged(expert: Model) -> list[Finding]:
    name = next((name for name in MERGED if expert.folder is not None and (expert.folder / name).is_file()), None)
    if name is None:
        return []
    return [Finding(
        "warning", "already-merged", (expert.name,), f"{expert.name} is a merge itself ({name} is there)",
        "merge its parts instead, each with a weight of its own",
        "what is merged twice is shrunk twice, and its experts count by how often they occur", "likely",
    )]  # fmt: skip


def _differs(one: Difference) -> Finding:
    return Finding(_SEVERITY[one.level], one.kind, one.models, one.what, one.mend)
