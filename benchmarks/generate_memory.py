"""Memory and time of `generate` at 64, 1024 and 8192 new tokens: an all-swapped student beside its teacher.

    python benchmarks/generate_memory.py    # writes benchmarks/results/generate_memory.json; Linux, some five minutes

Each figure is from a process of its own, with one thread, in float32, two rows with random weights. "cache" is the
bytes that the tensors in the returned cache hold; "peak above start" is what the kernel counts (VmHWM) above what the
process held after a first short generation (VmRSS); "ms per token" is processor time, the median of the last 64 steps.
"""

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, LlamaConfig

import limbeck
from limbeck.students import cache_bytes

RESULT = Path(__file__).parent / "results" / "generate_memory.json"
LENGTHS = (64, 1024, 8192)
CONFIG = LlamaConfig(
    vocab_size=512,
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=4,
    num_attention_heads=4,
    max_position_embeddings=16384,
    bos_token_id=0,
    eos_token_id=1,
    pad_token_id=2,
)


def kilobytes(name: str) -> int:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(name))


def measure(kind: str, new_tokens: int) -> dict[str, Any]:
    """Generate once in this process."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(CONFIG).eval()
    if kind == "student":
        model = limbeck.convert(model)
    times = []

    def clock(input_ids: torch.Tensor, _scores: Any) -> torch.Tensor:
        times.append(time.process_time())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)

    ids = torch.randint(3, 512, (2, 16))
    options = {"do_sample": False, "eos_token_id": None, "return_dict_in_generate": True}
    model.generate(ids, max_new_tokens=8, **options)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    start = kilobytes("VmRSS")
    output = model.generate(ids, max_new_tokens=new_tokens, stopping_criteria=[clock], **options)
    assert output.sequences.shape[1] == 16 + new_tokens
    steps = [1e3 * (after - before) for before, after in zip(times[-65:], times[-64:], strict=False)]
    return {
        "new_tokens": new_tokens,
        "cache_bytes": cache_bytes(output.past_key_values),
        "peak_above_start_bytes": (kilobytes("VmHWM") - start) << 10,
        "ms_per_token_at_the_end": round(statistics.median(steps), 3),
    }


def main() -> None:
    result: dict[str, Any] = {
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "threads": 1,
        },
        "model": "Llama, float32, width 256, 4 layers, 2 rows; the student has discrete-mamba2 in every layer",
    }
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    for kind in ("student", "teacher"):
        result[kind] = []
        for length in LENGTHS:
            command = [sys.executable, __file__, kind, str(length)]
            done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
            found = json.loads(done.stdout.splitlines()[-1])
            result[kind].append(found)
            print(kind, found, flush=True)
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    if len(sys.argv) == 3:
        print(json.dumps(measure(sys.argv[1], int(sys.argv[2]))))
    else:
        main()
