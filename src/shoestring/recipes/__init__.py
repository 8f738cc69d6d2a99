"""Recipes: YAML files that fully determine a run; nothing here imports torch."""
