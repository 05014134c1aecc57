"""SSD in readable torch, in three equal forms (Mamba-2, arXiv 2405.21060, sections 3 and 6).

    S_t = exp(a_t) · S_{t-1} + x_t ⊗ B_t        the state, (b, h, p, n)
    y_t = S_t · C_t

- `ssd_recurrent` is that loop, the definition.
- `ssd_quadratic` multiplies with the matrix of `ssd_matrix`, quadratic in the length, as attention would.
- `ssd_chunked` does the second within chunks and the first between them; linear in the length and made of matrix
  products. It is the one to train with.

Shapes: x (b,l,h,p), log_decay a (b,l,h), B and C (b,l,g,n), seq_idx (b,l), state (b,h,p,n). All tensors have one dtype,
float32 or float64. Head j uses head j // (h/g) of B and C. Nothing is ever exponentiated that could be large: a
difference of cumulative decays is formed first, and entries above the diagonal are masked before exp.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from limbeck.ops.checks import without_autocast


def ssd_recurrent(
    x: Tensor,
    log_decay: Tensor,
    B: Tensor,
    C: Tensor,
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Run the definition, one token after another.

    Returns:
        y, (b, l, h, p), and the state after the last token, (b, h, p, n).
    """
    b, l, h, p = x.shape
    state = x.new_zeros(b, h, p, B.shape[-1]) if initial_state is None else initial_state
    outputs = []
    for t in range(l):
        if seq_idx is not None and t > 0:
            fresh = seq_idx[:, t] != seq_idx[:, t - 1]  # (b,)
            state = state.masked_fill(fresh[:, None, None, None], 0)
        y, state = ssd_step_reference(state, x[:, t], log_decay[:, t], B[:, t], C[:, t])
        outputs.append(y)
    return torch.stack(outputs, dim=1), state


