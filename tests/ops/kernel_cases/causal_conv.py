"""What `compile_kernels.py` compiles of the causal convolution."""

import torch

from limbeck.ops.causal_conv import causal_conv_split


def conv(
    dtype: torch.dtype,
    *,
    widths: tuple[int, ...] = (2048, 2048, 2048),
    k: int = 4,
    silu: bool = False,
    state: bool = False,
    documents: bool = False,
    padding: bool = False,
    rest: int = 2080,
) -> None:
    """Forward and backward, of a slice of a wider projection."""
    b, l, c = 2, 32, sum(widths)
    x = torch.randn(b, l, c + rest, dtype=dtype)[..., :c].requires_grad_()
    weight, bias = torch.randn(c, k, requires_grad=True), torch.randn(c, requires_grad=True)
    pieces, _ = causal_conv_split(
        x,
        weight,
        bias,
        widths,
        activation="silu" if silu else "identity",
        initial_state=torch.randn(b, c, k - 1, dtype=dtype, requires_grad=True) if state else None,
        seq_idx=torch.zeros(b, l, dtype=torch.int32) if documents else None,
        mask=torch.ones(b, l, dtype=torch.bool) if padding else None,
        backend="triton",
    )
    torch.autograd.backward(pieces, [torch.randn_like(piece) for piece in pieces])


CASES = {
    "bf16 Phi-1.5": lambda: conv(torch.bfloat16),
    "bf16 Mamba-2, silu": lambda: conv(torch.bfloat16, widths=(2048, 128, 128), silu=True, rest=2080),
    "bf16 Mamba, silu": lambda: conv(torch.bfloat16, widths=(5120,), silu=True, rest=5120),
    "bf16 24 heads, documents, padding": lambda: conv(
        torch.bfloat16, widths=(3072,) * 3, documents=True, padding=True, rest=3096
    ),
    "fp32 state, documents, padding": lambda: conv(torch.float32, silu=True, state=True, documents=True, padding=True),
    "bf16 k 8, all options": lambda: conv(torch.bfloat16, k=8, silu=True, state=True, documents=True, padding=True),
    "fp16 k 2, odd widths": lambda: conv(torch.float16, widths=(45, 30, 30), k=2, rest=7),
}
