"""`matrix_distance` on a GPU, beside its reference, which stores both matrices, and softmax attention as a ceiling.

`benchmarks/kernels.py` runs `measure()`. What the kernels cost depends on how fast the mixer forgets: "remembers" has a
decay that leaves every pair of tokens to compute, "starts" the one that MOHAWK's runs start with, about a half a step.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
import triton
from timing import extra_memory, matmul_rate, median_ms
from torch.nn.attention import SDPBackend, sdpa_kernel

from limbeck.ops import matrix_distance

DECAYS = {"remembers": -9.0, "starts": 0.0}
"""Mean of A_log; the log decay is −softplus(A_log)."""


def draw(
    b: int, l: int, h: int = 32, d: int = 64, decay: str = "remembers", dtype=torch.bfloat16
) -> list[torch.Tensor]:
    """query, key, log_decay, B, C, D of a layer; the last four want gradients."""
    query, key = (torch.randn(b, l, h, d, device="cuda", dtype=dtype).transpose(1, 2) for _ in range(2))
    B, C = (torch.randn(b, l, h, d, device="cuda", dtype=dtype) * d**-0.25 for _ in range(2))
    log_decay = -F.softplus(0.3 * torch.randn(b, l, h, device="cuda") + DECAYS[decay])
    return [query, key, *(tensor.requires_grad_() for tensor in (log_decay, B, C, torch.ones(h, device="cuda")))]


def both_ways(inputs: list[torch.Tensor], **options) -> Callable[[], object]:
    """Forward and backward to everything that learns."""
    weight = torch.rand(inputs[0].shape[:2], device="cuda")
    return lambda: torch.autograd.grad(matrix_distance(*inputs, **options), inputs[2:], weight)


def measure() -> list[dict]:
    """The shapes of the issue, in one run."""
    rate = matmul_rate()
    results = []
    for b, l in ((4, 2048), (1, 8192), (1, 32768)):
        for decay in DECAYS:
            results += entries(b, l, decay, rate)
    inputs = draw(4, 2048)
    reference = triton.testing.do_bench(both_ways(inputs, backend="reference"), warmup=1, rep=300, return_mode="median")
    results.append(
        {
            "operator": "matrix_distance",
            "shape": "4 x 2048",
            "what": "reference, forward + backward",
            "ms": reference,
            "extra_memory_gb": extra_memory(both_ways(inputs, backend="reference"), inputs[2:]) / 1e9,
        }
    )
    return results


def entries(b: int, l: int, decay: str, rate: float) -> list[dict]:
    """Value alone, and forward + backward; beside them, once a shape, softmax attention."""
    inputs = draw(b, l, decay=decay)
    product = b * 32 * l * l * 64  # operations of one causal product of two matrices

    def entry(what: str, run: Callable[[], object], products: int) -> dict:
        return {
            "operator": "matrix_distance",
            "shape": f"{b} x {l}, h = 32, d = n = 64, {decay}",
            "what": what,
            "ms": median_ms(run, 100),
            "floor_ms": products * product / rate * 1e3,
            "extra_memory_gb": extra_memory(run, inputs[2:]) / 1e9,
        }

    with torch.no_grad():
        found = [entry("value", lambda: matrix_distance(*inputs), 3)]
    found.append(entry("forward + backward", both_ways(inputs), 7))
    if decay == "remembers":
        q, k, v = (t.detach().contiguous().requires_grad_() for t in (*inputs[:2], inputs[3].transpose(1, 2)))
        weight = torch.randn_like(q)
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            attention = entry(
                "SDPA flash, forward + backward",
                lambda: torch.autograd.grad(F.scaled_dot_product_attention(q, k, v, is_causal=True), (q, k, v), weight),
                7,
            )
        found.append(attention)
    return found


def sweep() -> None:
    """Launches side by side, to choose from: those of the normaliser, then those of the walks."""
    from limbeck.ops import matrix_distance_triton as kernels

    chosen = kernels.launches
    sizes = [(128, 64, 8, 2), (128, 64, 8, 3), (64, 64, 4, 2), (64, 64, 4, 3), (128, 32, 8, 2), (64, 32, 4, 3)]
    for d in (64, 128):
        inputs = draw(4, 2048, h=2048 // d, d=d)
        run = both_ways(inputs)
        plain = chosen(d, d, 2, kernels.card_of(inputs[0]))
        for place in (0, 1):
            for size in [*sizes, (128, 128, 8, 2), (128, 64, 4, 2)] if place == 0 else sizes:
                launches = [*plain]
                launches[place] = kernels.Launch(*size)
                kernels.launches = lambda *_, found=launches: tuple(found)
                label = f"d {d} {('normaliser', 'walks')[place]} {size}"
                try:
                    print(label, f"{median_ms(run, 60):.4f} ms", flush=True)
                except Exception as error:  # noqa: BLE001 (a launch that does not fit is a result)
                    print(label, type(error).__name__, str(error)[:100], flush=True)
    kernels.launches = chosen


if __name__ == "__main__":
    for result in measure():
        print(result)
