"""What a run's figures are held against, and who shows them."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from limbeck.distill import GuidedStep, StageStep
from limbeck.recipes.folder import RunPaths
from limbeck.recipes.schema import AnyStage, EngineTable, Recipe
from limbeck.training import Limits, Trackers, World, open_trackers, settle


def limits_of(stage: AnyStage, engine: EngineTable) -> Limits:
    """What the stage's figures are held against."""
    expect = stage.expect
    return Limits(engine.max_nonfinite, expect.start if expect else None, expect.end if expect else None)


def trackers_of(run: RunPaths, recipe: Recipe) -> Trackers:
    """Open the run's trackers; steps go on growing from stage to stage."""
    table, offsets, done = recipe.tracking, {}, 0
    for name, stage in recipe.stages.items():
        offsets[name] = done
        done += stage.steps
    return open_trackers(
        table.trackers,
        run.path / "trackers.json",
        offsets=offsets,
        project=table.project,
        run_name=table.run_name,
        entity=table.entity,
        config=recipe.model_dump(mode="json", exclude={"tracking"}),
    )


def perfect_loss(
    stage: AnyStage, step: StageStep, batch: Sequence[Mapping[str, Tensor]], autocast: torch.dtype | None, world: World
) -> float | None:
    """The loss of a student that is its teacher: the teacher's own on the text, where the stage reads that.

    Args:
        stage: The stage.
        step: What it trains.
        batch: This process's micro-batches of one update.
        autocast: Number format of the forward pass; None: that of the weights.
        world: The processes; all call this at once.

    Returns:
        The mean over all processes; None for a stage on the text that has no teacher.
    """
    options = stage.objective_options()
    if not (options.get("ce_weight") or options.get("alpha_ce")):
        return 0.0
    teacher = step.guide.teacher if isinstance(step, GuidedStep) else step.__dict__["teacher"]
    if teacher is None:
        return None
    losses = []
    with torch.no_grad(), torch.autocast(world.device.type, autocast, enabled=autocast is not None):
        for part in batch:
            part = {key: tensor.to(world.device) for key, tensor in part.items()}
            losses.append(step.objective(teacher, teacher, part)["loss"].double())
    settle(teacher)
    return world.mean(torch.stack(losses).mean()).item()
