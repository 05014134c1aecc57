"""Distillation: what the teacher shows (`observe`) and what the student is asked to match (the objectives)."""

from limbeck.distill.alone import LayerOutput, run_layer
from limbeck.distill.base import (
    OBJECTIVES,
    WHOLE_MODEL,
    Objective,
    StageStep,
    check_vocabularies,
    make_objective,
    mixer_parameters,
    register_objective,
)
from limbeck.distill.guidance import Guide, GuidedStep, TargetGuide, TrajectoryGuide, WaypointGuide
from limbeck.distill.hidden import HiddenObjective
from limbeck.distill.layerwise import LayerwiseObjective, layer_outputs
from limbeck.distill.logits import LogitsObjective
from limbeck.distill.matrix import MatrixObjective
from limbeck.distill.observe import LayerSignals, Observation, observe
from limbeck.distill.teacher_cache import TeacherCache, teacher_fingerprint
from limbeck.distill.teacher_cache_writer import Keeping, write_teacher_cache
from limbeck.ops.linear_kl_reference import kl_divergence, next_token_loss

__all__ = [
    "OBJECTIVES",
    "WHOLE_MODEL",
    "Guide",
    "GuidedStep",
    "HiddenObjective",
    "Keeping",
    "LayerOutput",
    "LayerSignals",
    "LayerwiseObjective",
    "LogitsObjective",
    "MatrixObjective",
    "Objective",
    "Observation",
    "StageStep",
    "TargetGuide",
    "TeacherCache",
    "TrajectoryGuide",
    "WaypointGuide",
    "check_vocabularies",
    "kl_divergence",
    "layer_outputs",
    "make_objective",
    "mixer_parameters",
    "next_token_loss",
    "observe",
    "register_objective",
    "run_layer",
    "teacher_fingerprint",
    "write_teacher_cache",
]
