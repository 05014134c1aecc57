"""What a recipe will do: every number of every stage's schedule."""

from typing import Any

from limbeck.recipes.schema import Recipe


def plan(recipe: Recipe) -> dict[str, Any]:
    """Work a recipe out.

    Args:
        recipe: From `limbeck.load_recipe`, scaled already if it is to be.

    Returns:
        ``stages``, in their order, and ``total_steps``. Of each stage: ``name``, ``objective``, ``steps`` (updates),
        ``tokens``, ``tokens_per_step``, ``lr`` (``start``, ``peak``, ``end``: of the first update, the highest, of the
        last update), ``min_lr``, ``warmup_steps``, ``decay_steps``, ``checkpoint_every`` (updates, or
        ``"epoch"``; 0 for the end alone) and ``switch_step`` (updates done when the teacher is let go; None where it is
        not).
    """
    stages = [_planned(name, stage) for name, stage in recipe.stages.items()]
    return {"stages": stages, "total_steps": sum(stage["steps"] for stage in stages)}


def _planned(name: str, stage: Any) -> dict[str, Any]:
    schedule = stage.learning_rate
    rates = {"start": schedule(0), "peak": stage.lr, "end": schedule(stage.steps - 1)}
    return {
        "name": name,
        "objective": stage.objective,
        "steps": stage.steps,
        "tokens": stage.tokens,
        "tokens_per_step": stage.tokens_per_step,
        "lr": rates,
        "min_lr": stage.min_lr,
        "warmup_steps": stage.warmup_steps,
        "decay_steps": stage.decay_steps,
        "checkpoint_every": stage.checkpoint_steps,
        "switch_step": stage.switch_step,
    }
