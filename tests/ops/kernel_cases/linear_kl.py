"""What `compile_kernels.py` compiles of the head: each term, with and without gradients, bias and soft cap."""

from functools import partial

import torch

from limbeck.ops.linear_kl import Head, linear_kl


def run(
    dtype: torch.dtype,
    kl_weight: float,
    ce_weight: float,
    *,
    v: int = 320,
    bias: bool = False,
    softcap: float | None = None,
    grad: bool = True,
) -> torch.Tensor:
    """Forward and, with gradients, backward."""
    states, weight = (torch.randn(*shape, dtype=dtype, requires_grad=grad) for shape in ((1, 32, 64), (v, 64)))
    teacher_states, teacher_weight = torch.randn(1, 32, 64, dtype=dtype), torch.randn(v, 64, dtype=dtype)
    biases = [torch.randn(v, dtype=dtype, requires_grad=grad and i == 0) if bias else None for i in range(2)]
    loss = linear_kl(
        states,
        Head(weight, biases[0], 0.5, softcap),
        teacher_states,
        Head(teacher_weight, biases[1], 0.5, softcap),
        labels=torch.zeros(1, 32, dtype=torch.int64),
        tokens=torch.ones(1, 32, dtype=torch.bool),
        kl_weight=kl_weight,
        ce_weight=ce_weight,
        backend="triton",
    ).loss
    if grad:
        loss.backward()
    return loss


CASES = {
    "bf16 kl": partial(run, torch.bfloat16, 1.0, 0.0),
    "bf16 ce": partial(run, torch.bfloat16, 0.0, 1.0),
    "bf16 kl ce": partial(run, torch.bfloat16, 0.5, 0.5),
    "bf16 kl ce bias softcap": partial(run, torch.bfloat16, 0.5, 0.5, v=323, bias=True, softcap=30.0),
    "fp16 kl ce bias": partial(run, torch.float16, 0.5, 0.5, bias=True),
    "fp32 kl ce": partial(run, torch.float32, 0.5, 0.5),
    "bf16 kl ce, forward alone": partial(run, torch.bfloat16, 0.5, 0.5, grad=False),
    "bf16 ce, forward alone": partial(run, torch.bfloat16, 0.0, 1.0, grad=False),
}
