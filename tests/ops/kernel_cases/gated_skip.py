"""What `compile_kernels.py` compiles of the skip and the gate."""

import torch

from limbeck.ops.gated_skip import gated_skip


def gate(dtype: torch.dtype, h: int, p: int, *, skip: bool = True, bias: bool = True, rest: int = 6176) -> None:
    """Forward and backward, with z a slice of a wider projection."""
    b, l, c = 2, 32, h * p
    y, x = (torch.randn(b, l, h, p, dtype=dtype, requires_grad=True) for _ in range(2))
    z = torch.randn(b, l, c + rest, dtype=dtype)[..., :c].requires_grad_()
    D, z_bias = torch.randn(h, requires_grad=True), torch.randn(c, requires_grad=True)
    given = (x, D) if skip else (None, None)
    out = gated_skip(y, *given, z, z_bias if bias else None, backend="triton")
    out.backward(torch.randn_like(out))


CASES = {
    "bf16 Phi-1.5": lambda: gate(torch.bfloat16, 32, 64),
    "bf16 Mamba": lambda: gate(torch.bfloat16, 5120, 1, bias=False, rest=5120),
    "bf16 no skip": lambda: gate(torch.bfloat16, 24, 128, skip=False, rest=9240),
    "fp32": lambda: gate(torch.float32, 32, 80),
    "fp16 odd widths": lambda: gate(torch.float16, 5, 9, rest=7),
}
