"""Recipes: one YAML file says everything about a run. ``schema`` defines its shape, ``load`` reads it and
explains its errors."""
