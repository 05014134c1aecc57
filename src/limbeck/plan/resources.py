"""What a recipe takes of a GPU: memory, arithmetic and, on a card that was measured, time and money."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PretrainedConfig, PreTrainedModel

from limbeck.data import fitting_micro_batch
from limbeck.distill import Guide, GuidedStep, StageStep, TargetGuide, TrajectoryGuide, make_objective
from limbeck.distill.head import take_as_described
from limbeck.errors import LimbeckError, unknown
from limbeck.ops.backends import has_triton
from limbeck.plan.cached import cache_is_there, cached_signals, manifest_of
from limbeck.plan.cards import MeasuredCard, card_named
from limbeck.plan.memory import WIDE, Memory, count, memory_of, total_of
from limbeck.plan.shapes import config_of, student_of_shape, teacher_of_shape
from limbeck.plan.trace import Trace, fake, trace, without_data
from limbeck.recipes.cached import cached_options
from limbeck.recipes.placement import COPY_SHARE, copies_of
from limbeck.recipes.schema import AnyStage, LayerwiseStage, Recipe
from limbeck.recipes.stages import cache_of

PARALLEL = ("auto", "ddp", "fsdp")

HALF = torch.bfloat16.itemsize
USABLE = 0.95
"""Part of a card's memory that torch's tensors can fill: the rest is the driver's, the kernels' and between tensors."""
OPTIMISER_TRAFFIC = 10 * WIDE
"""Bytes that clipping and AdamW read and write for each parameter that learns."""


@dataclass(frozen=True)
class Phase:
    """Updates of a stage with the same models.

    Attributes:
        updates: How many.
        teacher: Whether there is one, and whether it learns, or has left what it said in a cache.
    """

    updates: int
    teacher: Literal["none", "frozen", "learns", "cached"]


@dataclass(frozen=True)
class Cluster:
    """What a recipe is to run on.

    Attributes:
        gpus: How many.
        shards: How many share one copy of the models; 1 where each has its own.
        card: What was measured of them; None where none is named.
        price_per_hour: Of one GPU.
    """

    gpus: int
    shards: int
    card: MeasuredCard | None
    price_per_hour: float | None


def estimate(
    recipe: Recipe,
    *,
    teacher: str | Path | None = None,
    gpu: str | None = None,
    gpus: int = 1,
    parallel: str | None = None,
    price_per_hour: float | None = None,
) -> dict[str, Any]:
    """Work out what a recipe takes. Nothing is loaded but configurations, and nothing comes over a network.

    Args:
        recipe: From `limbeck.load_recipe`, scaled already if it is to be.
        teacher: Folder or hub id; over the recipe's.
        gpu: A card of `limbeck.plan.CARDS`, for times and whether memory suffices.
        gpus: How many of them.
        parallel: Over the recipe's ``engine.parallel``.
        price_per_hour: Of one of them, in any currency.

    Returns:
        ``gpu``, ``gpus``, ``parallel`` (``none``, ``ddp`` or ``fsdp``), ``stages`` by name, ``flops``, ``hours`` and
        ``cost`` of all, and ``unknown``: sentences about what could not be worked out. Of each stage ``parameters``
        (``student``, ``learning``, ``teacher``), ``micro_batch``, ``accumulation``, ``memory`` (bytes, see `Memory`,
        and ``total``), ``fits``, ``flops_per_token``, ``flops``, ``launches`` (operations that the
        host starts in an update), ``tokens_per_second``, ``hours`` and ``cost``; None is what is not known.

    Raises:
        LimbeckError: The card is not known, or the recipe's numbers do not fit the count of GPUs.
    """
    if gpus < 1:
        raise LimbeckError(f"{gpus} GPUs", expected="1 or more")
    if parallel not in (None, *PARALLEL):
        raise unknown("parallel", parallel, PARALLEL)
    card = None if gpu is None else card_named(gpu)
    found: dict[str, Any] = {"gpu": gpu, "gpus": gpus, "parallel": None, "stages": {}}
    rest = {"flops": None, "hours": None, "cost": None}
    source = teacher or recipe.teacher
    if source is None:
        return found | rest | {"unknown": ["everything but the schedule: the recipe names no teacher (--teacher)"]}
    try:
        config = config_of(source)
        configs = {name: config_of(stage.teacher) if stage.teacher else config for name, stage in recipe.stages.items()}
    except LimbeckError as error:
        return found | rest | {"unknown": [str(error)]}
    sharded = gpus > 1 and _is_sharded(recipe, config, parallel or recipe.engine.parallel, card)
    cluster = Cluster(gpus, (recipe.engine.shard_size or gpus) if sharded else 1, card, price_per_hour)
    stages = {name: _stage(recipe, name, config, configs[name], cluster) for name in recipe.stages}
    return found | {
        "parallel": "none" if gpus == 1 else "fsdp" if sharded else "ddp",
        "stages": stages,
        **{key: total_of(stage[key] for stage in stages.values()) for key in rest},
        "unknown": list(_unknown(recipe, cluster)),
    }


def _is_sharded(recipe: Recipe, config: PretrainedConfig, parallel: str, card: MeasuredCard | None) -> bool:
    """Whether a run would share one copy: the rule of `limbeck.recipes.placement`."""
    if parallel != "auto":
        return parallel == "fsdp"
    if card is None:
        return False
    student, teacher = student_of_shape(config, recipe), teacher_of_shape(config, torch.float32)
    itemsize = WIDE if recipe.precision == "float32" else HALF
    return copies_of(recipe, student, teacher, itemsize) > COPY_SHARE * card.memory


def _stage(
    recipe: Recipe, name: str, config: PretrainedConfig, teacher_config: PretrainedConfig, cluster: Cluster
) -> dict[str, Any]:
    """Everything about one stage; the fullest of its phases is what must fit."""
    stage = recipe.stages[name]
    length = recipe.data.sequence_length
    samples = stage.samples_per_step(length)
    micro_batch = fitting_micro_batch(samples, stage.micro_batch, cluster.gpus)
    accumulation = samples // cluster.gpus // micro_batch
    phases = [
        (phase, _phase(recipe, stage, phase, config, teacher_config, (micro_batch, length, accumulation), cluster))
        for phase in phases_of(stage)
    ]
    fullest: Memory = max((found["memory"] for _, found in phases), key=lambda memory: memory.total or 0)
    card, tokens = cluster.card, stage.steps * stage.tokens_per_step
    flops = total_of(None if found["flops"] is None else found["flops"] * phase.updates for phase, found in phases)
    seconds = total_of(
        None if found["seconds"] is None else found["seconds"] * phase.updates for phase, found in phases
    )
    hours = None if seconds is None else seconds / 3600
    price = cluster.price_per_hour
    return {
        "parameters": phases[0][1]["parameters"],
        "micro_batch": micro_batch,
        "accumulation": accumulation,
        "memory": asdict(fullest) | {"total": fullest.total},
        "fits": None if card is None or fullest.total is None else fullest.total <= USABLE * card.memory,
        "flops_per_token": None if flops is None else flops / tokens,
        "flops": flops,
        "launches": phases[0][1]["launches"],
        "tokens_per_second": None if seconds is None else tokens / seconds,
        "hours": hours,
        "cost": None if hours is None or price is None else hours * price * cluster.gpus,
    }


def phases_of(stage: AnyStage) -> list[Phase]:
    """With which teachers a stage's updates are made."""
    guided, rest = stage.guided_steps, stage.steps - stage.guided_steps
    learning = guided // stage.teacher_update_every if isinstance(stage, LayerwiseStage) and _learns(stage) else 0
    steady = "frozen" if cache_of(stage) is None else "cached"
    phases = [Phase(learning, "learns"), Phase(guided - learning, steady), Phase(rest, "none")]
    return [phase for phase in phases if phase.updates]


