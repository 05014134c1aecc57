"""Every kernel on one GPU, beside its peers and its floor, in one run.

    python benchmarks/kernels.py                          # all; writes results/kernels_ssd.json and the like
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

RESULTS = Path(__file__).with_name("results")
OPERATORS = ("ssd", "matrix_distance", "elementwise", "selective_scan", "linear_kl")


def main(operators: list[str]) -> None:
    """Measure, and write after every entry, so that a run that is cut short leaves what it has."""
    ceilings = {
        "card": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "copy_bytes_per_second": copy_bandwidth(),
        "bf16_matmul_per_second": matmul_rate(),
    }
    for operator in operators or OPERATORS:
        entries: list[dict] = []
        for entry in importlib.import_module(f"kernels_{operator}").measure():
            print(json.dumps(entry), flush=True)
            entries.append(entry)
            results = json.dumps(ceilings | {"entries": entries}, indent=1)
            (RESULTS / f"kernels_{operator}.json").write_text(results + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
