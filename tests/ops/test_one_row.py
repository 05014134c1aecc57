"""Linear layers of one row, and the norms and sums between them, are torch's modules, one after the other."""

import pytest
import torch
from torch import nn

from limbeck.errors import LimbeckError
from limbeck.ops import Linear, Norm, linear_sum, norm_linears, sum_norm


def a_norm(kind, width):
    norm = nn.LayerNorm(width) if kind == "layer" else nn.RMSNorm(width, eps=1e-5)
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    return norm.double(), Norm(norm.weight, norm.bias if kind == "layer" else None)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_norm_linears_is_the_modules(kind):
    x, first, second = torch.randn(3, 8).double(), nn.Linear(8, 5).double(), nn.Linear(8, 7, bias=False).double()
    (norm, ours), (other, others) = a_norm(kind, 8), a_norm(kind, 8)
    layers = [Linear(first.weight, first.bias, "silu", ours), Linear(second.weight, norm=others)]
    found = norm_linears(x, layers, kind, 1e-5)
    torch.testing.assert_close(found, (nn.functional.silu(first(norm(x))), second(other(x))))


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("identity", nn.Identity()),
        ("silu", nn.SiLU()),
        ("gelu", nn.GELU()),
        ("gelu_tanh", nn.GELU(approximate="tanh")),
    ],
)
def test_activations(name, module):
    x, layer = torch.randn(2, 6).double(), nn.Linear(6, 4).double()
    (found,) = norm_linears(x, [Linear(layer.weight, layer.bias, name)])
    torch.testing.assert_close(found, module(layer(x)))


@torch.no_grad()
def test_linear_sum_is_the_modules():
    x, y, residual = (torch.randn(2, width).double() for width in (6, 9, 4))
    first, second = nn.Linear(6, 4).double(), nn.Linear(9, 4, bias=False).double()
    layers = [Linear(first.weight, first.bias), Linear(second.weight)]
    torch.testing.assert_close(linear_sum([x, y], layers, residual), first(x) + second(y) + residual)
    torch.testing.assert_close(linear_sum([x], layers[:1]), first(x))


@torch.no_grad()
@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_sum_norm_is_the_modules(kind):
    terms = [torch.randn(5, 8).double() for _ in range(3)]
    (norm, ours), (other, others) = a_norm(kind, 8), a_norm(kind, 8)
    total, *normed = sum_norm(terms, [ours, others], kind, 1e-5)
    torch.testing.assert_close([total, *normed], [sum(terms), norm(sum(terms)), other(sum(terms))])


def test_what_does_not_fit_is_told():
    x, layer, norm = torch.randn(2, 6), Linear(torch.randn(4, 6)), Norm(torch.randn(6))
    with pytest.raises(LimbeckError, match="3 layers"):
        norm_linears(x, [layer] * 3)
    with pytest.raises(LimbeckError, match="norms of kind 'rms'"):
        norm_linears(x, [layer], "rms")
    with pytest.raises(LimbeckError, match=r"weight 0 of shape \(4, 5\)"):
        norm_linears(x, [Linear(torch.randn(4, 5))])
    with pytest.raises(LimbeckError, match="1 inputs and 2 layers"):
        linear_sum([x], [layer, layer])
    with pytest.raises(LimbeckError, match=r"residual of shape|weight 0 of shape"):
        linear_sum([x], [layer], torch.randn(2, 5))
    with pytest.raises(LimbeckError, match="kind 'none'"):
        sum_norm([x], [norm], "none", 1e-5)
    with pytest.raises(LimbeckError, match="2 rows"):
        norm_linears(x, [layer], backend="triton")
