"""The causal convolution in Triton: one warp walks along time with a block of channels in its registers.

    forward      u_t = bias + Σ_j w_j · x_{t-(k-1)+j}          y_t = act(u_t)
    backward     du_t = dy_t · act'(u_t)                       dx_s = Σ_j w_j · du_{s+(k-1)-j}
                 dw_j = Σ_t du_t · x_{t-(k-1)+j}               dbias = Σ_t du_t

A program has a block of channels and a span of tokens. It keeps the last k-1 rows of inputs (and of du) in registers,
so that each row comes from memory once, and again for the k-1 rows before a span. The backward computes u again, one
token after another as the forward does, and knows dx_s when it has come to du_{s+(k-1)}: its spans cover the l tokens
and k-1 more. Sums over tokens leave a program as one partial sum and are added by torch: the same bits on every run.

y may be cut into pieces along its channels, each a tensor of its own: blocks are counted within pieces.
"""

# What stands in a kernel is Triton's language, which pyright takes for Python.
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from limbeck.ops.cards import card_of
from limbeck.ops.inputs import rows_whole, whole_or

# --- pieces of both kernels -------------------------------------------------------------------------------------------


@triton.jit
def _taps(weight_ptr, channel, inside, K: tl.constexpr, KP: tl.constexpr):
    """The k taps of a block of channels, one tensor each, from weights (c, k)."""
    tap = tl.arange(0, KP)
    tile = tl.load(weight_ptr + channel[:, None] * K + tap, mask=inside[:, None] & (tap < K), other=0.0)  # (BC, KP)
    taps = ()
    for j in tl.static_range(K):
        taps = taps + (tl.sum(tl.where(tap == j, tile.to(tl.float32), 0.0), axis=1),)
    return taps


@triton.jit
def _row(row_ptr, token_ptr, t, l, channel, inside, HAS_MASK: tl.constexpr):
    """Row t in float32; zero at padding, before the first token and past the last."""
    here = (t >= 0) & (t < l)
    if HAS_MASK:
        here = here & (tl.load(token_ptr + t, mask=here, other=0) != 0)
    return tl.load(row_ptr + channel, mask=inside & here, other=0.0).to(tl.float32)


@triton.jit
def _row_before(state_ptr, t, channel, inside, K: tl.constexpr, HAS_STATE: tl.constexpr):
    """Row t of the initial state, whose last row is -1; zero where there is none."""
    row = tl.zeros(channel.shape, tl.float32)
    if HAS_STATE:
        here = inside & (t < 0) & (t > -K)
        row = tl.load(state_ptr + channel * (K - 1) + (t + K - 1), mask=here, other=0.0).to(tl.float32)
    return row


@triton.jit
def _document(seq_ptr, t, l, HAS_SEQ: tl.constexpr):
    """The document id at t; what is before the first token is of its document."""
    document = 0
    if HAS_SEQ:
        document = tl.load(seq_ptr + tl.minimum(tl.maximum(t, 0), l - 1))
    return document


@triton.jit
def _reached(row, documents, here: tl.constexpr, there: tl.constexpr, HAS_SEQ: tl.constexpr):
    """The row, or zero where two places of the window are of different documents."""
    if HAS_SEQ:
        row = tl.where(documents[here] == documents[there], row, 0.0)
    return row


@triton.jit
def _convolved(rows, documents, taps, bias, r: tl.constexpr, K: tl.constexpr, HAS_SEQ: tl.constexpr):
    """Sum the taps of the token at place r + K-1 of the window."""
    u = bias
    for j in tl.static_range(K):
        u += taps[j] * _reached(rows[r + j], documents, r + j, r + K - 1, HAS_SEQ)
    return u


@triton.jit
def _slope(dy, u, SILU: tl.constexpr):
    """Multiply dy with act'(u)."""
    if SILU:
        sigmoid = 1.0 / (1.0 + tl.exp(-u))
        dy *= sigmoid + u * sigmoid * (1.0 - sigmoid)
    return dy


