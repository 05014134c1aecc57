"""A teacher's hidden states in its cache: those that the objective `hidden` compares with, on disk and in a batch.

Of each sample they are (n, l, d), for a teacher of L layers:

    block   n = L + 1   what entered each block, and what left the last one: what a block put out enters the next
    mixer   n = 2 L     what each layer's attention was given, then what each put out
"""

from collections.abc import Mapping, Sequence
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from limbeck.distill.alone import block_arguments
from limbeck.distill.base import Target
from limbeck.distill.observe import LayerSignals, padding_of
from limbeck.errors import LimbeckError, unknown
from limbeck.students import blocks

STATES = "teacher_states"
"""The key of a batch under which they travel, (b, n, l, d)."""

FORMATS: Mapping[str, tuple[torch.dtype, torch.dtype, str]] = {
    "bfloat16": (torch.bfloat16, torch.uint16, "<u2"),
    "float32": (torch.float32, torch.float32, "<f4"),
}
"""By name: the number type, what torch hands over to numpy, and numpy's own, which has no bfloat16."""


def describe_states(teacher: PreTrainedModel, target: str, stored: str) -> dict[str, Any]:
    """What a cache's plan says of its hidden states.

    Raises:
        LimbeckError: There is no such target or number type.
    """
    if target not in get_args(Target):
        raise unknown("hidden states", target, get_args(Target))
    if stored not in FORMATS:
        raise LimbeckError(f"hidden states stored in {stored}", expected=" or ".join(FORMATS))
    config: Any = teacher.config
    return {"target": target, "layers": len(blocks(teacher)), "width": config.hidden_size, "stored": stored}


def states_shape(described: Mapping[str, Any], length: int) -> tuple[int, int, int]:
    """(n, l, d) of a sample."""
    layers = described["layers"]
    return layers + 1 if described["target"] == "block" else 2 * layers, length, described["width"]


def states_field(described: Mapping[str, Any], length: int) -> tuple[str, str, tuple[int, int, int]]:
    """The part of a sample's row that holds them."""
    return "states", FORMATS[described["stored"]][2], states_shape(described, length)


def states_of(signals: Mapping[int, LayerSignals], described: Mapping[str, Any]) -> np.ndarray:
    """What `recording` saw of a batch in all layers, (b, n, l, d) as it is stored.

    Raises:
        LimbeckError: What a block puts out is not what enters the next.
    """
    ordered = [signals[index] for index in range(described["layers"])]
    if described["target"] == "mixer":
        found = [layer.mixer_input for layer in ordered] + [layer.mixer_output for layer in ordered]
    else:
        found = [layer.block_input for layer in ordered] + [ordered[-1].block_output]
        for before, after in zip(ordered, ordered[1:], strict=False):
            assert before.block_output is not None
            assert after.block_input is not None
            if not torch.equal(before.block_output, after.block_input):
                raise LimbeckError(
                    f"what block {before.index} puts out is not what enters block {after.index}",
                    expected="blocks that follow one another directly",
                    hint="run this teacher live in the stage hidden",
                )
    kind, handed, _ = FORMATS[described["stored"]]
    states = torch.stack([tensor.to(kind) for tensor in found if tensor is not None], dim=1)
    return states.cpu().view(handed).numpy()


def states_tensor(rows: Sequence[np.ndarray], stored: str) -> Tensor:
    """What rows hold, (b, n, l, d)."""
    return torch.from_numpy(np.stack(rows)).view(FORMATS[stored][0])


def signals_of(
    states: Tensor, student: PreTrainedModel, layers: Sequence[int], target: Target, attention_mask: Tensor | None
) -> dict[int, LayerSignals]:
    """What `observe` says of a teacher, as far as the objective `hidden` reads it.

    Args:
        states: (b, n, l, d) of a cache.
        student: What is to be taught; masks and rotary tables are its own.
        layers: Which are wanted.
        target: What the states are of.
        attention_mask: (b, l), 1 at tokens and 0 at padding.
    """
    count, padding_mask = len(blocks(student)), padding_of(attention_mask)
    if not torch.is_autocast_enabled(states.device.type):
        states = states.to(student.dtype)
    if target == "mixer":
        return {
            index: LayerSignals(
                index,
                mixer_input=states[:, index].contiguous(),
                mixer_output=states[:, count + index],
                padding_mask=padding_mask,
            )
            for index in layers
        }
    arguments = block_arguments(student, states[:, 0], attention_mask)
    return {
        index: LayerSignals(
            index,
            block_input=states[:, index].contiguous(),
            block_output=states[:, index + 1],
            padding_mask=padding_mask,
            block_kwargs=arguments[index],
        )
        for index in layers
    }
