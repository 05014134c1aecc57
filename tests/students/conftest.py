"""Tiny teachers and students with weights large enough that every path shows in the logits."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

import limbeck
from limbeck.students import mixers
from tiny import VOCABULARY, shaken, tiny_teacher

LAYERS = 3
KEEP = {"none": (0, 1, 2), "first": (1, 2), "last": (0, 1), "all": ()}
"""Attention kept, for each way of swapping."""


@pytest.fixture(params=["gpt_neox", "phi", "llama", "gpt2", "stablelm"])
def family(request: Any) -> str:
    """Families that differ in how blocks call their attention; `test_table.py` goes through all."""
    return request.param


@pytest.fixture(params=list(KEEP))
def keep(request: Any) -> tuple[int, ...]:
    return KEEP[request.param]


@pytest.fixture(params=["first", "last", "all"])
def keep_some(request: Any) -> tuple[int, ...]:
    return KEEP[request.param]


@pytest.fixture
def make_teacher() -> Callable[..., Any]:
    """Build a teacher with random weights, biases included."""
    return partial(tiny_teacher, layers=LAYERS)


@pytest.fixture
def make_student(make_teacher: Callable[..., Any]) -> Callable[..., Any]:
    """Build a student whose mixers are random and strong."""

    def make(family: str, keep_attention: tuple[int, ...] = (), **options: Any) -> Any:
        student = limbeck.convert(make_teacher(family, **options), keep_attention=keep_attention, init="random")
        for mixer in mixers(student).values():
            shaken(mixer)
        return student

    return make


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (2, 12))