# --- the kernels ------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["l", "span", "x_b", "x_l"])
def conv_forward(
    x_ptr, weight_ptr, bias_ptr, state_ptr, seq_ptr, token_ptr, y_ptrs, l, span, x_b, x_l,
    C: tl.constexpr, K: tl.constexpr, KP: tl.constexpr,
    STARTS: tl.constexpr, WIDTHS: tl.constexpr, BLOCKS: tl.constexpr,
    BC: tl.constexpr, ROWS: tl.constexpr, ALIGN: tl.constexpr,
    SILU: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_STATE: tl.constexpr, HAS_SEQ: tl.constexpr, HAS_MASK: tl.constexpr,
):  # fmt: skip
    """Make y of a block of channels and a span of tokens; x's strides are in units of ALIGN."""
    block = tl.program_id(0)
    y_ptr, start, width, first_block = y_ptrs[0], 0, WIDTHS[0], 0
    for i in tl.static_range(1, len(WIDTHS)):
        y_ptr = tl.where(block >= BLOCKS[i], y_ptrs[i], y_ptr)
        start = tl.where(block >= BLOCKS[i], STARTS[i], start)
        width = tl.where(block >= BLOCKS[i], WIDTHS[i], width)
        first_block = tl.where(block >= BLOCKS[i], BLOCKS[i], first_block)
    channel = (block - first_block) * BC + tl.arange(0, BC)
    inside = channel < width
    first, batch = tl.program_id(1) * span, tl.program_id(2).to(tl.int64)
    x_l = x_l.to(tl.int64) * ALIGN
    x_ptr += batch * (x_b.to(tl.int64) * ALIGN) + first * x_l + start
    y_ptr += (batch * l + first) * width
    state_ptr += (batch * C + start) * (K - 1)
    seq_ptr += batch * l
    token_ptr += batch * l

    taps = _taps(weight_ptr + start * K, channel, inside, K, KP)
    bias = tl.zeros((BC,), tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + start + channel, mask=inside, other=0.0).to(tl.float32)
    window, documents = (), ()  # the last k-1 rows, and their documents
    for i in tl.static_range(K - 1):
        t = first + i - (K - 1)
        row = _row(x_ptr + (i - (K - 1)) * x_l, token_ptr, t, l, channel, inside, HAS_MASK)
        window = window + (row + _row_before(state_ptr, t, channel, inside, K, HAS_STATE),)
        documents = documents + (_document(seq_ptr, t, l, HAS_SEQ),)
    for tile in range(first, tl.minimum(first + span, l), ROWS):
        rows, ids = window, documents
        for r in tl.static_range(ROWS):
            rows = rows + (_row(x_ptr + r * x_l, token_ptr, tile + r, l, channel, inside, HAS_MASK),)
            ids = ids + (_document(seq_ptr, tile + r, l, HAS_SEQ),)
        for r in tl.static_range(ROWS):
            y = _convolved(rows, ids, taps, bias, r, K, HAS_SEQ)
            if SILU:
                y = y / (1.0 + tl.exp(-y))
            here = tile + r < l
            if HAS_MASK:
                y = tl.where(tl.load(token_ptr + tile + r, mask=here, other=0) != 0, y, 0.0)
            tl.store(y_ptr + r * width + channel, y.to(y_ptr.dtype.element_ty), mask=inside & here)
        window, documents = rows[ROWS:], ids[ROWS:]
        x_ptr += ROWS * x_l
        y_ptr += ROWS * width


