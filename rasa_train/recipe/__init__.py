"""Recipes: one YAML file says everything about a run. ``schema`` is its shape, ``load`` reads and explains it."""
