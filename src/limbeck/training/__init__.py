"""Training: one stage's loop, its optimiser, schedule, checkpoints and metrics. Plain arguments, never a recipe."""

from limbeck.training.checkpoint import Checkpoints
from limbeck.training.compiled import compile_layers
from limbeck.training.distributed import World
from limbeck.training.guards import Limits
from limbeck.training.loop import StageResult, TrainingInterrupted, train_stage
from limbeck.training.offload import offload_layers
from limbeck.training.optim import GroupSummary, learning_summary, learning_table, make_adamw, parameter_groups
from limbeck.training.parallel import is_sharded, settle, shard, shard_step, shard_teacher, whole_weights
from limbeck.training.schedule import Schedule, make_schedule
from limbeck.training.store import TrainingState, read_state
from limbeck.training.trackers import Trackers, check_trackers, open_trackers
from limbeck.training.tracking import TIME_FIELDS, MetricsLog, read_metrics
from limbeck.training.update import Companion, OutOfMemory
from limbeck.training.weights import load_learned

__all__ = [
    "TIME_FIELDS",
    "Checkpoints",
    "Companion",
    "GroupSummary",
    "Limits",
    "MetricsLog",
    "OutOfMemory",
    "Schedule",
    "StageResult",
    "Trackers",
    "TrainingInterrupted",
    "TrainingState",
    "World",
    "check_trackers",
    "compile_layers",
    "is_sharded",
    "learning_summary",
    "learning_table",
    "load_learned",
    "make_adamw",
    "make_schedule",
    "offload_layers",
    "open_trackers",
    "parameter_groups",
    "read_metrics",
    "read_state",
    "settle",
    "shard",
    "shard_step",
    "shard_teacher",
    "train_stage",
    "whole_weights",
]
