"""Every kernel on one GPU, beside its peers and its floor, in one run.

    python benchmarks/kernels.py                          # all; writes results/kernels.json, operator by operator
    python benchmarks/kernels.py ssd matrix_distance      # these

Needs a CUDA device; peers (mamba_ssm, fla, liger_kernel) are measured where they can be imported. Times are medians of
CUDA-graph replays (`timing.py`), so that a host's slowness is nobody's.
"""

import importlib
import json
import sys
from pathlib import Path

import torch
import triton
from timing import copy_bandwidth, matmul_rate

RESULTS = Path(__file__).with_name("results") / "kernels.json"
OPERATORS = ("ssd", "matrix_distance", "elementwise", "selective_scan", "linear_kl")


def main(operators: list[str]) -> None:
    """Measure, and write after every operator, so that a run that is cut short leaves what it has."""
    results: dict = {
        "card": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "copy_bytes_per_second": copy_bandwidth(),
        "bf16_matmul_per_second": matmul_rate(),
    }
    for operator in operators or OPERATORS:
        results[operator] = importlib.import_module(f"kernels_{operator}").measure()
        print(operator, json.dumps(results[operator]), flush=True)
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
