"""`matrix_distance`, the loss of MOHAWK's stage 1 without its matrices: ‖M − A‖_F of every head.

M is the mixer's matrix, `ssd_matrix(log_decay, B, C)` with D on the diagonal; A is the teacher's softmax attention
(arXiv 2408.10189, section 3.1). This is the door: shapes, number types, the choice of backend. The specification, both
matrices materialised, is in `matrix_distance_reference.py`; the kernels, which keep tiles only, in
`matrix_distance_triton.py`.
"""

from typing import Literal

import torch
from torch import Tensor

from limbeck.errors import LimbeckError
from limbeck.ops.backends import choose_backend
from limbeck.ops.checks import check_seq_idx, check_shapes, wide_dtype, without_autocast
from limbeck.ops.matrix_distance_reference import matrix_distance_reference

WIDEST_HEAD = 256
"""The widest head of q, k, B or C that the kernels take."""

Backend = Literal["auto", "reference", "triton"]


def matrix_distance(
    query: Tensor,
    key: Tensor,
    log_decay: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    scale: float | None = None,
    attention_mask: Tensor | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    seq_idx: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Measure how far a mixer's matrix is from an attention matrix, per head, without an l × l matrix on a GPU.

    Differentiable once in log_decay, B, C and D; the teacher's query and key get no gradient. Computed in float32,
    under autocast too, or in float64 when an input is. The kernels take a decay below exp(−60) for 0.

    Args:
        query: (b, h, l, d), the teacher's, after its rotary embedding.
        key: (b, h_kv, l, d); head j looks at key head j // (h/h_kv).
        log_decay: (b, l, h), a ≤ 0, float32 or float64; −inf forgets everything before the token.
        B: (b, l, g, n), the mixer's keys; head j uses group j // (h/g).
        C: (b, l, g, n), the mixer's queries.
        D: (h,), what stands on the diagonal beside C·B, undecayed; None for nothing.
        scale: What the teacher's logits are multiplied with; by default 1/√d.
        attention_mask: (b, l), 1 at a token; rows and columns of padding count zero.
        sliding_window: How many tokens back the teacher looks, itself included; None for all.
        softcap: The teacher's logits are softcap · tanh(logits / softcap); None for plain logits.
        seq_idx: (b, l) integer, non-decreasing document ids; both matrices are zero between documents.
        backend: ``"auto"`` chooses by device, dtype and shape; ``"reference"`` stores both matrices; ``"triton"``.

    Returns:
        (b, h), float32, or float64 when an input is.

    Raises:
        LimbeckError: When a shape or dtype does not fit, or the backend cannot run.
    """
    _check(query, key, log_decay, B, C, D, attention_mask, seq_idx)
    if sliding_window is not None and sliding_window < 1:
        raise LimbeckError(f"matrix_distance was given sliding_window {sliding_window}", expected="1 or more, or None")
    if softcap is not None and softcap <= 0:
        raise LimbeckError(f"matrix_distance was given softcap {softcap}", expected="above 0, or None")
    factor = float(query.shape[-1] ** -0.5) if scale is None else scale
    tokens = None if attention_mask is None else attention_mask.to(torch.bool)
    query, key = query.detach(), key.detach()
    chosen = choose_backend("matrix_distance", backend, query, _unsupported(query, key, log_decay, B, C, D))
    if chosen == "triton":
        from limbeck.ops.matrix_distance_triton import matrix_distance_triton as compute
    else:
        compute = matrix_distance_reference
        wide = wide_dtype(query, key, log_decay, B, C, D)
        query, key, log_decay, B, C = (tensor.to(wide) for tensor in (query, key, log_decay, B, C))
        D = None if D is None else D.to(wide)
    with without_autocast(query):
        return compute(query, key, log_decay, B, C, D, tokens, seq_idx, factor, sliding_window, softcap)


def _check(
    query: Tensor,
    key: Tensor,
    log_decay: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    attention_mask: Tensor | None,
    seq_idx: Tensor | None,
) -> None:
    layouts = {
        "query": (query, "b h l d"),
        "key": (key, "b h_kv l d"),
        "log_decay": (log_decay, "b l h"),
        "B": (B, "b l g n"),
        "C": (C, "b l g n"),
    }
    if D is not None:
        layouts["D"] = (D, "h")
    if attention_mask is not None:
        layouts["attention_mask"] = (attention_mask, "b l")
    sizes = check_shapes("matrix_distance", layouts)
    check_seq_idx("matrix_distance", seq_idx, sizes["b"], sizes["l"])
    for shared in ("h_kv", "g"):
        if sizes["h"] % sizes[shared]:
            raise LimbeckError(
                f"matrix_distance was given {sizes['h']} heads over {shared} = {sizes[shared]}",
                expected="the heads to be a multiple of the key heads, and of the groups of B and C",
            )
    if log_decay.dtype not in (torch.float32, torch.float64):
        raise LimbeckError(
            f"matrix_distance was given log_decay in {log_decay.dtype}",
            expected="float32 or float64: narrower types lose the decay",
            hint="compute log_decay from .float()",
        )


def _unsupported(query: Tensor, *others: Tensor | None) -> str | None:
    """What of the inputs the kernels cannot do; None when nothing."""
    if any(tensor is not None and tensor.dtype == torch.float64 for tensor in (query, *others)):
        return "torch.float64"
    B = others[2]
    assert B is not None
    widest = max(query.shape[-1], B.shape[-1])
    return f"heads {widest} wide (at most {WIDEST_HEAD})" if widest > WIDEST_HEAD else None
