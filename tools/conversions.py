"""Write the names that transformers changes when it loads a file: ``python -m tools.conversions``.

Merging imports no transformers, so the table is committed; a test holds it against the installed version.
"""

import importlib
import json
import re
import sys
from pathlib import Path
from typing import Any

PATH = Path("src/consilience/experts/conversions.json")
#: Renamings that a regular expression alone does not say: they count, or depend on what was renamed before.
_STATEFUL = ("GroupWeightRename", "Inkling2IndexOffsetWeightRename", "LayerPairCollapse")


def _model_types() -> dict[str, str]:
    """Return class name -> model type for every class of transformers' auto mappings."""
    auto: Any = importlib.import_module("transformers.models.auto.modeling_auto")
    found: dict[str, str] = {}
    for name, mapping in vars(auto).items():
        if name.endswith("MAPPING_NAMES"):
            for model_type, classes in mapping.items():
                for class_name in classes if isinstance(classes, tuple | list) else (classes,):
                    found.setdefault(class_name, model_type)
    return found


def _model_type(name: str, of_class: dict[str, str]) -> str | None:
    """Return the model type that a key of the conversion mapping, a model type or a class, is for."""
    if not name[0].isupper() and not name.startswith("xCLIP"):
        return name
    if name in of_class:
        return of_class[name]
    found = getattr(importlib.import_module("transformers"), name, None)
    return getattr(getattr(found, "config_class", None), "model_type", None)


def _rules(transforms: list[Any]) -> tuple[list[list[str]], list[list[list[str]]]]:
    """Return the renamings as [pattern, replacement], and what changes its form as [stored, loaded, operations]."""
    renamings: list[list[str]] = []
    conversions: list[list[list[str]]] = []
    for transform in transforms:
        if type(transform).__name__ in _STATEFUL:
            continue
        if hasattr(transform, "operations"):
            operations = [type(operation).__name__ for operation in transform.operations]
            conversions.append([list(transform.source_patterns), list(transform.target_patterns), operations])
            continue
        for source in re.split(r"\|(?=\(\?P<g\d+>)", transform.compiled_sources.pattern):
            renamings.append([re.sub(r"^\(\?P<g\d+>(.*)\)$", r"\1", source), transform.target_patterns[0]])
    return renamings, conversions


def table() -> dict[str, Any]:
    """Return the table: rule sets, and which of them each model type's files need."""
    mapping = importlib.import_module("transformers.conversion_mapping")
    sets: list[dict[str, Any]] = []
    of_type: dict[str, list[int]] = {}
    of_class = _model_types()
    every: dict[str, Any] = mapping._build_checkpoint_conversion_mapping()
    for name in sorted(every, key=lambda key: (not key[0].isupper(), key)):
        model_type = _model_type(name, of_class)
        renamings, conversions = _rules(every[name])
        if model_type is None or not (renamings or conversions):
            continue
        found = {"renamings": renamings, "conversions": conversions}
        if found not in sets:
            sets.append(found)
        numbers = of_type.setdefault(model_type, [])
        if sets.index(found) not in numbers:
            numbers.append(sets.index(found))
    return {"sets": sets, "model_types": dict(sorted(of_type.items()))}


def render(found: dict[str, Any]) -> str:
    """Return the table as text, a rule set or model type a line."""
    lines = ['{"sets": [']
    lines += [f"  {json.dumps(rules)}," for rules in found["sets"]]
    lines[-1] = lines[-1].removesuffix(",")
    lines += ['], "model_types": {']
    lines += [f"  {json.dumps(name)}: {json.dumps(numbers)}," for name, numbers in found["model_types"].items()]
    lines[-1] = lines[-1].removesuffix(",")
    return "\n".join([*lines, "}}", ""])


if __name__ == "__main__":
    PATH.write_text(render(table()), encoding="utf-8")
    sys.stdout.write(f"wrote {PATH}\n")
