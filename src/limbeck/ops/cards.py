"""What the card under a tensor offers to a kernel: launches are chosen by it, never by trying."""

import functools
from typing import NamedTuple

import torch
from torch import Tensor


class Card(NamedTuple):
    """A GPU, as far as a launch depends on it.

    Attributes:
        capability: Of CUDA, such as (9, 0).
        shared_memory: Bytes of shared memory that one program may have.
        multiprocessors: How many there are.
    """

    capability: tuple[int, int]
    shared_memory: int
    multiprocessors: int


INTERPRETER = Card((8, 6), 101376, 4)
"""What Triton's interpreter on a CPU is taken for: the smallest limits of all, and few multiprocessors."""


def card_of(tensor: Tensor) -> Card:
    """The card that the tensor lies on; for a tensor of the CPU, `INTERPRETER`."""
    return _card(tensor.device.index or 0) if tensor.is_cuda else INTERPRETER


@functools.cache
def _card(index: int) -> Card:
    properties = torch.cuda.get_device_properties(index)
    return Card(
        (properties.major, properties.minor),
        properties.shared_memory_per_block_optin,
        properties.multi_processor_count,
    )
