"""The model card of an output: front matter a hub understands, what was merged, and how to repeat it."""

import re
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import yaml

from consilience import __version__
from consilience.checkpoints.files import exists, regular_size
from consilience.checkpoints.json_files import read_object
from consilience.engine.plan import Plan
from consilience.errors import InputError
from consilience.experts.model import Model
from consilience.recipe.yaml_file import parse_yaml

#: Front-matter keys of the base's card that stay true of a merge.
_KEPT = ("language", "pipeline_tag", "library_name")
#: ``owner/name`` as the hub allows it; a Trainer's ``folder/checkpoint-500`` looks the same and is none.
_REPOSITORY = re.compile(r"\w[\w.-]*(?<![.-])/(?!checkpoint-\d+$)\w[\w.-]*(?<![.-])", re.ASCII)


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


def hub_ids(model: Model) -> list[str]:
    """Return the hub ids that a model comes from, as far as they are known.

    What was fetched from the hub has its own id. A local folder has the ids it states as its origin: its config
    (``_name_or_path``), else its card (``model_name``, else ``base_model``). Folder names and paths are no ids.
    """
    return list(dict.fromkeys(name for part in _parts(model) for name in _ids(part)))


def base_models(plan: Plan) -> list[str]:
    """Return the hub ids that the models of a merge come from, each once."""
    return list(dict.fromkeys(name for model in plan.models for name in hub_ids(model)))


def origin(ids: list[str], relation: str) -> dict[str, Any]:
    """Return the front matter that links a card to ``ids``: nothing where none is known."""
    return {"base_model": ids, "base_model_relation": relation} if ids else {}


def label(model: Model) -> str:
    """Return what a card calls a model: its hub id if it was fetched from there, else its reference's last part."""
    parts = _parts(model)
    names = [part.name for part in parts] if len(parts) > 1 else [Path(model.reference).name]
    return " + ".join(_fetched(part) or name or part.resolve().name for part, name in zip(parts, names, strict=True))


def _parts(model: Model) -> list[Path]:
    """Return where a model lies: its checkpoint, its adapter, or the one and then the other."""
    checkpoint = [model.checkpoint.path or Path(model.reference)] if model.checkpoint else []
    return checkpoint + ([model.adapter.path] if model.adapter else [])


def _fetched(path: Path) -> str | None:
    """Return the hub id of what lies in the hub's cache, or is linked from there."""
    return _cached(path.absolute()) or _cached(path.resolve())


def _cached(path: Path) -> str | None:
    """Return the hub id that a path of the form ``models--owner--name/snapshots/revision`` holds."""
    for folder, inside in pairwise(path.parts):
        if folder.startswith("models--") and inside in ("snapshots", "blobs"):
            return folder.removeprefix("models--").replace("--", "/")
    return None


def _ids(part: Path) -> list[str]:
    known = _fetched(part)
    if known is not None or not part.is_dir():
        return [known] if known is not None else []
    try:
        config = read_object(part / "config.json")
    except InputError:
        config = {}
    card = front_matter(part / "README.md")
    for value in (config.get("_name_or_path"), card.get("model_name"), card.get("base_model")):
        stated = [_stated(name, part) for name in (cast(list[Any], value) if isinstance(value, list) else [value])]
        if any(stated):
            return [name for name in stated if name is not None]
    return []


def _stated(name: object, folder: Path) -> str | None:
    """Return the hub id that ``name``, said by the model in ``folder``, stands for; None if it is no id."""
    if not isinstance(name, str):
        return None
    if not _REPOSITORY.fullmatch(name) or ".." in name or "--" in name:
        return _cached(Path(name))
    # owner/name may as well be a relative path: from here, or from where the model was saved.
    nearby = (Path(), *(folder / name).absolute().parents)
    return None if any(exists(top / name) for top in nearby) else name


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
    # An adapter's one known origin is the base it stands on, unless experts came from the hub too.
    stands = peft and not any(_fetched(part) for expert in plan.experts for part in _parts(expert))
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
