"""What the card under a tensor offers to a kernel: launches are chosen by it, never by trying."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
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


_planned: list[Card] = []  # no context variable: torch.compile cannot look into those


@contextmanager
def planned_on(card: Card) -> Iterator[None]:
    """While open, operators choose as on `card`: to plan, with tensors that have no data, what a run does there."""
    _planned.append(card)
    try:
        yield
    finally:
        _planned.pop()


def on_gpu(tensor: Tensor) -> bool:
    """Whether the tensor lies on a card, or is planned to."""
    return tensor.is_cuda or bool(_planned)


def card_of(tensor: Tensor) -> Card:
    """The card that the tensor lies on, or is planned to; for a tensor of the CPU, `INTERPRETER`."""
    if _planned:
        return _planned[-1]
    return _card(tensor.device.index or 0) if tensor.is_cuda else INTERPRETER


@functools.cache
def _card(index: int) -> Card:
    properties = torch.cuda.get_device_properties(index)
    return Card(
        (properties.major, properties.minor),
        properties.shared_memory_per_block_optin,
        properties.multi_processor_count,
    )
