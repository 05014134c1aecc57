"""Activations in one kernel are the same functions."""

import pytest
import torch
from torch import nn
from transformers.activations import ACT2FN

from limbeck.students.activations import fuse_activations


@pytest.mark.parametrize("name", ["gelu_new", "gelu_fast"])
def test_the_same_function_as_one_module(name):
    model = nn.ModuleDict({"mlp": nn.ModuleDict({"act": ACT2FN[name]}), "other": ACT2FN["silu"]})
    before, silu = model["mlp"]["act"], model["other"]
    fuse_activations(model)
    x = (5 * torch.randn(1000, dtype=torch.float64)).requires_grad_()
    outputs = [act(x) for act in (before, model["mlp"]["act"])]
    gradients = [torch.autograd.grad(out.sum(), x)[0] for out in outputs]
    torch.testing.assert_close(*outputs, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-9)
    assert type(model["mlp"]["act"]) is nn.GELU
    assert model["other"] is silu
