"""How the GPU benchmarks time things."""

import time
from collections.abc import Callable, Sequence

import torch
import triton


def median_ms(run: Callable[[], object], repeat_ms: int = 30) -> float:
    """Median milliseconds of a call as the GPU works on it: replays of a CUDA graph of many calls.

    Launches cost nothing so, for us and for a peer alike; what a host adds is told apart by `host_us`.
    """
    return float(triton.testing.do_bench_cudagraph(run, rep=repeat_ms, return_mode="median"))


def host_us(run: Callable[[], object], calls: int = 50) -> float:
    """Microseconds that the host spends on a call, while the GPU is kept busy with something else."""
    run()
    torch.cuda.synchronize()
    torch.cuda._sleep(int(2e9))
    begin = time.perf_counter()
    for _ in range(calls):
        run()
    spent = time.perf_counter() - begin
    torch.cuda.synchronize()
    return spent / calls * 1e6


def extra_memory(run: Callable[[], object], beside: Sequence[torch.Tensor] = ()) -> int:
    """Bytes that a call holds at its peak, beyond what was there before and beyond gradients as large as `beside`."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    gradients = sum(tensor.numel() * tensor.element_size() for tensor in beside)
    return torch.cuda.max_memory_allocated() - before - gradients


def copy_bandwidth() -> float:
    """Bytes per second of a device-to-device copy, read and written; by events, since a graph copies more slowly."""
    source = torch.randn(2**29, device="cuda")
    target = torch.empty_like(source)
    milliseconds = triton.testing.do_bench(lambda: target.copy_(source), return_mode="median")
    return 2 * source.numel() * 4 / (float(milliseconds) * 1e-3)


def matmul_rate() -> float:
    """Operations per second of a large bfloat16 matrix product on random numbers."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * 8192**3 / (median_ms(lambda: a @ b) * 1e-3)
