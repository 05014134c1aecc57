"""Where discrete Mamba-2 starts from: at random, near the identity, or at an attention layer's projections.

(METHODS 1.2; the identity start is that of MOHAWK's training code, arXiv 2408.10189.) All work in place, under
no_grad, and draw from the current random state.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from limbeck.errors import LimbeckError
from limbeck.mixers.base import AttentionWeights
from limbeck.mixers.common import identity_conv_

if TYPE_CHECKING:
    from limbeck.mixers.discrete_mamba2 import DiscreteMamba2

OPEN_GATE = 1.278464542761
"""The number whose silu is 1: a gate with this bias and no weight lets everything through."""


@torch.no_grad()
def random_start(mixer: "DiscreteMamba2") -> None:
    """Give linear maps and convolution torch's usual random weights; D = 1, and z_bias as for an open gate."""
    mixer.in_proj.reset_parameters()
    mixer.out_proj.reset_parameters()
    mixer.conv1d.reset_parameters()
    nn.init.ones_(mixer.D)
    if mixer.z_bias is not None:
        nn.init.constant_(mixer.z_bias, OPEN_GATE)


@torch.no_grad()
def identity_start(mixer: "DiscreteMamba2") -> None:
    """As `random_start`, but the convolution is the identity and the gate open whatever the input."""
    random_start(mixer)
    identity_conv_(mixer.conv1d)
    _, gate, _ = mixer.in_proj.weight.split(mixer.in_proj_widths)
    nn.init.zeros_(gate)
    if mixer.in_proj.bias is not None:
        _, gate_bias, _ = mixer.in_proj.bias.split(mixer.in_proj_widths)
        nn.init.constant_(gate_bias, OPEN_GATE)


@torch.no_grad()
def attention_start(mixer: "DiscreteMamba2", weights: AttentionWeights) -> list[str]:
    """Load an attention layer's projections: see `DiscreteMamba2.load_attention`.

    Returns:
        One note for each thing that could not be carried over.

    Raises:
        LimbeckError: When the heads or widths do not fit.
    """
    _check_fit(mixer, weights)
    identity_start(mixer)
    nn.init.zeros_(mixer.D)
    key, _ = weights.per_head("key")
    value, _ = weights.per_head("value")

    xBC, _, A_log = mixer.in_proj.weight.split(mixer.in_proj_widths)
    x, B, C = xBC.split(mixer.conv_widths)
    x.copy_(value)
    _copy_heads(B, key, mixer)  # rows of B beyond the head width stay random
    nn.init.zeros_(C)
    _copy_heads(C, weights.query * weights.scale, mixer)
    nn.init.zeros_(A_log)  # exp(−softplus(0)) = 1/2
    mixer.out_proj.weight.copy_(weights.output)
    return _load_biases(mixer, weights)


def _load_biases(mixer: "DiscreteMamba2", weights: AttentionWeights) -> list[str]:
    """Put the biases where the mixer has room for them; say which have none."""
    _, key = weights.per_head("key")
    _, value = weights.per_head("value")
    query = None if weights.query_bias is None else weights.query_bias * weights.scale
    room = mixer.conv1d.bias  # after the identity convolution, as good as before it
    if mixer.in_proj.bias is not None:
        room, _, A_log = mixer.in_proj.bias.split(mixer.in_proj_widths)
        nn.init.zeros_(room)
        nn.init.zeros_(A_log)

    notes = []
    if room is not None:
        x, B, C = room.split(mixer.conv_widths)
        if value is not None:
            x.copy_(value)
        if key is not None:
            _copy_heads(B, key, mixer)
        if query is not None:
            _copy_heads(C, query, mixer)
    else:
        biases = {"query": query, "key": key, "value": value}
        lost = [name for name, bias in biases.items() if bias is not None and bias.any()]
        if lost:
            notes.append(
                f"the attention's {', '.join(lost)} bias is lost: the mixer has bias=False and conv_bias=False"
            )
    if mixer.out_proj.bias is not None:
        nn.init.zeros_(mixer.out_proj.bias)
        if weights.output_bias is not None:
            mixer.out_proj.bias.copy_(weights.output_bias)
    elif weights.output_bias is not None and weights.output_bias.any():
        notes.append("the attention's output bias is lost: the mixer has bias=False")
    if mixer.activation != "identity":
        notes.append(f"the {mixer.activation} after the convolution bends queries, keys and values")
    return notes


def _copy_heads(rows: Tensor, heads: Tensor, mixer: "DiscreteMamba2") -> None:
    """Copy (g·p, …) into the first p of the n rows of each head of (g·n, …)."""
    heads = heads.unflatten(0, (mixer.n_qk_heads, -1))  # (g, p, …)
    rows.unflatten(0, (mixer.n_qk_heads, mixer.d_state))[:, : heads.shape[1]] = heads


def _check_fit(mixer: "DiscreteMamba2", weights: AttentionWeights) -> None:
    expected = {
        "d_model": weights.query.shape[1],
        "n_v_heads": weights.num_heads,
        "n_qk_heads": weights.num_heads,
        "d_inner": weights.num_heads * weights.head_dim,
    }
    for name, value in expected.items():
        if getattr(mixer, name) != value:
            raise LimbeckError(
                f"the mixer's {name} is {getattr(mixer, name)}",
                expected=f"{value}, to start from attention with {weights.num_heads} heads of width "
                f"{weights.head_dim} in a model of width {weights.query.shape[1]}",
                hint='leave the option out, or init="identity"',
            )
    if mixer.d_state < weights.head_dim:
        raise LimbeckError(
            f"d_state {mixer.d_state} is below the attention's head width {weights.head_dim}",
            expected=f"d_state of {weights.head_dim} or more, so that queries and keys fit",
            hint=f'd_state={weights.head_dim}, or init="identity"',
        )