@triton.jit(do_not_specialize=["l", "span", "x_b", "x_l"])
def conv_backward(
    x_ptr, weight_ptr, bias_ptr, state_ptr, seq_ptr, token_ptr, dy_ptrs, dx_ptr, sums_ptr, dstate_ptr,
    l, span, x_b, x_l,
    C: tl.constexpr, K: tl.constexpr, KP: tl.constexpr,
    STARTS: tl.constexpr, WIDTHS: tl.constexpr, BLOCKS: tl.constexpr,
    BC: tl.constexpr, ROWS: tl.constexpr, ALIGN: tl.constexpr,
    SILU: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_STATE: tl.constexpr, HAS_SEQ: tl.constexpr, HAS_MASK: tl.constexpr,
):  # fmt: skip
    """Make dx and dstate, and of dw and dbias the part of this span: sums (b · spans, k+1, c), in float32."""
    block = tl.program_id(0)
    dy_ptr, start, width, first_block = dy_ptrs[0], 0, WIDTHS[0], 0
    for i in tl.static_range(1, len(WIDTHS)):
        dy_ptr = tl.where(block >= BLOCKS[i], dy_ptrs[i], dy_ptr)
        start = tl.where(block >= BLOCKS[i], STARTS[i], start)
        width = tl.where(block >= BLOCKS[i], WIDTHS[i], width)
        first_block = tl.where(block >= BLOCKS[i], BLOCKS[i], first_block)
    channel = (block - first_block) * BC + tl.arange(0, BC)
    inside = channel < width
    first, batch = tl.program_id(1) * span, tl.program_id(2).to(tl.int64)
    x_l = x_l.to(tl.int64) * ALIGN
    x_ptr += batch * (x_b.to(tl.int64) * ALIGN) + first * x_l + start
    dy_ptr += (batch * l + first) * width
    dx_ptr += (batch * l + first) * C + start
    state_ptr += (batch * C + start) * (K - 1)
    dstate_ptr += (batch * C + start) * (K - 1)
    seq_ptr += batch * l
    token_ptr += batch * l
    sums_ptr += (batch * tl.num_programs(1) + tl.program_id(1)) * (K + 1) * C + start

    taps = _taps(weight_ptr + start * K, channel, inside, K, KP)
    bias = tl.zeros((BC,), tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + start + channel, mask=inside, other=0.0).to(tl.float32)
    before, documents = (), ()
    for i in tl.static_range(2 * (K - 1)):
        t = first + i - 2 * (K - 1)
        row = _row(x_ptr + (i - 2 * (K - 1)) * x_l, token_ptr, t, l, channel, inside, HAS_MASK)
        before = before + (row + _row_before(state_ptr, t, channel, inside, K, HAS_STATE),)
        documents = documents + (_document(seq_ptr, t, l, HAS_SEQ),)
    slopes = ()  # the last k-1 rows of du
    for i in tl.static_range(K - 1):
        t = first + i - (K - 1)
        dy = _row(dy_ptr + (i - (K - 1)) * width, token_ptr, t, l, channel, inside, HAS_MASK)
        slopes = slopes + (_slope(dy, _convolved(before, documents, taps, bias, i, K, HAS_SEQ), SILU),)
    window, documents = before[K - 1 :], documents[K - 1 :]
    sums = ()  # dw_0 … dw_{k-1}, dbias
    for _ in tl.static_range(K + 1):
        sums = sums + (tl.zeros((BC,), tl.float32),)

    for tile in range(first, tl.minimum(first + span, l + K - 1), ROWS):
        rows, dys, ids, dus = window, (), documents, slopes
        for r in tl.static_range(ROWS):
            dys = dys + (_row(dy_ptr + r * width, token_ptr, tile + r, l, channel, inside, HAS_MASK),)
            rows = rows + (_row(x_ptr + r * x_l, token_ptr, tile + r, l, channel, inside, HAS_MASK),)
            ids = ids + (_document(seq_ptr, tile + r, l, HAS_SEQ),)
        for r in tl.static_range(ROWS):
            du = _slope(dys[r], _convolved(rows, ids, taps, bias, r, K, HAS_SEQ), SILU)
            dus = dus + (du,)
            added = ()
            for j in tl.static_range(K):
                added = added + (sums[j] + du * _reached(rows[r + j], ids, r + j, r + K - 1, HAS_SEQ),)
            sums = added + (sums[K] + du,)
            dx = tl.zeros((BC,), tl.float32)  # of the token at place r of the window
            for j in tl.static_range(K):
                dx += taps[K - 1 - j] * _reached(dus[r + j], ids, r + j, r, HAS_SEQ)
            s = tile + r - (K - 1)
            here = (s >= 0) & (s < l)
            if HAS_STATE:
                tl.store(
                    dstate_ptr + channel * (K - 1) + tile + r, dx.to(dstate_ptr.dtype.element_ty), mask=inside & (s < 0)
                )
            if HAS_MASK:
                dx = tl.where(tl.load(token_ptr + s, mask=here, other=0) != 0, dx, 0.0)
            tl.store(dx_ptr + (r - (K - 1)) * C + channel, dx.to(dx_ptr.dtype.element_ty), mask=inside & here)
        window, documents, slopes = rows[ROWS:], ids[ROWS:], dus[ROWS:]
        x_ptr += ROWS * x_l
        dy_ptr += ROWS * width
        dx_ptr += ROWS * C
    for j in tl.static_range(K + 1):
        tl.store(sums_ptr + j * C + channel, sums[j], mask=inside)


