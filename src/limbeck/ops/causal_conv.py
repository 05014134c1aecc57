"""`causal_conv`, the short depthwise convolution before the mixers: each channel sees its last k inputs.

    y_t = activation(bias + Σ_j weight[:, j] · x_{t-(k-1)+j})

This is the door: shapes, number types, the choice of backend. The computation is in `causal_conv_reference.py`,
readable, and in `causal_conv_triton.py`, for CUDA.
"""

from collections.abc import Sequence
from typing import Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from limbeck.errors import LimbeckError
from limbeck.ops.backends import choose_backend
from limbeck.ops.causal_conv_reference import causal_conv_reference, last_inputs
from limbeck.ops.checks import check_mask, check_seq_idx, check_shapes, wide_dtype, without_autocast

MOST_TAPS = 8
"""The largest k that the kernels take."""

Activation = Literal["identity", "silu"]
Backend = Literal["auto", "reference", "triton"]


@overload
def causal_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: Activation = "identity",
    initial_state: Tensor | None = None,
    return_state: Literal[False] = False,
    seq_idx: Tensor | None = None,
    mask: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor: ...
@overload
def causal_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: Activation = "identity",
    initial_state: Tensor | None = None,
    return_state: Literal[True],
    seq_idx: Tensor | None = None,
    mask: Tensor | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]: ...
def causal_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: Activation = "identity",
    initial_state: Tensor | None = None,
    return_state: bool = False,
    seq_idx: Tensor | None = None,
    mask: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Convolve each channel with its own k taps, looking back only.

    Differentiable once in every floating input. Summed in float32, under autocast too, or in float64 when an input is.

    Args:
        x: (b, l, c).
        weight: (c, k); the last tap is the present token's.
        bias: (c,) or None.
        activation: ``"identity"`` or ``"silu"``.
        initial_state: (b, c, k-1), the inputs before the first token, of the first document; zero by default.
        return_state: Whether to return the last k-1 inputs as well.
        seq_idx: (b, l) integer, non-decreasing document ids; no tap reaches across a change of id.
        mask: (b, l) bool, True at a token. Padding counts as an input of zero, and its output is zero.
        backend: ``"auto"`` chooses by device, dtype and shape; ``"reference"`` is plain torch; ``"triton"``.

    Returns:
        y, (b, l, c) in x's dtype, or (y, state) with the state (b, c, k-1) in x's dtype: the last inputs of the last
        document, zeros before its start.

    Raises:
        LimbeckError: When a shape does not fit, or the activation or backend is unknown or cannot run.
    """
    (y,), state = causal_conv_split(
        x,
        weight,
        bias,
        x.shape[-1:],
        activation=activation,
        initial_state=initial_state,
        return_state=return_state,
        seq_idx=seq_idx,
        mask=mask,
        backend=backend,
    )
    return y if state is None else (y, state)


def causal_conv_split(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    widths: Sequence[int],
    *,
    activation: Activation = "identity",
    initial_state: Tensor | None = None,
    return_state: bool = False,
    seq_idx: Tensor | None = None,
    mask: Tensor | None = None,
    backend: Backend = "auto",
) -> tuple[tuple[Tensor, ...], Tensor | None]:
    """Do what `causal_conv` does, and return y cut along its channels.

    Cut here, the pieces' gradients are read from where they are; those of slices of one y would be put together first.

    Args:
        x: (b, l, c).
        weight: (c, k).
        bias: (c,) or None.
        widths: How many channels each piece has; their sum is c.
        activation: See `causal_conv`, for this and all that follow.
        initial_state: (b, c, k-1) or None.
        return_state: Whether to return the last k-1 inputs.
        seq_idx: (b, l) or None.
        mask: (b, l) or None.
        backend: Of `causal_conv`.

    Returns:
        The pieces of y, (b, l, width) each, and the state, (b, c, k-1), or None when it is not asked for.

    Raises:
        LimbeckError: See `causal_conv`; also when the widths do not add up.
    """
    sizes = _check_conv(weight, bias, activation, x=x, state=initial_state)
    check_seq_idx("causal_conv", seq_idx, sizes["b"], sizes["l"])
    check_mask("causal_conv", mask, (sizes["b"], sizes["l"]))
    if sum(widths) != sizes["c"]:
        raise LimbeckError(f"causal_conv was given widths {tuple(widths)}", expected=f"a sum of c = {sizes['c']}")
    wide, k = wide_dtype(x, weight, bias), sizes["k"]
    if initial_state is not None:
        initial_state = initial_state.to(x.dtype)
    unsupported = str(wide) if wide == torch.float64 else f"{k} taps" if k > MOST_TAPS else None
    if choose_backend("causal_conv", backend, x, unsupported) == "triton":
        from limbeck.ops.causal_conv_triton import causal_conv_triton

        pieces = causal_conv_triton(x, weight, bias, initial_state, seq_idx, mask, widths, activation == "silu")
        return pieces, last_inputs(x, initial_state, k, seq_idx, mask) if return_state else None
    with without_autocast(x):
        y = causal_conv_reference(
            _at_tokens(x, mask).to(wide),
            weight.to(wide),
            None if bias is None else bias.to(wide),
            None if initial_state is None else initial_state.to(wide),
            seq_idx,
        )
        y = _at_tokens(_activate(y, activation).to(x.dtype), mask)
    state = last_inputs(x, initial_state, k, seq_idx, mask) if return_state else None
    return y.split(tuple(widths), dim=-1), state


def causal_conv_step(
    state: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: Activation = "identity"
) -> tuple[Tensor, Tensor]:
    """Advance `causal_conv` by one token.

    Args:
        state: (b, c, k-1), the inputs before this one; left as it is.
        x: (b, c).
        weight: (c, k).
        bias: (c,) or None.
        activation: ``"identity"`` or ``"silu"``.

    Returns:
        y, (b, c) in x's dtype, and the new state, (b, c, k-1) in x's dtype.

    Raises:
        LimbeckError: When a shape does not fit, or the activation is unknown.
    """
    _check_conv(weight, bias, activation, layout="b c", x=x, state=state)
    wide = wide_dtype(x, weight, bias)
    window = torch.cat([state.to(x.dtype), x[..., None]], dim=-1)  # (b, c, k)
    y = (window.to(wide) * weight.to(wide)).sum(-1)
    if bias is not None:
        y = y + bias.to(wide)
    return _activate(y, activation).to(x.dtype), window[..., 1:]


def _activate(y: Tensor, activation: Activation) -> Tensor:
    return F.silu(y) if activation == "silu" else y


def _at_tokens(x: Tensor, mask: Tensor | None) -> Tensor:
    return x if mask is None else x.masked_fill(mask.logical_not()[..., None], 0)


def _check_conv(
    weight: Tensor, bias: Tensor | None, activation: str, *, layout: str = "b l c", x: Tensor, state: Tensor | None
) -> dict[str, int]:
    if activation not in ("identity", "silu"):
        raise LimbeckError(f"causal_conv was given activation {activation!r}", expected='"identity" or "silu"')
    tensors = {"x": (x, layout), "weight": (weight, "c k")}
    if bias is not None:
        tensors["bias"] = (bias, "c")
    sizes = check_shapes("causal_conv", tensors)
    shape = (sizes["b"], sizes["c"], sizes["k"] - 1)
    if state is not None and tuple(state.shape) != shape:
        raise LimbeckError(
            f"causal_conv was given a state of shape {tuple(state.shape)}", expected=f"(b, c, k-1) = {shape}"
        )
    return sizes