def _learns(stage: AnyStage) -> bool:
    return isinstance(stage, LayerwiseStage) and stage.guidance == "trajectory"


def _phase(
    recipe: Recipe,
    stage: AnyStage,
    phase: Phase,
    config: PretrainedConfig,
    teacher_config: PretrainedConfig,
    batch: tuple[int, int, int],
    cluster: Cluster,
) -> dict[str, Any]:
    """Parameters, memory, and arithmetic and seconds of one update; `batch` is b, l and how many to an update."""
    half = None if recipe.precision == "float32" else torch.bfloat16
    student = student_of_shape(config, recipe)
    kind = torch.float32 if half is None or _learns(stage) else half
    teacher = teacher_of_shape(teacher_config, kind) if phase.teacher in ("frozen", "learns") else None
    mode = fake()
    cached = manifest_of(stage, teacher_config) if phase.teacher == "cached" else None
    options = {} if cached is None else cached_options(stage, cached)
    step = _step(stage, phase, student, teacher, mode, options)
    learned = count(student.parameters(), learning=True)
    if teacher is not None and _learns(stage):  # its momenta stay while it waits
        learned += count(teacher.parameters())
    micro_batch, length, accumulation = batch
    traced = None
    if has_triton():
        traced = trace(
            step,
            teacher,
            mode,
            micro_batch=micro_batch,
            length=length,
            autocast=half,
            again=accumulation > 1,
            signals=lambda: {} if cached is None else cached_signals(stage, cached, micro_batch, length),
        )
    seconds = None
    if traced is not None and cluster.card is not None and half is not None:
        seconds = accumulation * seconds_of(traced, stage.objective, cluster.card)
        seconds += learned * OPTIMISER_TRAFFIC / cluster.shards / cluster.card.copy_bandwidth
    return {
        "parameters": {
            "student": count(student.parameters()),
            "learning": count(student.parameters(), learning=True),
            "teacher": 0 if teacher is None else count(teacher.parameters()),
        },
        "memory": memory_of(
            step, student, teacher, learned, traced, cluster.shards, offloaded=recipe.engine.offload_teacher
        ),
        "flops": None if traced is None else traced.flops * accumulation * cluster.gpus,
        "launches": None if traced is None else len(traced.calls) * accumulation,
        "seconds": seconds,
    }


