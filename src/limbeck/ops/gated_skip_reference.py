"""The skip and the gate in readable torch."""

import torch.nn.functional as F
from torch import Tensor


def gated_skip_reference(y: Tensor, x: Tensor | None, D: Tensor | None, z: Tensor, z_bias: Tensor | None) -> Tensor:
    """(y + D·x) · silu(z + z_bias), from y and x (…, h, p), D (h,), z (…, h·p) and z_bias (h·p,), all of one dtype.

    Returns:
        (…, h·p).
    """
    if x is not None and D is not None:
        y = y + D[:, None] * x
    return y.flatten(-2) * F.silu(z if z_bias is None else z + z_bias)
