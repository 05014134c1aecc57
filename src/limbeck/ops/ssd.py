"""`ssd`, the one primitive under the mixers: linear attention with a scalar decay per head and step.

    S_t = exp(a_t) · S_{t-1} + x_t ⊗ B_t        y_t = S_t · C_t

(Mamba-2, arXiv 2405.21060; discrete Mamba-2, arXiv 2408.10189.) This is the door: shapes, number types, the choice of
backend. The computation is in `ssd_reference.py`, readable, and in `ssd_triton.py`, for CUDA.
"""

from typing import Literal, overload

import torch
from torch import Tensor

from limbeck.errors import LimbeckError
from limbeck.ops.backends import choose_backend
from limbeck.ops.checks import check_seq_idx, check_shapes, wide_dtype, without_autocast
from limbeck.ops.ssd_reference import ssd_chunked, ssd_matrix_reference, ssd_step_reference

CHUNK_SIZE = 32
"""Tokens in a chunk of the reference backend: the fastest on a CPU (benchmarks/ssd_cpu.py)."""

WIDEST_STATE = 256
"""The largest d_state that the kernels take."""

Backend = Literal["auto", "reference", "triton"]


@overload
def ssd(
    x: Tensor,
    log_decay: Tensor,
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
def ssd(
    x: Tensor,
    log_decay: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    initial_state: Tensor | None = None,
    return_state: Literal[True],
    seq_idx: Tensor | None = None,
    chunk_size: int | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]: ...
def ssd(
    x: Tensor,
    log_decay: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    initial_state: Tensor | None = None,
    return_state: bool = False,
    seq_idx: Tensor | None = None,
    chunk_size: int | None = None,
    backend: Backend = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Apply a decayed linear attention along the sequence, in time linear in its length.

    Differentiable once in every floating input. Accumulated in float32, under autocast too, or in float64 when an input
    is; the kernels multiply what is bfloat16 or float16 as it is, and take a decay below exp(−60) for 0.

    Args:
        x: (b, l, h, p), the values.
        log_decay: (b, l, h), a ≤ 0, float32 or float64; −inf forgets everything before the token.
        B: (b, l, g, n), the keys; h is a multiple of g, and head j uses group j // (h/g).
        C: (b, l, g, n), the queries.
        initial_state: (b, h, p, n), the state before the first token, of the first document; zero by default.
        return_state: Whether to return the state after the last token, of the last document, as well.
        seq_idx: (b, l) integer, non-decreasing document ids; the state never crosses a change of id.
        chunk_size: Tokens that the reference computes as one matrix product; by default what is fastest.
        backend: ``"auto"`` chooses by device, dtype and shape; ``"reference"`` is plain torch; ``"triton"``.

    Returns:
        y, (b, l, h, p) in x's dtype, or (y, state) with the state (b, h, p, n) in float32 or float64.

    Raises:
        LimbeckError: When a shape or dtype does not fit, or the backend is unknown or cannot run.
    """
    sizes = _check_ssd("b l h p", x=x, log_decay=log_decay, B=B, C=C, initial_state=initial_state)
    check_seq_idx("ssd", seq_idx, sizes["b"], sizes["l"])
    if chunk_size is not None and chunk_size < 1:
        raise LimbeckError(f"ssd was given chunk_size {chunk_size}", expected="1 or more, or None")
    wide = wide_dtype(x, log_decay, B, C, initial_state)
    n = sizes["n"]
    unsupported = str(wide) if wide == torch.float64 else f"d_state {n}" if n > WIDEST_STATE else None
    if choose_backend("ssd", backend, x, unsupported) == "triton":
        from limbeck.ops.ssd_triton import ssd_triton

        dtype = torch.promote_types(x.dtype, torch.promote_types(B.dtype, C.dtype))
        y, state = ssd_triton(x.to(dtype), log_decay, B.to(dtype), C.to(dtype), initial_state, seq_idx)
        y = y.to(x.dtype)
        return (y, state) if return_state else y
    with without_autocast(x):
        y, state = ssd_chunked(
            x.to(wide),
            log_decay.to(wide),
            B.to(wide),
            C.to(wide),
            None if initial_state is None else initial_state.to(wide),
            seq_idx,
            CHUNK_SIZE if chunk_size is None else chunk_size,
        )
    y = y.to(x.dtype)
    return (y, state) if return_state else y


def ssd_step(state: Tensor, x: Tensor, log_decay: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    """Advance `ssd` by one token.

    Args:
        state: (b, h, p, n), float32 or float64; left as it is.
        x: (b, h, p).
        log_decay: (b, h), float32 or float64.
        B: (b, g, n).
        C: (b, g, n).

    Returns:
        y, (b, h, p) in x's dtype, and the new state, (b, h, p, n).

    Raises:
        LimbeckError: When a shape or dtype does not fit.
    """
    _check_ssd("b h p", x=x, log_decay=log_decay, B=B, C=C, initial_state=state)
    wide = wide_dtype(x, log_decay, B, C, state)
    with without_autocast(x):
        y, state = ssd_step_reference(state.to(wide), x.to(wide), log_decay.to(wide), B.to(wide), C.to(wide))
    return y.to(x.dtype), state


def ssd_matrix(log_decay: Tensor, B: Tensor, C: Tensor, *, seq_idx: Tensor | None = None) -> Tensor:
    """Materialise the matrix that `ssd` applies: M[t,s] = (C_t · B_s) · exp(a_{s+1} + … + a_t) for s ≤ t, else 0.

    Args:
        log_decay: (b, l, h), float32 or float64.
        B: (b, l, g, n).
        C: (b, l, g, n).
        seq_idx: (b, l) integer, document ids; entries between documents are 0.

    Returns:
        M, (b, h, l, l), float32, or float64 when an input is.

    Raises:
        LimbeckError: When a shape or dtype does not fit.
    """
    sizes = _check_ssd("b l h p", log_decay=log_decay, B=B, C=C)
    check_seq_idx("ssd_matrix", seq_idx, sizes["b"], sizes["l"])
    wide = wide_dtype(log_decay, B, C)
    with without_autocast(log_decay):
        return ssd_matrix_reference(log_decay.to(wide), B.to(wide), C.to(wide), seq_idx)


def _check_ssd(layout: str, **tensors: Tensor | None) -> dict[str, int]:
    """Check the shapes and number types that the three functions share; `layout` is that of x."""
    time = layout.removesuffix(" h p")
    layouts = {
        "x": layout,
        "log_decay": f"{time} h",
        "B": f"{time} g n",
        "C": f"{time} g n",
        "initial_state": "b h p n",
    }
    given = {name: (tensor, layouts[name]) for name, tensor in tensors.items() if tensor is not None}
    sizes = check_shapes("ssd", given)
    if sizes["h"] % sizes["g"]:
        raise LimbeckError(
            f"ssd was given {sizes['h']} heads of x and {sizes['g']} groups of B and C",
            expected="the heads to be a multiple of the groups",
        )
    for name in ("log_decay", "initial_state"):
        tensor = tensors.get(name)
        if tensor is not None and tensor.dtype not in (torch.float32, torch.float64):
            raise LimbeckError(
                f"ssd was given {name} in {tensor.dtype}",
                expected="float32 or float64: narrower types lose the decay",
                hint=f"compute {name} from .float()",
            )
    return sizes
