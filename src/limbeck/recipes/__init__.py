"""Recipes: whole distillation runs written down as TOML."""

from limbeck.recipes.load import load_recipe, parse_override, recipe_names
from limbeck.recipes.run import RunResult, distill
from limbeck.recipes.schema import HiddenStage, LayerwiseStage, LogitsStage, MatrixStage, Recipe, Stage
from limbeck.recipes.write import to_toml

__all__ = [
    "HiddenStage",
    "LayerwiseStage",
    "LogitsStage",
    "MatrixStage",
    "Recipe",
    "RunResult",
    "Stage",
    "distill",
    "load_recipe",
    "parse_override",
    "recipe_names",
    "to_toml",
]
