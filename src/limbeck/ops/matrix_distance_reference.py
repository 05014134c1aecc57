"""The Frobenius distance of stage 1 with both matrices materialised: the specification of `matrix_distance`.

A = softmax(scale · Q Kᵀ) where a query may look, else 0        (b, h, l, l)
M = ssd_matrix(log_decay, B, C) + diag(D)                       (b, h, l, l)
distance = ‖M − A‖_F, rows and columns of padding zero in both  (b, h)
"""

import torch
from torch import Tensor

from limbeck.ops.ssd_reference import ssd_matrix_reference


def matrix_distance_reference(
    query: Tensor,
    key: Tensor,
    log_decay: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    tokens: Tensor | None,
    seq_idx: Tensor | None,
    scale: float,
    sliding_window: int | None,
    softcap: float | None,
) -> Tensor:
    """The distance of every head, (b, h), quadratic in memory; all floating tensors have one dtype.

    Args:
        query: (b, h, l, d).
        key: (b, h_kv, l, d).
        log_decay: (b, l, h).
        B: (b, l, g, n).
        C: (b, l, g, n).
        D: (h,) or None.
        tokens: (b, l) bool, True at a token; None when all are.
        seq_idx: (b, l), document ids.
        scale: Of the softmax.
        sliding_window: How many tokens back a query looks, itself included.
        softcap: Logits are softcap · tanh(logits / softcap).
    """
    length, device = query.shape[2], query.device
    exists = torch.ones(1, 1, length, length, dtype=torch.bool, device=device).tril()  # (b or 1, 1, t, s)
    if tokens is not None:
        exists = exists & tokens[:, None, :, None] & tokens[:, None, None, :]
    M = ssd_matrix_reference(log_decay, B, C, seq_idx)  # (b, h, t, s)
    if D is not None:
        M = M + torch.diag_embed(D[:, None].expand(-1, length))
    with torch.no_grad():
        A = attention_matrix(query, key, exists, seq_idx, scale, sliding_window, softcap)
    return torch.linalg.matrix_norm(M.masked_fill(~exists, 0) - A)


def attention_matrix(
    query: Tensor,
    key: Tensor,
    exists: Tensor,
    seq_idx: Tensor | None,
    scale: float,
    sliding_window: int | None,
    softcap: float | None,
) -> Tensor:
    """The softmax attention (b, h, l, l) over the pairs that exist, are of one document and within the window."""
    position = torch.arange(query.shape[2], device=query.device)
    visible = exists
    if sliding_window is not None:
        visible = visible & (position[:, None] - position < sliding_window)
    if seq_idx is not None:
        visible = visible & (seq_idx[:, None, :, None] == seq_idx[:, None, None, :])
    logits = query @ key.repeat_interleave(query.shape[1] // key.shape[1], dim=1).mT * scale  # (b, h, t, s)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    # A padded row sees nothing at all: a finite floor keeps its softmax free of NaN until it is zeroed.
    attention = logits.masked_fill(~visible, torch.finfo(logits.dtype).min).softmax(dim=-1)
    return attention.masked_fill(~visible, 0)
