"""Bytes and arithmetic of an update, against what can be counted by hand."""

import torch
from torch import Tensor, nn

from limbeck.plan.trace import fake, trace

B, L, D = 4, 256, 512
EXACT = B * L * D  # numbers in one activation


class Step(nn.Module):
    """Two products with something between that keeps its input."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (nn.Linear(D, D, bias=False, device="meta") for _ in range(2))

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        ids = batch["input_ids"]
        hidden_states = self.first(ids[..., None].float().expand(-1, -1, D).contiguous())
        return {"loss": self.second(hidden_states.sin()).sum()}


def found(**options):
    mode = fake()
    step = Step()
    with mode:
        step.to_empty(device="cpu")
    return trace(step, None, mode, **{"micro_batch": B, "length": L, "autocast": None, "again": True} | options)


def test_what_is_counted_by_hand():
    traced = found()
    products = sum(call.flops for call in traced.calls if call.name == "aten::mm")
    assert traced.flops == products == 2 * EXACT * D * (2 + 3)  # the first has no gradient of its input
    assert traced.gradients == 2 * D * D * 4
    # The first product's input, its output for sin, sin for the second, and the ids as batch.
    assert traced.activations == 3 * EXACT * 4 + B * L * 8 + 512
    assert 0 < traced.workspace <= 3 * EXACT * 4


def test_autocast_keeps_half_as_much():
    wide, half = found(), found(autocast=torch.bfloat16)
    assert half.flops == wide.flops
    assert half.activations < 0.75 * wide.activations


def test_a_first_micro_batch_has_no_gradients_yet():
    first, later = found(again=False), found()
    assert first.gradients < later.gradients
    assert first.activations == later.activations
