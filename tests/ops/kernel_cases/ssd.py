"""What `compile_kernels.py` compiles of `ssd`: every way the kernels are launched."""

from functools import partial

import torch
from torch import Tensor

from limbeck.ops import ssd


def run(dtype: torch.dtype, p: int, n: int, g: int = 2, *, b: int = 1, l: int = 70, documents: bool = False) -> Tensor:
    """Forward and backward, from a state and into a state; with b 1 in segments."""
    h = 2
    x = torch.randn(b, l, h, p, dtype=dtype, requires_grad=True)
    B, C = (torch.randn(b, l, g, n, dtype=dtype, requires_grad=True) for _ in range(2))
    log_decay = -torch.rand(b, l, h).requires_grad_()
    initial_state = torch.randn(b, h, p, n, requires_grad=True)
    seq_idx = torch.zeros(b, l, dtype=torch.int32) if documents else None
    y, last = ssd(x, log_decay, B, C, initial_state=initial_state, return_state=True, seq_idx=seq_idx, backend="triton")
    (y.float().sum() + last.sum()).backward()
    return y


CASES = {
    "bf16 64 64": partial(run, torch.bfloat16, 64, 64, b=140),
    "bf16 64 64 in segments": partial(run, torch.bfloat16, 64, 64, l=2048),
    "bf16 64 128": partial(run, torch.bfloat16, 64, 128, 1, documents=True),
    "fp16 32 16": partial(run, torch.float16, 32, 16),
    "bf16 80 96": partial(run, torch.bfloat16, 80, 96),
    "bf16 256 256": partial(run, torch.bfloat16, 256, 256),
    "fp32 64 64": partial(run, torch.float32, 64, 64, documents=True),
    "fp32 256 256": partial(run, torch.float32, 256, 256),
}