def seconds_of(traced: Trace, objective: str, card: MeasuredCard) -> float:
    """How long a micro-batch takes on a card."""
    least = sum(card.seconds(call.name, call.flops, call.bytes) for call in traced.calls)
    return max(least / card.efficiency_at(objective, traced.flops), len(traced.calls) * card.launch)


def _step(
    stage: AnyStage,
    phase: Phase,
    student: PreTrainedModel,
    teacher: PreTrainedModel | None,
    mode: FakeTensorMode,
    options: dict[str, Any],
) -> StageStep:
    """The stage's step module, as `limbeck.recipes.driver` makes it, of models without data."""
    for model in (student, teacher):
        if model is not None:
            without_data(model, mode)
            take_as_described(model)
    objective = make_objective(stage.objective, **stage.objective_options(), **options)
    with mode:  # an objective may try what it reaches
        if not isinstance(stage, LayerwiseStage):
            return StageStep(student, objective, teacher, stage.trainable)
        guide = Guide()
        if teacher is not None and stage.guidance == "trajectory":
            guide = TrajectoryGuide(teacher, until=1, update_every=1 if phase.teacher == "learns" else 2)
        elif teacher is not None:
            guide = TargetGuide(lambda: teacher, until=1)
        step = GuidedStep(student, objective, guide, stage.trainable)
        step.enter(0)
        return step


def _unknown(recipe: Recipe, cluster: Cluster) -> Iterator[str]:
    """What the numbers leave out, in sentences."""
    for name, stage in recipe.stages.items():
        if cache_of(stage) is not None and not cache_is_there(stage):
            yield f"the teacher cache of stages.{name}: it is not there, and planned as prepare makes one by default"
    if not has_triton():
        yield "activations, arithmetic and speed: they need the triton package, which there is for Linux"
    if cluster.card is None:
        yield "speed, cost and whether memory suffices: no card is named (--gpu)"
    elif recipe.precision == "float32":
        yield "speed in float32: cards were measured in bfloat16"
    elif cluster.gpus > 1:
        yield "the time of exchanges between GPUs: speed is that of GPUs that never wait for one another"
