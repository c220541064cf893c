"""What is diagnosed: a recipe's base and those of its experts that can be compared with it, the others with reasons."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from consilience.engine.plan import Plan, make_plan
from consilience.engine.stream import check_copies
from consilience.errors import InputError
from consilience.experts.expert_set import expert_names
from consilience.experts.stack import Stack
from consilience.recipe.schema import ModelEntry, Recipe
from consilience.recipe.tokens import UNION


@dataclass(frozen=True)
class Refused:
    """An expert that no merge could use, and why, in one line."""

    name: str
    reference: str
    reason: str


@dataclass(frozen=True, eq=False)
class Case:
    """A recipe's experts on their base.

    Attributes:
        plan: of the experts that fit, with task vectors as its rows; nothing of it is run.
        entries: theirs in the recipe, in the plan's order.
        refused: the others.
        where: how errors name the recipe.
        root: the folder that its relative paths start from.
    """

    plan: Plan
    entries: tuple[ModelEntry, ...]
    refused: tuple[Refused, ...]
    where: str
    root: Path | None

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the experts that fit."""
        return tuple(expert.name for expert in self.plan.experts)

    @property
    def stacks(self) -> tuple[Stack, ...]:
        """The experts' task vectors of every tensor of the base, in its order; of what is not merged without rows."""
        return tuple(tensor.stack for tensor in self.plan.tensors)

    def close(self) -> None:
        """Release files."""
        self.plan.close()


def open_case(recipe: Recipe, where: str = "recipe", root: Path | None = None) -> Case:
    """Open a recipe's base and experts from their headers; experts that do not fit are put aside.

    Raises:
        InputError: there is no base, or no expert fits it.
    """
    if recipe.sliced or recipe.stages:
        form = "stages" if recipe.stages else "slices" if recipe.slices else "modules"
        raise InputError(f"{where}: {form}: whole models are examined; give a recipe that names them as models")
    if recipe.base_model is None:
        raise InputError(f"{where}: base_model is missing; name the model that the experts were fine-tuned from")
    entries = [entry for entry in recipe.models if entry.model != recipe.base_model]
    if not entries:
        raise InputError(f"{where}: models: names no expert besides the base; add one")
    names = expert_names([(entry.model, entry.name) for entry in entries], where)
    named = [
        entry.model_copy(update={"name": name, "parameters": {}}) for entry, name in zip(entries, names, strict=True)
    ]
    try:
        return Case(_planned(recipe, named, where, root), tuple(named), (), where, root)
    except InputError as error:
        first = error
    fitting: list[ModelEntry] = []
    refused: list[Refused] = []
    for entry in named:
        try:
            _planned(recipe, [entry], where, root).close()
            fitting.append(entry)
        except InputError as error:
            refused.append(Refused(str(entry.name), entry.model, str(error)))
    if not fitting or not refused:
        raise first
    return Case(_planned(recipe, fitting, where, root), tuple(fitting), tuple(refused), where, root)


def _planned(recipe: Recipe, entries: list[ModelEntry], where: str, root: Path | None) -> Plan:
    """Plan the plain sum of task vectors: what is opened, checked and aligned is what every merge needs."""
    kept: dict[str, Any] = {"base_model": recipe.base_model, "private": recipe.private, "seed": recipe.seed}
    known = ("base", UNION, *(name for entry in entries for name in (entry.name, entry.model)))
    for key in ("config", "tokenizer", "chat_template"):
        choice = recipe.tokenizer_source if key == "tokenizer" else getattr(recipe, key)
        if isinstance(choice, dict) or choice in known:  # a choice of an expert that was put aside chooses nothing
            kept[key] = choice
    plain = Recipe.model_validate({"merge_method": "task_arithmetic", "models": [{"model": "x"}], **kept})
    plan = make_plan(plain.model_copy(update={"models": entries}), where=where, root=root)
    try:
        check_copies(plan)
    except InputError:
        plan.close()
        raise
    return plan
