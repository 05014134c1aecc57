"""Tiny teachers and students with weights large enough that every path shows."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

import limbeck
from limbeck.students import mixers
from tiny import VOCABULARY, shaken, tiny_teacher


@pytest.fixture(params=["gpt_neox", "phi", "llama", "stablelm"])
def family(request: Any) -> str:
    return request.param


@pytest.fixture
def make_teacher() -> Callable[..., Any]:
    def make(family: str = "gpt_neox", **options: Any) -> Any:
        return tiny_teacher(family, **({"attn_implementation": "eager"} | options))

    return make


@pytest.fixture
def make_student() -> Callable[..., Any]:
    """Build a student of a teacher; its mixers are random and strong."""

    def make(teacher: Any, keep_attention: tuple[int, ...] = (), **mixer_kwargs: Any) -> Any:
        student = limbeck.convert(teacher, keep_attention=keep_attention, init="random", mixer_kwargs=mixer_kwargs)
        for mixer in mixers(student).values():
            shaken(mixer)
        return student

    return make


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (2, 12))


@pytest.fixture
def left_padding() -> torch.Tensor:
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[0, :4] = 0
    return mask
