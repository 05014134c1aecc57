"""A plan laid out for people."""

from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table

from limbeck.plan.schedule import plan
from limbeck.recipes.schema import LayerwiseStage, Recipe, Stage

MEMORY = {
    "student": "student",
    "teacher": "teacher",
    "gradients": "gradients",
    "optimizer": "optimiser",
    "gathered": "gathered while needed",
    "activations": "activations",
    "workspace": "workspace",
}


def plan_table(recipe: Recipe, estimated: dict[str, Any] | None = None) -> RenderableType:
    """Lay the plan out for people: a column for each stage.

    Args:
        recipe: The recipe.
        estimated: What `estimate` made of it; left out, the schedule alone is shown.
    """
    planned = plan(recipe)
    table = Table(title=f"{recipe.name}: {planned['total_steps']:,} updates in all", title_justify="left")
    table.add_column("")
    for name in recipe.stages:
        table.add_column(name, justify="right")
    columns = [_shown(stage, recipe.stages[stage["name"]]) for stage in planned["stages"]]
    for row in columns[0]:
        table.add_row(row, *(column[row] for column in columns))
    if estimated is None:
        return table
    if estimated["stages"]:
        table.add_section()
        columns = [_taken(stage) for stage in estimated["stages"].values()]
        for row in columns[0]:
            table.add_row(row, *(column[row] for column in columns))
    return Group(table, *_lines(estimated))


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
        "checkpoint every": "epoch" if every == "epoch" else f"{every:,}" if every else "at the end",
        "teacher let go at": f"{switch:,}" if switch else "–",
    }


def _taken(stage: dict[str, Any]) -> dict[str, str]:
    parameters, memory = stage["parameters"], stage["memory"]
    fits = stage["fits"]
    return {
        "parameters of the student": f"{parameters['student']:,}",
        "of them learn": f"{parameters['learning']:,}",
        "parameters of the teacher": f"{parameters['teacher']:,}",
        "micro-batch × accumulation": f"{stage['micro_batch']} × {stage['accumulation']}",
        "memory of a GPU, GB": _number(memory["total"], 1e9, 1),
        **{f"  {words}": _number(memory[part], 1e9, 1) for part, words in MEMORY.items()},
        "fits": "not known" if fits is None else "yes" if fits else "NO",
        "GFLOP per token": _number(stage["flops_per_token"], 1e9, 1),
        "tokens per second": _number(stage["tokens_per_second"], 1.0, 0),
        "hours": _number(stage["hours"], 1.0, 1),
    }


def _number(value: float | None, unit: float, digits: int) -> str:
    return "not known" if value is None else f"{value / unit:,.{digits}f}"


def _lines(estimated: dict[str, Any]) -> list[str]:
    """What is said of all stages together."""
    lines = []
    if estimated["hours"] is not None:
        cost = "" if estimated["cost"] is None else f", cost {estimated['cost']:,.0f}"
        held = {"none": "", "ddp": ", each with a copy of the models (ddp)", "fsdp": ", sharing the models (fsdp)"}
        where = f"{estimated['gpus']} × {estimated['gpu']}{held[estimated['parallel']]}"
        lines.append(f"{estimated['flops']:.3g} operations, {estimated['hours']:,.1f} hours on {where}{cost}")
    return [*lines, *(f"Not known: {sentence}" for sentence in estimated["unknown"])]
