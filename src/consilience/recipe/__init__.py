"""What to merge, as data: pydantic models read from YAML."""

from consilience.recipe.resolve import Settings, depths
from consilience.recipe.schema import ModelEntry, Recipe, parse_recipe
from consilience.recipe.stages import read_recipe

__all__ = ["ModelEntry", "Recipe", "Settings", "depths", "parse_recipe", "read_recipe"]
