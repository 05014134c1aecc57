"""Linear layers of one row, and the norms and sums between them: a token's work, besides the mixers' steps.

    norm_linears    activation(norm(x) · Wᵀ + bias), for every layer that reads x
    linear_sum      x_0 · W_0ᵀ + bias_0 + x_1 · W_1ᵀ + bias_1 + residual
    sum_norm        s = Σ terms, and norm(s) for every norm that reads s

At one token the launches, and what stands between two products, cost as much as the products, so each of these is one
operator. They are for generation: no gradients. This is the door: shapes, number types, the choice of backend. The
computation is in `one_row_reference.py`, readable, and in `one_row_triton.py`, for CUDA.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from limbeck.errors import LimbeckError
from limbeck.ops.backends import choose_backend
from limbeck.ops.checks import check_shapes, wide_dtype, without_autocast
from limbeck.ops.one_row_reference import (
    ACTIVATIONS,
    Linear,
    Norm,
    linear_sum_reference,
    norm_linears_reference,
    sum_norm_reference,
)

WIDEST_NORM = 16384
"""The widest row that `sum_norm`'s kernel takes."""

Backend = Literal["auto", "reference", "triton"]
Kind = Literal["none", "layer", "rms"]


def norm_linears(
    x: Tensor, layers: Sequence[Linear], kind: Kind = "none", eps: float = 0.0, *, backend: Backend = "auto"
) -> tuple[Tensor, ...]:
    """Apply linear layers that read the same input, each after its norm of it.

    Args:
        x: (r, k).
        layers: One or two; with a norm each, or, when `kind` is ``"none"``, none.
        kind: ``"layer"``, ``"rms"`` or ``"none"``.
        eps: Added to the variance, or to the mean square.
        backend: ``"auto"`` chooses by device, dtype and shape; ``"reference"`` is plain torch; ``"triton"``.

    Returns:
        (r, m) for each layer, in x's dtype; computed in float32, or in float64 when x is.

    Raises:
        LimbeckError: When a shape does not fit, or the backend is unknown or cannot run.
    """
    fits = all((layer.norm is None) == (kind == "none") and layer.activation in ACTIVATIONS for layer in layers)
    if not 1 <= len(layers) <= 2 or not fits:
        raise LimbeckError(
            f"norm_linears was given {len(layers)} layers and norms of kind {kind!r}",
            expected=f"one or two, all with norms or none, and of activations {', '.join(ACTIVATIONS)}",
        )
    tensors = {"x": (x, "r k")}
    for i, layer in enumerate(layers):
        tensors |= _named(i, layer)
    rows = check_shapes("norm_linears", tensors)["r"]
    if choose_backend("norm_linears", backend, x, _too_many(rows)) == "triton":
        from limbeck.ops.one_row_triton import norm_linears_triton

        return norm_linears_triton(x, layers, kind, eps)
    with without_autocast(x):
        wide = wide_dtype(x)
        outs = norm_linears_reference(x.to(wide), _to(layers, wide), kind, eps)
    return tuple(out.to(x.dtype) for out in outs)


def linear_sum(
    inputs: Sequence[Tensor], layers: Sequence[Linear], residual: Tensor | None = None, *, backend: Backend = "auto"
) -> Tensor:
    """Add up the outputs of linear layers, and what runs past them.

    Args:
        inputs: (r, k) for each layer; k may differ.
        layers: One or two of m outputs, without norms and activations.
        residual: (r, m) or None.
        backend: See `norm_linears`.

    Returns:
        (r, m), in the inputs' dtype; computed as `norm_linears` does.

    Raises:
        LimbeckError: See `norm_linears`.
    """
    plain = all(layer.norm is None and layer.activation == "identity" for layer in layers)
    if not 1 <= len(layers) <= 2 or len(inputs) != len(layers) or not plain:
        raise LimbeckError(
            f"linear_sum was given {len(inputs)} inputs and {len(layers)} layers",
            expected="one or two, and as many layers without norm and activation",
        )
    tensors = {} if residual is None else {"residual": (residual, "r m")}
    for i, (x, layer) in enumerate(zip(inputs, layers, strict=True)):
        tensors |= {f"input {i}": (x, f"r k{i}")} | _named(i, layer, m="m", k=f"k{i}")
    rows = check_shapes("linear_sum", tensors)["r"]
    x = inputs[0]
    if choose_backend("linear_sum", backend, x, _too_many(rows)) == "triton":
        from limbeck.ops.one_row_triton import linear_sum_triton

        return linear_sum_triton(inputs, layers, residual)
    with without_autocast(x):
        inputs, layers, residual = _to((inputs, layers, residual), wide_dtype(x))
        return linear_sum_reference(inputs, layers, residual).to(x.dtype)


def sum_norm(
    terms: Sequence[Tensor], norms: Sequence[Norm], kind: Kind, eps: float, *, backend: Backend = "auto"
) -> tuple[Tensor, ...]:
    """Add up some tensors, and norm the sum.

    Args:
        terms: One to three of (r, k).
        norms: One or two.
        kind: ``"layer"`` or ``"rms"``.
        eps: Added to the variance, or to the mean square.
        backend: See `norm_linears`.

    Returns:
        The sum, (r, k), and what each norm makes of it; computed as `norm_linears` does.

    Raises:
        LimbeckError: See `norm_linears`.
    """
    if not (1 <= len(terms) <= 3 and 1 <= len(norms) <= 2 and kind != "none"):
        raise LimbeckError(
            f"sum_norm was given {len(terms)} terms and {len(norms)} norms of kind {kind!r}",
            expected="one to three, and one or two of kind 'layer' or 'rms'",
        )
    tensors = {f"term {i}": (term, "r k") for i, term in enumerate(terms)}
    for i, norm in enumerate(norms):
        tensors |= _named_norm(i, norm, "k")
    width = check_shapes("sum_norm", tensors)["k"]
    unsupported = f"rows of {width}" if width > WIDEST_NORM else None
    if choose_backend("sum_norm", backend, terms[0], unsupported) == "triton":
        from limbeck.ops.one_row_triton import sum_norm_triton

        return sum_norm_triton(terms, norms, kind, eps)
    wide, dtype = wide_dtype(terms[0]), terms[0].dtype
    outs = sum_norm_reference(_to(terms, wide), _to(norms, wide), kind, eps)
    return tuple(out.to(dtype) for out in outs)


def _named(i: int, layer: Linear, m: str | None = None, k: str = "k") -> dict[str, tuple[Tensor, str]]:
    """A layer's tensors with their layouts, for `check_shapes`."""
    m = m or f"m{i}"
    named = {f"weight {i}": (layer.weight, f"{m} {k}")}
    if layer.bias is not None:
        named[f"bias {i}"] = (layer.bias, m)
    return named if layer.norm is None else named | _named_norm(i, layer.norm, k)


def _named_norm(i: int, norm: Norm, k: str) -> dict[str, tuple[Tensor, str]]:
    given = {f"the norm's weight {i}": norm.weight, f"the norm's bias {i}": norm.bias}
    return {name: (tensor, k) for name, tensor in given.items() if tensor is not None}


def _too_many(rows: int) -> str | None:
    """For more rows torch's own products are the faster ones."""
    return f"{rows} rows" if rows > 1 else None


def _to(tree: Any, dtype: torch.dtype) -> Any:
    """Every tensor in that dtype."""
    return tree_map_only(Tensor, lambda tensor: tensor.to(dtype), tree)
