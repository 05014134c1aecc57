"""The Mamba and Mamba-2 mixers on a CPU, beside transformers' own in plain torch with the same weights.

    python benchmarks/mamba_cpu.py            # writes benchmarks/results/mamba_cpu.json

Forward + backward of the sum of all outputs times fixed random weights, in float32, at b 2, l 512, d 512 and both
libraries' default sizes (transformers' Mamba-2 at its default chunk). Times are the processor time of one thread, least
of the rounds; ours and theirs take turns. The outputs are compared before anything is timed. The second part shows
where the chunk size of `selective_scan` comes from.
"""

import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers import Mamba2Config, MambaConfig
from transformers.models.mamba.modeling_mamba import MambaMixer
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

from limbeck.mixers import Mamba, Mamba2
from limbeck.ops import selective_scan

RESULT = Path(__file__).parent / "results" / "mamba_cpu.json"
BATCH, LENGTH, WIDTH = 2, 512, 512


def least_ms(function: Callable[[], Any], rounds: int) -> float:
    """Least processor time of so many rounds, in milliseconds."""
    best = float("inf")
    for _ in range(rounds):
        start = time.process_time()
        function()
        best = min(best, time.process_time() - start)
    return round(1e3 * best, 1)


def compare(ours: nn.Module, theirs: nn.Module, rounds: tuple[int, int]) -> dict[str, float]:
    """Milliseconds of forward + backward, ours and theirs, and how many times faster ours is."""
    ours.load_state_dict(theirs.state_dict())
    inputs, weights = torch.randn(BATCH, LENGTH, WIDTH, requires_grad=True), torch.randn(BATCH, LENGTH, WIDTH)

    def step(mixer: nn.Module) -> tuple[Tensor, ...]:
        return torch.autograd.grad(mixer(inputs), [inputs, *mixer.parameters()], weights)

    torch.testing.assert_close(ours(inputs), theirs(inputs), rtol=1e-5, atol=1e-5)
    step(ours)
    mine, other = least_ms(lambda: step(ours), rounds[0]), least_ms(lambda: step(theirs), rounds[1])
    return {"limbeck_ms": mine, "transformers_ms": other, "times_faster": round(other / mine, 1)}


def chunk_sizes() -> dict[str, dict[str, float]]:
    """`selective_scan` at several chunk sizes."""
    result = {}
    for b, l, c in ((2, 512, 1024), (8, 256, 256), (1, 2048, 2048)):
        x, B, C = (torch.randn(b, l, width, requires_grad=True) for width in (c, 16, 16))
        delta = F.softplus(torch.randn(b, l, c) - 4).requires_grad_()
        A = (-torch.arange(1.0, 17)).expand(c, 16).clone().requires_grad_()
        learned, weights = [x, delta, A, B, C], torch.randn(b, l, c)

        def step(q: int, learned: list[Tensor] = learned, weights: Tensor = weights) -> None:
            torch.autograd.grad(selective_scan(*learned, chunk_size=q), learned, weights)

        times = {str(q): least_ms(lambda q=q, step=step: step(q), 5) for q in (4, 8, 16, 32, 64)}
        result[f"b {b}, l {l}, c {c}, n 16"] = times
    return result


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    mamba = MambaMixer(MambaConfig(hidden_size=WIDTH, num_hidden_layers=1), 0)
    mamba2 = Mamba2Mixer(Mamba2Config(hidden_size=WIDTH, num_hidden_layers=1, num_heads=16, n_groups=1), 0)
    result = {
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "threads": 1,
        },
        "unit": "ms of processor time, forward + backward",
        "shape": f"b {BATCH}, l {LENGTH}, d {WIDTH}",
        "mamba": compare(Mamba(WIDTH), mamba, (5, 2)),
        "mamba2": compare(Mamba2(WIDTH), mamba2, (7, 7)),
        "selective_scan_chunk_sizes": chunk_sizes(),
    }
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
