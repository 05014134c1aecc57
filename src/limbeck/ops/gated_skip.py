"""`gated_skip`, what follows the mixing: a skip past it and a gate on both.

    out = (y + D·x) · silu(z + z_bias)

This is the door: shapes, number types, the choice of backend. The computation is in `gated_skip_reference.py`,
readable, and in `gated_skip_triton.py`, for CUDA.
"""

from typing import Literal

import torch
from torch import Tensor

from limbeck.errors import LimbeckError
from limbeck.ops.backends import choose_backend
from limbeck.ops.checks import check_shapes, wide_dtype, without_autocast
from limbeck.ops.gated_skip_reference import gated_skip_reference

Backend = Literal["auto", "reference", "triton"]


def gated_skip(
    y: Tensor,
    x: Tensor | None,
    D: Tensor | None,
    z: Tensor,
    z_bias: Tensor | None = None,
    *,
    backend: Backend = "auto",
) -> Tensor:
    """Add D·x to y and gate the sum.

    Differentiable once in every input. Computed in float32, under autocast too, or in float64 when an input is.

    Args:
        y: (b, l, h, p), what was mixed.
        x: (b, l, h, p), what it was mixed from, or None when there is no skip.
        D: (h,), or None with x.
        z: (b, l, h·p), the gate before silu.
        z_bias: (h·p,) or None.
        backend: ``"auto"`` chooses by device, dtype and shape; ``"reference"`` is plain torch; ``"triton"``.

    Returns:
        (b, l, h·p), in z's dtype.

    Raises:
        LimbeckError: When a shape does not fit, or the backend is unknown or cannot run.
    """
    _check_gate(y, x, D, z, z_bias)
    wide = wide_dtype(y, x, D, z, z_bias)
    unsupported = str(wide) if wide == torch.float64 else None
    if choose_backend("gated_skip", backend, z, unsupported) == "triton":
        from limbeck.ops.gated_skip_triton import gated_skip_triton

        return gated_skip_triton(y.flatten(-2), None if x is None else x.flatten(-2), D, z, z_bias)
    with without_autocast(z):
        x, D, z_bias = (None if tensor is None else tensor.to(wide) for tensor in (x, D, z_bias))
        return gated_skip_reference(y.to(wide), x, D, z.to(wide), z_bias).to(z.dtype)


def _check_gate(y: Tensor, x: Tensor | None, D: Tensor | None, z: Tensor, z_bias: Tensor | None) -> None:
    tensors = {"y": (y, "b l h p"), "x": (x, "b l h p"), "D": (D, "h"), "z": (z, "b l c"), "z_bias": (z_bias, "c")}
    given = {name: (tensor, layout) for name, (tensor, layout) in tensors.items() if tensor is not None}
    sizes = check_shapes("gated_skip", given)
    if sizes["c"] != sizes["h"] * sizes["p"]:
        raise LimbeckError(
            f"gated_skip was given z of width {sizes['c']} and y of {sizes['h']} heads of width {sizes['p']}",
            expected=f"z to be h·p = {sizes['h'] * sizes['p']} wide",
        )
    if (x is None) != (D is None):
        raise LimbeckError("gated_skip was given x or D alone", expected="both, or neither where there is no skip")
