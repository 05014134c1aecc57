"""The selective scan in Triton: one warp walks along time with the states of a block of channels in its registers.

    forward      decay_t = exp(Δ_t A)        S_t = decay_t ∘ S_{t-1} + (Δ_t x_t) ⊗ B_t        y_t = S_t · C_t
    backward     dS_t = C_t ⊗ dy_t + decay_{t+1} ∘ dS_{t+1}        back in time
                 E_t = dS_t ∘ decay_t ∘ S_{t-1}                    the gradient of Δ_t A
                 dC_t = Σ_c S_t dy_t         dB_t = Σ_c dS_t Δ_t x_t         dA = Σ_t Δ_t E_t
                 dx_t = Δ_t Σ_n dS_t B_t     dΔ_t = x_t Σ_n dS_t B_t + Σ_n A E_t

There are b·l·c·n states, each with an exponential and five instructions forward, twenty backward, and few bytes: the
instructions are what takes the time. The forward keeps the state before every tile, or every few tiles, of tokens; the
backward computes those in between again and holds the states of a tile, and their decays, in registers.

A block's tensors are (NI, W, NL, CL): state entry n = nl·NI + ni, channel w·CL + cl. NL·CL = 32 are the lanes of a
warp, W the warps (one, unless a row of B has as many numbers as a warp has threads), NI stay inside a thread. This is
Triton's default layout for such a shape, so no state ever moves. A sum over n is additions in a thread and log₂NL
exchanges. A sum over channels would be some 10 instructions for every state; it is a matrix product instead
(`_over_channels`), whose operand lies in registers as the states do. Each warp writes its sums for dB and dC as parts,
which `scan_sum` adds in a fixed order: the same bits on every run.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# What stands in a kernel is Triton's language, which pyright takes for Python.
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
# pyright: reportAssignmentType=false

INSIDE = 8
"""NI, the entries of a state inside a thread."""

_LOG2E = tl.constexpr(1.4426950408889634)
_LOWEST = tl.constexpr(-1e30)  # an A below this decays as much, and cannot overflow


class Launch(NamedTuple):
    """How the kernels are launched.

    Attributes:
        tile: Tokens that the backward holds in registers.
        tiles_kept: Tiles between two states that the forward keeps.
        registers: The most a thread of the backward may have; 200 puts 10 warps on a multiprocessor.
        product: How summands over channels are rounded: to ``"bf16"``, to ``"tf32"``, or ``"tf32x2"``, hardly.
    """

    tile: int
    tiles_kept: int
    registers: int
    product: str


def launch_for(x: Tensor) -> Launch:
    """The launch for inputs of x's dtype; every card we know has 65536 registers on a multiprocessor."""
    if x.dtype == torch.float32:
        return Launch(tile=8, tiles_kept=1, registers=255, product="tf32x2")
    return Launch(tile=8, tiles_kept=1, registers=200, product="tf32")


# --- pieces of both kernels -------------------------------------------------------------------------------------------


@triton.jit
def _entries_and_channels(NI: tl.constexpr, W: tl.constexpr, NL: tl.constexpr, CL: tl.constexpr):
    """What states a block holds: n, (NI, 1, NL, 1), and the channels within the block, (1, W, 1, CL)."""
    n = tl.arange(0, NL)[None, None, :, None] * NI + tl.arange(0, NI)[:, None, None, None]
    return n, tl.arange(0, W)[None, :, None, None] * CL + tl.arange(0, CL)[None, None, None, :]


@triton.jit
def _rows(pointer, start, cl, in_c, STRIDE: tl.constexpr, COUNT: tl.constexpr, WHOLE: tl.constexpr):
    """A block's channels of COUNT tokens in float32, a tensor a token; WHOLE where every block of channels is full."""
    pointer += tl.cast(start, tl.int64) * STRIDE
    rows = ()
    for t in tl.static_range(COUNT):
        if WHOLE:
            row = tl.load(pointer + t * STRIDE + cl)
        else:
            row = tl.load(pointer + t * STRIDE + cl, mask=in_c, other=0.0)
        rows = rows + (row.to(tl.float32),)
    return rows


