"""What is written down does what the function did: with other inputs, changes in place, weights that move on."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from limbeck.generation.tape import LookedAtNumbersError, Tape


def test_other_inputs_and_changes_in_place():
    layer = nn.Linear(4, 4)

    def function(x: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        first, second = layer(x).split((1, 3), dim=-1)
        state[:, 1:].mul_(0.5).add_(second)
        return F.softplus(first) * state.mT.sum(0, keepdim=True).mT

    with torch.no_grad():
        x, state = torch.randn(3, 4), torch.randn(3, 4)
        tape = Tape(function, [x, state.clone()])
        assert torch.equal(tape.output, function(x, state.clone()))
        for _ in range(2):
            x, state, copy = torch.randn(3, 4), torch.randn(3, 4), torch.empty(3, 4)
            copy.copy_(state)
            assert torch.equal(tape(x, state), function(x, copy))
            assert torch.equal(state, copy)
            layer.weight.add_(1)  # views of weights are kept, not copies


def test_what_makes_nothing_and_what_nobody_uses_is_left_out():
    weight = torch.randn(4, 1, 3)

    def function(x: torch.Tensor) -> torch.Tensor:
        x.cos()
        return (x.to(torch.float32).contiguous() * weight.squeeze(1)).sum()

    tape = Tape(function, [torch.randn(4, 3)])
    calls = [node.name for node in tape.code.graph.nodes if node.op == "call_function"]
    assert len(calls) == 2, calls


@pytest.mark.parametrize("look", [bool, float, torch.Tensor.item, torch.Tensor.tolist])
def test_a_function_that_looks_at_numbers_is_refused(look):
    with pytest.raises(LookedAtNumbersError):
        Tape(lambda x: x + 1 if look(x.sum()) else x, [torch.ones(2)])
