"""One token of discrete Mamba-2 over its states, in the torch calls that cost a CPU least.

For a small model what a call costs by itself, and how it goes through memory, outweighs arithmetic: this does what
`mixer_step_reference.py` spells out in some 60 % of its time. The g heads of B and C serve h/g heads of x each, whose
states lie side by side and are read as one matrix of h/g·p rows: nothing is repeated.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def mixer_step_in_place(
    xBC: Tensor,
    A_log: Tensor,
    z: Tensor,
    conv_state: Tensor,
    state: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    D: Tensor,
    z_bias: Tensor | None,
    silu: bool,
) -> Tensor:
    """Convolve, advance both states where they lie, read out, skip and gate: see `limbeck.ops.mixer_step`.

    All of one dtype but `conv_state`, which may be narrower. It is quickest with the channels last in memory.

    Returns:
        out (b, h·p).
    """
    _, h, p, n = state.shape
    window = torch.cat([conv_state.mT, xBC[:, None]], dim=1)  # (b, k, c)
    conv_state.copy_(window[:, 1:].mT)
    xBC = (window * conv_weight.mT).sum(1)
    if conv_bias is not None:
        xBC.add_(conv_bias)
    if silu:
        F.silu(xBC, inplace=True)
    groups = (xBC.shape[1] - h * p) // (2 * n)
    x, B, C = torch.split_with_sizes(xBC, (h * p, groups * n, groups * n), dim=-1)
    x, B = x.view(-1, groups, h // groups, p), B.view(-1, groups, 1, 1, n)
    state.mul_(torch.sigmoid(-A_log)[..., None, None])  # exp(−softplus(A_log))
    state.unflatten(1, (groups, -1)).addcmul_(x[..., None], B)
    y = torch.bmm(C.reshape(-1, 1, n), state.reshape(-1, h // groups * p, n).mT)
    y = y.view(-1, h, p).addcmul_(x.flatten(1, 2), D[:, None])
    return F.silu(z if z_bias is None else z + z_bias).mul_(y.flatten(1))
