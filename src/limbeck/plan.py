"""What a recipe will do, before any of it is spent: every number of every stage, without loading a model."""

from typing import Any

from rich.table import Table

from limbeck.recipes.schema import LayerwiseStage, Recipe, Stage


def plan(recipe: Recipe) -> dict[str, Any]:
    """Work a recipe out.

    Args:
        recipe: From `limbeck.load_recipe`, scaled already if it is to be.

    Returns:
        ``stages``, in their order, and ``total_steps``. Of each stage: ``name``, ``objective``, ``steps`` (updates),
        ``tokens``, ``tokens_per_step``, ``lr`` (``start``, ``peak``, ``end``: of the first update, the highest, of the
        last update), ``min_lr``, ``warmup_steps``, ``decay_steps``, ``checkpoint_every`` (updates; 0 for the end
        alone) and ``switch_step`` (updates done when the teacher is let go; None where it is not).
    """
    stages = [_planned(name, stage) for name, stage in recipe.stages.items()]
    return {"stages": stages, "total_steps": sum(stage["steps"] for stage in stages)}


def plan_table(recipe: Recipe) -> Table:
    """Lay the plan out for people: a column for each stage."""
    table = Table(title=f"{recipe.name}: {plan(recipe)['total_steps']:,} updates in all", title_justify="left")
    table.add_column("")
    for name in recipe.stages:
        table.add_column(name, justify="right")
    columns = [_shown(_planned(name, stage), stage) for name, stage in recipe.stages.items()]
    for row in columns[0]:
        table.add_row(row, *(column[row] for column in columns))
    return table


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


def _shown(planned: dict[str, Any], stage: Stage) -> dict[str, str]:
    rates = planned["lr"]
    every, switch = planned["checkpoint_every"], planned["switch_step"]
    return {
        "objective": planned["objective"],
        "guidance": stage.guidance if isinstance(stage, LayerwiseStage) else "target" if stage.guided_steps else "none",
        "updates": f"{planned['steps']:,}",
        "tokens": f"{planned['tokens']:,}",
        "tokens per update": f"{planned['tokens_per_step']:,}",
        "schedule": stage.schedule,
        "learning rate": f"{rates['start']:.3g} → {rates['peak']:.3g} → {rates['end']:.3g}",
        "warm-up, updates": f"{planned['warmup_steps']:,}",
        "decay, updates": f"{planned['decay_steps']:,}",
        "checkpoint every": f"{every:,}" if every else "at the end",
        "teacher let go at": f"{switch:,}" if switch else "–",
    }
