"""`selective_scan`, the operator under Mamba: every channel keeps n numbers, each with a decay of its own.

    S_t = exp(Δ_t · A) ∘ S_{t-1} + (Δ_t · x_t) ⊗ B_t        y_t = S_t · C_t

(Mamba, arXiv 2312.00752.) This is the door: shapes, number types, the choice of backend. The computation is in
`selective_scan_reference.py`, readable, and in `selective_scan_triton.py`, for CUDA. The skip D·x and the gate are the
mixer's.
"""

from typing import Literal, overload

import torch
from torch import Tensor

from limbeck.errors import LimbeckError
from limbeck.ops.backends import choose_backend
from limbeck.ops.checks import check_seq_idx, check_shapes, wide_dtype, without_autocast
from limbeck.ops.selective_scan_reference import selective_scan_chunked, selective_scan_step_reference

CHUNK_SIZE = 16
"""Tokens in a chunk of the reference backend: the fastest on a CPU (benchmarks/mamba_cpu.py)."""

WIDEST_STATE = 64
"""The largest d_state that the kernels take."""

Backend = Literal["auto", "reference", "triton"]


@overload
def selective_scan(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    initial_state: Tensor | None = None,
    return_state: Literal[False] = False,
    seq_idx: Tensor | None = None,
    chunk_size: int | None = None,
    backend: Backend = "auto",
) -> Tensor: ...
@overload
def selective_scan(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    initial_state: Tensor | None = None,
    return_state: Literal[True],
    seq_idx: Tensor | None = None,
    chunk_size: int | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]: ...
def selective_scan(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    initial_state: Tensor | None = None,
    return_state: bool = False,
    seq_idx: Tensor | None = None,
    chunk_size: int | None = None,
    backend: Backend = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Run a selective state-space model along the sequence.

    Differentiable once in every floating input. Computed in float32, under autocast too, or in float64 when an input
    is. One state per chunk of tokens is kept for the backward, the others are computed again; the kernels keep it in
    bfloat16 when x is bfloat16 or float16.

    Args:
        x: (b, l, c), the channels' inputs.
        delta: (b, l, c), the step Δ ≥ 0, float32 or float64; at 0 a token leaves no trace.
        A: (c, n), ≤ 0, float32 or float64.
        B: (b, l, n).
        C: (b, l, n).
        initial_state: (b, c, n), the state before the first token, of the first document; zero by default.
        return_state: Whether to return the state after the last token, of the last document, as well.
        seq_idx: (b, l) integer, non-decreasing document ids; the state never crosses a change of id.
        chunk_size: Tokens that the reference computes together; by default what is fastest.
        backend: ``"auto"`` chooses by device, dtype and shape; ``"reference"`` is plain torch; ``"triton"``.

    Returns:
        y, (b, l, c) in x's dtype, or (y, state) with the state (b, c, n) in float32 or float64.

    Raises:
        LimbeckError: When a shape or dtype does not fit, or the backend is unknown or cannot run.
    """
    sizes = _check_scan("b l", x=x, delta=delta, A=A, B=B, C=C, initial_state=initial_state)
    check_seq_idx("selective_scan", seq_idx, sizes["b"], sizes["l"])
    if chunk_size is not None and chunk_size < 1:
        raise LimbeckError(f"selective_scan was given chunk_size {chunk_size}", expected="1 or more, or None")
    wide = wide_dtype(x, delta, A, B, C, initial_state)
    n = sizes["n"]
    unsupported = str(wide) if wide == torch.float64 else f"d_state {n}" if n > WIDEST_STATE else None
    if choose_backend("selective_scan", backend, x, unsupported) == "triton":
        from limbeck.ops.selective_scan_triton import selective_scan_triton

        y, state = selective_scan_triton(x, delta, A, B, C, initial_state, seq_idx)
        return (y, state) if return_state else y
    with without_autocast(x):
        y, state = selective_scan_chunked(
            x.to(wide),
            delta.to(wide),
            A.to(wide),
            B.to(wide),
            C.to(wide),
            None if initial_state is None else initial_state.to(wide),
            seq_idx,
            CHUNK_SIZE if chunk_size is None else chunk_size,
        )
    y = y.to(x.dtype)
    return (y, state) if return_state else y


def selective_scan_step(
    state: Tensor, x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor
) -> tuple[Tensor, Tensor]:
    """Advance `selective_scan` by one token.

    Args:
        state: (b, c, n), float32 or float64; left as it is.
        x: (b, c).
        delta: (b, c), float32 or float64.
        A: (c, n), float32 or float64.
        B: (b, n).
        C: (b, n).

    Returns:
        y, (b, c) in x's dtype, and the new state, (b, c, n).

    Raises:
        LimbeckError: When a shape or dtype does not fit.
    """
    _check_scan("b", x=x, delta=delta, A=A, B=B, C=C, initial_state=state)
    wide = wide_dtype(x, delta, A, B, C, state)
    with without_autocast(x):
        y, state = selective_scan_step_reference(*(tensor.to(wide) for tensor in (state, x, delta, A, B, C)))
    return y.to(x.dtype), state


def _check_scan(time: str, **tensors: Tensor | None) -> dict[str, int]:
    """Check the shapes and number types; `time` is what comes before the channels."""
    layouts = {
        "x": f"{time} c",
        "delta": f"{time} c",
        "A": "c n",
        "B": f"{time} n",
        "C": f"{time} n",
        "initial_state": "b c n",
    }
    given = {name: (tensor, layouts[name]) for name, tensor in tensors.items() if tensor is not None}
    sizes = check_shapes("selective_scan", given)
    for name in ("delta", "A", "initial_state"):
        tensor = tensors.get(name)
        if tensor is not None and tensor.dtype not in (torch.float32, torch.float64):
            raise LimbeckError(
                f"selective_scan was given {name} in {tensor.dtype}",
                expected="float32 or float64: narrower types lose the decay",
                hint=f"compute {name} from .float()",
            )
    return sizes
