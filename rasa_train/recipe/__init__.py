"""Recipes: one YAML file says everything about a run. ``schema`` is its shape, ``load`` reads and explains it."""

from .load import LoadedRecipe, configs_dir, copy_recipe, load_recipe
from .schema import Recipe

__all__ = ["LoadedRecipe", "Recipe", "configs_dir", "copy_recipe", "load_recipe"]
