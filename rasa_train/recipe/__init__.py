"""Recipes: one YAML file says everything about a run. ``schema`` is its shape, ``load`` reads and explains it."""

from ..shipped import configs_dir
from .load import LoadedRecipe, copy_recipe, load_recipe
from .schema import Recipe

__all__ = ["LoadedRecipe", "Recipe", "configs_dir", "copy_recipe", "load_recipe"]
