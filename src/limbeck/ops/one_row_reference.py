"""Linear layers, and the norms and sums between them, in readable torch."""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS = {
    "identity": lambda y: y,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
}
"""What may follow a linear layer, by name."""


class Norm(NamedTuple):
    """A norm's parameters: weight (k,), and bias (k,) or None."""

    weight: Tensor
    bias: Tensor | None = None


class Linear(NamedTuple):
    """A linear layer: weight (m, k), bias (m,) or None, what follows it by name, and the norm before it or None."""

    weight: Tensor
    bias: Tensor | None = None
    activation: str = "identity"
    norm: Norm | None = None


def norm_linears_reference(x: Tensor, layers: Sequence[Linear], kind: str, eps: float) -> tuple[Tensor, ...]:
    """activation(norm(x) · Wᵀ + bias) of each layer: see `limbeck.ops.norm_linears`. All of one dtype."""
    normed = [x if layer.norm is None else _norm(x, layer.norm, kind, eps) for layer in layers]  # (r, k)
    products = (F.linear(x, layer.weight, layer.bias) for x, layer in zip(normed, layers, strict=True))
    return tuple(ACTIVATIONS[layer.activation](y) for y, layer in zip(products, layers, strict=True))


def linear_sum_reference(inputs: Sequence[Tensor], layers: Sequence[Linear], residual: Tensor | None) -> Tensor:
    """x_0 · W_0ᵀ + bias_0 + x_1 · W_1ᵀ + bias_1 + residual: see `limbeck.ops.linear_sum`. All of one dtype."""
    terms = [F.linear(x, layer.weight, layer.bias) for x, layer in zip(inputs, layers, strict=True)]  # (r, m) each
    return torch.stack(terms if residual is None else [*terms, residual]).sum(0)


def sum_norm_reference(terms: Sequence[Tensor], norms: Sequence[Norm], kind: str, eps: float) -> tuple[Tensor, ...]:
    """The sum, and norm(sum) of each norm: see `limbeck.ops.sum_norm`. All of one dtype."""
    total = torch.stack(list(terms)).sum(0)
    return total, *(_norm(total, norm, kind, eps) for norm in norms)


def _norm(x: Tensor, norm: Norm, kind: str, eps: float) -> Tensor:
    if kind == "layer":
        return F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, eps)
    return F.rms_norm(x, x.shape[-1:], norm.weight, eps)
