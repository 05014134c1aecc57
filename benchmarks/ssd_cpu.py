"""ssd and causal_conv on a CPU: what they cost beside the softmax attention and the convolution of torch.

    python benchmarks/ssd_cpu.py            # writes benchmarks/results/ssd_cpu.json

Times are the processor time of one thread, so that other work on the machine disturbs them little; least of the rounds.
Forward + backward is of the sum of all outputs times fixed random weights, in float32.
"""

import json
import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from limbeck.ops import causal_conv, ssd

ROUNDS = 15
RESULT = Path(__file__).parent / "results" / "ssd_cpu.json"
SSD_SHAPES = ((8, 256, 4, 32), (4, 512, 8, 32), (1, 2048, 8, 64), (1, 8192, 8, 64))  # b, l, h, p = n
CONV_SHAPES = ((8, 256, 384), (1, 2048, 1536))  # b, l, c; k = 4


def measure(functions: dict[str, Callable[[], Tensor]], inputs: list[Tensor]) -> dict[str, dict[str, float]]:
    """Milliseconds of forward, and of forward + backward; the candidates take turns."""
    weights = torch.randn_like(next(iter(functions.values()))())
    best = {name: {"forward": float("inf"), "forward_backward": float("inf")} for name in functions}
    for _ in range(ROUNDS):
        for name, function in functions.items():
            start = time.process_time()
            with torch.no_grad():
                function()
            forward = time.process_time() - start
            start = time.process_time()
            torch.autograd.grad(function(), inputs, weights, allow_unused=True)
            both = time.process_time() - start
            for key, seconds in (("forward", forward), ("forward_backward", both)):
                best[name][key] = min(best[name][key], round(1e3 * seconds, 3))
    return best


def measure_ssd(b: int, l: int, h: int, p: int, mean_decay: float) -> dict[str, dict[str, float]]:
    """ssd at several chunk sizes beside causal scaled-dot-product attention of the same heads."""
    x, B, C = (torch.randn(b, l, h, p, requires_grad=True) for _ in range(3))
    log_decay = (-F.softplus(torch.randn(b, l, h) + mean_decay)).requires_grad_()

    def attention() -> Tensor:
        q, k, v = (tensor.transpose(1, 2) for tensor in (C, B, x))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)

    functions: dict[str, Callable[[], Tensor]] = {"attention": attention}
    for chunk_size in (16, 32, 64, 128):
        functions[f"ssd, chunks of {chunk_size}"] = lambda q=chunk_size: ssd(x, log_decay, B, C, chunk_size=q)
    return measure(functions, [x, log_decay, B, C])


def measure_conv(b: int, l: int, c: int) -> dict[str, dict[str, float]]:
    """causal_conv beside `F.conv1d` with groups and a sum of shifted products left to autograd."""
    x, weight = torch.randn(b, l, c, requires_grad=True), torch.randn(c, 4, requires_grad=True)

    def conv1d() -> Tensor:
        return F.conv1d(F.pad(x.mT, (3, 0)), weight[:, None], groups=c).mT

    def shifted_products() -> Tensor:
        window = F.pad(x, (0, 0, 3, 0))
        return sum((window[:, j : j + l] * weight[:, j] for j in range(1, 4)), window[:, :l] * weight[:, 0])

    functions = {
        "causal_conv": lambda: causal_conv(x, weight),
        "conv1d": conv1d,
        "shifted products by autograd": shifted_products,
    }
    return measure(functions, [x, weight])


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    result = {
        "machine": {"processor": platform.processor() or platform.machine(), "torch": torch.__version__, "threads": 1},
        "unit": "ms of processor time",
        "ssd": {
            f"b {b}, l {l}, h {h}, p = n {p}, {name} decay": measure_ssd(b, l, h, p, mean)
            for b, l, h, p in SSD_SHAPES
            for name, mean in (("usual", 0.0), ("strong", 5.0))
        },
        "causal_conv": {f"b {b}, l {l}, c {c}, k 4": measure_conv(b, l, c) for b, l, c in CONV_SHAPES},
    }
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=2) + "\n")
    for operator in ("ssd", "causal_conv"):
        for shape, times in result[operator].items():
            print(f"{operator}, {shape}")
            for name, best in times.items():
                print(f"    {name:32} forward {best['forward']:9.2f}   + backward {best['forward_backward']:9.2f}")


if __name__ == "__main__":
    main()
