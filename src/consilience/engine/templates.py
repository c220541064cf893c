"""Chat templates by name: formats that many models share, and whichever most of a merge's models have.

The names are mergekit's. The texts follow the formats as their makers give them (``chat_templates``).
"""

from collections.abc import Sequence
from pathlib import Path

from consilience.errors import InputError
from consilience.experts.model import Model
from consilience.experts.model_files import ModelFiles

#: Formats by name.
NAMES = ("alpaca", "chatml", "exaone", "llama3", "mistral")
AUTO = "auto"


def is_literal(template: str) -> bool:
    """Whether a recipe's ``chat_template`` is a template itself and no name."""
    return "{" in template


def resolved_template(choice: str | None, models: Sequence[Model], where: str) -> str | None:
    """Return a recipe's ``chat_template`` as a template itself or a model's name.

    ``auto`` is the model whose template most models have, the first of them on a tie; None where no model has one.

    Raises:
        InputError: it is a format's name and a model's.
    """
    if choice is None or is_literal(choice) or choice not in (AUTO, *NAMES):
        return choice
    if any(choice in (model.name, model.reference) for model in models):
        raise InputError(
            f"{where}: chat_template: {choice!r} is a format's name and a model's; call the model otherwise (name: ...)"
        )
    if choice != AUTO:
        return (Path(__file__).with_name("chat_templates") / f"{choice}.jinja").read_text(encoding="utf-8").strip()
    texts = [(ModelFiles(model).templates or {}).get("default", "") for model in models]
    held = [text for text in texts if text]
    return models[texts.index(max(held, key=held.count))].name if held else None
