"""What `compile_kernels.py` compiles of the selective scan: every way the kernels are launched."""

from functools import partial

import torch
from torch import Tensor

from limbeck.ops import selective_scan


def run(dtype: torch.dtype, n: int, c: int = 5120, *, state: bool = False, documents: bool = False) -> Tensor:
    """Forward and backward; x, B and C are slices of projections."""
    b, l = 1, 17
    x, B, C = torch.randn(b, l, c + 2 * n, dtype=dtype).split([c, n, n], dim=-1)
    x, B, C = (tensor.detach().requires_grad_() for tensor in (x, B, C))
    delta, A = torch.rand(b, l, c, requires_grad=True), (-torch.rand(c, n)).requires_grad_()
    initial_state = torch.randn(b, c, n, requires_grad=True) if state else None
    seq_idx = torch.zeros(b, l, dtype=torch.int32) if documents else None
    y, last = selective_scan(
        x, delta, A, B, C, initial_state=initial_state, return_state=True, seq_idx=seq_idx, backend="triton"
    )
    (y.float().sum() + last.sum() if state else y.float().sum()).backward()
    return y


CASES = {
    "bf16 n 16": partial(run, torch.bfloat16, 16),
    "bf16 n 16 state documents": partial(run, torch.bfloat16, 16, state=True, documents=True),
    "bf16 n 64": partial(run, torch.bfloat16, 64),
    "fp16 n 8 c 100": partial(run, torch.float16, 8, 100),
    "fp32 n 16 state documents": partial(run, torch.float32, 16, state=True, documents=True),
    "fp32 n 24 c 100": partial(run, torch.float32, 24, 100),
}
