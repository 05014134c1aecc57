"""The causal convolution in readable torch, as a sum of k shifted products.

Shapes: x (b,l,c), weight (c,k), bias (c,), state (b,c,k-1), seq_idx (b,l). What came before the first token belongs to
its document.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def causal_conv_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, initial_state: Tensor | None, seq_idx: Tensor | None
) -> Tensor:
    """Sum k shifted products.

    Returns:
        y, (b, l, c).
    """
    if initial_state is None:
        initial_state = _no_inputs(x, weight.shape[1])
    window = torch.cat([initial_state.mT, x], dim=1)  # (b, k-1+l, c)
    y = _SumOfShifts.apply(window, weight, seq_idx)
    return y if bias is None else y + bias


class _SumOfShifts(torch.autograd.Function):
    """y_t = Σ_j weight[:, j] · window_{t+j}, in the layout that the tokens come in and without a copy per tap.

    On a CPU faster than `conv1d` with groups, which wants (b, c, l): benchmarks/ssd_cpu.py has the figures.
    """

    @staticmethod
    def forward(ctx, window, weight, seq_idx):
        ctx.save_for_backward(window, weight, seq_idx)
        taps = weight.mT.contiguous()  # (k, c)
        k, l = len(taps), window.shape[1] - len(taps) + 1
        y = window[:, k - 1 :] * taps[-1]  # (b, l, c)
        for j in range(k - 1):  # not in place: torch 2.11 then compiles a wrong backward
            y = torch.addcmul(y, _reachable(window[:, j : j + l], seq_idx, k - 1 - j), taps[j])
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):  # pyright: ignore[reportIncompatibleMethodOverride]
        window, weight, seq_idx = ctx.saved_tensors
        taps = weight.mT.contiguous()  # (k, c)
        k, l = len(taps), dy.shape[1]
        dwindow, dtaps = torch.zeros_like(window), torch.empty_like(taps)
        for j in range(k):
            dshifted = _reachable(dy, seq_idx, k - 1 - j)
            dwindow[:, j : j + l].addcmul_(dshifted, taps[j])
            dtaps[j] = (window[:, j : j + l] * dshifted).sum((0, 1))
        return dwindow, dtaps.mT, None


def _reachable(shifted: Tensor, seq_idx: Tensor | None, lag: int) -> Tensor:
    """Put zero at the tokens whose input `lag` tokens ago is another document's."""
    if seq_idx is None or lag == 0:
        return shifted
    earlier = _with_ids_before(seq_idx, lag)[:, : seq_idx.shape[1]]  # (b, l)
    return shifted.masked_fill((earlier != seq_idx)[..., None], 0)


def last_inputs(x: Tensor, initial_state: Tensor | None, k: int, seq_idx: Tensor | None, mask: Tensor | None) -> Tensor:
    """The last k-1 inputs of the last document, zeros before its start and at padding.

    Returns:
        (b, c, k-1), in memory of its own.
    """
    if initial_state is None:
        initial_state = _no_inputs(x, k)
    keep = k - 1
    start = max(0, x.shape[1] - keep)
    recent = x[:, start:]  # (b, ≤ k-1, c)
    if mask is not None:
        recent = recent.masked_fill(mask[:, start:].logical_not()[..., None], 0)
    state = torch.cat([initial_state, recent.mT], dim=-1)[..., recent.shape[1] :].contiguous()
    if seq_idx is None:
        return state
    ids = _with_ids_before(seq_idx, keep)[:, x.shape[1] :]  # (b, k-1)
    return state.masked_fill((ids != seq_idx[:, -1:])[:, None], 0)


def _no_inputs(x: Tensor, k: int) -> Tensor:
    return x.new_zeros(x.shape[0], x.shape[2], k - 1)


def _with_ids_before(seq_idx: Tensor, count: int) -> Tensor:
    return torch.cat([seq_idx[:, :1].expand(-1, count), seq_idx], dim=1)
