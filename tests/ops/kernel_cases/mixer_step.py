"""What `compile_kernels.py` compiles of the one-token step."""

import torch

from limbeck.ops.mixer_step import mixer_step


def step(
    dtype: torch.dtype,
    h: int,
    g: int,
    p: int,
    n: int,
    *,
    k: int = 4,
    padding: bool = False,
    in_place: bool = False,
    silu: bool = False,
) -> None:
    """One token, from slices of one projection."""
    b, c = 2, h * p + 2 * g * n
    xBC, z, A_log = torch.randn(b, c + h * p + h, dtype=dtype).split((c, h * p, h), dim=1)
    mixer_step(
        xBC,
        A_log,
        z,
        torch.randn(b, c, k - 1, dtype=dtype),
        torch.randn(b, h, p, n),
        torch.randn(c, k),
        torch.randn(c),
        torch.randn(h),
        torch.randn(h * p),
        activation="silu" if silu else "identity",
        mask=torch.ones(b, dtype=torch.bool) if padding else None,
        in_place=in_place,
        backend="triton",
    )


CASES = {
    "bf16 Phi-1.5": lambda: step(torch.bfloat16, 32, 32, 64, 64, padding=True),
    "bf16 in place": lambda: step(torch.bfloat16, 32, 32, 64, 64, padding=True, in_place=True),
    "bf16 heads of 128": lambda: step(torch.bfloat16, 32, 8, 128, 128),
    "bf16 widest": lambda: step(torch.bfloat16, 8, 1, 256, 256, in_place=True),
    "fp32 heads of 80": lambda: step(torch.float32, 32, 32, 80, 80, silu=True),
    "fp16 small": lambda: step(torch.float16, 4, 2, 5, 3, k=2),
}