# --- the operator -----------------------------------------------------------------------------------------------------

_INPUTS = "Tensor x, Tensor weight, Tensor? bias, Tensor? initial_state, Tensor? seq_idx, Tensor? mask, int[] widths"
_FORWARD = f"({_INPUTS}, bool silu) -> Tensor[]"
_BACKWARD = f"(Tensor[] dy, {_INPUTS}, bool silu) -> (Tensor, Tensor, Tensor, Tensor)"


def causal_conv_triton(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
    mask: Tensor | None,
    widths: Sequence[int],
    silu: bool,
) -> tuple[Tensor, ...]:
    """Run the kernels: see `limbeck.ops.causal_conv.causal_conv_split`.

    Returns:
        The pieces of y, (b, l, width) each, in x's dtype.
    """
    return tuple(_conv(x, weight, bias, initial_state, seq_idx, mask, list(widths), silu))


class Launch(NamedTuple):
    """How a kernel is cut up.

    Attributes:
        channels: Of a program, which is a warp; 16 bytes a thread, or 8 where 16 would take too many registers.
        rows: Whose loads are under way together.
        span: Tokens of a program, a multiple of `rows`.
    """

    channels: int
    rows: int
    span: int


def launch_of(x: Tensor, silu: bool, backward: bool) -> Launch:
    """The launch for x (b, l, c): as many programs as the card holds at once, and no longer spans than that takes."""
    (b, l, c), width = x.shape, 8 if backward else 16
    channels = min(32 * width // x.element_size(), triton.next_power_of_2(c))
    rows = 4 if backward and silu else 8
    wanted = card_of(x).multiprocessors * (16 if backward else 32)
    spans = max(1, wanted // (b * triton.cdiv(c, channels)))
    most = 512 if backward else 128
    return Launch(channels, rows, rows * triton.cdiv(min(most, max(16, triton.cdiv(l, spans))), rows))


def _options(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None, seq_idx: Tensor | None, mask: Tensor | None,
    widths: list[int], silu: bool, launch: Launch,
) -> dict[str, Any]:  # fmt: skip
    """What both kernels are specialised for."""
    k = weight.shape[1]
    blocks = [triton.cdiv(width, launch.channels) for width in widths]
    return {
        "C": x.shape[2],
        "K": k,
        "KP": triton.next_power_of_2(k),
        "STARTS": tuple(accumulate(widths, initial=0)),
        "WIDTHS": tuple(widths),
        "BLOCKS": tuple(accumulate(blocks, initial=0)),
        "BC": launch.channels,
        "ROWS": launch.rows,
        "ALIGN": math.gcd(8, *x.stride()[:2]),
        "SILU": silu,
        "HAS_BIAS": bias is not None,
        "HAS_STATE": state is not None,
        "HAS_SEQ": seq_idx is not None,
        "HAS_MASK": mask is not None,
        "num_warps": 1,
    }


def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, initial_state: Tensor | None, seq_idx: Tensor | None,
    mask: Tensor | None, widths: list[int], silu: bool,
) -> list[Tensor]:  # fmt: skip
    b, l, _ = x.shape
    x = rows_whole(x)
    launch = launch_of(x, silu, backward=False)
    options = _options(x, weight, bias, initial_state, seq_idx, mask, widths, silu, launch)
    pieces = [x.new_empty(b, l, width) for width in widths]
    conv_forward[(options["BLOCKS"][-1], triton.cdiv(l, launch.span), b)](
        x, weight.contiguous(), *(whole_or(tensor, x) for tensor in (bias, initial_state, seq_idx, mask)),
        tuple(pieces), l, launch.span, *(stride // options["ALIGN"] for stride in x.stride()[:2]), **options,
    )  # fmt: skip
    return pieces


def _backward(
    dy: list[Tensor], x: Tensor, weight: Tensor, bias: Tensor | None, initial_state: Tensor | None,
    seq_idx: Tensor | None, mask: Tensor | None, widths: list[int], silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    (b, l, c), k = x.shape, weight.shape[1]
    x = rows_whole(x)
    launch = launch_of(x, silu, backward=True)
    options = _options(x, weight, bias, initial_state, seq_idx, mask, widths, silu, launch)
    spans = triton.cdiv(l + k - 1, launch.span)
    dx = x.new_empty(b, l, c)
    dstate = x.new_empty(0) if initial_state is None else x.new_empty(b, c, k - 1)
    sums = x.new_empty(b * spans, k + 1, c, dtype=torch.float32)
    conv_backward[(options["BLOCKS"][-1], spans, b)](
        x, weight.contiguous(), *(whole_or(tensor, x) for tensor in (bias, initial_state, seq_idx, mask)),
        tuple(piece.contiguous() for piece in dy), dx, sums, dstate,
        l, launch.span, *(stride // options["ALIGN"] for stride in x.stride()[:2]), **options,
    )  # fmt: skip
    sums = sums.sum(0)  # (k+1, c)
    dweight = sums[:k].mT.to(weight.dtype).contiguous()
    dbias = x.new_empty(0) if bias is None else sums[k].to(bias.dtype).clone()
    return dx, dweight, dbias, dstate


def _forward_shapes(
    x: Tensor, weight: Tensor, bias: Tensor | None, initial_state: Tensor | None, seq_idx: Tensor | None,
    mask: Tensor | None, widths: list[int], silu: bool,
) -> list[Tensor]:  # fmt: skip
    return [x.new_empty(*x.shape[:2], width) for width in widths]


def _backward_shapes(
    dy: list[Tensor], x: Tensor, weight: Tensor, bias: Tensor | None, initial_state: Tensor | None,
    seq_idx: Tensor | None, mask: Tensor | None, widths: list[int], silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dx, dweight = x.new_empty(x.shape), weight.new_empty(weight.shape)
    dbias = x.new_empty(0) if bias is None else bias.new_empty(bias.shape)
    return dx, dweight, dbias, x.new_empty(0) if initial_state is None else x.new_empty(initial_state.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    *tensors, ctx.widths, ctx.silu = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, dy: list[Tensor]) -> tuple[Tensor | None, ...]:
    x, weight, bias, initial_state, seq_idx, mask = ctx.saved_tensors
    dx, dweight, dbias, dstate = _conv_backward(dy, x, weight, bias, initial_state, seq_idx, mask, ctx.widths, ctx.silu)
    return (
        dx, dweight, None if bias is None else dbias, None if initial_state is None else dstate, None, None, None, None,
    )  # fmt: skip


_conv = torch.library.custom_op("limbeck::causal_conv", _forward, mutates_args=(), schema=_FORWARD)
_conv.register_fake(_forward_shapes)
_conv.register_autograd(_differentiate, setup_context=_save)
_conv_backward = torch.library.custom_op("limbeck::causal_conv_backward", _backward, mutates_args=(), schema=_BACKWARD)
_conv_backward.register_fake(_backward_shapes)