def ssd_step_reference(state: Tensor, x: Tensor, log_decay: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    """Advance the state (b,h,p,n) by one token: x (b,h,p), log_decay (b,h), B and C (b,g,n).

    Returns:
        y, (b, h, p), and the new state, (b, h, p, n).
    """
    heads = x.shape[1] // B.shape[1]
    B, C = B.repeat_interleave(heads, dim=1), C.repeat_interleave(heads, dim=1)  # (b, h, n)
    state = log_decay.exp()[..., None, None] * state + x[..., None] * B[..., None, :]  # (b, h, p, n)
    return (state @ C[..., None]).squeeze(-1), state


def ssd_matrix_reference(log_decay: Tensor, B: Tensor, C: Tensor, seq_idx: Tensor | None = None) -> Tensor:
    """M[t,s] = (C_t · B_s) · exp(a_{s+1} + … + a_t) for s ≤ t in one document, else 0.

    Returns:
        M, (b, h, l, l).
    """
    heads = log_decay.shape[-1] // B.shape[2]
    scores = torch.einsum("btgn,bsgn->bgts", C, B).repeat_interleave(heads, dim=1)  # (b, h, t, s)
    return scores * _decay_matrix(log_decay.transpose(1, 2), None if seq_idx is None else seq_idx[:, None])


def ssd_quadratic(
    x: Tensor,
    log_decay: Tensor,
    B: Tensor,
    C: Tensor,
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Materialise M and multiply.

    Returns:
        y, (b, l, h, p), and the state after the last token, (b, h, p, n).
    """
    heads = x.shape[2] // B.shape[2]
    y = torch.einsum("bhts,bshp->bthp", ssd_matrix_reference(log_decay, B, C, seq_idx), x)
    decay = _decay_matrix(log_decay.transpose(1, 2), None if seq_idx is None else seq_idx[:, None])[
        :, :, -1
    ]  # (b, h, s)
    B, C = B.repeat_interleave(heads, dim=2), C.repeat_interleave(heads, dim=2)  # (b, l, h, n)
    state = torch.einsum("bhs,bshp,bshn->bhpn", decay, x, B)
    if initial_state is not None:
        carried = log_decay.cumsum(1).exp()  # (b, l, h), decay of the initial state up to and with t
        if seq_idx is not None:
            carried = carried.masked_fill((seq_idx != seq_idx[:, :1])[..., None], 0)
        y = y + torch.einsum("blh,bhpn,blhn->blhp", carried, initial_state, C)
        state = state + carried[:, -1, :, None, None] * initial_state
    return y, state


def ssd_chunked(
    x: Tensor,
    log_decay: Tensor,
    B: Tensor,
    C: Tensor,
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
    chunk_size: int = 32,
) -> tuple[Tensor, Tensor]:
    """Multiply with M within chunks of q tokens, and pass the state from chunk to chunk.

    Returns:
        y, (b, l, h, p), and the state after the last token, (b, h, p, n).
    """
    b, l, h, p = x.shape
    g, n = B.shape[2:]
    q = min(chunk_size, l)
    if g != h:
        B, C = B.repeat_interleave(h // g, dim=2), C.repeat_interleave(h // g, dim=2)
    padding = -l % q  # tokens that decay nothing and add nothing, in the last document
    if padding:
        x, log_decay, B, C = (F.pad(t, (0, 0) * (t.ndim - 2) + (0, padding)) for t in (x, log_decay, B, C))
        if seq_idx is not None:
            seq_idx = torch.cat([seq_idx, seq_idx[:, -1:].expand(-1, padding)], dim=1)
    if initial_state is None:
        initial_state = x.new_zeros(b, h, p, n)
    y, state = _ChunkedSSD.apply(x, log_decay, B, C, initial_state, seq_idx, q)
    return y[:, :l], state


class _ChunkedSSD(torch.autograd.Function):
    """The chunked form, with its backward written out, in place: cheaper than recording every small step.

    N = c·b·h is one batch of all chunks of all heads. `states[i]` is the state that enters chunk i, `dstates[i]` its
    gradient.
    """

    @staticmethod
    def forward(ctx, x, log_decay, B, C, initial_state, seq_idx, q):
        b, l, h, p = x.shape
        c, n = l // q, B.shape[-1]
        x, B, C = (_to_chunks(t, q) for t in (x, B, C))  # (N, q, ·)
        within, to_end, from_start = _chunk_decays(log_decay, seq_idx, q)
        # 1. Within chunks.
        M = torch.bmm(C, B.mT).mul_(within)  # (N, q, q)
        y = torch.bmm(M, x)  # (N, q, p)
        # 2. What each chunk adds to the state at its end; then from chunk to chunk.
        states = x.new_empty(c + 1, b, h, p, n)
        states[0] = initial_state
        torch.bmm((x * to_end).mT, B, out=states[1:].view(-1, p, n))
        across = from_start[:, -1].view(c, b, h, 1, 1)
        for i in range(c):
            states[i + 1].addcmul_(states[i], across[i])
        # 3. The state that enters a chunk is read by its tokens.
        y.baddbmm_(C * from_start, states[:-1].view(-1, p, n).mT)
        ctx.save_for_backward(x, B, C, M, states, within, to_end, from_start)
        return _from_chunks(y, b, h), states[c].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dstate):  # pyright: ignore[reportIncompatibleMethodOverride]
        with without_autocast(dy):  # backward may be called where autocast is on, and products must stay wide
            return *_gradients(ctx.saved_tensors, dy, dstate), None, None


def _gradients(saved: tuple[Tensor, ...], dy: Tensor, dstate: Tensor) -> tuple[Tensor, ...]:
    """Of x, log_decay, B, C and the initial state: the three steps of the forward, backwards."""
    x, B, C, M, states, within, to_end, from_start = saved
    c, (b, h, p, n) = len(states) - 1, states.shape[1:]
    dy = _to_chunks(dy, x.shape[1])  # (N, q, p)
    # 3. The state that enters a chunk, as its tokens read it.
    entering = states[:-1].view(-1, p, n)
    read = C * from_start  # (N, q, n)
    dread = torch.bmm(dy, entering)
    dfrom_start = torch.linalg.vecdot(dread, read)  # (N, q), with respect to the logarithm, as all of these
    dC = dread.mul_(from_start)
    # 2. From chunk to chunk, backwards; then what each chunk added.
    dstates = torch.empty_like(states)
    dstates[c] = dstate
    torch.bmm(dy.mT, read, out=dstates[:-1].view(-1, p, n))
    across = from_start[:, -1].view(c, b, h, 1, 1)
    for i in reversed(range(c)):
        dstates[i].addcmul_(dstates[i + 1], across[i])
    dadded = dstates[1:].view(-1, p, n)
    dfrom_start[:, -1] += torch.linalg.vecdot(dadded.flatten(1), entering.flatten(1)) * from_start[:, -1, 0]
    written = x * to_end  # (N, q, p)
    dB = torch.bmm(written, dadded)
    dx = torch.bmm(B, dadded.mT)
    dto_end = torch.linalg.vecdot(dx, written)  # (N, q)
    dx.mul_(to_end)
    # 1. Within chunks.
    dx.baddbmm_(M.mT, dy)
    dM = torch.bmm(dy, x.mT)  # (N, q, q)
    dlog_decay = _log_decay_gradient(dM * M, dto_end, dfrom_start)  # (N, q)
    dscores = dM.mul_(within)
    dC.baddbmm_(dscores, B)
    dB.baddbmm_(dscores.mT, C)
    dx, dB, dC, dlog_decay = (_from_chunks(t, b, h) for t in (dx, dB, dC, dlog_decay[..., None]))
    return dx, dlog_decay.squeeze(-1), dB, dC, dstates[0]


_FLOOR = {torch.float32: (-110.0, 1e-30), torch.float64: (-750.0, 1e-300)}
"""A log decay whose exp is 0, so that cumulative sums need go no lower; and a decay too small to matter, put to zero
because products with subnormal numbers take a CPU many times as long."""


def _chunk_decays(log_decay: Tensor, seq_idx: Tensor | None, q: int) -> tuple[Tensor, Tensor, Tensor]:
    """The decays of every chunk, from log_decay (b, l, h), zero between documents.

    Returns:
        From token s to token t, (N, q, q) at [t, s]; from each token to the chunk's end, (N, q, 1); from the entering
        state to each token, (N, q, 1).
    """
    b, _, h = log_decay.shape
    lowest, negligible = _FLOOR[log_decay.dtype]
    log_decay = _to_chunks(log_decay[..., None], q).squeeze(-1).clamp(min=lowest)  # (N, q)
    past = torch.ones(q, q, dtype=log_decay.dtype, device=log_decay.device).tril()  # 1 at [t, s] where s ≤ t
    # a_u at [t, u] where u ≤ t, summed over u > s: no sum is a difference of two longer ones
    sums = (log_decay[:, None] * past).flatten(0, 1) @ past.tril(-1)
    within = sums.view(-1, q, q).masked_fill_(past == 0, -torch.inf).exp_()
    to_end = within[:, -1].clone()
    from_start = log_decay.cumsum(-1).exp_()
    decays = within, to_end, from_start
    if seq_idx is not None:
        ids = _to_chunks(seq_idx[:, :, None, None].expand(-1, -1, h, -1), q).squeeze(-1)  # (N, q)
        before = ids.view(-1, b * h, q)[:, :, -1].roll(1, dims=0)  # (c, b·h), the last id of the chunk before
        before[0] = ids.view(-1, b * h, q)[0, :, 0]
        within.masked_fill_(ids[:, :, None] != ids[:, None, :], 0)
        to_end.masked_fill_(ids != ids[:, -1:], 0)
        from_start.masked_fill_(ids != before.view(-1, 1), 0)
    for decay in decays:
        torch.threshold_(decay, negligible, 0.0)
    return within, to_end[..., None], from_start[..., None]


def _log_decay_gradient(dwithin: Tensor, dto_end: Tensor, dfrom_start: Tensor) -> Tensor:
    """Gather the gradient of the log decay of each token from those of the sums it is part of.

    a_u is part of within[t, s] for s < u ≤ t, of to_end[s] for s < u, and of from_start[t] for u ≤ t. Only these are
    added up: a difference of two longer sums would drown in rounding where decay is strong.

    Args:
        dwithin: (N, q, q), at [t, s].
        dto_end: (N, q).
        dfrom_start: (N, q).

    Returns:
        (N, q).
    """
    q = dto_end.shape[-1]
    before = dto_end.new_ones(q, q).triu(1)  # at [s, u], 1 where s < u
    gradient = (dwithin.flatten(0, 1) @ before).view_as(dwithin).tril_().sum(1)  # over s < u, then over t ≥ u
    return gradient.addmm_(dto_end, before).addmm_(dfrom_start, 1 - before)


def _to_chunks(tensor: Tensor, q: int) -> Tensor:
    """(b, c·q, h, k) → (c·b·h, q, k)."""
    b, l, h, k = tensor.shape
    return tensor.reshape(b, l // q, q, h, k).permute(1, 0, 3, 2, 4).reshape(-1, q, k)


def _from_chunks(tensor: Tensor, b: int, h: int) -> Tensor:
    """(c·b·h, q, k) → (b, c·q, h, k)."""
    q, k = tensor.shape[1:]
    return tensor.view(-1, b, h, q, k).permute(1, 0, 3, 2, 4).reshape(b, -1, h, k)


def _decay_matrix(log_decay: Tensor, seq_idx: Tensor | None) -> Tensor:
    """exp(a_{s+1} + … + a_t) at [t, s] for s ≤ t in one document, else 0: (…, q) → (…, q, q).

    Sums are made back from t, never as a difference of two long sums, so that neither a long sequence nor a decay of
    −inf costs precision. What is too small to matter is 0.
    """
    q = log_decay.shape[-1]
    past = torch.ones(q, q, dtype=torch.bool, device=log_decay.device).tril()  # s ≤ t
    following = F.pad(log_decay[..., 1:], (0, 1))  # a_{s+1} at s
    terms = following[..., None, :].expand(*log_decay.shape, q).masked_fill(~past.tril(-1), 0)  # at [t, s]
    sums = terms.flip(-1).cumsum(-1).flip(-1)  # along memory: along t a CPU takes several times as long
    visible = past & ~(sums.detach() <= math.log(_FLOOR[log_decay.dtype][1]))  # what is not a number stays it
    if seq_idx is not None:
        visible = visible & (seq_idx[..., :, None] == seq_idx[..., None, :])
    return sums.masked_fill(~visible, -torch.inf).exp()
