"""A discrete Mamba-2 layer beside the attention layer it replaces, forward and backward, on a CPU in float32.

    python benchmarks/layers_cpu.py        # writes results/layers_cpu.json

Width 512, heads of 64, batch 1; the attention is Phi's with torch's fused kernel. Both are timed in turn, so that a
busy machine is busy for both.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import PhiConfig, PhiForCausalLM

import limbeck
from limbeck.students import attention_of, blocks

RESULTS = Path(__file__).with_name("results") / "layers_cpu.json"
LENGTHS = (128, 512, 1024, 2048, 4096)
WIDTH, HEADS, ROUNDS = 512, 8, 15


def layers(l: int) -> dict[str, Callable[[], None]]:
    """Forward and backward of both layers at one length."""
    config = PhiConfig(
        vocab_size=64, hidden_size=WIDTH, intermediate_size=WIDTH, num_hidden_layers=1, num_attention_heads=HEADS
    )
    teacher = PhiForCausalLM(config)
    student = limbeck.convert(teacher)
    hidden_states = torch.randn(1, l, WIDTH, requires_grad=True)
    positions = teacher.model.rotary_emb(hidden_states, torch.arange(l)[None])
    attention, mixer = attention_of(blocks(teacher)[0]), attention_of(blocks(student)[0])

    def attend() -> None:
        attention(hidden_states, position_embeddings=positions, attention_mask=None)[0].sum().backward()

    def mix() -> None:
        mixer(hidden_states)[0].sum().backward()

    return {"attention": attend, "discrete Mamba-2": mix}


def main() -> None:
    """Time both at every length."""
    results = {"torch": torch.__version__, "threads": torch.get_num_threads(), "milliseconds": {}}
    for l in LENGTHS:
        runs = layers(l)
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        for turn in range(ROUNDS + 2):
            for name, run in runs.items():
                start = time.perf_counter()
                run()
                if turn > 1:
                    seconds[name].append(time.perf_counter() - start)
        found = {name: statistics.median(values) * 1e3 for name, values in seconds.items()}
        results["milliseconds"][l] = found | {"ratio": found["discrete Mamba-2"] / found["attention"]}
        print(l, found, flush=True)
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
