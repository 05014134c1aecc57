"""Every kernel compiles for the cards that people have, and fits them, without one at hand."""

import importlib
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
SCRIPT = Path(__file__).with_name("compile_kernels.py")
OPERATORS = sorted(path.stem for path in (SCRIPT.parent / "kernel_cases").glob("*.py"))
WIDEST = [  # cases that hold every kernel once, each at about the most shared memory that it ever wants
    "ssd:bf16 64 64 in segments",
    "ssd:fp32 256 256",
    "matrix_distance:bf16 256",
    "matrix_distance:fp32 96",
    "matrix_distance:fp32 256",
    "causal_conv:bf16 k 8, all options",
    "gated_skip:bf16 Phi-1.5",
    "mixer_step:bf16 widest",
    "selective_scan:bf16 n 64",
    "linear_kl:bf16 kl ce bias softcap",
    "one_row:bf16 Phi-1.5",
]


def kernels_of(operator):
    """Names of the functions of an operator that are launched."""
    module = importlib.import_module(f"limbeck.ops.{operator}_triton")
    source = inspect.getsource(module)
    return {name for name, value in vars(module).items() if hasattr(value, "fn") and f"    {name}[" in source}


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 86, 89, 90, 100])
def test_every_kernel_fits_every_card(capability):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(SCRIPT), str(capability), *WIDEST]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=540)
    assert run.returncode == 0, run.stderr[-3000:]
    found = [json.loads(line) for line in run.stdout.splitlines()]
    for operator in OPERATORS:
        assert {kernel["kernel"] for kernel in found if kernel["operator"] == operator} == kernels_of(operator)
    for kernel in found:
        assert kernel["shared"] <= kernel["limit"], kernel
        assert kernel["stack"] < 1000, f"most of what this kernel works with lies in memory: {kernel}"
