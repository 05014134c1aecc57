"""The choice between an operator's reference and its Triton kernels."""

import functools
import importlib.util
import logging
import os

import torch
from torch import Tensor

from limbeck.errors import LimbeckError, unknown
from limbeck.ops.cards import on_gpu

KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
"""What the kernels take; float64 goes to the reference."""

_log = logging.getLogger(__name__)


def choose_backend(operator: str, backend: str, tensor: Tensor, unsupported: str | None = None) -> str:
    """Resolve ``"auto"`` by device, dtype and shape alone, and check that what was asked for can run.

    Args:
        operator: Its name, for messages.
        backend: ``"auto"``, ``"reference"`` or ``"triton"``.
        tensor: The main input; its device and dtype decide.
        unsupported: What about the inputs the kernels cannot do, such as ``"d_state 512"``; None when nothing.

    Returns:
        ``"reference"`` or ``"triton"``.

    Raises:
        LimbeckError: When the backend is unknown, or ``"triton"`` is asked for where it cannot run.
    """
    if backend == "reference":
        return backend
    if backend not in ("auto", "triton"):
        raise unknown(f"backend of {operator}", backend, ("auto", "reference", "triton"))
    if tensor.dtype not in KERNEL_DTYPES:
        unsupported = str(tensor.dtype)
    if backend == "auto":
        if not on_gpu(tensor):
            return "reference"
        choice = "reference" if unsupported else "triton"
        if not torch.compiler.is_compiling():  # a log, or a look at what is installed, would break the graph
            _log_once(operator, choice, unsupported or "")
            if choice == "triton":
                _check_triton(operator, "cuda")
        return choice
    if unsupported:
        raise LimbeckError(
            f"{operator} has no Triton kernel for {unsupported}",
            expected="bfloat16, float16 or float32 within the kernel's limits",
            hint='backend="reference" takes it',
        )
    if not torch.compiler.is_compiling():
        _check_triton(operator, tensor.device.type)
    return backend


def _check_triton(operator: str, device: str) -> None:
    if not has_triton():
        raise LimbeckError(
            f"{operator} found no Triton in this environment",
            expected="the triton package, which comes with torch for CUDA",
            hint='install it, or pass backend="reference"',
        )
    if device != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise LimbeckError(
            f"{operator} was asked to run a Triton kernel on {device}",
            expected="a CUDA device",
            hint='backend="auto" chooses the reference there',
        )


@functools.cache
def has_triton() -> bool:
    """Whether the triton package is installed; it is not imported for the answer."""
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _log_once(operator: str, choice: str, why: str) -> None:
    _log.info("%s uses its %s backend on CUDA%s", operator, choice, f" ({why})" if why else "")
