"""What `compile_kernels.py` compiles of the matrix distance."""

import torch
from torch import Tensor

from limbeck.ops import matrix_distance


def distance(
    teacher: torch.dtype, mixer: torch.dtype, d: int, n: int, *, g: int = 2, narrow: bool = False, learn: bool = True
) -> Tensor:
    """Forward and, where something learns, backward; `narrow` has a window, a soft cap, padding and documents."""
    b, l, h = 1, 256, 2
    query = torch.randn(b, l, h, d, dtype=teacher).transpose(1, 2)
    key = torch.randn(b, 1, l, d, dtype=teacher)
    B, C = (torch.randn(b, l, g, n, dtype=mixer, requires_grad=learn) for _ in range(2))
    log_decay, D = -torch.rand(b, l, h), torch.randn(h)
    options = {}
    if narrow:
        options = {
            "attention_mask": torch.ones(b, l),
            "seq_idx": torch.zeros(b, l, dtype=torch.int32),
            "sliding_window": 100,
            "softcap": 30.0,
        }
    found = matrix_distance(query, key, log_decay, B, C, None if narrow else D, backend="triton", **options)
    if learn:
        found.sum().backward()
    return found


CASES = {
    "bf16 64": lambda: distance(torch.bfloat16, torch.bfloat16, 64, 64),
    "bf16 64 all options": lambda: distance(torch.bfloat16, torch.bfloat16, 64, 64, narrow=True),
    "bf16 64 nothing learns": lambda: distance(torch.bfloat16, torch.bfloat16, 64, 64, learn=False),
    "fp16 80, 128, grouped": lambda: distance(torch.float16, torch.float16, 80, 128, g=1),
    "bf16 80": lambda: distance(torch.bfloat16, torch.bfloat16, 80, 80),
    "bf16 64, 128": lambda: distance(torch.bfloat16, torch.bfloat16, 64, 128),
    "bf16 128": lambda: distance(torch.bfloat16, torch.bfloat16, 128, 128),
    "bf16 256": lambda: distance(torch.bfloat16, torch.bfloat16, 256, 256),
    "bf16 and fp32 64": lambda: distance(torch.bfloat16, torch.float32, 64, 64),
    "fp32 64": lambda: distance(torch.float32, torch.float32, 64, 64),
    "fp32 64 all options": lambda: distance(torch.float32, torch.float32, 64, 64, narrow=True),
    "fp32 16, 32": lambda: distance(torch.float32, torch.float32, 16, 32),
    "fp32 96": lambda: distance(torch.float32, torch.float32, 96, 96),
    "fp32 256": lambda: distance(torch.float32, torch.float32, 256, 256),
}
