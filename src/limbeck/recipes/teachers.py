"""The teachers of a run: which one each stage follows, when it is loaded, and who else holds it (nobody)."""

import re
from pathlib import Path
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh
from transformers import PretrainedConfig, PreTrainedModel

from limbeck.distill import Guide, TargetGuide, TrajectoryGuide, WaypointGuide, check_vocabularies
from limbeck.errors import LimbeckError
from limbeck.recipes.given import checkpoint_identity
from limbeck.recipes.schema import AnyStage, EngineTable, LayerwiseStage, Recipe
from limbeck.students import blocks, load_config, load_model
from limbeck.training import (
    Companion,
    compile_layers,
    make_adamw,
    make_schedule,
    offload_layers,
    parameter_groups,
    shard,
    shard_teacher,
)


class Teachers:
    """Loads teachers; the frozen one of plain stages is kept from stage to stage.

    Args:
        source: The recipe's teacher: folder or hub id.
        autocast: What the computation is in; a frozen teacher is loaded as that.
        device: Where to put them.
        mesh: The processes that share them; None where each holds its own.
        engine: Whether frozen ones are offloaded, or compiled.
    """

    def __init__(
        self,
        source: str,
        autocast: torch.dtype | None,
        device: torch.device,
        mesh: DeviceMesh | None = None,
        engine: EngineTable | None = None,
    ):
        self.source, self.dtype, self.device, self.mesh = source, autocast or torch.float32, device, mesh
        self.engine = engine or EngineTable()
        self._kept: tuple[str, PreTrainedModel] | None = None

    def of(self, stage: AnyStage) -> PreTrainedModel:
        """The frozen teacher of a plain stage."""
        source = stage.teacher or self.source
        if self._kept is None or self._kept[0] != source:
            self._kept = None  # before the next one is loaded
            self._kept = (source, self._load(source))
        return self._kept[1]

    def release(self) -> None:
        """Let the frozen teacher of an earlier stage go: the next one reads a cache."""
        self._kept = None

    def _load(self, source: str) -> PreTrainedModel:
        """A frozen teacher."""
        offload = self.engine.offload_teacher
        teacher = load_model(source, dtype=self.dtype, device=None if self.mesh or offload else self.device)
        if self.mesh is not None:
            shard_teacher(teacher, self.mesh, offload=offload)
        elif offload:
            offload_layers(teacher, self.device)
        if self.engine.compile_teacher:
            compile_layers(teacher)
        return teacher

    def _load_to_learn(self, source: str) -> PreTrainedModel:
        """A teacher that learns beside the student, in float32."""
        if self.mesh is None:
            return load_model(source, dtype=torch.float32, device=self.device)
        teacher = load_model(source, dtype=torch.float32)
        shard(teacher, [*blocks(teacher), teacher], self.mesh)
        return teacher

    def guide(self, stage: LayerwiseStage) -> tuple[Guide, Companion | None]:
        """Who a layerwise stage follows, and what learns beside the student."""
        self._kept = None  # a guide alone holds its teacher, so that it can let it go
        source, until = stage.teacher or self.source, stage.guided_steps

        match stage.guidance:
            case "none":
                return Guide(), None
            case "target":
                return TargetGuide(lambda: self._load(source), until), None
            case "waypoint":
                return WaypointGuide([lambda path=path: self._load(path) for path in waypoints(stage)], until), None
            case "trajectory":
                teacher = self._load_to_learn(source)
                companion = _companion(teacher, stage)
                return TrajectoryGuide(teacher, until, stage.teacher_update_every), companion


def waypoints(stage: LayerwiseStage) -> list[str]:
    """The checkpoints a stage walks through: those it lists, or those in its folder by the numbers in their names.

    Raises:
        LimbeckError: None is named, or the folder holds none.
    """
    if not stage.waypoints:
        raise LimbeckError(
            "no waypoints for a stage that is guided by them",
            expected="a folder of checkpoints, or a list of them",
            hint="--set stages.NAME.waypoints=FOLDER",
        )
    first, *more = stage.waypoints
    if more:
        return [first, *more]
    folder = Path(first)
    found = [path for path in folder.iterdir() if (path / "config.json").is_file()] if folder.is_dir() else []
    if not found:
        raise LimbeckError(
            f"no checkpoints in {folder}", expected="a folder with the saved steps of a teacher, each a folder"
        )
    return [str(path) for path in sorted(found, key=lambda path: _natural(path.name))]


def further_teachers(recipe: Recipe) -> list[str]:
    """What stages follow besides the recipe's teacher."""
    sources: list[str] = []
    for stage in recipe.stages.values():
        sources += [stage.teacher] if stage.teacher else []
        sources += waypoints(stage) if isinstance(stage, LayerwiseStage) and stage.guidance == "waypoint" else []
    return sources


def check_further_teachers(recipe: Recipe, teacher: PretrainedConfig) -> list[dict[str, Any]]:
    """Refuse what cannot guide a student of `teacher`; return what tells them from others."""
    for source in further_teachers(recipe):
        check_vocabularies(teacher, load_config(source))
    return [checkpoint_identity(source) for source in further_teachers(recipe)]


def smallest_vocabulary(recipe: Recipe, teacher: PretrainedConfig) -> int:
    """How many tokens all teachers of a recipe know."""
    return min(config.vocab_size for config in (teacher, *map(load_config, further_teachers(recipe))))


def _natural(name: str) -> list[Any]:
    """Sort ``step-9`` before ``step-10``."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", name)]


def _companion(teacher: PreTrainedModel, stage: LayerwiseStage) -> Companion:
    """A teacher's own optimiser and schedule: the stage's shape over the teacher's own updates, at its own rate."""
    assert stage.teacher_lr is not None
    own = stage.guided_steps // stage.teacher_update_every

    def scaled(steps: int) -> int:
        return steps * own // stage.steps

    schedule = make_schedule(
        stage.schedule,
        total_steps=own,
        peak=stage.teacher_lr,
        warmup=scaled(stage.warmup_steps),
        decay=max(1, scaled(stage.decay_steps)),
        floor=stage.min_lr * stage.teacher_lr / stage.lr,
    )
    groups = parameter_groups(
        teacher.train().requires_grad_(True).named_parameters(),
        mixer_parameters=(),
        lr=stage.teacher_lr,
        weight_decay=stage.weight_decay,
    )
    return Companion(
        teacher,
        make_adamw(groups, betas=stage.betas),
        schedule,
        until=stage.guided_steps,
        every=stage.teacher_update_every,
        clip=stage.clip or None,
    )
