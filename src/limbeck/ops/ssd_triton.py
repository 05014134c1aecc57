"""`ssd` in Triton: the forward walks the chunks of a head with the state in registers, the backward takes all at once.

    S_e = e^{w_e} S + Σ_s e^{w_e − w_s} x_s ⊗ B_s                       w: log decay summed since the chunk's start
    y_t = e^{w_t} C_t S + Σ_{s ≤ t} e^{w_t − w_s} (C_t · B_s) x_s       S: the state that enters the chunk

1. `ssd_summed` makes w, once for both directions.
2. `ssd_forward` walks in time. With gradients wanted it keeps the S of every chunk, in the inputs' dtype, since that is
   how a matrix product reads it.
3. `ssd_walk` walks back in time and keeps dS, the gradient of the state that leaves each chunk.
4. `ssd_gradients` makes all gradients of a chunk, of S and dS, all chunks side by side.

Where heads and batch do not fill the card, sequences are cut into segments that are walked side by side: `ssd_walk`
makes what each adds to the state, `ssd_pass_on` adds these up.

d log_decay is gathered without a difference of long sums. With W[t,s] the share of (t, s) in ⟨dy, y⟩,

    da_u = Σ_{t ≥ u > s} W[t,s]     within the chunk: row sums minus column sums of the same float32 numbers
         + Σ_{t ≥ u} C_t · dC_t     of what came in with S
         + Σ_{s < u} B_s · dB_s     of what goes out with dS
         + e^{w_e} ⟨S, dS⟩          of what goes through

States are held transposed, (n, p). w is to base 2; no decay is below 2 to the −200, which is 0 in float32, and so is
that at the first token of a document. For float32 inputs w comes in two parts, so that the difference of two of them is
as exact as the log decays are.
"""

# Triton's launches and cdiv are not what pyright takes them for.
# pyright: reportCallIssue=false, reportArgumentType=false, reportReturnType=false, reportGeneralTypeIssues=false

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from limbeck.ops.cards import Card, card_of
from limbeck.ops.inputs import document_starts, rows_whole, whole_or

_LOG2E = tl.constexpr(1.4426950408889634)
_NOTHING = tl.constexpr(-200.0)


# --- pieces of all kernels --------------------------------------------------------------------------------------------


