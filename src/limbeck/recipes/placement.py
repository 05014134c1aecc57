"""Whether each of several processes holds a copy of the models, or a part of them."""

import math
from pathlib import Path

import torch
from torch.distributed.device_mesh import DeviceMesh
from transformers import AutoModelForCausalLM, PreTrainedModel

from limbeck.errors import LimbeckError
from limbeck.progress import say
from limbeck.recipes.schema import AnyStage, LayerwiseStage, Recipe
from limbeck.recipes.stages import cache_of
from limbeck.students import blocks, load_config
from limbeck.training import World

BYTES_LEARNED = 16
"""Of a parameter that learns: itself, its gradient and two momenta, in float32."""

COPY_SHARE = 0.6
"""Of a GPU's memory that copies of everything may fill; the rest is for activations and logits."""


def mesh_of(
    recipe: Recipe, teacher: str, student: Path, autocast: torch.dtype | None, world: World
) -> DeviceMesh | None:
    """The processes as FSDP sees them; None where each holds a copy of everything, or there is but one.

    Left to choose, it takes copies where parameters, gradients, momenta and teacher leave room for activations.
    """
    if world.size == 1 or recipe.engine.parallel == "ddp":
        return None
    if recipe.engine.parallel == "auto":
        itemsize = (autocast or torch.float32).itemsize
        needed = copies_of(recipe, model_of(student), model_of(teacher), itemsize)
        room = torch.cuda.mem_get_info(world.device)[1] if world.device.type == "cuda" else math.inf
        if not world.agree([needed > COPY_SHARE * room])[0]:
            return None
        say(f"model, optimiser and teacher take {needed / 2**30:.0f} GiB: they are sharded (engine.parallel)")
    if autocast == torch.float16:
        raise LimbeckError(
            'precision = "float16" with sharded models',
            expected="a scaled gradient that every process has whole",
            hint='precision = "bfloat16", or engine.parallel = "ddp"',
        )
    return world.mesh(recipe.engine.shard_size)


def copies_of(recipe: Recipe, student: PreTrainedModel, teacher: PreTrainedModel, itemsize: int) -> int:
    """Bytes of what a process holds that shares nothing: parameters, gradients and momenta, and the teacher.

    Args:
        recipe: Of the run.
        student: Its shape; it needs no data.
        teacher: Likewise.
        itemsize: Bytes of a number that a frozen teacher computes with.
    """
    learning = student.num_parameters() * BYTES_LEARNED
    if not any(holds_teacher(recipe, stage) for stage in recipe.stages.values()):
        return learning
    if has_companion(recipe):
        return learning + teacher.num_parameters() * BYTES_LEARNED
    stays = teacher.num_parameters()
    if recipe.engine.offload_teacher:
        stays -= sum(parameter.numel() for parameter in blocks(teacher).parameters())
    return learning + stays * itemsize


def holds_teacher(recipe: Recipe, stage: AnyStage) -> bool:
    """Whether a stage has a teacher in memory: to learn from it, or to compare with it in evaluations."""
    if cache_of(stage) is not None:
        return False
    compared = bool(recipe.evaluation.every) and not isinstance(stage, LayerwiseStage)
    return compared or stage.guided_steps > 0


def has_companion(recipe: Recipe) -> bool:
    """Whether a teacher learns in some stage."""
    return any(isinstance(stage, LayerwiseStage) and stage.guidance == "trajectory" for stage in recipe.stages.values())


def model_of(source: str | Path) -> PreTrainedModel:
    """A checkpoint's model by its configuration, without data."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(load_config(source))
