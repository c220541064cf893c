"""Heads that an adapter brings to a base without one: a classifier, a reward model's score.

PEFT trains and saves such a head whole (``modules_to_save``), on a model of another class than the base's file is of.
One expert's head is taken as it is, and the output is a model of that class. Two heads cannot be one.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from consilience.checkpoints.checkpoint import TensorInfo
from consilience.errors import InputError
from consilience.experts.model import Model

#: The ending of the class that a PEFT task type means.
_CLASSES = {
    "SEQ_CLS": "ForSequenceClassification",
    "TOKEN_CLS": "ForTokenClassification",
    "QUESTION_ANS": "ForQuestionAnswering",
}
#: What an architecture's name ends in after the family.
_ENDING = re.compile(r"(For[A-Z]\w*|LMHeadModel|Model)$")
#: Last parts of the module that gives the scores of the classes.
_SCORES = ("score", "classifier", "out_proj", "qa_outputs", "head")


@dataclass(frozen=True)
class Heads:
    """The tensors of a head that one expert brings, and the class of model that has them, if known."""

    expert: Model | None = None
    tensors: dict[str, TensorInfo] = field(default_factory=dict[str, TensorInfo])
    architecture: str | None = None
    labels: int | None = None

    def notes(self) -> list[str]:
        """Return what a user is told."""
        if self.expert is None:
            return []
        names = ", ".join(self.tensors)
        said = f"{names}: the base has none; {self.expert.name}'s own"
        if self.architecture is None:
            return [f"{said} (config.json does not name the class of model that has them)"]
        labels = f" with {self.labels} labels" if self.labels is not None else ""
        return [f"{said}, of a {self.architecture}{labels}, as config.json now says"]

    def config(self, config: dict[str, Any]) -> dict[str, Any]:
        """Return a config that says which class of model the output is, and how many labels it has."""
        if self.architecture is None:
            return config
        config = config | {"architectures": [self.architecture]}
        if self.labels is not None and len(config.get("id2label") or {}) != self.labels:
            names = [f"LABEL_{number}" for number in range(self.labels)]
            config |= {"id2label": {str(i): name for i, name in enumerate(names)}}
            config |= {"label2id": {name: i for i, name in enumerate(names)}}
        return config


def heads_of(donor: Model, experts: Iterable[Model], is_private: Any) -> Heads:
    """Return the head that one of the experts brings and the base does not have.

    Raises:
        InputError: two experts bring one.
    """
    found = Heads()
    for model in experts:
        names = (
            [] if model.checkpoint is not None else [name for name in _brought(model, donor) if not is_private(name)]
        )
        if not names or model.adapter is None:
            continue
        if found.expert is not None:
            module = names[0].rpartition(".")[0]
            raise InputError(
                f"{model.reference}: {names[0]!r} is a head that {donor.reference} does not have, and "
                f"{found.expert.reference} brings one too; a model has one: keep each with its expert by private: "
                f"['{module}.*'] in a recipe"
            )
        tensors = {name: model.adapter.whole[name] for name in names}
        found = Heads(model, tensors, _architecture(model, donor), _labels(tensors))
    return found


def _brought(model: Model, donor: Model) -> list[str]:
    """Return an adapter's saved modules that the base lacks, of an adapter that is otherwise at home there."""
    adapter, named = model.adapter, donor.named
    assert adapter is not None
    saved = adapter.config.get("modules_to_save")
    modules: set[str] = {str(name) for name in saved} if isinstance(saved, list) else set()
    if not any(name in named for name in adapter.pairs.keys() | adapter.whole.keys()):
        return []
    return [name for name in adapter.whole if name not in named and modules & set(name.split(".")[:-1])]


def _architecture(model: Model, donor: Model) -> str | None:
    """Return the class of model that was adapted: as PEFT noted it, or the base's family's for the task."""
    assert model.adapter is not None
    assert donor.checkpoint is not None
    mapping: Any = model.adapter.config.get("auto_mapping") or {}
    if isinstance(mapping, dict) and isinstance(mapping.get("base_model_class"), str):
        return mapping["base_model_class"]
    ending = _CLASSES.get(str(model.adapter.config.get("task_type")))
    named = (donor.checkpoint.config or {}).get("architectures") or [None]
    if ending is None or not isinstance(named, list) or not isinstance(named[0], str):
        return None
    return _ENDING.sub("", named[0]) + ending


def _labels(tensors: dict[str, TensorInfo]) -> int | None:
    """Return how many classes a head scores."""
    matrices = {name: info for name, info in tensors.items() if name.endswith(".weight") and len(info.shape) == 2}
    scores = [info for name, info in matrices.items() if name.split(".")[-2] in _SCORES]
    found = scores if len(scores) == 1 else list(matrices.values())
    return found[0].shape[0] if len(found) == 1 else None