@triton.jit
def _inputs(
    x_ptr, delta_ptr, start, cl, in_c,
    X_L: tl.constexpr, DELTA_L: tl.constexpr, COUNT: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """`_rows` of x and of Δ."""
    return _rows(x_ptr, start, cl, in_c, X_L, COUNT, WHOLE), _rows(delta_ptr, start, cl, in_c, DELTA_L, COUNT, WHOLE)


@triton.jit
def _put(pointers, row, in_c, WHOLE: tl.constexpr):
    """Store one of `_rows`."""
    row = row.to(pointers.dtype.element_ty)
    if WHOLE:
        tl.store(pointers, row)
    else:
        tl.store(pointers, row, mask=in_c)


@triton.jit
def _decay(delta, A, resets_ptr, HAS_RESETS: tl.constexpr):
    """exp(Δ A), with log₂e already in A; a reset is −∞ where a document begins, else 0."""
    exponent = delta * A
    if HAS_RESETS:
        exponent += tl.load(resets_ptr)
    return tl.exp2(exponent)


@triton.jit
def _over_n(values):
    """Σ_n of (NI, 1, NL, CL), as (1, 1, 1, CL)."""
    return tl.sum(tl.sum(values, axis=0, keep_dims=True), axis=2, keep_dims=True)


@triton.jit
def _over_channels(
    values, pick, NI: tl.constexpr, W: tl.constexpr, NL: tl.constexpr, CL: tl.constexpr, PRODUCT: tl.constexpr
):  # fmt: skip
    """Σ_c of (NI, W, NL, CL) over the channels of each warp, as (NI, W, NL), by the matrix units.

    Columns of the product are (w, nl, c // 4); its inner index is (ni, c % 4), in the order in which the operand of a
    matrix instruction lies: over 4 lanes, with `word` neighbours in a thread. So nothing moves. `pick` keeps every ni
    apart and sums the rest; what the groups of 4 leave is summed last.
    """
    word: tl.constexpr = 2 if PRODUCT == "bf16" else 1
    values = tl.permute(tl.reshape(values, (NI // word, word, W, NL, CL // 4, 4)), (0, 5, 1, 2, 3, 4))
    values = tl.reshape(values, (NI * 4, W * NL * CL // 4))
    if PRODUCT == "bf16":
        sums = tl.dot(pick, values.to(tl.bfloat16))
    elif PRODUCT == "tf32":
        sums = tl.dot(pick, values, input_precision="tf32")
    else:  # in two parts, each of which tf32 holds
        high = (values.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
        sums = tl.dot(pick, high, input_precision="tf32")
        sums = tl.dot(pick, values - high, sums, input_precision="tf32")
    sums = tl.sum(tl.reshape(sums, (2, NI, W, NL, CL // 4)), axis=4)
    sums, _ = tl.split(tl.permute(sums, (1, 2, 3, 0)))  # rows 8…15 of the product are zero
    return sums


@triton.jit
def _pick(NI: tl.constexpr, PRODUCT: tl.constexpr):
    """(16, NI·4): 1 where the row is the ni of the column, see `_over_channels`."""
    row, column = tl.arange(0, 16)[:, None], tl.arange(0, NI * 4)[None, :]
    word: tl.constexpr = 2 if PRODUCT == "bf16" else 1
    pick = tl.where(row == column // (4 * word) * word + column % word, 1.0, 0.0)
    return pick.to(tl.bfloat16 if PRODUCT == "bf16" else tl.float32)


@triton.jit
def _advance(
    state, A, xs, deltas, B_ptr, resets_ptr, start, on,
    NP: tl.constexpr, COUNT: tl.constexpr, HAS_RESETS: tl.constexpr,
):  # fmt: skip
    """COUNT tokens on.

    Returns:
        The states before the first of them, …, after the last, and their decays.
    """
    start = tl.cast(start, tl.int64)
    B_ptr += start * NP
    states, decays = (state,), ()
    for t in tl.static_range(COUNT):
        decay = _decay(deltas[t], A, resets_ptr + start + t, HAS_RESETS)
        state = decay * state + (deltas[t] * xs[t]) * tl.load(B_ptr + t * NP + on)
        states, decays = states + (state,), decays + (decay,)
    return states, decays


# --- forward ----------------------------------------------------------------------------------------------------------


@triton.jit
def _tokens_forward(
    state, A, xs, deltas, B_ptr, C_ptr, resets_ptr, y_ptr, start, cl, on, in_c,
    c: tl.constexpr, NP: tl.constexpr, COUNT: tl.constexpr, HAS_RESETS: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """The state after COUNT more tokens; their y is stored."""
    states, _ = _advance(state, A, xs, deltas, B_ptr, resets_ptr, start, on, NP, COUNT, HAS_RESETS)
    start = tl.cast(start, tl.int64)
    C_ptr += start * NP
    y_ptr += start * c
    ys = ()
    for t in tl.static_range(COUNT):
        ys = ys + (_over_n(states[t + 1] * tl.load(C_ptr + t * NP + on)),)
    for t in tl.static_range(COUNT):  # stored last: a load may not pass a store, which could be to the same place
        _put(y_ptr + t * c + cl, ys[t], in_c, WHOLE)
    return states[COUNT]


@triton.jit(do_not_specialize=["l", "one"])
def scan_forward(
    x_ptr, delta_ptr, A_ptr, B_ptr, C_ptr, resets_ptr, initial_ptr, y_ptr, last_ptr, kept_ptr,
    l, one, x_b, delta_b,
    X_L: tl.constexpr, DELTA_L: tl.constexpr, c: tl.constexpr, n: tl.constexpr,
    NI: tl.constexpr, W: tl.constexpr, NL: tl.constexpr, CL: tl.constexpr,
    TILE: tl.constexpr, TILES_KEPT: tl.constexpr,
    HAS_RESETS: tl.constexpr, HAS_INITIAL: tl.constexpr, KEEP: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """y, the last state and, with KEEP, the states before every TILES_KEPT tiles. Grid: blocks of channels, b.

    initial and last are (b,c,n), B and C (b,l,NP), kept (b, ⌈l/(TILE·TILES_KEPT)⌉, blocks, NL, W·CL, NI).
    """
    NP: tl.constexpr = NI * NL
    on, cl = _entries_and_channels(NI, W, NL, CL)
    block, i_b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    channel = block * (W * CL) + cl
    in_c = channel < c
    x_ptr += i_b * x_b + block * (W * CL)
    delta_ptr += i_b * delta_b + block * (W * CL)
    B_ptr += i_b * l * NP
    C_ptr += i_b * l * NP
    resets_ptr += i_b * l
    y_ptr += i_b * l * c + block * (W * CL)
    kept_stride = tl.num_programs(0).to(tl.int64) * (W * CL * NP)
    kept_ptr += i_b * tl.cdiv(l, TILE * TILES_KEPT) * kept_stride + block * (W * CL * NP)
    # Float32 in vectors is 4 numbers a thread, and Triton would lay all states out so: hence a step it does not know.
    step = one if kept_ptr.dtype.element_ty == tl.float32 else 1
    at_kept = on // NI * (W * CL * NI) + cl * NI + on % NI * step
    at_A, inside = channel * n + on * step, in_c & (on < n)
    at = i_b * c * n + at_A

    A = tl.load(A_ptr + at_A, mask=inside, other=0.0)
    A = tl.maximum(A, _LOWEST, propagate_nan=tl.PropagateNan.ALL) * _LOG2E
    state = tl.zeros((NI, W, NL, CL), tl.float32)
    if HAS_INITIAL:
        state = tl.load(initial_ptr + at, mask=inside, other=0.0)
    whole_tiles = l // TILE
    if whole_tiles > 0:
        xs, deltas = _inputs(x_ptr, delta_ptr, 0, cl, in_c, X_L, DELTA_L, TILE, WHOLE)
        for tile in range(whole_tiles):
            if KEEP:  # noqa: SIM102 (Triton has to see that this is known when it compiles)
                if tile % TILES_KEPT == 0:
                    tl.store(kept_ptr + at_kept, state.to(kept_ptr.dtype.element_ty))
                    kept_ptr += kept_stride
            following = tl.minimum(tile + 1, whole_tiles - 1) * TILE  # loaded a tile ahead
            next_xs, next_deltas = _inputs(x_ptr, delta_ptr, following, cl, in_c, X_L, DELTA_L, TILE, WHOLE)
            state = _tokens_forward(
                state, A, xs, deltas, B_ptr, C_ptr, resets_ptr, y_ptr, tile * TILE, cl, on, in_c,
                c, NP, TILE, HAS_RESETS, WHOLE,
            )  # fmt: skip
            xs, deltas = next_xs, next_deltas
    if KEEP:  # noqa: SIM102
        if (whole_tiles % TILES_KEPT == 0) & (whole_tiles * TILE < l):
            tl.store(kept_ptr + at_kept, state.to(kept_ptr.dtype.element_ty))
    for t in range(whole_tiles * TILE, l):
        x, delta = _inputs(x_ptr, delta_ptr, t, cl, in_c, X_L, DELTA_L, 1, WHOLE)
        state = _tokens_forward(
            state, A, x, delta, B_ptr, C_ptr, resets_ptr, y_ptr, t, cl, on, in_c, c, NP, 1, HAS_RESETS, WHOLE
        )  # fmt: skip
    tl.store(last_ptr + at, state, mask=inside)


# --- backward ---------------------------------------------------------------------------------------------------------


@triton.jit
def _since_kept(
    state, A, x_ptr, delta_ptr, B_ptr, resets_ptr, start, cl, on, in_c,
    X_L: tl.constexpr, DELTA_L: tl.constexpr, NP: tl.constexpr, TILE: tl.constexpr, TILES_KEPT: tl.constexpr,
    HAS_RESETS: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """The state before the tile of token `start`, from the last one that was kept."""
    for tile in range(start // (TILE * TILES_KEPT) * TILES_KEPT, start // TILE):
        xs, deltas = _inputs(x_ptr, delta_ptr, tile * TILE, cl, in_c, X_L, DELTA_L, TILE, WHOLE)
        states, _ = _advance(state, A, xs, deltas, B_ptr, resets_ptr, tile * TILE, on, NP, TILE, HAS_RESETS)
        state = states[TILE]
    return state


@triton.jit
def _tokens_backward(
    dstate, dA, states, decays, A, pick, dys, xs, deltas, B_ptr, C_ptr, dx_ptr, ddelta_ptr, dB_ptr, dC_ptr,
    start, cl, on, at_part, in_c,
    c: tl.constexpr, NI: tl.constexpr, W: tl.constexpr, NL: tl.constexpr, CL: tl.constexpr,
    FIRST: tl.constexpr, COUNT: tl.constexpr, PRODUCT: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """COUNT tokens from FIRST on, back in time, of the tile that starts at token `start`.

    Returns:
        The gradient of the state before them, and dA with theirs added.
    """
    NP: tl.constexpr = NI * NL
    start = tl.cast(start, tl.int64)
    B_ptr += start * NP
    C_ptr += start * NP
    dx_ptr += start * c
    ddelta_ptr += start * c
    dB_ptr += start * NP
    dC_ptr += start * NP
    last: tl.constexpr = FIRST + COUNT - 1
    for t in tl.static_range(FIRST, last + 1):
        dC = _over_channels(states[t + 1] * dys[t], pick, NI, W, NL, CL, PRODUCT)
        tl.store(dC_ptr + t * NP + at_part, dC.to(dC_ptr.dtype.element_ty))
    B, C = tl.load(B_ptr + last * NP + on), tl.load(C_ptr + last * NP + on)
    for t in tl.static_range(last, FIRST - 1, -1):
        delta, x, dy = deltas[t], xs[t], dys[t]
        dstate += C * dy
        dinput = _over_n(dstate * B)
        if t > FIRST:  # before anything is stored: a load may not pass a store, which could be to the same place
            B, C = tl.load(B_ptr + (t - 1) * NP + on), tl.load(C_ptr + (t - 1) * NP + on)
        dB = _over_channels(dstate * (delta * x), pick, NI, W, NL, CL, PRODUCT)
        dstate *= decays[t]
        dexponent = dstate * states[t]
        dA += dexponent * delta
        tl.store(dB_ptr + t * NP + at_part, dB.to(dB_ptr.dtype.element_ty))
        _put(dx_ptr + t * c + cl, dinput * delta, in_c, WHOLE)
        _put(ddelta_ptr + t * c + cl, dinput * x + _over_n(dexponent * A) * (1 / _LOG2E), in_c, WHOLE)
    return dstate, dA


@triton.jit(do_not_specialize=["l", "one"])
def scan_backward(
    dy_ptr, dlast_ptr, x_ptr, delta_ptr, A_ptr, B_ptr, C_ptr, resets_ptr, kept_ptr,
    dx_ptr, ddelta_ptr, dA_ptr, parts_ptr, dinitial_ptr, l, one, dy_b, x_b, delta_b,
    DY_L: tl.constexpr, X_L: tl.constexpr, DELTA_L: tl.constexpr, c: tl.constexpr, n: tl.constexpr,
    NI: tl.constexpr, W: tl.constexpr, NL: tl.constexpr, CL: tl.constexpr,
    TILE: tl.constexpr, TILES_KEPT: tl.constexpr,
    HAS_RESETS: tl.constexpr, HAS_LAST: tl.constexpr, PRODUCT: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """All gradients, back in time. Grid: blocks of channels, b.

    dA is (b,c,n), a part of a sum for each of the batch; parts are (blocks·W, 2, b, l, NP), of dB and of dC.
    """
    NP: tl.constexpr = NI * NL
    on, cl = _entries_and_channels(NI, W, NL, CL)
    block, i_b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    channel = block * (W * CL) + cl
    in_c = channel < c
    dy_ptr += i_b * dy_b + block * (W * CL)
    x_ptr += i_b * x_b + block * (W * CL)
    delta_ptr += i_b * delta_b + block * (W * CL)
    B_ptr += i_b * l * NP
    C_ptr += i_b * l * NP
    resets_ptr += i_b * l
    dx_ptr += i_b * l * c + block * (W * CL)
    ddelta_ptr += i_b * l * c + block * (W * CL)
    dB_ptr = parts_ptr + (block * W * 2 * tl.num_programs(1) + i_b) * l * NP
    dC_ptr = dB_ptr + tl.num_programs(1).to(tl.int64) * l * NP
    at_part = tl.arange(0, NI)[:, None, None] + tl.arange(0, NL)[None, None, :] * NI
    if W > 1:
        at_part += tl.arange(0, W)[None, :, None] * (2 * tl.num_programs(1).to(tl.int64) * l * NP)
    kept_stride = tl.num_programs(0).to(tl.int64) * (W * CL * NP)
    kept_ptr += i_b * tl.cdiv(l, TILE * TILES_KEPT) * kept_stride + block * (W * CL * NP)
    step = one if kept_ptr.dtype.element_ty == tl.float32 else 1
    at_kept = on // NI * (W * CL * NI) + cl * NI + on % NI * step
    at_A, inside = channel * n + on * step, in_c & (on < n)
    at = i_b * c * n + at_A

    A = tl.load(A_ptr + at_A, mask=inside, other=0.0)
    A = tl.maximum(A, _LOWEST, propagate_nan=tl.PropagateNan.ALL) * _LOG2E
    pick = _pick(NI, PRODUCT)
    dA = tl.zeros((NI, W, NL, CL), tl.float32)
    dstate = tl.zeros((NI, W, NL, CL), tl.float32)
    if HAS_LAST:
        dstate = tl.load(dlast_ptr + at, mask=inside, other=0.0)
    span: tl.constexpr = TILE * TILES_KEPT
    half: tl.constexpr = TILE // 2
    end = l // TILE * TILE
    for i in range(end, l):
        t = end + l - 1 - i
        state = tl.load(kept_ptr + t // span * kept_stride + at_kept).to(tl.float32)
        state = _since_kept(
            state, A, x_ptr, delta_ptr, B_ptr, resets_ptr, t, cl, on, in_c,
            X_L, DELTA_L, NP, TILE, TILES_KEPT, HAS_RESETS, WHOLE,
        )  # fmt: skip
        for before in range(end, t):
            x, delta = _inputs(x_ptr, delta_ptr, before, cl, in_c, X_L, DELTA_L, 1, WHOLE)
            states, _ = _advance(state, A, x, delta, B_ptr, resets_ptr, before, on, NP, 1, HAS_RESETS)
            state = states[1]
        x, delta = _inputs(x_ptr, delta_ptr, t, cl, in_c, X_L, DELTA_L, 1, WHOLE)
        dy = _rows(dy_ptr, t, cl, in_c, DY_L, 1, WHOLE)
        states, decays = _advance(state, A, x, delta, B_ptr, resets_ptr, t, on, NP, 1, HAS_RESETS)
        dstate, dA = _tokens_backward(
            dstate, dA, states, decays, A, pick, dy, x, delta, B_ptr, C_ptr, dx_ptr, ddelta_ptr, dB_ptr, dC_ptr,
            t, cl, on, at_part, in_c, c, NI, W, NL, CL, 0, 1, PRODUCT, WHOLE,
        )  # fmt: skip
    if end > 0:
        start = end - TILE
        xs, deltas = _inputs(x_ptr, delta_ptr, start, cl, in_c, X_L, DELTA_L, TILE, WHOLE)
        dys = _rows(dy_ptr, start, cl, in_c, DY_L, TILE, WHOLE)
        kept = tl.load(kept_ptr + start // span * kept_stride + at_kept).to(tl.float32)
        for i in range(0, end, TILE):
            start = end - TILE - i
            state = kept
            if TILES_KEPT > 1:
                state = _since_kept(
                    state, A, x_ptr, delta_ptr, B_ptr, resets_ptr, start, cl, on, in_c,
                    X_L, DELTA_L, NP, TILE, TILES_KEPT, HAS_RESETS, WHOLE,
                )  # fmt: skip
            states, decays = _advance(state, A, xs, deltas, B_ptr, resets_ptr, start, on, NP, TILE, HAS_RESETS)
            dstate, dA = _tokens_backward(
                dstate, dA, states, decays, A, pick, dys, xs, deltas, B_ptr, C_ptr, dx_ptr, ddelta_ptr, dB_ptr, dC_ptr,
                start, cl, on, at_part, in_c, c, NI, W, NL, CL, half, TILE - half, PRODUCT, WHOLE,
            )  # fmt: skip
            following = tl.maximum(start - TILE, 0)  # loaded now: half the states are done with and leave room
            next_xs, next_deltas = _inputs(x_ptr, delta_ptr, following, cl, in_c, X_L, DELTA_L, TILE, WHOLE)
            next_dys = _rows(dy_ptr, following, cl, in_c, DY_L, TILE, WHOLE)
            kept = tl.load(kept_ptr + following // span * kept_stride + at_kept).to(tl.float32)
            dstate, dA = _tokens_backward(
                dstate, dA, states, decays, A, pick, dys, xs, deltas, B_ptr, C_ptr, dx_ptr, ddelta_ptr, dB_ptr, dC_ptr,
                start, cl, on, at_part, in_c, c, NI, W, NL, CL, 0, half, PRODUCT, WHOLE,
            )  # fmt: skip
            xs, deltas, dys = next_xs, next_deltas, next_dys
    tl.store(dinitial_ptr + at, dstate, mask=inside)
    tl.store(dA_ptr + at, dA, mask=inside)


@triton.jit(do_not_specialize=["parts", "rows"])
def scan_sum(
    parts_ptr, dB_ptr, dC_ptr, parts, rows, n: tl.constexpr, NP: tl.constexpr, AT_ONCE: tl.constexpr, SIZE: tl.constexpr
):  # fmt: skip
    """Add parts (parts, 2, rows, NP) to dB and dC, (rows, n) each. Grid: ⌈rows·NP/SIZE⌉, 2."""
    at = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    numbers = rows.to(tl.int64) * NP
    part = tl.arange(0, AT_ONCE)[:, None]
    parts_ptr += tl.program_id(1) * numbers
    total = tl.zeros((SIZE,), tl.float32)
    for first in range(0, parts, AT_ONCE):
        inside = (first + part < parts) & (at < numbers)[None, :]
        some = tl.load(parts_ptr + (first + part) * (2 * numbers) + at[None, :], mask=inside, other=0.0)
        total += tl.sum(some.to(tl.float32), axis=0)
    to, inside = at // NP * n + at % NP, (at < numbers) & (at % NP < n)
    if tl.program_id(1) == 0:
        tl.store(dB_ptr + to, total.to(dB_ptr.dtype.element_ty), mask=inside)
    else:
        tl.store(dC_ptr + to, total.to(dC_ptr.dtype.element_ty), mask=inside)


# --- the operator -----------------------------------------------------------------------------------------------------


def selective_scan_triton(
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, initial_state: Tensor | None, seq_idx: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Run the kernels: see `limbeck.ops.selective_scan`.

    Returns:
        y, (b, l, c) in x's dtype, and the state after the last token, (b, c, n) in float32.
    """
    resets = None
    if seq_idx is not None:  # −∞ at the first token of a document, except of the first
        fresh = torch.nn.functional.pad(seq_idx.diff(dim=1) != 0, (1, 0))  # (b, l)
        resets = torch.zeros_like(fresh, dtype=torch.float32).masked_fill_(fresh, -torch.inf)
    inputs = (x, delta, A, B, C, initial_state)
    keep = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in inputs)
    y, last, _ = _scan(*inputs, resets, keep)
    return y, last


def _sizes(x: Tensor, A: Tensor) -> dict[str, Any]:
    """What both kernels are compiled for."""
    (c, n), launch = A.shape, launch_for(x)
    lanes = max(1, (1 << (n - 1).bit_length()) // INSIDE)  # of a warp along n
    warps = max(1, lanes // 2)
    return {
        "c": c,
        "n": n,
        "NI": INSIDE,
        "W": warps,
        "NL": lanes,
        "CL": 32 // lanes,
        "TILE": launch.tile,
        "TILES_KEPT": launch.tiles_kept,
        "WHOLE": c % (warps * 32 // lanes) == 0,
    }


def _blocks(sizes: dict[str, Any]) -> int:
    return -(-sizes["c"] // (sizes["W"] * sizes["CL"]))


def _forward(
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, initial_state: Tensor | None, resets: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    y, last, kept = outputs = _scan_shapes(x, delta, A, B, C, initial_state, resets, keep)
    b, l, sizes = x.shape[0], x.shape[1], _sizes(x, A)
    x, delta = _whole_rows(x), _whole_rows(delta)
    initial = x if initial_state is None else initial_state.contiguous()
    scan_forward[(_blocks(sizes), b)](
        x, delta, A.contiguous(), _entries(B, sizes), _entries(C, sizes), x if resets is None else resets, initial,
        y, last, kept, l, 1, x.stride(0), delta.stride(0), X_L=x.stride(1), DELTA_L=delta.stride(1), **sizes,
        HAS_RESETS=resets is not None, HAS_INITIAL=initial_state is not None, KEEP=keep, num_warps=sizes["W"],
    )  # fmt: skip
    return outputs


def _backward(
    dy: Tensor, dlast: Tensor | None, x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, kept: Tensor,
    resets: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dx, ddelta, dA, dB, dC, dinitial = gradients = _scan_backward_shapes(dy, dlast, x, delta, A, B, C, kept, resets)
    (b, l, c), n, sizes, launch = x.shape, A.shape[1], _sizes(x, A), launch_for(x)
    entries = sizes["NI"] * sizes["NL"]
    dA_parts, parts = A.new_empty(b, c, n), kept.new_empty(_blocks(sizes) * sizes["W"], 2, b, l, entries)
    dy, x, delta = _whole_rows(dy), _whole_rows(x), _whole_rows(delta)
    scan_backward[(_blocks(sizes), b)](
        dy, x if dlast is None else dlast.contiguous(), x, delta, A.contiguous(), _entries(B, sizes),
        _entries(C, sizes), x if resets is None else resets, kept, dx, ddelta, dA_parts, parts, dinitial,
        l, 1, dy.stride(0), x.stride(0), delta.stride(0),
        DY_L=dy.stride(1), X_L=x.stride(1), DELTA_L=delta.stride(1), **sizes,
        HAS_RESETS=resets is not None, HAS_LAST=dlast is not None, PRODUCT=launch.product,
        num_warps=sizes["W"], num_stages=1, maxnreg=launch.registers,
    )  # fmt: skip
    size = 1024
    scan_sum[(triton.cdiv(b * l * entries, size), 2)](
        parts, dB, dC, len(parts), b * l, n=n, NP=entries, AT_ONCE=8, SIZE=size, num_warps=4
    )
    torch.sum(dA_parts, 0, out=dA)
    return gradients


def _whole_rows(tensor: Tensor) -> Tensor:
    """The tensor as it is where its last dimension is one piece of memory, else a copy."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _entries(tensor: Tensor, sizes: dict[str, Any]) -> Tensor:
    """B or C as the kernels read it, in float32 with zeros up to NP: so small that a copy costs nothing."""
    missing = sizes["NI"] * sizes["NL"] - sizes["n"]
    wide = tensor.float()
    return torch.nn.functional.pad(wide, (0, missing)) if missing else wide.contiguous()


def _scan_shapes(
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, initial_state: Tensor | None, resets: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    (b, l, c), sizes = x.shape, _sizes(x, A)
    span = sizes["TILE"] * sizes["TILES_KEPT"]
    kept = (b, (l + span - 1) // span, _blocks(sizes), sizes["W"] * 32 * INSIDE) if keep else (0,)
    dtype = torch.float32 if x.dtype == torch.float32 else torch.bfloat16
    return x.new_empty(b, l, c), A.new_empty(b, *A.shape), x.new_empty(kept, dtype=dtype)


def _scan_backward_shapes(
    dy: Tensor, dlast: Tensor | None, x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, kept: Tensor,
    resets: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dx, ddelta, dA, dB, dC = (tensor.new_empty(tensor.shape) for tensor in (x, delta, A, B, C))
    return dx, ddelta, dA, dB, dC, A.new_empty(x.shape[0], *A.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, delta, A, B, C, initial_state, resets, _ = inputs
    ctx.has_initial = initial_state is not None
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, delta, A, B, C, output[2], resets)


def _differentiate(ctx: Any, dy: Tensor | None, dlast: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    x, delta, A, B, C, kept, resets = ctx.saved_tensors
    if dy is None:
        dy = torch.zeros_like(x)
    *gradients, dinitial = _scan_backward(dy, dlast, x, delta, A, B, C, kept, resets)
    return *gradients, dinitial if ctx.has_initial else None, None, None


_scan = torch.library.custom_op(
    "limbeck::selective_scan_triton",
    _forward,
    mutates_args=(),
    schema="(Tensor x, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? initial_state, Tensor? resets, bool keep)"
    " -> (Tensor, Tensor, Tensor)",
)
_scan.register_fake(_scan_shapes)
_scan.register_autograd(_differentiate, setup_context=_save)
_scan_backward = torch.library.custom_op(
    "limbeck::selective_scan_triton_backward",
    _backward,
    mutates_args=(),
    schema="(Tensor dy, Tensor? dlast, Tensor x, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor kept,"
    " Tensor? resets) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
_scan_backward.register_fake(_scan_backward_shapes)
