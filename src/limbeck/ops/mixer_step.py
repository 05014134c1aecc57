"""`mixer_step`, one token of discrete Mamba-2 between its two projections: convolution, SSD, skip and gate at once.

    [x | B | C] = activation(causal_conv of xBC)        a = −softplus(A_log)
    S_t = exp(a) · S_{t-1} + x ⊗ B                      out = (S_t · C + D·x) · silu(z + z_bias)

At one token the launches cost more than the work, so this is one operator. This is the door: shapes, number types, the
choice of backend. The computation is in `mixer_step_reference.py`, readable, in `mixer_step_in_place.py`, for decoding
on a CPU, and in `mixer_step_triton.py`, for CUDA.
"""

from typing import Any, Literal

import torch
from torch import Tensor

from limbeck.errors import LimbeckError
from limbeck.ops.backends import choose_backend
from limbeck.ops.causal_conv import MOST_TAPS, Activation
from limbeck.ops.checks import check_mask, check_shapes, wide_dtype, without_autocast
from limbeck.ops.mixer_step_in_place import mixer_step_in_place
from limbeck.ops.mixer_step_reference import mixer_step_reference

WIDEST_STATE = 256
"""The largest d_state that the kernel takes."""

Backend = Literal["auto", "reference", "triton"]


def mixer_step(
    xBC: Tensor,
    A_log: Tensor,
    z: Tensor,
    conv_state: Tensor,
    state: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    D: Tensor,
    z_bias: Tensor | None = None,
    *,
    activation: Activation = "identity",
    mask: Tensor | None = None,
    in_place: bool = False,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Advance a discrete Mamba-2 mixer by one token.

    Differentiable once in every floating input, unless it is in place. Computed in float32, under autocast too, or in
    float64 when an input is.

    Args:
        xBC: (b, c), what goes into the convolution: h·p channels of x, g·n of B, g·n of C; h is a multiple of g.
        A_log: (b, h), before the softplus that makes it a decay.
        z: (b, h·p), the gate before silu.
        conv_state: (b, c, k-1), the inputs of the convolution before this one.
        state: (b, h, p, n), float32 or float64, the state of the SSD before this token.
        conv_weight: (c, k).
        conv_bias: (c,) or None.
        D: (h,).
        z_bias: (h·p,) or None.
        activation: After the convolution, ``"identity"`` or ``"silu"``.
        mask: (b,) bool, True at a token. Padding enters as zero and leaves the state of the SSD as it is.
        in_place: Whether to write the new states over the old ones, as a CUDA graph needs it; not with gradients.
        backend: ``"auto"`` chooses by device, dtype and shape; ``"reference"`` is plain torch; ``"triton"``.

    Returns:
        out, (b, h·p) in z's dtype; the new conv_state, (b, c, k-1) in xBC's dtype; the new state, (b, h, p, n). In
        place the latter two are the tensors that were given.

    Raises:
        LimbeckError: When a shape or dtype does not fit, or the backend is unknown or cannot run.
    """
    inputs = (xBC, A_log, z, conv_state, state, conv_weight, conv_bias, D, z_bias)
    sizes = _check_step(*inputs, activation)
    check_mask("mixer_step", mask, (sizes["b"],))
    if in_place:
        _check_in_place(inputs)
    wide = wide_dtype(*inputs)
    if choose_backend("mixer_step", backend, xBC, _unsupported(wide, sizes)) == "triton":
        from limbeck.ops.mixer_step_triton import mixer_step_triton

        return mixer_step_triton(*inputs, mask, activation == "silu", in_place)
    silu = activation == "silu"
    with without_autocast(xBC):
        wides: Any = [None if tensor is None else tensor.to(wide) for tensor in inputs]
        if in_place and mask is None and state.dtype == wide:
            wides[3] = conv_state  # itself, not a wider copy
            return mixer_step_in_place(*wides, silu=silu).to(z.dtype), conv_state, state
        out, new_conv, new_state = mixer_step_reference(*wides, mask=mask, silu=silu)
    out = out.to(z.dtype)
    if in_place:
        return out, conv_state.copy_(new_conv), state.copy_(new_state)
    return out, new_conv.to(xBC.dtype), new_state


def _unsupported(wide: torch.dtype, sizes: dict[str, int]) -> str | None:
    if wide == torch.float64:
        return str(wide)
    if sizes["n"] > WIDEST_STATE:
        return f"d_state {sizes['n']}"
    return f"{sizes['k']} taps" if sizes["k"] > MOST_TAPS else None


def _check_step(
    xBC: Tensor,
    A_log: Tensor,
    z: Tensor,
    conv_state: Tensor,
    state: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    D: Tensor,
    z_bias: Tensor | None,
    activation: str,
) -> dict[str, int]:
    if activation not in ("identity", "silu"):
        raise LimbeckError(f"mixer_step was given activation {activation!r}", expected='"identity" or "silu"')
    tensors = {"xBC": (xBC, "b c"), "conv_weight": (conv_weight, "c k"), "state": (state, "b h p n"), "D": (D, "h")}
    tensors |= {"A_log": (A_log, "b h"), "z": (z, "b h·p")}
    if conv_bias is not None:
        tensors["conv_bias"] = (conv_bias, "c")
    if z_bias is not None:
        tensors["z_bias"] = (z_bias, "h·p")
    sizes = check_shapes("mixer_step", tensors)
    c, h, n, inner = (sizes[letter] for letter in ("c", "h", "n", "h·p"))
    groups, rest = divmod(c - inner, 2 * n)
    if inner != h * sizes["p"] or rest or groups < 1 or h % groups:
        raise LimbeckError(
            f"mixer_step was given {c} channels, z of width {inner} and a state of shape {tuple(state.shape)}",
            expected="z of width h·p, and h·p + 2·g·n channels with h a multiple of g",
        )
    if tuple(conv_state.shape) != (sizes["b"], c, sizes["k"] - 1):
        raise LimbeckError(
            f"mixer_step was given conv_state of shape {tuple(conv_state.shape)}",
            expected=f"(b, c, k-1) = {(sizes['b'], c, sizes['k'] - 1)}",
        )
    if state.dtype not in (torch.float32, torch.float64):
        raise LimbeckError(f"mixer_step was given a state in {state.dtype}", expected="float32 or float64")
    return sizes


def _check_in_place(inputs: tuple[Tensor | None, ...]) -> None:
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in inputs):
        raise LimbeckError(
            "mixer_step was asked to write its states in place where gradients are wanted",
            expected="torch.no_grad() around it, or in_place=False",
        )
