"""What `compile_kernels.py` compiles of the linear layers of one row."""

import torch

from limbeck.ops.one_row import Linear, Norm, linear_sum, norm_linears, sum_norm


def layer(dtype: torch.dtype, m: int, k: int, activation: str = "identity", norm: Norm | None = None) -> Linear:
    return Linear(torch.randn(m, k, dtype=dtype), torch.randn(m, dtype=dtype), activation, norm)


def block(dtype: torch.dtype, d: int, wide: int, kind: str = "layer", activation: str = "gelu_tanh") -> None:
    """One token through a parallel block: norm and products, sum of products, sum and norms."""
    x, norm = torch.randn(1, d, dtype=dtype), Norm(torch.randn(d, dtype=dtype), torch.randn(d, dtype=dtype))
    layers = [layer(dtype, d, d, "identity", norm), layer(dtype, wide, d, activation, norm)]
    first, second = norm_linears(x, layers, kind, 1e-5, backend="triton")
    total = linear_sum([first, second], [layer(dtype, d, d), layer(dtype, d, wide)], x, backend="triton")
    sum_norm([total, x, first], [norm, norm], kind, 1e-5, backend="triton")


CASES = {
    "bf16 Phi-1.5": lambda: block(torch.bfloat16, 2048, 8192),
    "fp32 narrow": lambda: block(torch.float32, 100, 40, activation="gelu"),
    "fp16 wide": lambda: block(torch.float16, 8192, 28672, "rms", "silu"),
}
