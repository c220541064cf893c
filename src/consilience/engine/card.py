"""The model card of an output: front matter a hub understands, what was merged, and how to repeat it."""

from pathlib import Path
from typing import Any, cast

import yaml

from consilience import __version__
from consilience.checkpoints.files import regular_size
from consilience.checkpoints.json_files import read_object
from consilience.checkpoints.reference import is_hub_id
from consilience.engine.plan import Plan
from consilience.errors import InputError
from consilience.experts.model import Model
from consilience.recipe.yaml_file import parse_yaml

#: Front-matter keys of the base's card that stay true of a merge.
_KEPT = ("language", "pipeline_tag", "library_name")


def front_matter(readme: Path) -> dict[str, Any]:
    """Return the YAML front matter of a card, or nothing if there is none that can be read."""
    try:
        regular_size(readme)
        with open(readme, encoding="utf-8") as file:
            text = file.read(1 << 16)
    except (InputError, OSError, UnicodeDecodeError):
        return {}
    if not text.startswith("---\n") or "\n---" not in text[4:]:
        return {}
    try:
        value = parse_yaml(text[4 : text.index("\n---", 4)], str(readme))
    except InputError:
        return {}
    return cast(dict[str, Any], value) if isinstance(value, dict) else {}


def licence(model: Model) -> str | None:
    """Return the licence a model's card states."""
    folder = model.folder
    if folder is None:
        return None
    matter = front_matter(folder / "README.md")
    value = matter.get("license_name") or matter.get("license")
    return value if isinstance(value, str) and value else None


def licences(plan: Plan) -> tuple[str | None, list[str]]:
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


def hub_name(model: Model) -> str:
    """Return the hub id of a model: as referenced, or as its own config names it, else its folder's name."""
    if is_hub_id(model.reference) and not Path(model.reference).exists():
        return model.reference.split("@")[0]
    for config in (model.checkpoint.config if model.checkpoint else None, {"_name_or_path": _card_name(model)}):
        name = (config or {}).get("_name_or_path")
        if isinstance(name, str) and is_hub_id(name):
            return name
    return Path(model.reference).name


def _card_name(model: Model) -> str | None:
    matter = front_matter(model.folder / "README.md") if model.folder else {}
    named = matter.get("model_name") or matter.get("base_model") if model.name == "base" else None
    return named if isinstance(named, str) else None


def base_models(plan: Plan) -> list[str]:
    """Return the ``base_model`` list of the front matter."""
    return list(dict.fromkeys(hub_name(model) for model in plan.models))


def _adapter_base(model: Model) -> str:
    if model.adapter is None:
        return ""
    named = read_object(model.adapter.path / "adapter_config.json").get("base_model_name_or_path")
    return f" (LoRA on {named})" if named else " (LoRA)"


def render_card(
    plan: Plan, title: str, fingerprint: str, recipe_text: str, notes: list[str], peft: bool = False
) -> str:
    """Return the card's text; ``peft`` marks an output that is an adapter."""
    donor = plan.alignment.donor
    kept = front_matter(donor.folder / "README.md") if donor.folder else {}
    agreed, warnings = licences(plan)
    if peft:
        kept = kept | {"library_name": "peft"}
    matter: dict[str, Any] = {
        "base_model": base_models(plan),
        "base_model_relation": "merge",
        "library_name": kept.get("library_name", "transformers"),
        "tags": ["merge", "consilience", plan.method.name.replace("_", "-")],
    } | {key: kept[key] for key in _KEPT if key in kept}
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
        f"One model made from {len(plan.experts)} by Consilience {__version__}: method `{plan.method.name}` "
        f"({plan.method.source}).",
        "",
        "| model | role |",
        "|---|---|",
        *(
            f"| {hub_name(m)} | {'base' if m is plan.base else f'expert `{m.name}`'}{_adapter_base(m)} |"
            for m in plan.models
        ),
        "",
        *(f"**Warning:** {warning}." for warning in warnings),
        *([""] if warnings else []),
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
