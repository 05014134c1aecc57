"""The selective scan in readable torch (Mamba, arXiv 2312.00752, section 3), in two equal forms.

    S_t = exp(Δ_t · A) ∘ S_{t-1} + (Δ_t · x_t) ⊗ B_t        the state, (b, c, n)
    y_t = S_t · C_t

- `selective_scan_recurrent` is that loop, the definition.
- `selective_scan_chunked` runs it over chunks of tokens that stay in a processor's cache, with one operation per token
  and the rest in products over the chunk. Its backward is written out: it keeps the state that enters each chunk and
  computes the others again.

Shapes: x and Δ (b,l,c), A (c,n), B and C (b,l,n), seq_idx (b,l), state (b,c,n). All tensors have one dtype, float32 or
float64. Δ ≥ 0 and A ≤ 0, so that nothing large is exponentiated.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


def selective_scan_recurrent(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Run the definition, one token after another.

    Returns:
        y, (b, l, c), and the state after the last token, (b, c, n).
    """
    b, l, c = x.shape
    state = x.new_zeros(b, c, A.shape[-1]) if initial_state is None else initial_state
    outputs = []
    for t in range(l):
        if seq_idx is not None and t > 0:
            state = state.masked_fill((seq_idx[:, t] != seq_idx[:, t - 1])[:, None, None], 0)
        y, state = selective_scan_step_reference(state, x[:, t], delta[:, t], A, B[:, t], C[:, t])
        outputs.append(y)
    return torch.stack(outputs, dim=1), state


def selective_scan_step_reference(
    state: Tensor, x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor
) -> tuple[Tensor, Tensor]:
    """Advance the state (b,c,n) by one token: x and Δ (b,c), A (c,n), B and C (b,n).

    Returns:
        y, (b, c), and the new state, (b, c, n).
    """
    decay = (delta[..., None] * A).exp()  # (b, c, n)
    state = decay * state + (delta * x)[..., None] * B[:, None]
    return (state @ C[..., None]).squeeze(-1), state


def selective_scan_chunked(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
    chunk_size: int = 16,
) -> tuple[Tensor, Tensor]:
    """Run the definition chunk by chunk, keeping only the states between chunks for the backward.

    Returns:
        y, (b, l, c), and the state after the last token, (b, c, n).
    """
    fresh = None
    if seq_idx is not None:  # the first token of a document, except of the first
        fresh = torch.nn.functional.pad(seq_idx.diff(dim=1) != 0, (1, 0))  # (b, l)
    if initial_state is None:
        initial_state = x.new_zeros(x.shape[0], x.shape[2], A.shape[1])
    y, state, _ = _scan(x, delta, A, B, C, initial_state, fresh, chunk_size)
    return y, state


# --- one operator, so that a compiler takes the loop over tokens as a whole ------------------------------------------
# Inside, a chunk of q tokens has time first and channels last: x, Δ (q,b,c), A (n,c), B, C (q,b,n), states (q,b,n,c).
# So every token's state is one piece of memory, and the inner loops run over channels.

