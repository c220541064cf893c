"""What a routed model is built from, as data."""

from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from consilience.errors import InputError
from consilience.recipe.schema import Closed, DataPaths, Name, PathText, explain
from consilience.recipe.yaml_file import read_yaml
from consilience.routing.settings import Settings


class RoutedEntry(Closed):
    """One expert: an adapter or a fine-tuned model, its data, and what it does in words."""

    model: PathText
    name: Name | None = None
    data: DataPaths | None = None
    instruction: str | None = Field(default=None, min_length=1)


class RouteRecipe(Closed):
    """A routed model: base, experts, how tokens are routed, and how gates and instructions are made."""

    base_model: PathText
    models: list[RoutedEntry] = Field(min_length=1, max_length=1000)
    routing: dict[str, Any] = Field(default_factory=dict[str, Any])
    gates: dict[str, Any] = Field(default_factory=dict[str, Any])
    instructions: dict[str, Any] | None = None
    seed: int = Field(default=0, ge=0)

    def settings(self, where: str) -> Settings:
        """Return how tokens are routed.

        Raises:
            InputError: a key is unknown or a value out of its range.
        """
        return Settings.from_plain(self.routing, f"{where}: routing")


def parse_route_recipe(value: Any, where: str) -> RouteRecipe:
    """Validate a recipe given as plain values.

    Raises:
        InputError: names the first key that is wrong, and the nearest known one.
    """
    if not isinstance(value, dict):
        raise InputError(f"{where}: a recipe is a mapping with base_model and models, not a {type(value).__name__}")
    try:
        return RouteRecipe.model_validate(value)
    except ValidationError as error:
        raise explain(error, where, {"": RouteRecipe, "models": RoutedEntry, "data": DataPaths}) from None


def read_route_recipe(path: Path) -> RouteRecipe:
    """Read a recipe from a YAML file.

    Raises:
        InputError: it cannot be read, or a key is wrong.
    """
    return parse_route_recipe(read_yaml(path), str(path))
