"""Small pieces that several mixers are made of."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.ops import causal_conv_split, causal_conv_step
from limbeck.ops.causal_conv import Activation


def at_tokens(tensor: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Put zero where the mask, which has the tensor's leading dimensions, says padding."""
    if attention_mask is None:
        return tensor
    padding = attention_mask.to(torch.bool).logical_not()
    return tensor.masked_fill(padding.reshape(padding.shape + (1,) * (tensor.ndim - padding.ndim)), 0)


def wide(tensor: Tensor) -> Tensor:
    """The tensor in float32, or as it is when it is wider."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def wide_default() -> torch.dtype:
    """What parameters that stay wide are made in: torch's default dtype, but float32 at least."""
    return torch.promote_types(torch.get_default_dtype(), torch.float32)


class CausalConv1d(nn.Conv1d):
    """A depthwise causal convolution that can go on from a state, with the parameters of `nn.Conv1d`.

    It is called as a module, so that what hooks into calls (offloading, sharding) meets its weights too.

    Args:
        channels: c.
        taps: k.
        bias: Whether there is one.
        activation: ``"identity"`` or ``"silu"``.
    """

    def __init__(self, channels: int, taps: int, *, bias: bool, activation: Activation):
        super().__init__(channels, channels, taps, groups=channels, bias=bias)
        self.activation: Activation = activation

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        x: Tensor | Callable[[Tensor, Tensor | None], Any],
        state: Tensor | None = None,
        *,
        widths: Sequence[int] | None = None,
        attention_mask: Tensor | None = None,
        seq_idx: Tensor | None = None,
        return_state: bool = True,
    ) -> Any:
        """Convolve a sequence, or one more token; padding enters as zero and comes out as zero.

        Args:
            x: (b, l, c), or one token (b, c), which needs a state; or a function that does it with the weight (c, k)
                and the bias, which it is given: then the rest is left out, and what it returns is returned.
            state: (b, c, k-1), the inputs before these, or None at the start.
            widths: Into how many channels each the outputs are cut; by default they stay whole.
            attention_mask: (b, l), or (b,) beside one token; 1 at a token.
            seq_idx: (b, l), document ids.
            return_state: Whether the new state is wanted.

        Returns:
            The pieces of the outputs, otherwise shaped as x, and the new state or None.
        """
        weight = self.weight.squeeze(1)  # (c, k)
        if not isinstance(x, Tensor):
            return x(weight, self.bias)
        widths = x.shape[-1:] if widths is None else widths
        if x.ndim == 2:
            assert state is not None
            y, state = causal_conv_step(
                state, at_tokens(x, attention_mask), weight, self.bias, activation=self.activation
            )
            return at_tokens(y, attention_mask).split(tuple(widths), dim=-1), state
        return causal_conv_split(
            x,
            weight,
            self.bias,
            widths,
            activation=self.activation,
            initial_state=state,
            return_state=return_state,
            seq_idx=seq_idx,
            mask=None if attention_mask is None else attention_mask.to(torch.bool),
        )


@torch.no_grad()
def identity_conv_(conv: nn.Conv1d) -> None:
    """Let a depthwise convolution pass its input on: last tap 1, the others and the bias 0."""
    nn.init.zeros_(conv.weight)
    conv.weight[..., -1] = 1
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)


@torch.no_grad()
def time_step_bias_(bias: Tensor, least: float = 1e-3, most: float = 1e-1, floor: float = 1e-4) -> None:
    """Fill the bias before a softplus so that the steps Δ are log-uniform on [least, most], as Mamba starts them."""
    delta = torch.empty_like(bias).uniform_(math.log(least), math.log(most)).exp_().clamp_(min=floor)
    bias.copy_(delta + torch.log(-torch.expm1(-delta)))  # the inverse of softplus
