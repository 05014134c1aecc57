"""What lies in each GPU's memory at the fullest moment of an update."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from limbeck.distill import StageStep
from limbeck.plan.trace import Trace
from limbeck.students import backbone, blocks
from limbeck.training.parallel import FORWARD_METHODS

WIDE = torch.float32.itemsize
MOMENTA = 2


@dataclass(frozen=True)
class Memory:
    """Bytes on each GPU at the fullest moment of an update.

    Attributes:
        student: Its parameters, in float32.
        teacher: Its parameters, in the number format of the computation; in float32 where it learns. Of one that is
            offloaded those outside of its layers.
        gradients: Of what learns, in float32.
        optimizer: The momenta of what learns, in float32.
        gathered: What is whole for a while of what is sharded or offloaded; 0 where nothing is.
        activations: What the backward pass needs of the forward pass, and the teacher's signals; None: not known.
        workspace: Operands in the other number format, gradients of activations, logits of some tokens at a time.
    """

    student: int
    teacher: int
    gradients: int
    optimizer: int
    gathered: int
    activations: int | None
    workspace: int | None

    @property
    def total(self) -> int | None:
        """All of them."""
        return total_of(asdict(self).values())


def memory_of(
    step: StageStep,
    student: PreTrainedModel,
    teacher: PreTrainedModel | None,
    learned: int,
    traced: Trace | None,
    shards: int,
    *,
    offloaded: bool = False,
) -> Memory:
    """The fullest moment: within a micro-batch or, where activations are few, at the optimiser's step.

    Args:
        step: The stage's.
        student: The model that learns.
        teacher: What it learns from.
        learned: Parameters that have momenta.
        traced: A micro-batch; None where it cannot be traced.
        shards: How many GPUs share one copy of the models.
        offloaded: Whether the layers of a frozen teacher lie in the host's memory.
    """
    stays = [] if teacher is None else _staying(teacher, offloaded)
    gradients, activations, workspace = learned * WIDE // shards, None, None
    if traced is not None:
        moment = traced.gradients // shards, traced.activations, traced.workspace
        gradients, activations, workspace = max(moment, (gradients, 0, 0), key=sum)
    return Memory(
        student=_bytes(student.parameters()) // shards,
        teacher=_bytes(stays) // shards,
        gradients=gradients,
        optimizer=MOMENTA * learned * WIDE // shards,
        gathered=_gathered(step, student, teacher, shared=shards > 1, offloaded=offloaded),
        activations=activations,
        workspace=workspace,
    )


def _staying(teacher: PreTrainedModel, offloaded: bool) -> list[nn.Parameter]:
    """The parameters of a teacher that are on the GPU all the time."""
    away = set(map(id, blocks(teacher).parameters())) if offloaded else set()
    return [parameter for parameter in teacher.parameters() if id(parameter) not in away]


def _gathered(
    step: StageStep, student: PreTrainedModel, teacher: PreTrainedModel | None, *, shared: bool, offloaded: bool
) -> int:
    """Bytes of parameters that are whole at once, by the rules of `limbeck.training.shard` and `offload_layers`.

    The units that stay so after their forward pass; of the others the greatest, the one that is fetched ahead of it,
    and its gradient.
    """
    found = 0
    if shared:
        units = step.objective.units(student)
        staying = [unit for unit in units if unit is student or any(hasattr(unit, name) for name in FORWARD_METHODS)]
        found += _whole(units, staying, ahead=3)
    if teacher is not None and (shared or offloaded):
        outer = [backbone(teacher), teacher.get_output_embeddings()] if shared else []
        found += _whole([*blocks(teacher), *outer], outer, ahead=2)
    return found


def _whole(units: Sequence[nn.Module], staying: Sequence[nn.Module], ahead: int) -> int:
    """Bytes of the units that stay, and so many times the greatest of the others."""
    met: set[int] = set()
    stay, most = 0, 0
    for unit in units:  # from the inside out: what is within another is its own
        own = [parameter for parameter in unit.parameters() if id(parameter) not in met]
        met.update(map(id, own))
        if unit in staying:
            stay += _bytes(own)
        else:
            most = max(most, _bytes(own))
    return stay + ahead * most


def count(parameters: Iterable[nn.Parameter], learning: bool = False) -> int:
    """How many numbers parameters hold, or those of them that learn."""
    return sum(parameter.numel() for parameter in parameters if parameter.requires_grad or not learning)


def _bytes(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in parameters)


def total_of(values: Iterable[Any]) -> Any:
    """Of numbers; None where one is not known."""
    listed = list(values)
    return None if None in listed else sum(listed)