@triton.jit
def _tile(
    pointer, stride, start, l, column, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    """Rows start… and columns column… of a matrix (l, WIDTH), as (ROWS, COLUMNS); zero beyond. `start` is int64."""
    rows, columns = tl.arange(0, ROWS), column + tl.arange(0, COLUMNS)
    pointers = pointer + start * stride + rows[:, None] * stride + columns[None, :]
    inside = (rows < (l - start).to(tl.int32))[:, None]
    if WIDTH % COLUMNS != 0:
        inside = inside & (columns < WIDTH)[None, :]
    return tl.load(pointers, mask=inside, other=0.0)


@triton.jit
def _put(
    pointer, stride, start, l, column, tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    """Store a tile where `_tile` loads it."""
    rows, columns = tl.arange(0, ROWS), column + tl.arange(0, COLUMNS)
    pointers = pointer + start * stride + rows[:, None] * stride + columns[None, :]
    inside = (rows < (l - start).to(tl.int32))[:, None]
    if WIDTH % COLUMNS != 0:
        inside = inside & (columns < WIDTH)[None, :]
    tl.store(pointers, tile.to(pointer.dtype.element_ty), mask=inside)


@triton.jit
def _state_at(column, BN: tl.constexpr, BP: tl.constexpr, N: tl.constexpr, P: tl.constexpr):
    """Offsets of a tile (n, p) in a state (P, N), and which of them exist."""
    n, p = tl.arange(0, BN)[:, None], column + tl.arange(0, BP)[None, :]
    return p * N + n, (n < N) & (p < P)


@triton.jit
def _within(w_ptr, plane, Q: tl.constexpr, EXACT: tl.constexpr):
    """Decay from s to t at [t, s]: 0 above the diagonal."""
    t, s = tl.arange(0, Q)[:, None], tl.arange(0, Q)[None, :]
    exponent = tl.load(w_ptr + t) - tl.load(w_ptr + s)
    if EXACT:
        exponent += tl.load(w_ptr + plane + t) - tl.load(w_ptr + plane + s)
    return tl.exp2(tl.where(t >= s, exponent, -float("inf")))


@triton.jit
def _across(w_ptr, plane, Q: tl.constexpr, EXACT: tl.constexpr):
    """The chunk's whole log decay."""
    total = tl.load(w_ptr + Q - 1)
    if EXACT:
        total += tl.load(w_ptr + plane + Q - 1)
    return total


@triton.jit
def _to_end(w_ptr, plane, Q: tl.constexpr, EXACT: tl.constexpr):
    """Decay from each token to the chunk's end."""
    t = tl.arange(0, Q)
    exponent = tl.load(w_ptr + Q - 1) - tl.load(w_ptr + t)
    if EXACT:
        exponent += tl.load(w_ptr + plane + Q - 1) - tl.load(w_ptr + plane + t)
    return tl.exp2(exponent)


@triton.jit
def _from_start(w_ptr, plane, Q: tl.constexpr, EXACT: tl.constexpr):
    """Decay from before the chunk to each token."""
    t = tl.arange(0, Q)
    exponent = tl.load(w_ptr + t)
    if EXACT:
        exponent += tl.load(w_ptr + plane + t)
    return tl.exp2(exponent)


# --- the kernels ------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["l", "h", "plane"])
def ssd_summed(
    a_ptr, fresh_ptr, w_ptr, a_b, a_l, a_h, l, h, plane,
    HAS_FRESH: tl.constexpr, Q: tl.constexpr, HEADS: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Sum log decays from the start of each chunk: w (b, h, whole chunks of l), in one or two planes."""
    t = tl.program_id(0) * Q + tl.arange(0, Q)[:, None]
    heads = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[None, :]
    i_b = tl.program_id(2).to(tl.int64)
    inside = (t < l) & (heads < h)
    a = tl.load(a_ptr + i_b * a_b + t.to(tl.int64) * a_l + heads * a_h, mask=inside, other=0.0) * _LOG2E
    if HAS_FRESH:
        a = tl.where(tl.load(fresh_ptr + i_b * l + t, mask=t < l, other=0) != 0, _NOTHING, a)
    a = tl.maximum(a, _NOTHING)
    at = w_ptr + (i_b * h + heads) * tl.num_programs(0) * Q + t
    if EXACT:
        summed = tl.cumsum(a.to(tl.float64), 0)
        w = summed.to(tl.float32)
        tl.store(at, w, mask=heads < h)
        tl.store(at + plane, (summed - w).to(tl.float32), mask=heads < h)
    else:
        tl.store(at, tl.cumsum(a, 0), mask=heads < h)


@triton.jit(do_not_specialize=["l", "chunks", "all_chunks"])
def ssd_walk(
    x_ptr, w_ptr, B_ptr, entering_ptr, states_ptr, left_ptr, totals_ptr,
    x_b, x_h, B_b, B_g, l, chunks, all_chunks,
    h: tl.constexpr, g: tl.constexpr, x_l: tl.constexpr, B_l: tl.constexpr,
    BACK: tl.constexpr, KEEP: tl.constexpr, HAS_ENTERING: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
    BP: tl.constexpr, BN: tl.constexpr, Q: tl.constexpr, PRECISION: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Walk the states of a segment of `chunks` chunks; grid (b·h·tiles of p, segments).

    With KEEP, from the state that enters it: keep the state before each chunk, and leave the one after the last
    segment. Without, from zero: leave what each segment adds, and its log decay. With BACK, x and B are dy and C,
    states are gradients of states, and before is after.
    """
    tiles: tl.constexpr = (P + BP - 1) // BP
    row, column = tl.program_id(0) // tiles, tl.program_id(0) % tiles * BP
    i_b, i_h = (row // h).to(tl.int64), row % h
    rows = tl.num_programs(0) // tiles
    segment = tl.program_id(1).to(tl.int64)
    if BACK and not KEEP:
        segment += 1  # what the last one on the way adds nobody needs: back in time, the first
    place = segment * rows + row
    x_ptr += i_b * x_b + i_h * x_h
    B_ptr += i_b * B_b + (i_h // (h // g)) * B_g
    plane = rows * all_chunks * Q
    w_ptr += row.to(tl.int64) * all_chunks * Q
    states_ptr += row.to(tl.int64) * all_chunks * P * N
    at, exists = _state_at(column, BN, BP, N, P)
    state = tl.zeros((BN, BP), tl.float32)
    if HAS_ENTERING:
        state = tl.load(entering_ptr + place * P * N + at, mask=exists, other=0.0)
    total = tl.zeros((), tl.float32)
    first = segment * chunks
    steps = tl.minimum(chunks, all_chunks - first)
    for step in tl.range(steps):
        i = first + (steps - 1 - step if BACK else step)
        start = i * Q
        x = _tile(x_ptr, x_l, start, l, column, Q, BP, P)
        B = _tile(B_ptr, B_l, start, l, 0, Q, BN, N)
        here = w_ptr + start
        if KEEP:
            _keep(states_ptr, i, column, state, BN, BP, N, P)
        across = _across(here, plane, Q, EXACT)
        total += across
        reach = _from_start(here, plane, Q, EXACT) if BACK else _to_end(here, plane, Q, EXACT)
        state *= tl.exp2(across)
        state = tl.dot(tl.trans(B), (x * reach[:, None]).to(B.dtype), acc=state, input_precision=PRECISION)  # (n, p)
    if KEEP:
        if segment == (0 if BACK else tl.num_programs(1) - 1):
            tl.store(left_ptr + row.to(tl.int64) * P * N + at, state, mask=exists)
    else:
        tl.store(left_ptr + place * P * N + at, state, mask=exists)
        if column == 0:
            tl.store(totals_ptr + place, total)


@triton.jit(do_not_specialize=["segments", "rows"])
def ssd_pass_on(
    states_ptr, totals_ptr, first_ptr, segments, rows,
    BACK: tl.constexpr, HAS_FIRST: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """From what segments add to the state to the state that enters each, in place: (segments, b·h, p·n)."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    exists = at < SIZE
    state = tl.zeros((BLOCK,), tl.float32)
    if HAS_FIRST:
        state = tl.load(first_ptr + row * SIZE + at, mask=exists, other=0.0)
    for i in range(segments):
        place = (segments - 1 - i if BACK else i) * rows + row
        added = state
        if i < segments - 1:
            added = tl.load(states_ptr + place * SIZE + at, mask=exists, other=0.0)
        tl.store(states_ptr + place * SIZE + at, state, mask=exists)
        if i < segments - 1:
            state = state * tl.exp2(tl.load(totals_ptr + place)) + added


@triton.jit(do_not_specialize=["l", "chunks", "all_chunks"])
def ssd_forward(
    x_ptr, w_ptr, B_ptr, C_ptr, entering_ptr, y_ptr, last_ptr, states_ptr,
    x_b, x_h, B_b, B_g, C_b, C_g, l, chunks, all_chunks,
    h: tl.constexpr, g: tl.constexpr, x_l: tl.constexpr, B_l: tl.constexpr, C_l: tl.constexpr,
    HAS_ENTERING: tl.constexpr, KEEP: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
    BP: tl.constexpr, BN: tl.constexpr, Q: tl.constexpr, PRECISION: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """The outputs of a segment, the last state and, with KEEP, that before each chunk; grid as that of `ssd_walk`."""
    tiles: tl.constexpr = (P + BP - 1) // BP
    row, column = tl.program_id(0) // tiles, tl.program_id(0) % tiles * BP
    i_b, i_h = (row // h).to(tl.int64), row % h
    segment = tl.program_id(1).to(tl.int64)
    x_ptr += i_b * x_b + i_h * x_h
    B_ptr += i_b * B_b + (i_h // (h // g)) * B_g
    C_ptr += i_b * C_b + (i_h // (h // g)) * C_g
    plane = tl.num_programs(0) // tiles * all_chunks * Q
    w_ptr += row.to(tl.int64) * all_chunks * Q
    y_ptr += (i_b * l * h + i_h) * P
    states_ptr += row.to(tl.int64) * all_chunks * P * N
    at, exists = _state_at(column, BN, BP, N, P)
    state = tl.zeros((BN, BP), tl.float32)
    if HAS_ENTERING:
        place = segment * (tl.num_programs(0) // tiles) + row
        state = tl.load(entering_ptr + place * P * N + at, mask=exists, other=0.0)
    first = segment * chunks
    for step in tl.range(tl.minimum(chunks, all_chunks - first)):
        i = first + step
        start = i * Q
        x = _tile(x_ptr, x_l, start, l, column, Q, BP, P)
        B = _tile(B_ptr, B_l, start, l, 0, Q, BN, N)
        C = _tile(C_ptr, C_l, start, l, 0, Q, BN, N)
        here = w_ptr + start
        if KEEP:
            _keep(states_ptr, i, column, state, BN, BP, N, P)
        # 1. What the tokens read of the state that enters.
        y = tl.dot(C, state.to(C.dtype), input_precision=PRECISION)  # (q, p)
        y *= _from_start(here, plane, Q, EXACT)[:, None]
        # 2. What they read of each other.
        M = tl.dot(C, tl.trans(B), input_precision=PRECISION) * _within(here, plane, Q, EXACT)  # (q, q)
        y = tl.dot(M.to(x.dtype), x, acc=y, input_precision=PRECISION)
        _put(y_ptr, h * P, start, l, column, y, Q, BP, P)
        # 3. The state that leaves.
        written = (x * _to_end(here, plane, Q, EXACT)[:, None]).to(B.dtype)
        state *= tl.exp2(_across(here, plane, Q, EXACT))
        state = tl.dot(tl.trans(B), written, acc=state, input_precision=PRECISION)  # (n, p)
    if segment == tl.num_programs(1) - 1:
        tl.store(last_ptr + row.to(tl.int64) * P * N + at, state, mask=exists)


@triton.jit
def _kept_at(column, BN: tl.constexpr, BP: tl.constexpr, N: tl.constexpr, P: tl.constexpr):
    """Offsets of a tile (n, p) in a kept state, which lies transposed, (N, P)."""
    n, p = tl.arange(0, BN)[:, None], column + tl.arange(0, BP)[None, :]
    return n * P + p, (n < N) & (p < P)


@triton.jit
def _keep(states_ptr, i, column, state, BN: tl.constexpr, BP: tl.constexpr, N: tl.constexpr, P: tl.constexpr):
    at, exists = _kept_at(column, BN, BP, N, P)
    tl.store(states_ptr + i * P * N + at, state.to(states_ptr.dtype.element_ty), mask=exists)


@triton.jit(do_not_specialize=["l", "all_chunks"])
def ssd_gradients(
    dy_ptr, x_ptr, w_ptr, B_ptr, C_ptr, fresh_ptr, states_ptr, dstates_ptr, dx_ptr, da_ptr, dB_ptr, dC_ptr,
    dy_b, dy_h, x_b, x_h, B_b, B_g, C_b, C_g, l, all_chunks,
    h: tl.constexpr, g: tl.constexpr, dy_l: tl.constexpr, x_l: tl.constexpr, B_l: tl.constexpr, C_l: tl.constexpr,
    HAS_FRESH: tl.constexpr, SPAN: tl.constexpr, P: tl.constexpr, N: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr,
    Q: tl.constexpr, PRECISION: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """All gradients of SPAN chunks of a head; grid (h·tiles of p, chunks / SPAN, b).

    dB and dC are (tiles, b, l, h, n), da is (tiles, b, l, h): parts of sums.
    """
    tiles: tl.constexpr = (P + BP - 1) // BP
    i_h, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    column = tile * BP
    first, i_b = tl.program_id(1).to(tl.int64) * SPAN, tl.program_id(2).to(tl.int64)
    row, batch = i_b * h + i_h, tl.num_programs(2)
    t = tl.arange(0, Q)
    plane = batch * h * all_chunks * Q
    kept, exists = _kept_at(column, BN, BP, N, P)
    part = (tile * batch + i_b) * l * h + i_h
    dy_ptr += i_b * dy_b + i_h * dy_h
    x_ptr += i_b * x_b + i_h * x_h
    B_ptr += i_b * B_b + (i_h // (h // g)) * B_g
    C_ptr += i_b * C_b + (i_h // (h // g)) * C_g
    for step in tl.range(1 if SPAN == 1 else tl.minimum(SPAN, all_chunks - first)):
        i = first + step
        start = i * Q
        here = w_ptr + row * all_chunks * Q + start
        state_at = (row * all_chunks + i) * P * N + kept
        dy = _tile(dy_ptr, dy_l, start, l, column, Q, BP, P)
        x = _tile(x_ptr, x_l, start, l, column, Q, BP, P)
        B = _tile(B_ptr, B_l, start, l, 0, Q, BN, N)
        C = _tile(C_ptr, C_l, start, l, 0, Q, BN, N)
        state = tl.load(states_ptr + state_at, mask=exists, other=0.0)  # (n, p)
        dstate = tl.load(dstates_ptr + state_at, mask=exists, other=0.0)  # (n, p)
        from_start, to_end = _from_start(here, plane, Q, EXACT), _to_end(here, plane, Q, EXACT)
        # 1. The log decay, of what comes in, goes out and goes through. The products with states are made again below:
        #    registers are what is scarce (and "ieee", which means nothing to narrow types, keeps the compiler from
        #    holding on to them).
        entered = tl.dot(dy, tl.trans(state), input_precision="ieee")  # (q, n)
        left = tl.dot(x, tl.trans(dstate), input_precision="ieee")  # (q, n)
        out = tl.sum(left * B, 1) * to_end
        through = tl.sum(tl.sum(state.to(tl.float32) * dstate, 1), 0) * tl.exp2(_across(here, plane, Q, EXACT))
        da = tl.sum(entered * C, 1) * from_start
        between = tl.cumsum(out, 0) - out + through
        # 2. What the tokens read of each other.
        decay = _within(here, plane, Q, EXACT)
        M = tl.dot(C, tl.trans(B), input_precision=PRECISION) * decay  # (q, q)
        dM = tl.dot(dy, tl.trans(x), input_precision=PRECISION)  # (q, q)
        W = tl.where(t[:, None] > t[None, :], M * dM, 0.0)
        da += tl.sum(W, 1) - tl.sum(W, 0)
        dscores = (dM * decay).to(x.dtype)
        # 3. dx and dB, with what was left to the state that leaves.
        dx = tl.dot(B, dstate, input_precision=PRECISION) * to_end[:, None]  # (q, p)
        dx = tl.dot(tl.trans(M.to(x.dtype)), dy, acc=dx, input_precision=PRECISION)
        _put(dx_ptr + (i_b * l * h + i_h) * P, h * P, start, l, column, dx, Q, BP, P)
        dB = tl.dot(x, tl.trans(dstate), input_precision=PRECISION) * to_end[:, None]  # (q, n)
        dB = tl.dot(tl.trans(dscores), C, acc=dB, input_precision=PRECISION)
        _put(dB_ptr + part * N, h * N, start, l, 0, dB, Q, BN, N)
        # 4. dC, with what was read of the state that enters.
        dC = tl.dot(dy, tl.trans(state), input_precision=PRECISION) * from_start[:, None]  # (q, n)
        dC = tl.dot(dscores, B, acc=dC, input_precision=PRECISION)
        _put(dC_ptr + part * N, h * N, start, l, 0, dC, Q, BN, N)
        da = tl.cumsum(da, 0, reverse=True) + between
        inside = t < (l - start).to(tl.int32)
        if HAS_FRESH:
            da = tl.where(tl.load(fresh_ptr + i_b * l + start + t, mask=inside, other=0) != 0, 0.0, da)
        tl.store(da_ptr + part + (start + t) * h, da, mask=inside)


# --- launching --------------------------------------------------------------------------------------------------------


class Launch(NamedTuple):
    """How the kernels are launched.

    Attributes:
        q: Tokens of a chunk.
        bp: Columns of a tile of p.
        stages: Of `ssd_forward`.
        stages_walk: Of `ssd_walk`.
        stages_back: Of `ssd_gradients`.
        span: Chunks of a program of `ssd_gradients`, which loads the next while it works on one.
        warps: Of all.
    """

    q: int
    bp: int
    stages: int = 1
    stages_walk: int = 1
    stages_back: int = 1
    span: int = 1
    warps: int = 4


@functools.cache
def launch_for(p: int, n: int, dtype: torch.dtype, card: Card) -> Launch:
    """The first of the table that fits the card's shared memory; what Hopper is given was measured on an H200."""
    bn, narrow, widest = padded(n), dtype.itemsize == 2, min(64, padded(p))
    table = []
    if narrow and card.capability >= (9, 0):
        if bn <= 64:
            table.append(Launch(64, widest, stages=3, stages_walk=3, stages_back=2, span=4))
        if bn <= 128:
            table.append(Launch(64, widest, stages=2, stages_walk=3))
    if narrow and bn <= 128:
        table.append(Launch(32, widest, stages=2, stages_walk=2))
    if narrow or bn <= 64:
        table.append(Launch(32, min(32, widest), warps=8))
    table.append(Launch(16, 16, warps=8))
    for launch in table:
        if _shared(launch, bn, dtype.itemsize) <= card.shared_memory:
            return launch
    return table[-1]


def _shared(launch: Launch, bn: int, size: int) -> int:
    """About the bytes of shared memory of the larger of walk and gradients: tiles loaded, and operands made of them."""
    q, bp = launch.q, launch.bp
    gradients = ((2 * q * bp + 2 * q * bn + 2 * bn * bp) * launch.stages_back + 2 * q * q) * size + q * bn * 4
    walk = ((q * bp + 2 * q * bn) * max(launch.stages, launch.stages_walk - 1) + q * bp + bn * bp) * size
    return max(gradients, walk)


def padded(width: int) -> int:
    """The width of a tile that holds this many columns, or the first tile of them."""
    return max(16, 1 << (width - 1).bit_length())


def _cdiv(a: int, b: int) -> int:
    """A over b, rounded up; Triton's own takes microseconds."""
    return -(-a // b)


def segments_for(programs: int, chunks: int, card: Card) -> int:
    """Into how many segments to cut the sequence, so that two programs are at work on every multiprocessor."""
    return max(1, min(2 * card.multiprocessors // programs, chunks // 4))


class _Shape(NamedTuple):
    """What the launches of one call share: rows is b·h, a segment has `chunks` of the `all_chunks` chunks."""

    launch: Launch
    tiles: int
    rows: int
    all_chunks: int
    segments: int
    chunks: int
    constants: dict[str, Any]

    @classmethod
    def of(cls, x: Tensor, B: Tensor) -> "_Shape":
        (b, l, h, p), n = x.shape, B.shape[-1]
        card = card_of(x)
        launch = launch_for(int(p), int(n), x.dtype, card)
        tiles, all_chunks = _cdiv(p, launch.bp), _cdiv(l, launch.q)
        chunks = _cdiv(all_chunks, segments_for(b * h * tiles, all_chunks, card))
        exact = x.dtype == torch.float32
        constants = {
            "P": p,
            "N": n,
            "BN": padded(n),
            "Q": launch.q,
            "PRECISION": "ieee" if exact else "tf32",  # of products of float32 alone
            "EXACT": exact,
        }
        return cls(launch, tiles, b * h, all_chunks, _cdiv(all_chunks, chunks), chunks, constants)

    def walk(self, segments: int, stages: int) -> tuple[tuple[int, int], dict[str, Any]]:
        """The grid of a walk of so many segments, and how it is launched."""
        options = {"BP": self.launch.bp, "num_warps": self.launch.warps, "num_stages": stages}
        return (self.rows * self.tiles, segments), self.constants | options


def ssd_triton(
    x: Tensor, log_decay: Tensor, B: Tensor, C: Tensor, initial_state: Tensor | None, seq_idx: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Run the kernels: see `limbeck.ops.ssd`. x, B and C have one dtype.

    Returns:
        y, (b, l, h, p) in x's dtype, and the state after the last token, (b, h, p, n) in float32.
    """
    fresh = None if seq_idx is None else document_starts(seq_idx)
    inputs = (x, log_decay, B, C, initial_state)
    keep = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in inputs)
    y, state, _, _ = _ssd(*inputs, fresh, keep)
    return y, state


def _forward(
    x: Tensor,
    log_decay: Tensor,
    B: Tensor,
    C: Tensor,
    initial_state: Tensor | None,
    fresh: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shape = _Shape.of(x, B)
    y, last, w, states = outputs = _shapes(x, log_decay, B, C, initial_state, fresh, keep)
    x, B, C = (rows_whole(tensor) for tensor in (x, B, C))
    b, l, h = log_decay.shape
    heads = min(32, padded(h))
    ssd_summed[shape.all_chunks, _cdiv(h, heads), b](
        log_decay, whole_or(fresh, x), w, *log_decay.stride(), l, h, w.stride(0),
        HAS_FRESH=fresh is not None, Q=shape.launch.q, HEADS=heads, EXACT=shape.constants["EXACT"],
    )  # fmt: skip
    entering = _entering(shape, x, w, B, initial_state, back=False)
    grid, options = shape.walk(shape.segments, shape.launch.stages)
    ssd_forward[grid](
        x, w, B, C, whole_or(entering, x), y, last, states,
        *_strides(x), *_strides(B), *_strides(C), l, shape.chunks, shape.all_chunks,
        h, B.shape[2], x.stride(1), B.stride(1), C.stride(1),
        HAS_ENTERING=entering is not None, KEEP=keep, **options,
    )  # fmt: skip
    return outputs


def _entering(shape: _Shape, x: Tensor, w: Tensor, B: Tensor, first: Tensor | None, back: bool) -> Tensor | None:
    """The state (segments, b, h, p, n) that enters each segment or, back in time, its gradient; None for zero."""
    if shape.segments == 1:
        return first
    (b, l, h, p), (g, n) = x.shape, B.shape[2:]
    states = w.new_empty(shape.segments, b, h, p, n)
    totals = w.new_empty(shape.segments, b, h)
    grid, options = shape.walk(shape.segments - 1, shape.launch.stages_walk)
    ssd_walk[grid](
        x, w, B, x, x, states, totals,
        *_strides(x), *_strides(B), l, shape.chunks, shape.all_chunks, h, g, x.stride(1), B.stride(1),
        BACK=back, KEEP=False, HAS_ENTERING=False, **options,
    )  # fmt: skip
    ssd_pass_on[shape.rows, _cdiv(p * n, 1024)](
        states, totals, whole_or(first, x), shape.segments, shape.rows,
        BACK=back, HAS_FIRST=first is not None, SIZE=p * n, BLOCK=1024,
    )  # fmt: skip
    return states


def _backward(
    dy: Tensor,
    dlast: Tensor | None,
    x: Tensor,
    w: Tensor,
    B: Tensor,
    C: Tensor,
    states: Tensor,
    fresh: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    shape = _Shape.of(x, B)
    (b, l, h, p), (g, n) = x.shape, B.shape[2:]
    dy, x, B, C = (rows_whole(tensor) for tensor in (dy, x, B, C))
    entering = _entering(shape, dy, w, C, dlast, back=True)
    dstates, dinitial = torch.empty_like(states), w.new_empty(b, h, p, n)
    grid, options = shape.walk(shape.segments, shape.launch.stages_walk)
    ssd_walk[grid](
        dy, w, C, whole_or(entering, x), dstates, dinitial, w,
        *_strides(dy), *_strides(C), l, shape.chunks, shape.all_chunks, h, g, dy.stride(1), C.stride(1),
        BACK=True, KEEP=True, HAS_ENTERING=entering is not None, **options,
    )  # fmt: skip
    tiles, span = _cdiv(p, shape.launch.bp), shape.launch.span
    dx = x.new_empty(b, l, h, p)
    da = w.new_empty(tiles, b, l, h)
    dB, dC = (x.new_empty(tiles, b, l, h, n) for _ in range(2))
    ssd_gradients[h * tiles, _cdiv(shape.all_chunks, span), b](
        dy, x, w, B, C, whole_or(fresh, x), states, dstates, dx, da, dB, dC,
        *_strides(dy), *_strides(x), *_strides(B), *_strides(C), l, shape.all_chunks,
        h, g, dy.stride(1), x.stride(1), B.stride(1), C.stride(1),
        HAS_FRESH=fresh is not None, SPAN=span, BP=shape.launch.bp, **shape.constants,
        num_warps=shape.launch.warps, num_stages=shape.launch.stages_back,
    )  # fmt: skip
    if tiles == 1 and g == h:
        dB, dC = dB[0], dC[0]
    else:
        dB, dC = (part.view(tiles, b, l, g, h // g, n).sum((0, 4)) for part in (dB, dC))
    return dx, da[0] if tiles == 1 else da.sum(0), dB, dC, dinitial


def _strides(tensor: Tensor) -> tuple[int, int]:
    """From sample to sample and from head to head; the one from token to token is a constant of the kernels."""
    return tensor.stride(0), tensor.stride(2)


# --- the operator -----------------------------------------------------------------------------------------------------


def _shapes(
    x: Tensor,
    log_decay: Tensor,
    B: Tensor,
    C: Tensor,
    initial_state: Tensor | None,
    fresh: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, the last state, w and, kept for the backward, the states that enter the chunks."""
    (b, l, h, p), n = x.shape, B.shape[-1]
    q = launch_for(int(p), int(n), x.dtype, card_of(x)).q  # widths are never symbolic
    chunks = _cdiv(l, q)
    y, last = x.new_empty(b, l, h, p), log_decay.new_empty(b, h, p, n)
    w = log_decay.new_empty(2 if x.dtype == torch.float32 else 1, b, h, chunks * q)
    return y, last, w, x.new_empty(b, h, chunks if keep else 0, n, p)


def _backward_shapes(
    dy: Tensor,
    dlast: Tensor | None,
    x: Tensor,
    w: Tensor,
    B: Tensor,
    C: Tensor,
    states: Tensor,
    fresh: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dx, dB, dC = (tensor.new_empty(tensor.shape) for tensor in (x, B, C))
    return dx, w.new_empty(x.shape[:3]), dB, dC, w.new_empty(x.shape[0], *x.shape[2:], B.shape[-1])


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, _, B, C, initial_state, fresh, _ = inputs
    ctx.has_initial = initial_state is not None
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, output[2], B, C, output[3], fresh)


def _differentiate(ctx: Any, dy: Tensor | None, dlast: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    x, w, B, C, states, fresh = ctx.saved_tensors
    if dy is None:
        dy = x.new_zeros(()).expand(x.shape)
    *gradients, dinitial = _ssd_backward(dy, dlast, x, w, B, C, states, fresh)
    return *gradients, dinitial if ctx.has_initial else None, None, None


_ssd = torch.library.custom_op(
    "limbeck::ssd_triton",
    _forward,
    mutates_args=(),
    schema="(Tensor x, Tensor log_decay, Tensor B, Tensor C, Tensor? initial_state, Tensor? fresh, bool keep)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
)
_ssd.register_fake(_shapes)
_ssd.register_autograd(_differentiate, setup_context=_save)
_ssd_backward = torch.library.custom_op(
    "limbeck::ssd_triton_backward",
    _backward,
    mutates_args=(),
    schema="(Tensor dy, Tensor? dlast, Tensor x, Tensor w, Tensor B, Tensor C, Tensor states, Tensor? fresh)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
_ssd_backward.register_fake(_backward_shapes)
