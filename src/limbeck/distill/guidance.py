"""Who the student follows, and until when (METHODS 3): nobody, a target, a trajectory, waypoints.

A guide holds at most one teacher at a time. `Guide.enter` is told how many updates are done, before the next one, and
sees to it that the right teacher is there, or none: a guide is a function of that number alone, so that a resumed run
meets the teachers of an uninterrupted one.
"""

import gc
from collections.abc import Callable, Sequence

import torch
from transformers import PreTrainedModel

from limbeck.distill.base import Batch, Losses, Objective, StageStep, Trainable, check_vocabularies
from limbeck.errors import LimbeckError

Load = Callable[[], PreTrainedModel]


class Guide:
    """Nobody: the student learns from the text alone.

    Args:
        until: Updates that are guided; from then on there is no teacher.
    """

    def __init__(self, until: int = 0):
        self.until = until
        self.teacher: PreTrainedModel | None = None

    def enter(self, step: int) -> None:
        """Bring in the teacher of the update that follows `step` finished ones, or let the last one go."""
        if step < self.until:
            self._prepare(step)
        else:
            self._release()

    def _prepare(self, step: int) -> None:
        """Bring in the teacher of that update."""

    def _release(self) -> None:
        """Let the teacher go, and its memory with it."""
        if self.teacher is None:
            return
        self.teacher = None
        gc.collect()  # modules and their hooks refer to each other in circles
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()


class TargetGuide(Guide):
    """The frozen target model (target guided; with `until` before the end: hybrid).

    Args:
        load: Gives the teacher; called once, when it is first needed. The guide should be the only one to hold it.
        until: Updates that are guided.
    """

    def __init__(self, load: Load, until: int):
        super().__init__(until)
        self._load = load

    def _prepare(self, step: int) -> None:
        if self.teacher is None:
            self.teacher = _frozen(self._load())


class WaypointGuide(Guide):
    """Saved steps of the teacher's own fine-tuning, in order, each for an equal part of the guided updates.

    Args:
        loads: Give the teachers.
        until: Updates that are guided, at least one for each teacher.
    """

    def __init__(self, loads: Sequence[Load], until: int):
        super().__init__(until)
        if not 1 <= len(loads) <= until:
            raise LimbeckError(f"{len(loads)} waypoints in {until} guided updates", expected="an update for each")
        self._loads = loads
        self._present: int | None = None

    def waypoint(self, step: int) -> int:
        """Which of the waypoints guides the update that follows `step` finished ones."""
        return step * len(self._loads) // self.until

    def _prepare(self, step: int) -> None:
        wanted = self.waypoint(step)
        if wanted != self._present:
            self._release()  # before the next one is loaded: there is room for one
            self.teacher, self._present = _frozen(self._loads[wanted]()), wanted

    def _release(self) -> None:
        self._present = None
        super()._release()


class TrajectoryGuide(Guide):
    """A teacher that is fine-tuned on the same text at the same time.

    Its parameters ask for gradients in every `update_every`-th update only; who updates them is the training loop's
    business (`limbeck.training.Companion`).

    Args:
        teacher: In float32; it is put in train mode.
        until: Updates that are guided.
        update_every: T_u.
    """

    def __init__(self, teacher: PreTrainedModel, until: int, update_every: int = 1):
        super().__init__(until)
        self.teacher = teacher.train()
        self.update_every = update_every

    def _prepare(self, step: int) -> None:
        assert self.teacher is not None, "a teacher that learned is not brought back"
        self.teacher.requires_grad_((step + 1) % self.update_every == 0)


class GuidedStep(StageStep):
    """A `StageStep` whose teacher is a guide's: `enter` before every update.

    Args:
        student: The model that learns.
        objective: What it is asked to match; it must do without a teacher too.
        guide: Who is followed.
        trainable: See `StageStep`.
    """

    def __init__(
        self, student: PreTrainedModel, objective: Objective, guide: Guide, trainable: Trainable | None = None
    ):
        assert not objective.needs_teacher, objective.name
        super().__init__(student, objective, trainable=trainable)
        self.guide = guide

    def enter(self, step: int) -> None:
        """Get ready for the update that follows `step` finished ones."""
        before = self.guide.teacher
        self.guide.enter(step)
        if self.guide.teacher is not None and self.guide.teacher is not before:
            check_vocabularies(self.student.config, self.guide.teacher.config)

    def forward(self, batch: Batch) -> Losses:
        """Losses of a batch; every term with a graph is to be learned from: ``loss``, maybe ``teacher_loss``."""
        return self.objective(self.student, self.guide.teacher, batch)


def _frozen(teacher: PreTrainedModel) -> PreTrainedModel:
    return teacher.eval().requires_grad_(False)
