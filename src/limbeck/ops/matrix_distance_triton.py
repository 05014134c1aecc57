"""`matrix_distance` in Triton: attention tile and mixer tile side by side, only their squared difference kept.

With E = M − A, f = ‖E‖ and decay[t,s] = exp(a_{s+1} + … + a_t), the gradient of f is E/f. So value and gradient times f
come out of the same walks over tiles, and backward only divides:

    f²        = Σ E²
    f · dC_t  = Σ_s E[t,s] decay[t,s] B_s
    f · dB_s  = Σ_t E[t,s] decay[t,s] C_t
    f · dD    = Σ_t E[t,t]
    f · da_u  = Σ_{t ≥ u > s} W[t,s] = Σ_{t < u} (Σ_{s>t} W[s,t] − Σ_{s<t} W[t,s]),     W = E ∘ M, its diagonal apart

1. `_decays` sums the log decays, in float64, and keeps the sums as two float32.
2. `_normaliser` makes the log-sum-exp of every row of A, and Σ A² over the columns that the mixer has forgotten.
3. `_rows` owns rows t and walks the columns: f², dC, dD and the row sums of W.
4. `_columns` owns columns s and walks the rows: dB and the column sums of W. Both walks make W of the same float32
   numbers, and what is added up along the length is added in float64: nothing is lost where the sums cancel.
5. `_decay_gradient` adds these sums up to da. `_scale`, in backward, multiplies with (gradient of f)/f per head and
   adds up the heads of a group.

With r the border between what a program owns and what it walks, the decay from s to t is (from s to its tile's end) ·
(from there to r) · (from r to t), or the like the other way: all factors are ≤ 1, and none takes an exp for every pair.
Only tiles on the diagonal take the exp of a difference. A block of rows has forgotten a block of columns where the
decay between them is below 2 to the −64; `_rows` and `_columns` leave such pairs of blocks out. A document begins with
a decay of 0. Logarithms are to base 2 inside.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportReturnType=false, reportGeneralTypeIssues=false

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from limbeck.ops.cards import Card, card_of
from limbeck.ops.inputs import document_starts, rows_whole

BLOCK = 128
"""Tokens that are forgotten together; tiles divide it."""
_BLOCK = tl.constexpr(BLOCK)
_LOG2E = tl.constexpr(math.log2(math.e))
_FORGET = tl.constexpr(200.0)
"""2 to the minus this is 0 in float32: no step decays by more, and sums stay finite."""
_NEGLIGIBLE = tl.constexpr(64.0)


# --- decays -----------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["l", "plane"])
def _decays(
    log_decay_ptr, fresh_ptr, decays_ptr, stride_b, stride_l, stride_h, h, l, plane,
    HAS_FRESH: tl.constexpr, TILES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The four planes of one head: the sum up to t in two parts, decay from t's tile's start to t, and to its end."""
    row = tl.program_id(0)
    i_b, i_h = (row // h).to(tl.int64), (row % h).to(tl.int64)
    log_decay_ptr += i_b * stride_b + i_h * stride_h
    decays_ptr += row.to(tl.int64) * l
    plane = tl.cast(plane, tl.int64)
    tokens = tl.arange(0, TILES)[:, None] * TILE + tl.arange(0, TILE)[None, :]
    carried = tl.full((), 0.0, tl.float64)
    for start in tl.range(0, l, TILES * TILE):
        t = start + tokens
        inside = t < l
        a = tl.load(log_decay_ptr + t.to(tl.int64) * stride_l, inside, other=0.0).to(tl.float64) * _LOG2E
        if HAS_FRESH:
            a = tl.where(tl.load(fresh_ptr + i_b * l + t, inside, other=0) != 0, -_FORGET, a)
        a = tl.where(a < -_FORGET, -_FORGET, a)  # NaN stays
        within = tl.cumsum(a, 1)
        total = tl.sum(a, 1)
        sums = (carried + (tl.cumsum(total, 0) - total))[:, None] + within
        carried += tl.sum(total, 0)
        high = sums.to(tl.float32)
        tl.store(decays_ptr + t, high, inside)
        tl.store(decays_ptr + plane + t, (sums - high.to(tl.float64)).to(tl.float32), inside)
        tl.store(decays_ptr + 2 * plane + t, tl.exp2(within.to(tl.float32)), inside)
        tl.store(decays_ptr + 3 * plane + t, tl.exp2((total[:, None] - within).to(tl.float32)), inside)


@triton.jit(do_not_specialize=["l"])
def _decay_gradient(row_sums_ptr, column_sums_ptr, out_ptr, l, TILE: tl.constexpr):
    """What the tokens before each token sum up to, column sums less row sums: the gradient of one head's log decay."""
    at = tl.program_id(0).to(tl.int64) * l
    carried = tl.full((), 0.0, tl.float64)
    for start in tl.range(0, l, TILE):
        t = start + tl.arange(0, TILE)
        own = tl.load(column_sums_ptr + at + t, t < l, other=0.0).to(tl.float64)
        own -= tl.load(row_sums_ptr + at + t, t < l, other=0.0).to(tl.float64)
        tl.store(out_ptr + at + t, (carried + (tl.cumsum(own, 0) - own)).to(tl.float32), t < l)
        carried += tl.sum(own, 0)


@triton.jit
def _forgotten(sums_ptr, rows, columns):
    """Whether a block of rows knows nothing of an earlier block of columns."""
    between = tl.load(sums_ptr + rows * _BLOCK - 1) - tl.load(sums_ptr + columns * _BLOCK + (_BLOCK - 1))
    return between <= -_NEGLIGIBLE


@triton.jit
def _first_remembered(sums_ptr, rows):
    """The first block of columns that a block of rows knows of, by bisection."""
    low, high = rows * 0, rows
    while low < high:
        middle = (low + high) // 2
        if _forgotten(sums_ptr, rows, middle):
            low = middle + 1
        else:
            high = middle
    return low


@triton.jit
def _first_to_forget(sums_ptr, columns, blocks):
    """The first block of rows that knows nothing of a block of columns."""
    low, high = columns + 1, blocks
    while low < high:
        middle = (low + high) // 2
        if _forgotten(sums_ptr, middle, columns):
            high = middle
        else:
            low = middle + 1
    return low


# --- tiles ------------------------------------------------------------------------------------------------------------


@triton.jit
def _tile(base, start, stride, l, WIDTH: tl.constexpr, TILE: tl.constexpr, PADDED: tl.constexpr):
    """Rows start to start + TILE of a matrix (l, WIDTH), as (TILE, PADDED); zero beyond."""
    rows = tl.arange(0, TILE)
    columns = tl.arange(0, PADDED)
    pointers = base + tl.cast(start, tl.int64) * stride + rows[:, None] * stride + columns[None, :]
    inside = (start + rows < l)[:, None]
    if WIDTH != PADDED:
        inside = inside & (columns < WIDTH)[None, :]
    return tl.load(pointers, inside, other=0.0)


@triton.jit
def _put(out_ptr, tile, i_b, i_h, start, l, h, WIDTH: tl.constexpr, TILE: tl.constexpr, PADDED: tl.constexpr):
    """Store a tile (TILE, PADDED) into a contiguous tensor (b, l, h, WIDTH)."""
    rows = start + tl.arange(0, TILE)
    columns = tl.arange(0, PADDED)
    pointers = out_ptr + ((i_b * l + rows)[:, None] * h + i_h) * WIDTH + columns[None, :]
    tl.store(pointers, tile.to(out_ptr.dtype.element_ty), (rows < l)[:, None] & (columns < WIDTH)[None, :])


@triton.jit
def _logits(q, k, scale, cap, HAS_CAP: tl.constexpr, PRECISION: tl.constexpr):
    """The teacher's logits to base 2; with a cap, `scale` is what goes into tanh."""
    logits = tl.dot(q, k, input_precision=PRECISION) * scale
    if HAS_CAP:
        logits = cap * (1.0 - 2.0 / (1.0 + tl.exp2(logits * (2 * _LOG2E))))  # cap · tanh
    return logits


@triton.jit
def _normalise_tile(
    q, k_ptr, s0, t, first, tokens_ptr, top, total, squares, stride_k_l, scale, cap, l,
    DIAGONAL: tl.constexpr, SQUARES: tl.constexpr, HAS_FIRST: tl.constexpr, HAS_PADDING: tl.constexpr,
    HAS_CAP: tl.constexpr, D_K: tl.constexpr, K: tl.constexpr, WALK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Take one more tile of columns into the rows' maximum, their sum of exp2 and, on demand, of its squares."""
    s = s0 + tl.arange(0, WALK)
    k = _tile(k_ptr, s0, stride_k_l, l, D_K, WALK, K)
    logits = _logits(q, tl.trans(k), scale, cap, HAS_CAP, PRECISION)
    if DIAGONAL:
        logits = tl.where(s[None, :] <= t[:, None], logits, -float("inf"))
    if HAS_FIRST:
        logits = tl.where(s[None, :] >= first[:, None], logits, -float("inf"))
    if HAS_PADDING:
        logits = tl.where((tl.load(tokens_ptr + s, s < l, other=0) != 0)[None, :], logits, -float("inf"))
    higher = tl.maximum(top, tl.max(logits, 1))
    shrink = tl.exp2(top - higher)
    p = tl.exp2(logits - higher[:, None])
    total = total * shrink + tl.sum(p, 1)
    squares *= shrink * shrink
    if SQUARES:
        squares += tl.sum(p * p, 1)
    return higher, total, squares


@triton.jit(do_not_specialize=["l"])
def _normaliser(
    q_ptr, k_ptr, sums_ptr, tokens_ptr, first_ptr, lse_ptr, squares_ptr,
    stride_q_b, stride_q_h, stride_q_l, stride_k_b, stride_k_h, stride_k_l, h, per_key, l, scale, cap,
    HAS_FIRST: tl.constexpr, HAS_PADDING: tl.constexpr, HAS_CAP: tl.constexpr,
    D_K: tl.constexpr, K: tl.constexpr, OWN: tl.constexpr, WALK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Log-sum-exp of OWN rows, +inf where a row sees nothing, and Σ A² over the columns that the mixer forgot."""
    tiles = tl.cdiv(l, OWN)
    row, t0 = tl.program_id(0) // tiles, (tiles - 1 - tl.program_id(0) % tiles) * OWN
    i_b, i_h = (row // h).to(tl.int64), (row % h).to(tl.int64)
    at = row.to(tl.int64) * l
    tokens_ptr += i_b * l
    first_ptr += i_b * l
    k_ptr += i_b * stride_k_b + (i_h // per_key) * stride_k_h
    q = _tile(q_ptr + i_b * stride_q_b + i_h * stride_q_h, t0, stride_q_l, l, D_K, OWN, K)
    t = t0 + tl.arange(0, OWN)
    first, begin = t, t0 * 0
    if HAS_FIRST:
        first, begin = tl.load(first_ptr + t, t < l, other=0), tl.load(first_ptr + t0) // WALK * WALK
    top = tl.full((OWN,), -1e30, tl.float32)
    total = tl.zeros((OWN,), tl.float32)
    squares = tl.zeros((OWN,), tl.float32)
    near = _first_remembered(sums_ptr + at, t0 // _BLOCK) * _BLOCK
    for s0 in tl.range(begin, near, WALK):
        top, total, squares = _normalise_tile(
            q, k_ptr, s0, t, first, tokens_ptr, top, total, squares, stride_k_l, scale, cap, l,
            False, True, HAS_FIRST, HAS_PADDING, HAS_CAP, D_K, K, WALK, PRECISION,
        )  # fmt: skip
    for s0 in tl.range(tl.maximum(begin, near), t0, WALK):
        top, total, squares = _normalise_tile(
            q, k_ptr, s0, t, first, tokens_ptr, top, total, squares, stride_k_l, scale, cap, l,
            False, False, HAS_FIRST, HAS_PADDING, HAS_CAP, D_K, K, WALK, PRECISION,
        )  # fmt: skip
    for s0 in tl.range(t0, tl.minimum(t0 + OWN, l), WALK):
        top, total, squares = _normalise_tile(
            q, k_ptr, s0, t, first, tokens_ptr, top, total, squares, stride_k_l, scale, cap, l,
            True, False, HAS_FIRST, HAS_PADDING, HAS_CAP, D_K, K, WALK, PRECISION,
        )  # fmt: skip
    sees = (t < l) & (total != 0)  # NaN goes on
    if HAS_PADDING:
        sees = sees & (tl.load(tokens_ptr + t, t < l, other=0) != 0)
    total = tl.where(sees, total, 1.0)
    tl.store(lse_ptr + at + t, tl.where(sees, top + tl.log2(total), float("inf")), t < l)
    squares = tl.where(sees, squares / (total * total), 0.0)
    tl.store(squares_ptr + row * tiles + t0 // OWN, tl.sum(squares, 0))


# --- the two walks ----------------------------------------------------------------------------------------------------


@triton.jit
def _difference(
    M, logits, lse, s, t, first, s_exists, t_exists,
    DIAGONAL: tl.constexpr, HAS_FIRST: tl.constexpr, HAS_PADDING: tl.constexpr,
):  # fmt: skip
    """E of a tile from M and the teacher's logits; what lies along its sides, s and t and theirs, broadcasts."""
    if DIAGONAL:
        logits = tl.where(s <= t, logits, -float("inf"))
    if HAS_FIRST:
        logits = tl.where(s >= first, logits, -float("inf"))
    E = M - tl.exp2(logits - lse)
    if HAS_PADDING:
        E = tl.where((s_exists != 0) & (t_exists != 0), E, 0.0)
    return E


@triton.jit(do_not_specialize=["l", "plane"])
def _rows(
    q_ptr, k_ptr, c_ptr, b_ptr, d_ptr, lse_ptr, decays_ptr, tokens_ptr, first_ptr,
    squares_ptr, diagonal_ptr, row_sums_ptr, dc_ptr,
    stride_q_b, stride_q_h, stride_q_l, stride_k_b, stride_k_h, stride_k_l,
    stride_c_b, stride_c_l, stride_c_g, stride_b_b, stride_b_l, stride_b_g,
    h, per_key, per_group, l, plane, scale, cap,
    GRAD: tl.constexpr, HAS_D: tl.constexpr, HAS_FIRST: tl.constexpr, HAS_PADDING: tl.constexpr,
    HAS_CAP: tl.constexpr, D_K: tl.constexpr, K: tl.constexpr, D_N: tl.constexpr, N: tl.constexpr,
    OWN: tl.constexpr, WALK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Walk the remembered columns of OWN rows: ΣE², ΣE on the diagonal, row sums of W, and dC times ‖E‖."""
    tiles = tl.cdiv(l, OWN)
    row, t0 = tl.program_id(0) // tiles, (tiles - 1 - tl.program_id(0) % tiles) * OWN
    i_b, i_h = (row // h).to(tl.int64), (row % h).to(tl.int64)
    at = row.to(tl.int64) * l
    plane = tl.cast(plane, tl.int64)
    decays_ptr += at
    tokens_ptr += i_b * l
    k_ptr += i_b * stride_k_b + (i_h // per_key) * stride_k_h
    b_ptr += i_b * stride_b_b + (i_h // per_group) * stride_b_g
    q = _tile(q_ptr + i_b * stride_q_b + i_h * stride_q_h, t0, stride_q_l, l, D_K, OWN, K)
    c = _tile(c_ptr + i_b * stride_c_b + (i_h // per_group) * stride_c_g, t0, stride_c_l, l, D_N, OWN, N)
    rows = t0 + tl.arange(0, OWN)
    t = rows[:, None]
    lse = tl.load(lse_ptr + at + rows, rows < l, other=float("inf"))[:, None]
    first = tl.load(first_ptr + i_b * l + rows, rows < l, other=0)[:, None] if HAS_FIRST else t
    t_exists = tl.load(tokens_ptr + rows, rows < l, other=0)[:, None] if HAS_PADDING else t
    high_t = tl.load(decays_ptr + rows, rows < l, other=-float("inf"))
    low_t = tl.load(decays_ptr + plane + rows, rows < l, other=0.0)
    squares = tl.zeros((OWN,), tl.float32)
    row_sums = tl.zeros((OWN,), tl.float32)
    dc = tl.zeros((OWN, N), tl.float32)

    # 1. Columns before these rows; the border is the token before the first row.
    border = tl.maximum(t0 - 1, 0)
    high, low = tl.load(decays_ptr + border), tl.load(decays_ptr + plane + border)
    decay_t = tl.exp2((high_t - high) + (low_t - low))
    near = _first_remembered(decays_ptr, t0 // _BLOCK) * _BLOCK
    for s0 in tl.range(near, t0, WALK):
        s = (s0 + tl.arange(0, WALK))[None, :]
        k = _tile(k_ptr, s0, stride_k_l, l, D_K, WALK, K)
        b = _tile(b_ptr, s0, stride_b_l, l, D_N, WALK, N)
        last = decays_ptr + s0 + (WALK - 1)
        between = tl.exp2((high - tl.load(last)) + (low - tl.load(last + plane)))
        decay_s = tl.load(decays_ptr + 3 * plane + s) * between
        s_exists = tl.load(tokens_ptr + s) if HAS_PADDING else s
        logits = _logits(q, tl.trans(k), scale, cap, HAS_CAP, PRECISION)
        part = tl.dot(c, tl.trans(b), input_precision=PRECISION) * decay_s
        M = part * decay_t[:, None]
        E = _difference(M, logits, lse, s, t, first, s_exists, t_exists, False, HAS_FIRST, HAS_PADDING)
        squares += tl.sum(E * E, 1)
        if GRAD:
            row_sums += tl.sum(E * part, 1)
            dc = tl.dot((E * decay_s).to(b.dtype), b, dc, input_precision=PRECISION)
    row_sums *= decay_t
    dc *= decay_t[:, None]

    # 2. Columns beside these rows, up to the diagonal.
    diagonal = tl.zeros((OWN,), tl.float32)
    for s0 in tl.range(t0, tl.minimum(t0 + OWN, l), WALK):
        s = (s0 + tl.arange(0, WALK))[None, :]
        k = _tile(k_ptr, s0, stride_k_l, l, D_K, WALK, K)
        b = _tile(b_ptr, s0, stride_b_l, l, D_N, WALK, N)
        high_s = tl.load(decays_ptr + s, s < l, other=0.0)
        low_s = tl.load(decays_ptr + plane + s, s < l, other=0.0)
        decay = tl.exp2(tl.where(s <= t, (high_t[:, None] - high_s) + (low_t[:, None] - low_s), -float("inf")))
        s_exists = tl.load(tokens_ptr + s, s < l, other=0) if HAS_PADDING else s
        on_diagonal = (s == t) & (t < l)
        logits = _logits(q, tl.trans(k), scale, cap, HAS_CAP, PRECISION)
        M = tl.dot(c, tl.trans(b), input_precision=PRECISION) * decay
        if HAS_D:
            M += tl.where(on_diagonal, tl.load(d_ptr + i_h).to(tl.float32), 0.0)
        E = _difference(M, logits, lse, s, t, first, s_exists, t_exists, True, HAS_FIRST, HAS_PADDING)
        squares += tl.sum(E * E, 1)
        diagonal += tl.sum(tl.where(on_diagonal, E, 0.0), 1)
        if GRAD:
            row_sums += tl.sum(tl.where(on_diagonal, 0.0, E * M), 1)
            dc = tl.dot((E * decay).to(b.dtype), b, dc, input_precision=PRECISION)

    tile = row * tiles + t0 // OWN
    tl.store(squares_ptr + tile, tl.sum(squares, 0))
    tl.store(diagonal_ptr + tile, tl.sum(diagonal, 0))
    if GRAD:
        tl.store(row_sums_ptr + at + rows, row_sums, rows < l)
        _put(dc_ptr, dc, i_b, i_h, t0, l, h, D_N, OWN, N)


@triton.jit(do_not_specialize=["l", "plane"])
def _columns(
    q_ptr, k_ptr, c_ptr, b_ptr, d_ptr, lse_ptr, decays_ptr, tokens_ptr, first_ptr, column_sums_ptr, db_ptr,
    stride_q_b, stride_q_h, stride_q_l, stride_k_b, stride_k_h, stride_k_l,
    stride_c_b, stride_c_l, stride_c_g, stride_b_b, stride_b_l, stride_b_g,
    h, per_key, per_group, l, plane, scale, cap,
    HAS_D: tl.constexpr, HAS_FIRST: tl.constexpr, HAS_PADDING: tl.constexpr, HAS_CAP: tl.constexpr,
    D_K: tl.constexpr, K: tl.constexpr, D_N: tl.constexpr, N: tl.constexpr,
    OWN: tl.constexpr, WALK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Walk the rows that remember OWN columns, tiles transposed: column sums of W, and dB times ‖E‖."""
    tiles = tl.cdiv(l, OWN)
    row, s0 = tl.program_id(0) // tiles, tl.program_id(0) % tiles * OWN
    i_b, i_h = (row // h).to(tl.int64), (row % h).to(tl.int64)
    at = row.to(tl.int64) * l
    plane = tl.cast(plane, tl.int64)
    decays_ptr += at
    lse_ptr += at
    tokens_ptr += i_b * l
    first_ptr += i_b * l
    q_ptr += i_b * stride_q_b + i_h * stride_q_h
    c_ptr += i_b * stride_c_b + (i_h // per_group) * stride_c_g
    k = _tile(k_ptr + i_b * stride_k_b + (i_h // per_key) * stride_k_h, s0, stride_k_l, l, D_K, OWN, K)
    b = _tile(b_ptr + i_b * stride_b_b + (i_h // per_group) * stride_b_g, s0, stride_b_l, l, D_N, OWN, N)
    columns = s0 + tl.arange(0, OWN)
    s = columns[:, None]
    s_exists = tl.load(tokens_ptr + columns, columns < l, other=0)[:, None] if HAS_PADDING else s
    high_s = tl.load(decays_ptr + columns, columns < l, other=0.0)
    low_s = tl.load(decays_ptr + plane + columns, columns < l, other=0.0)
    column_sums = tl.zeros((OWN,), tl.float32)
    db = tl.zeros((OWN, N), tl.float32)

    # 1. Rows after these columns; the border is the last column.
    border = tl.minimum(s0 + OWN, l) - 1
    high, low = tl.load(decays_ptr + border), tl.load(decays_ptr + plane + border)
    decay_s = tl.exp2((high - high_s) + (low - low_s))
    end = tl.minimum(_first_to_forget(decays_ptr, s0 // _BLOCK, tl.cdiv(l, _BLOCK)) * _BLOCK, l)
    for i in tl.range(0, tl.cdiv(end - (s0 + OWN), WALK)):
        t0 = s0 + OWN + i * WALK
        t = (t0 + tl.arange(0, WALK))[None, :]
        q = _tile(q_ptr, t0, stride_q_l, l, D_K, WALK, K)
        c = _tile(c_ptr, t0, stride_c_l, l, D_N, WALK, N)
        before = decays_ptr + t0 - 1
        between = tl.exp2((tl.load(before) - high) + (tl.load(before + plane) - low))
        decay_t = tl.load(decays_ptr + 2 * plane + t, t < l, other=0.0) * between
        lse = tl.load(lse_ptr + t, t < l, other=float("inf"))
        first = tl.load(first_ptr + t, t < l, other=0) if HAS_FIRST else t
        t_exists = tl.load(tokens_ptr + t, t < l, other=0) if HAS_PADDING else t
        logits = _logits(k, tl.trans(q), scale, cap, HAS_CAP, PRECISION)
        part = tl.dot(b, tl.trans(c), input_precision=PRECISION) * decay_t
        M = part * decay_s[:, None]
        E = _difference(M, logits, lse, s, t, first, s_exists, t_exists, False, HAS_FIRST, HAS_PADDING)
        column_sums += tl.sum(E * part, 1)
        db = tl.dot((E * decay_t).to(c.dtype), c, db, input_precision=PRECISION)
    column_sums *= decay_s
    db *= decay_s[:, None]

    # 2. Rows beside these columns, from the diagonal on.
    for t0 in tl.range(s0, tl.minimum(s0 + OWN, l), WALK):
        t = (t0 + tl.arange(0, WALK))[None, :]
        q = _tile(q_ptr, t0, stride_q_l, l, D_K, WALK, K)
        c = _tile(c_ptr, t0, stride_c_l, l, D_N, WALK, N)
        high_t = tl.load(decays_ptr + t, t < l, other=-float("inf"))
        low_t = tl.load(decays_ptr + plane + t, t < l, other=0.0)
        decay = tl.exp2(tl.where(s <= t, (high_t - high_s[:, None]) + (low_t - low_s[:, None]), -float("inf")))
        lse = tl.load(lse_ptr + t, t < l, other=float("inf"))
        first = tl.load(first_ptr + t, t < l, other=0) if HAS_FIRST else t
        t_exists = tl.load(tokens_ptr + t, t < l, other=0) if HAS_PADDING else t
        logits = _logits(k, tl.trans(q), scale, cap, HAS_CAP, PRECISION)
        M = tl.dot(b, tl.trans(c), input_precision=PRECISION) * decay
        if HAS_D:
            M += tl.where(s == t, tl.load(d_ptr + i_h).to(tl.float32), 0.0)
        E = _difference(M, logits, lse, s, t, first, s_exists, t_exists, True, HAS_FIRST, HAS_PADDING)
        column_sums += tl.sum(tl.where(s == t, 0.0, E * M), 1)
        db = tl.dot((E * decay).to(c.dtype), c, db, input_precision=PRECISION)

    tl.store(column_sums_ptr + at + columns, column_sums, columns < l)
    _put(db_ptr, db, i_b, i_h, s0, l, h, D_N, OWN, N)


@triton.jit(do_not_specialize=["l"])
def _scale(
    gradient_ptr, scale_ptr, out_ptr, g, l,
    PER_GROUP: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """Sum the gradients (b, l, h, WIDTH) of a group's heads, each times its scale (b, h), for TILE tokens."""
    tiles = tl.cdiv(l, TILE)
    row, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    i_b, i_g = (row // g).to(tl.int64), row % g
    at = ((i_b * l + tile * TILE + tl.arange(0, TILE)) * g + i_g)[:, None]
    columns = tl.arange(0, PADDED)[None, :]
    inside = (tile * TILE + tl.arange(0, TILE) < l)[:, None] & (columns < WIDTH)
    total = tl.zeros((TILE, PADDED), tl.float32)
    for i in tl.static_range(PER_GROUP):
        gradient = tl.load(gradient_ptr + (at * PER_GROUP + i) * WIDTH + columns, inside, other=0.0)
        total += gradient.to(tl.float32) * tl.load(scale_ptr + (i_b * g + i_g) * PER_GROUP + i)
    tl.store(out_ptr + at * WIDTH + columns, total.to(out_ptr.dtype.element_ty), inside)


# --- launches ---------------------------------------------------------------------------------------------------------


class Launch(NamedTuple):
    """How tiles are walked: tokens that a program owns, tokens it walks at a time, warps, stages of the pipeline."""

    own: int
    walk: int
    warps: int
    stages: int

    @property
    def options(self) -> dict[str, int]:
        """As Triton takes them."""
        return {"OWN": self.own, "WALK": self.walk, "num_warps": self.warps, "num_stages": self.stages}

    def fits(self, K: int, N: int, itemsize: int, card: Card) -> bool:
        """Whether tiles of K + N columns fit into shared memory, and accumulators into registers.

        Two products of (own, walk) and one of (own, N) accumulate at once. float32 is multiplied in three parts, which
        take as much again of both tiles; on all cards but Hopper, threads hold the tile that is walked.
        """
        wide = itemsize == 4
        if wide and card.capability[0] != 9 and self.walk * max(K, N) > 4096:
            return False
        shared = (self.own * (2 if wide else 1) + self.walk * (self.stages + wide)) * (K + N) * itemsize + 1024
        accumulators = self.own * (2 * self.walk + N) // (32 * self.warps)
        return shared <= card.shared_memory and accumulators <= (64 if wide else 160)


_LAUNCHES = (
    Launch(128, 64, 8, 3),
    Launch(128, 64, 8, 2),
    Launch(128, 32, 8, 2),
    Launch(64, 64, 4, 2),
    Launch(64, 32, 4, 2),
    Launch(32, 32, 4, 2),
    Launch(16, 16, 4, 1),
)
"""The first that fits is taken; the last always does."""


def launches(K: int, N: int, itemsize: int, card: Card) -> tuple[Launch, Launch]:
    """The launches of the normaliser and of the two walks, for padded widths of q and k and of B and C."""
    normaliser = next((x for x in _LAUNCHES if x.fits(K, 0, itemsize, card)), _LAUNCHES[-1])
    walks = next((x for x in _LAUNCHES if x.fits(K, N, itemsize, card)), _LAUNCHES[-1])
    return normaliser, walks


def _padded(width: int) -> int:
    """The width of a tile that holds heads of this width."""
    return max(16, triton.next_power_of_2(width))


# --- the operator -----------------------------------------------------------------------------------------------------

_FORWARD = (
    "(Tensor query, Tensor key, Tensor log_decay, Tensor B, Tensor C, Tensor? D, Tensor? tokens, Tensor? seq_idx,"
    " float scale, int? sliding_window, float? softcap, bool gradients) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_SCALED = "(Tensor gradient, Tensor scale, int groups) -> Tensor"


def matrix_distance_triton(
    query: Tensor, key: Tensor, log_decay: Tensor, B: Tensor, C: Tensor, D: Tensor | None,
    tokens: Tensor | None, seq_idx: Tensor | None, scale: float, sliding_window: int | None, softcap: float | None,
) -> Tensor:  # fmt: skip
    """Run the kernels: see `limbeck.ops.matrix_distance`.

    Returns:
        The distance of every head, (b, h), float32.
    """
    teachers, mixers = torch.promote_types(query.dtype, key.dtype), torch.promote_types(B.dtype, C.dtype)
    query, key, B, C = query.to(teachers), key.to(teachers), B.to(mixers), C.to(mixers)
    learned = (log_decay, B, C, D)
    gradients = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in learned)
    shape = (scale, sliding_window, softcap)
    return _distance(query, key, log_decay, B, C, D, tokens, seq_idx, *shape, gradients)[0]


def _forward(
    query: Tensor, key: Tensor, log_decay: Tensor, B: Tensor, C: Tensor, D: Tensor | None,
    tokens: Tensor | None, seq_idx: Tensor | None, scale: float, sliding_window: int | None, softcap: float | None,
    gradients: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The distances, and their gradients times them: of log_decay (b, h, l), B and C per head, D per batch entry."""
    (b, h, l, d), n = query.shape, B.shape[-1]
    query, key, B, C = (rows_whole(tensor) for tensor in (query, key, B, C))
    K, N = _padded(d), _padded(n)
    normaliser, walks = launches(K, N, max(query.itemsize, B.itemsize), card_of(query))
    fresh = None if seq_idx is None else document_starts(seq_idx)
    windowed = fresh is not None or (sliding_window is not None and sliding_window < l)
    first = _first_columns(query, fresh, sliding_window) if windowed else log_decay
    options: dict[str, Any] = {
        "HAS_FIRST": windowed,
        "HAS_PADDING": tokens is not None,
        "HAS_CAP": softcap is not None,
        "D_K": d,
        "K": K,
        "PRECISION": "tf32x3",
    }
    tokens = log_decay if tokens is None else tokens.int()
    log2e = math.log2(math.e)
    logit_scale, cap = (scale * log2e, 0.0) if softcap is None else (scale / softcap, softcap * log2e)
    plane = b * h * l

    decays = log_decay.new_empty(4, b, h, l)
    _decays[(b * h,)](
        log_decay, log_decay if fresh is None else fresh, decays, *log_decay.stride(), h, l, plane,
        HAS_FRESH=fresh is not None, TILES=1024 // walks.walk, TILE=walks.walk, num_warps=4,
    )  # fmt: skip
    lse = log_decay.new_empty(b, h, l)
    far = log_decay.new_empty(b, h, triton.cdiv(l, normaliser.own))
    strides = (*query.stride()[:3], *key.stride()[:3])
    _normaliser[(far.numel(),)](
        query, key, decays, tokens, first, lse, far, *strides, h, h // key.shape[1], l, logit_scale, cap,
        **options, **normaliser.options,
    )  # fmt: skip

    near, diagonal = log_decay.new_empty(2, b, h, triton.cdiv(l, walks.own))
    row_sums, column_sums = log_decay.new_empty(2, b, h, l if gradients else 0)
    dB, dC = (B.new_empty(b, l, h, n if gradients else 0) for _ in range(2))
    tensors = (query, key, C, B, log_decay if D is None else D, lse, decays, tokens, first)
    strides += (*C.stride()[:3], *B.stride()[:3])
    sizes = (h, h // key.shape[1], h // B.shape[2], l, plane, logit_scale, cap)
    options |= {"HAS_D": D is not None, "D_N": n, "N": N, **walks.options}
    grid = (near.numel(),)
    _rows[grid](*tensors, near, diagonal, row_sums, dC, *strides, *sizes, GRAD=gradients, **options)
    dlog_decay = torch.empty_like(row_sums)
    if gradients:
        _columns[grid](*tensors, column_sums, dB, *strides, *sizes, **options)
        _decay_gradient[(b * h,)](row_sums, column_sums, dlog_decay, l, TILE=1024, num_warps=4)
    return (far.sum(-1) + near.sum(-1)).sqrt(), dlog_decay, dB, dC, diagonal.sum(-1)


def _first_columns(query: Tensor, fresh: Tensor | None, sliding_window: int | None) -> Tensor:
    """The first column that a row may look at, (b, l) int32: its document begins there, or its window."""
    (b, _, l, _), device = query.shape, query.device
    position = torch.arange(l, device=device, dtype=torch.int32)
    first = torch.zeros_like(position).expand(b, l)
    if fresh is not None:
        first = torch.where(fresh, position, 0).cummax(-1).values
    if sliding_window is not None:
        first = torch.maximum(first, position - (sliding_window - 1))
    return first.contiguous()


def _scaled(gradient: Tensor, scale: Tensor, groups: int) -> Tensor:
    """Gradients per head (b, l, h, n) times a scale (b, h), added up over each group's heads: (b, l, g, n)."""
    b, l, h, n = gradient.shape
    out = gradient.new_empty(b, l, groups, n)
    tile = max(1, 2048 // _padded(n))
    _scale[(triton.cdiv(l, tile) * b * groups,)](
        gradient, scale.contiguous(), out, groups, l,
        PER_GROUP=h // groups, WIDTH=n, TILE=tile, PADDED=_padded(n), num_warps=4,
    )  # fmt: skip
    return out


def _forward_shapes(query: Tensor, key: Tensor, log_decay: Tensor, B: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    (b, h, l, _), n, gradients = query.shape, B.shape[-1], rest[-1]
    dB, dC = (B.new_empty(b, l, h, n if gradients else 0) for _ in range(2))
    distance, dD = (log_decay.new_empty(b, h) for _ in range(2))
    return distance, log_decay.new_empty(b, h, l if gradients else 0), dB, dC, dD


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.groups, D = inputs[3].shape[2], inputs[5]
    ctx.dtype = None if D is None else D.dtype
    ctx.save_for_backward(*output)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, ddistance: Tensor, *_: None) -> tuple[Tensor | None, ...]:
    distance, dlog_decay, dB, dC, dD = ctx.saved_tensors
    scale = torch.where(distance == 0, 0.0, ddistance / distance)  # (b, h); the norm has a corner at 0
    return (
        None,
        None,
        (dlog_decay * scale[..., None]).transpose(1, 2),
        _times(dB, scale, ctx.groups),
        _times(dC, scale, ctx.groups),
        None if ctx.dtype is None else (dD * scale).sum(0).to(ctx.dtype),
        *(None for _ in range(6)),
    )


_distance = torch.library.custom_op("limbeck::matrix_distance_triton", _forward, mutates_args=(), schema=_FORWARD)
_distance.register_fake(_forward_shapes)
_distance.register_autograd(_differentiate, setup_context=_save)
_times = torch.library.custom_op(
    "limbeck::matrix_distance_triton_scale", _scaled, mutates_args=(), schema=_SCALED
)  # fmt: skip
_times.register_fake(lambda gradient, scale, groups: gradient.new_empty(*gradient.shape[:2], groups, gradient.shape[3]))