_FORWARD = (
    "(Tensor x, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor initial_state, Tensor? fresh, int q)"
    " -> (Tensor, Tensor, Tensor)"
)
_BACKWARD = (
    "(Tensor dy, Tensor dstate, Tensor x, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor borders, Tensor? fresh,"
    " int q) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_NEGLIGIBLE = {torch.float32: 1e-30, torch.float64: 1e-300}
"""A decay too small to matter, put to zero because products with subnormal numbers take a CPU many times as long."""


def _forward(
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, initial_state: Tensor, fresh: Tensor | None, q: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Scan.

    Returns:
        y, (b, l, c); the last state, (b, c, n); the states that enter the chunks, (⌈l/q⌉, b, n, c).
    """
    y, last, borders = _scan_shapes(x, delta, A, B, C, initial_state, fresh, q)
    A, state = A.mT.contiguous(), initial_state.mT
    for i, (here, x_, delta_, B_, C_, fresh_) in enumerate(_chunks(q, x, delta, B, C, fresh)):
        borders[i] = state
        _, states = _states(x_, delta_, A, B_, borders[i], fresh_)
        y[:, here] = torch.matmul(C_[:, :, None], states).squeeze(2).transpose(0, 1)  # (q, b, 1, n) @ (q, b, n, c)
        state = states[-1]
    return y, last.copy_(state.mT), borders


def _backward(
    dy: Tensor,
    dstate: Tensor,
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    borders: Tensor,
    fresh: Tensor | None,
    q: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Go back chunk by chunk, each chunk's states computed again.

    Returns:
        The gradients of x, Δ, A, B, C and the initial state.
    """
    dx, ddelta, dA, dB, dC, dinitial = _scan_backward_shapes(dy, dstate, x, delta, A, B, C, borders, fresh, q)
    A, dA_ = A.mT.contiguous(), torch.zeros_like(A.mT)
    dstate = dstate.mT
    for i, (here, x_, delta_, B_, C_, fresh_, dy_) in reversed([*enumerate(_chunks(q, x, delta, B, C, fresh, dy))]):
        decay, states = _states(x_, delta_, A, B_, borders[i], fresh_)  # (q, b, n, c) each
        dC[:, here] = torch.matmul(states, dy_[..., None]).squeeze(3).transpose(0, 1)
        # What reaches each state: its own output's gradient, and the next state's through the decay.
        dstates = C_[..., None] * dy_[:, :, None]  # (q, b, n, c)
        dstates[-1] += dstate
        for t in reversed(range(len(decay) - 1)):
            dstates[t].addcmul_(dstates[t + 1], decay[t + 1])
        dstate = dstates[0] * decay[0]
        # The input Δ·x ⊗ B.
        dinput = torch.matmul(B_[:, :, None], dstates).squeeze(2)  # (q, b, c)
        dB[:, here] = torch.matmul(dstates, (delta_ * x_)[..., None]).squeeze(3).transpose(0, 1)
        dx[:, here] = (dinput * delta_).transpose(0, 1)
        # The exponent Δ·A.
        dexponent = dstates.mul_(decay)
        dexponent[1:].mul_(states[:-1])
        dexponent[0].mul_(borders[i])
        ddelta[:, here] = (dexponent * A).sum(2).addcmul_(dinput, x_).transpose(0, 1)
        dA_ += dexponent.mul_(delta_[:, :, None]).sum((0, 1))
    return dx, ddelta, dA.copy_(dA_.mT), dB, dC, dinitial.copy_(dstate.mT)


def _states(
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor, state: Tensor, fresh: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The decay of every token of a chunk and the state after it, (q, b, n, c) both."""
    decay = (delta[:, :, None] * A).exp_()
    torch.threshold_(decay, _NEGLIGIBLE[decay.dtype], 0.0)
    if fresh is not None:
        decay.masked_fill_(fresh[:, :, None, None], 0)
    states = B[..., None] * (delta * x)[:, :, None]  # what each token adds; then what was there is added
    for t in range(len(states)):
        state = states[t].addcmul_(state, decay[t])
    return decay, states


def _chunks(q: int, *tensors: Tensor | None) -> Iterator[tuple[Any, ...]]:
    """Cut tensors (b, l, ·) into chunks: where each lies in time, and its pieces, (≤ q, b, ·)."""
    length = max(tensor.shape[1] for tensor in tensors if tensor is not None)
    for start in range(0, length, q):
        here = slice(start, start + q)
        yield here, *(None if tensor is None else tensor[:, here].transpose(0, 1).contiguous() for tensor in tensors)


def _scan_shapes(
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, initial_state: Tensor, fresh: Tensor | None, q: int
) -> tuple[Tensor, Tensor, Tensor]:
    b, l, c = x.shape
    n = A.shape[1]
    return x.new_empty(b, l, c), x.new_empty(b, c, n), x.new_empty((l + q - 1) // q, b, n, c)


def _scan_backward_shapes(
    dy: Tensor,
    dstate: Tensor,
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    borders: Tensor,
    fresh: Tensor | None,
    q: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    dx, ddelta, dA, dB, dC, dinitial = (tensor.new_empty(tensor.shape) for tensor in (x, delta, A, B, C, dstate))
    return dx, ddelta, dA, dB, dC, dinitial


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, delta, A, B, C, _, fresh, ctx.q = inputs
    ctx.save_for_backward(x, delta, A, B, C, output[2], fresh)


def _differentiate(ctx: Any, dy: Tensor, dstate: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    x, delta, A, B, C, borders, fresh = ctx.saved_tensors
    return *_scan_backward(dy, dstate, x, delta, A, B, C, borders, fresh, ctx.q), None, None


_scan = torch.library.custom_op("limbeck::selective_scan", _forward, mutates_args=(), schema=_FORWARD)
_scan.register_fake(_scan_shapes)
_scan.register_autograd(_differentiate, setup_context=_save)
_scan_backward = torch.library.custom_op(
    "limbeck::selective_scan_backward", _backward, mutates_args=(), schema=_BACKWARD
)
_scan_backward.register_fake(_scan_backward_shapes)
