"""One token of discrete Mamba-2 in readable torch."""

import torch
import torch.nn.functional as F
from torch import Tensor

from limbeck.ops.gated_skip_reference import gated_skip_reference
from limbeck.ops.ssd_reference import ssd_step_reference


def mixer_step_reference(
    xBC: Tensor,
    A_log: Tensor,
    z: Tensor,
    conv_state: Tensor,
    state: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    D: Tensor,
    z_bias: Tensor | None,
    mask: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Convolve, advance the state, read it out, skip and gate: see `limbeck.ops.mixer_step`. All of one dtype.

    Returns:
        out (b, h·p), the new conv_state (b, c, k-1) and the new state (b, h, p, n).
    """
    _, h, p, n = state.shape
    if mask is not None:
        xBC = xBC.masked_fill(mask.logical_not()[:, None], 0)
    window = torch.cat([conv_state, xBC[..., None]], dim=-1)  # (b, c, k)
    xBC = (window * conv_weight).sum(-1)
    if conv_bias is not None:
        xBC = xBC + conv_bias
    if silu:
        xBC = F.silu(xBC)
    groups = (xBC.shape[1] - h * p) // (2 * n)
    x, B, C = xBC.split((h * p, groups * n, groups * n), dim=-1)
    x, log_decay = x.unflatten(-1, (h, p)), -F.softplus(A_log)  # (b, h, p), (b, h)
    if mask is not None:  # nothing enters the state and nothing decays
        x = x.masked_fill(mask.logical_not()[:, None, None], 0)
        log_decay = log_decay.masked_fill(mask.logical_not()[:, None], 0)
    y, state = ssd_step_reference(state, x, log_decay, B.unflatten(-1, (groups, n)), C.unflatten(-1, (groups, n)))
    return gated_skip_reference(y, x, D, z, z_bias), window[..., 1:].contiguous(), state
