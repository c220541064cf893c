"""The model card of an output: front matter a hub understands, what was merged, and how to repeat it."""

from pathlib import Path
from typing import Any

import yaml

from consilience import __version__
from consilience.engine.differences import by_level
from consilience.engine.origin import fetched_id, front_matter, hub_ids, parts_of
from consilience.engine.plan import Plan
from consilience.experts.expert_set import Opened
from consilience.experts.model import Model

#: Front-matter keys of the base's card that stay true of a merge.
_KEPT = ("language", "pipeline_tag", "library_name")


def licence(model: Model) -> str | None:
    """Return the licence a model's card states."""
    folder = model.folder
    if folder is None:
        return None
    matter = front_matter(folder / "README.md")
    value = matter.get("license_name") or matter.get("license")
    return value if isinstance(value, str) and value else None


def licences(plan: Opened) -> tuple[str | None, list[str]]:
    """Return the output's licence where all inputs that state one agree, and warnings where they do not."""
    stated = {model.reference: licence(model) for model in plan.models}
    distinct = sorted({value for value in stated.values() if value})
    warnings: list[str] = []
    if len(distinct) > 1:
        listed = ", ".join(f"{name}: {value}" for name, value in stated.items() if value)
        warnings.append(f"licences conflict ({listed}); the merge must satisfy all of them")
    silent = [name for name, value in stated.items() if value is None]
    if distinct and silent:
        warnings.append(f"no licence is stated by {', '.join(silent)}")
    return (distinct[0] if len(distinct) == 1 else None), warnings


def base_models(plan: Plan) -> list[str]:
    """Return the hub ids that the models of a merge come from, each once."""
    return list(dict.fromkeys(name for model in plan.models for name in hub_ids(model)))


def origin(ids: list[str], relation: str) -> dict[str, Any]:
    """Return the front matter that links a card to ``ids``: nothing where none is known."""
    return {"base_model": ids, "base_model_relation": relation} if ids else {}


def label(model: Model) -> str:
    """Return what a card calls a model: its hub id if it was fetched from there, else its reference's last part."""
    parts = parts_of(model)
    names = [part.name for part in parts] if len(parts) > 1 else [Path(model.reference).name]
    return " + ".join(fetched_id(part) or name or part.resolve().name for part, name in zip(parts, names, strict=True))


def _adapter_base(model: Model) -> str:
    if model.adapter is None:
        return ""
    named = model.adapter.config.get("base_model_name_or_path")
    return f" (LoRA on {named})" if named else " (LoRA)"


def _slices(plan: Plan) -> list[str]:
    """Return what the layers of the output are stacked of, as a list."""
    if plan.stacking is None:
        return []
    return ["## Layers", "", *(f"- {one.text}" for one in plan.stacking.slices), ""]


def render_card(
    plan: Plan, title: str, fingerprint: str, recipe_text: str, notes: list[str], peft: bool = False
) -> str:
    """Return the card's text; ``peft`` marks an output that is an adapter."""
    donor = plan.alignment.donor
    kept = front_matter(donor.folder / "README.md") if donor.folder else {}
    agreed, warnings = licences(plan)
    if peft:
        kept = kept | {"library_name": "peft"}
    # An adapter's one known origin is the base it stands on, unless experts came from the hub too.
    stands = peft and not any(fetched_id(part) for expert in plan.experts for part in parts_of(expert))
    matter: dict[str, Any] = (
        origin(base_models(plan), "adapter" if stands else "merge")
        | {
            "library_name": kept.get("library_name", "transformers"),
            "tags": ["merge", "consilience", plan.method.name.replace("_", "-")],
        }
        | {key: kept[key] for key in _KEPT if key in kept}
    )
    if agreed:
        matter["license"] = agreed
    elif warnings:
        matter["license"] = "other"
    lines = [
        "---",
        yaml.safe_dump(matter, sort_keys=False, allow_unicode=True).strip(),
        "---",
        "",
        f"# {title}",
        "",
        f"Merged from {len(plan.experts)} expert{'s' * (len(plan.experts) != 1)} by Consilience {__version__} "
        f"with the method `{plan.method.name}` ({plan.method.source}).",
        "",
        "| model | role |",
        "|---|---|",
        *(
            f"| {label(m)} | {'base' if m is plan.base else f'expert `{m.name}`'}{_adapter_base(m)} |"
            for m in plan.models
        ),
        "",
        *(f"**Warning:** {warning}." for warning in (*warnings, *by_level(plan.differences, "warning"))),
        *([""] if warnings or by_level(plan.differences, "warning") else []),
        *_slices(plan),
        "## How to repeat it",
        "",
        "```yaml",
        recipe_text.strip(),
        "```",
        "",
        f"Seed {plan.recipe.seed}. Fingerprint of the weights: `{fingerprint}`; those of the inputs and of every "
        "tensor are in `consilience/lineage.json`.",
        "",
        *([*(f"- {note}" for note in notes), ""] if notes else []),
        "",
    ]
    return "\n".join(lines)
