"""The contract of an objective, and the module the training engine drives.

An objective says what the student is asked to match, and which of its parameters can learn from that. A `StageStep`
binds a student, its teacher and an objective into one module whose forward takes a batch and returns the losses, so
that data-parallel wrappers see every call.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from limbeck.errors import LimbeckError, unknown
from limbeck.students import blocks, mixers

Trainable = Literal["mixers", "blocks", "all"]
Target = Literal["block", "mixer"]
Batch = dict[str, Tensor]
Losses = dict[str, Tensor]

SomeObjective = TypeVar("SomeObjective", bound="Objective")

WHOLE_MODEL = 2
"""The scope of an objective that sees the student end to end."""

MOST_PADDING = 0.01
"""Vocabularies that differ by more than this part are different ones, not one padded to two sizes."""

OBJECTIVES: dict[str, "type[Objective]"] = {}


class Objective(ABC):
    """What a stage asks of the student.

    Attributes:
        name: As recipes write it.
        scope: Stages run from small scope to large: a mixer's matrix (0), a layer's output (1), the whole model (2).
        needs_teacher: Whether it reads a teacher.
    """

    name: str
    scope: int
    needs_teacher: bool = True

    @abstractmethod
    def trainable(self, student: PreTrainedModel) -> set[str]:
        """Names of the parameters that this objective can reach and lets learn."""

    def units(self, student: PreTrainedModel) -> list[nn.Module]:
        """The parts of the student that it calls, from the inside out: what a process gathers at once when sharded.

        By default its blocks and then, around them, the whole student.
        """
        return [*blocks(student), student]

    @abstractmethod
    def __call__(self, student: PreTrainedModel, teacher: PreTrainedModel | None, batch: Batch) -> Losses:
        """Compute the losses of a batch.

        Args:
            student: In train mode.
            teacher: Frozen, in eval mode; None where `needs_teacher` is False.
            batch: ``input_ids`` and ``labels``, each (b, l); ``attention_mask`` (b, l) where there is padding.

        Returns:
            ``loss``, a scalar with its graph, and named terms, detached scalars.
        """


def register_objective(cls: type[SomeObjective]) -> type[SomeObjective]:
    """Class decorator: make an objective known to recipes by its name."""
    OBJECTIVES[cls.name] = cls
    return cls


def make_objective(name: str, **options: object) -> Objective:
    """The objective of that name with its options.

    Raises:
        LimbeckError: The name or an option is unknown.
    """
    if name not in OBJECTIVES:
        raise unknown("objective", name, OBJECTIVES)
    try:
        return OBJECTIVES[name](**options)
    except TypeError as error:
        raise LimbeckError(f"objective {name!r} with options {sorted(options)}", hint=str(error)) from error


class StageStep(nn.Module):
    """One stage of distillation as a module: forward takes a batch and returns the losses.

    Args:
        student: The model that learns. Everything the objective cannot reach is frozen here.
        objective: What it is asked to match.
        teacher: The model it learns from. It is put in eval mode, frozen, and left out of this module's parameters
            and state, since it neither learns nor is saved.
        trainable: Narrows what learns to the mixers, the swapped blocks or, the default, all the objective reaches.
    """

    def __init__(
        self,
        student: PreTrainedModel,
        objective: Objective,
        teacher: PreTrainedModel | None = None,
        trainable: Trainable | None = None,
    ):
        super().__init__()
        if objective.needs_teacher and teacher is None:
            raise LimbeckError(f"objective {objective.name!r} without a teacher", hint="name one with --teacher")
        if teacher is not None:
            check_vocabularies(student.config, teacher.config)
        if objective.scope < WHOLE_MODEL and not mixers(student):
            raise LimbeckError(
                f"objective {objective.name!r} for a model without a mixer",
                expected="a student with at least one swapped layer",
                hint="keep attention in fewer layers",
            )
        if teacher is not None:
            teacher.eval().requires_grad_(False)
        self.student = student
        self.objective = objective
        self.__dict__["teacher"] = teacher
        freeze(student, learning(student, objective, trainable))

    def forward(self, batch: Batch) -> Losses:
        """Losses of a batch: ``loss`` with its graph, and detached terms."""
        return self.objective(self.student, self.__dict__["teacher"], batch)


def learning(student: PreTrainedModel, objective: Objective, trainable: Trainable | None) -> set[str]:
    """Which parameters learn: what the objective can reach, narrowed to a part of the student."""
    reachable = objective.trainable(student)
    if trainable in (None, "all"):
        return reachable
    part = mixer_parameters(student) if trainable == "mixers" else block_parameters(student)
    return reachable & part


def mixer_parameters(student: PreTrainedModel) -> set[str]:
    """Names of the parameters of the student's mixers; the rest is teacher-born."""
    return _names_within(student, list(mixers(student).values()))


def block_parameters(student: PreTrainedModel) -> set[str]:
    """Names of the parameters of the blocks whose attention was swapped, mixers included."""
    return _names_within(student, [blocks(student)[index] for index in mixers(student)])


def _names_within(student: PreTrainedModel, parts: list[nn.Module]) -> set[str]:
    inside = {id(parameter) for part in parts for parameter in part.parameters()}
    return {name for name, parameter in student.named_parameters() if id(parameter) in inside}


def freeze(student: nn.Module, learns: set[str]) -> None:
    """Let exactly these parameters learn."""
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(name in learns)


def check_vocabularies(student: PretrainedConfig, teacher: PretrainedConfig) -> None:
    """Refuse a student and a teacher, by their configurations, that do not speak of the same tokens.

    One vocabulary may be padded further than the other, as those of one family's sizes often are.
    """
    found, expected = student.vocab_size, teacher.vocab_size
    if abs(found - expected) > MOST_PADDING * min(found, expected):
        raise LimbeckError(
            f"the student's vocabulary has {found} tokens",
            expected=f"the teacher's {expected}",
            hint="convert the student from this teacher, or name the teacher it was made from",
        )


def reached(student: PreTrainedModel, loss: Callable[[], Tensor]) -> set[str]:
    """Names of the parameters a probe loss has gradients for; the student is left as it was."""
    named = dict(student.named_parameters())
    asked = {name: p.requires_grad for name, p in named.items()}
    student.requires_grad_(True)
    try:
        with torch.enable_grad():
            gradients = torch.autograd.grad(loss(), list(named.values()), allow_unused=True)
    finally:
        for name, parameter in named.items():
            parameter.requires_grad_(asked[name])
    return {name for name, gradient in zip(named, gradients, strict=True) if gradient is not None}


def in_own_dtype(model: PreTrainedModel) -> AbstractContextManager[object]:
    """While open, a model in a half-precision format computes in that alone.

    Autocast would bring the input of every norm to float32 and its output back, for the same numbers.
    """
    if model.dtype in (torch.bfloat16, torch.float16):
        return torch.autocast(model.device.type, enabled=False)
    return nullcontext()


def token_mean(values: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over tokens of (b, l) values, where the mask (b, l) is 1."""
    if mask is None:
        return values.mean()
    return values.masked_fill(mask == 0, 0.0).sum() / mask.sum().clamp_min(1)
