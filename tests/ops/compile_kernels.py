"""Compiles every Triton kernel for a card that need not be there: what does it take, and does it fit?

    python tests/ops/compile_kernels.py 90 ssd causal_conv      # compute capability 9.0, these operators (default: all)
    python tests/ops/compile_kernels.py 86 "ssd:fp32 64 64"     # one case of one operator

Prints a JSON object a kernel: operator, case, kernel, shared memory, registers, spilled bytes. Operators are called
through their doors, forward and backward, with launches replaced by compilation; so what is compiled is what would run.
`test_compile_kernels.py` runs this in processes of its own, since the interpreter and the compiler exclude each other.
"""

import importlib.util
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from limbeck.ops import backends, cards

CARDS = {  # compute capability: shared memory that a program may have, multiprocessors
    80: (166912, 108),
    86: (101376, 84),
    89: (101376, 128),
    90: (232448, 132),
    100: (232448, 148),
}
CASES = Path(__file__).with_name("kernel_cases")
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


def compile_all(capability: int, operators: list[str]) -> Iterator[dict[str, Any]]:
    """Compile the kernels of every case of these operators."""
    shared, multiprocessors = CARDS[capability]
    card = cards.Card(divmod(capability, 10), shared, multiprocessors)
    cards.INTERPRETER = card  # what CPU tensors are taken to lie on
    backends._check_triton = lambda operator, device: None
    driver.set_active(
        SimpleNamespace(
            get_current_device=lambda: 0,
            get_current_stream=lambda device: 0,
            get_current_target=lambda: GPUTarget("cuda", capability, 32),
        )
    )
    kernels: dict[str, tuple[str, Any]] = {}
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        kernels[kernel.hash] = (self.__name__, kernel)
        return kernel

    JITFunction.run = compile_only
    seen = set()
    for operator in operators:
        operator, _, only = operator.partition(":")
        for case, call in cases_of(operator).items():
            if only in ("", case):
                call()
            for key, (name, kernel) in kernels.items():
                if key not in seen:
                    seen.add(key)
                    yield {
                        "operator": operator,
                        "case": case,
                        "kernel": name,
                        "shared": kernel.metadata.shared,
                        "limit": shared,
                        **usage(kernel.asm["cubin"]),
                    }


def cases_of(operator: str) -> dict[str, Callable[[], object]]:
    """The cases in `kernel_cases/`: name and a call, forward and backward, on CPU tensors."""
    path = CASES / f"{operator}.py"
    spec = importlib.util.spec_from_file_location(operator, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.CASES


def usage(cubin: bytes) -> dict[str, int]:
    """Registers of a thread, and bytes of its that lie in local memory."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [CUOBJDUMP, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert found, text
    return {"registers": int(found[1]), "stack": int(found[2])}


if __name__ == "__main__":
    torch.manual_seed(0)
    for result in compile_all(int(sys.argv[1]), sys.argv[2:] or sorted(path.stem for path in CASES.glob("*.py"))):
        print(json.dumps(result), flush=True)
