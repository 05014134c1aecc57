"""`ssd` on a GPU, beside state-spaces/mamba's Triton kernels, flash-linear-attention and softmax attention.

`benchmarks/kernels.py` runs `measure()`. The peers are measured where they can be imported, and said to be missing
where not.
"""

import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from timing import extra_memory, median_ms

from limbeck.ops import ssd

LENGTHS = ((8, 2048), (2, 8192), (1, 32768), (1, 131072))


def draw(b: int, l: int, h: int = 32, g: int = 32, p: int = 64, n: int = 64) -> list[torch.Tensor]:
    """x, log_decay, B, C of a mixer's sizes, wanting gradients."""
    x = torch.randn(b, l, h, p, device="cuda", dtype=torch.bfloat16)
    B, C = (torch.randn(b, l, g, n, device="cuda", dtype=torch.bfloat16) / math.sqrt(n) for _ in range(2))
    log_decay = -F.softplus(torch.randn(b, l, h, device="cuda") - 2)
    return [tensor.requires_grad_() for tensor in (x, log_decay, B, C)]


def forward_and_both(run: Callable[[], torch.Tensor], inputs: list[torch.Tensor]) -> dict[str, float]:
    """Milliseconds of forward alone, without gradients, and of forward + backward to every input."""
    with torch.no_grad():
        forward = median_ms(run)
    weight = torch.randn_like(run())

    def both() -> None:
        torch.autograd.grad(run(), inputs, weight)

    return {
        "forward_ms": forward,
        "both_ms": median_ms(both),
        "extra_memory_gb": extra_memory(both, [*inputs, weight]) / 1e9,  # beyond gradients and y
    }


def peer(run: Callable[..., dict[str, float]], inputs: list[torch.Tensor]) -> dict[str, float] | str:
    """The same numbers of a peer, on the same inputs; where it cannot be measured, why."""
    try:
        return run(*inputs)
    except Exception as error:  # noqa: BLE001 (a peer that does not run is a result)
        return f"not measured: {type(error).__name__}: {error}"[:200]


def mamba(x: torch.Tensor, log_decay: torch.Tensor, B: torch.Tensor, C: torch.Tensor) -> dict[str, float]:
    """state-spaces/mamba in chunks of 128, as Phi-Mamba calls it; its Δ is minus our log decay."""
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    A = -torch.ones(x.shape[2], device="cuda")
    delta = (-log_decay.detach()).requires_grad_()

    return forward_and_both(lambda: mamba_chunk_scan_combined(x, delta, A, B, C, 128), [x, delta, B, C])


def simple_gla(x: torch.Tensor, log_decay: torch.Tensor, B: torch.Tensor, C: torch.Tensor) -> dict[str, float]:
    """flash-linear-attention, forward alone: it refuses the backward on this Triton and Hopper."""
    from fla.ops.simple_gla import chunk_simple_gla

    with torch.no_grad():
        return {"forward_ms": median_ms(lambda: chunk_simple_gla(C, B, x, g=log_decay, scale=1.0)[0])}


def softmax_attention(x: torch.Tensor, _: torch.Tensor, B: torch.Tensor, C: torch.Tensor) -> dict[str, float]:
    """Causal softmax attention of the same sizes, torch's flash kernel."""
    q, k, v = (t.detach().transpose(1, 2).requires_grad_() for t in (C, B, x))
    return forward_and_both(lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True), [q, k, v])


def measure() -> Iterator[dict]:
    """Every shape of the issue: ours, the peers, the floor in bytes; state-spaces/mamba, which tunes for long, last."""
    shapes = [{"b": b, "l": l} for b, l in LENGTHS] + [{"b": 8, "l": 2048, "g": 1, "n": 128}]
    for shape in shapes:
        inputs = draw(**shape)
        others = {"SDPA": softmax_attention} if shape["l"] <= 32768 and "g" not in shape else {}
        if "g" not in shape:
            others["flash-linear-attention"] = simple_gla
        read = sum(t.numel() * t.element_size() for t in inputs)
        y = inputs[0].numel() * inputs[0].element_size()
        yield {
            "operator": "ssd",
            "shape": shape,
            "ours": forward_and_both(lambda inputs=inputs: ssd(*inputs, backend="triton"), inputs),
            "peers": {name: peer(run, inputs) for name, run in others.items()},
            "floor_bytes": {"forward": read + y, "both": 2 * (read + y) + read},
        }
    for shape in shapes:
        yield {"operator": "ssd", "shape": shape, "peers": {"state-spaces/mamba": peer(mamba, draw(**shape))}}
