"""The skip and the gate in Triton: one pass over the inputs forward, one backward.

    forward      s = y + D x        g = z + z_bias              out = s · silu(g)
    backward     dy = dout · silu(g)                            dx = D dy
                 dz = dout · s · silu'(g)                       dD = Σ x dy        dz_bias = Σ dz

One warp walks along the tokens of a span with a block of channels. Sums over tokens leave it as one partial sum and are
added by torch: the same bits on every run.
"""

# What stands in a kernel is Triton's language, which pyright takes for Python.
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from limbeck.ops.cards import card_of
from limbeck.ops.inputs import rows_whole, whole_or


@triton.jit
def _block(D_ptr, z_bias_ptr, C: tl.constexpr, P: tl.constexpr, BC: tl.constexpr, HAS_SKIP, HAS_BIAS: tl.constexpr):
    """The program's channels, whether they exist, and D and z_bias at them."""
    channel = tl.program_id(0) * BC + tl.arange(0, BC)
    inside = channel < C
    D, z_bias = tl.zeros((BC,), tl.float32), tl.zeros((BC,), tl.float32)
    if HAS_SKIP:
        D = tl.load(D_ptr + channel // P, mask=inside, other=0.0).to(tl.float32)
    if HAS_BIAS:
        z_bias = tl.load(z_bias_ptr + channel, mask=inside, other=0.0).to(tl.float32)
    return channel, inside, D, z_bias


@triton.jit
def _rows(row_ptr, stride, channel, inside, left, ROWS: tl.constexpr):
    """The next rows in float32, one tensor each; zero where none are left."""
    rows = ()
    for r in tl.static_range(ROWS):
        row = tl.load(row_ptr + r * stride + channel, mask=inside & (r < left), other=0.0)
        rows = rows + (row.to(tl.float32),)
    return rows


@triton.jit(do_not_specialize=["l", "span", "y_b", "y_l", "x_b", "x_l", "z_b", "z_l"])
def gate_forward(
    y_ptr, x_ptr, D_ptr, z_ptr, z_bias_ptr, out_ptr, l, span, y_b, y_l, x_b, x_l, z_b, z_l,
    C: tl.constexpr, P: tl.constexpr, BC: tl.constexpr, ROWS: tl.constexpr, ALIGN: tl.constexpr,
    HAS_SKIP: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """Make out of a block of channels and a span of tokens; strides are in units of ALIGN."""
    channel, inside, D, z_bias = _block(D_ptr, z_bias_ptr, C, P, BC, HAS_SKIP, HAS_BIAS)
    first, batch = tl.program_id(1) * span, tl.program_id(2).to(tl.int64) * ALIGN
    y_l, x_l, z_l = y_l.to(tl.int64) * ALIGN, x_l.to(tl.int64) * ALIGN, z_l.to(tl.int64) * ALIGN
    y_ptr += batch * y_b + first * y_l
    x_ptr += batch * x_b + first * x_l
    z_ptr += batch * z_b + first * z_l
    out_ptr += (tl.program_id(2).to(tl.int64) * l + first) * C
    for tile in range(first, tl.minimum(first + span, l), ROWS):
        left = l - tile
        y, z = _rows(y_ptr, y_l, channel, inside, left, ROWS), _rows(z_ptr, z_l, channel, inside, left, ROWS)
        if HAS_SKIP:
            x = _rows(x_ptr, x_l, channel, inside, left, ROWS)
        for r in tl.static_range(ROWS):
            s, g = y[r], z[r] + z_bias
            if HAS_SKIP:
                s += D * x[r]
            out = s * g / (1.0 + tl.exp(-g))
            tl.store(out_ptr + r * C + channel, out.to(out_ptr.dtype.element_ty), mask=inside & (r < left))
        y_ptr += ROWS * y_l
        x_ptr += ROWS * x_l
        z_ptr += ROWS * z_l
        out_ptr += ROWS * C


@triton.jit(do_not_specialize=["l", "span", "y_b", "y_l", "x_b", "x_l", "z_b", "z_l", "dout_b", "dout_l"])
def gate_backward(
    dout_ptr, y_ptr, x_ptr, D_ptr, z_ptr, z_bias_ptr, dy_ptr, dx_ptr, dz_ptr, sums_ptr,
    l, span, y_b, y_l, x_b, x_l, z_b, z_l, dout_b, dout_l,
    C: tl.constexpr, P: tl.constexpr, BC: tl.constexpr, ROWS: tl.constexpr, ALIGN: tl.constexpr,
    HAS_SKIP: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """Make dy, dx and dz, and of Σ dz and Σ x dy the part of this span: sums (b · spans, 2, c), in float32."""
    channel, inside, D, z_bias = _block(D_ptr, z_bias_ptr, C, P, BC, HAS_SKIP, HAS_BIAS)
    first, batch = tl.program_id(1) * span, tl.program_id(2).to(tl.int64) * ALIGN
    y_l, x_l, z_l = y_l.to(tl.int64) * ALIGN, x_l.to(tl.int64) * ALIGN, z_l.to(tl.int64) * ALIGN
    dout_l = dout_l.to(tl.int64) * ALIGN
    y_ptr += batch * y_b + first * y_l
    x_ptr += batch * x_b + first * x_l
    z_ptr += batch * z_b + first * z_l
    dout_ptr += batch * dout_b + first * dout_l
    at = (tl.program_id(2).to(tl.int64) * l + first) * C
    dy_ptr += at
    dx_ptr += at
    dz_ptr += at
    sums_ptr += (tl.program_id(2).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * 2 * C
    dz_sum, dD_sum = tl.zeros((BC,), tl.float32), tl.zeros((BC,), tl.float32)
    for tile in range(first, tl.minimum(first + span, l), ROWS):
        left = l - tile
        douts = _rows(dout_ptr, dout_l, channel, inside, left, ROWS)
        y, z = _rows(y_ptr, y_l, channel, inside, left, ROWS), _rows(z_ptr, z_l, channel, inside, left, ROWS)
        if HAS_SKIP:
            x = _rows(x_ptr, x_l, channel, inside, left, ROWS)
        for r in tl.static_range(ROWS):
            here = inside & (r < left)
            s, g = y[r], z[r] + z_bias
            if HAS_SKIP:
                s += D * x[r]
            sigmoid = 1.0 / (1.0 + tl.exp(-g))
            dy = douts[r] * g * sigmoid
            dz = douts[r] * s * (sigmoid + g * sigmoid * (1.0 - sigmoid))
            dz_sum += dz
            tl.store(dy_ptr + r * C + channel, dy.to(dy_ptr.dtype.element_ty), mask=here)
            tl.store(dz_ptr + r * C + channel, dz.to(dz_ptr.dtype.element_ty), mask=here)
            if HAS_SKIP:
                dD_sum += dy * x[r]
                tl.store(dx_ptr + r * C + channel, (D * dy).to(dx_ptr.dtype.element_ty), mask=here)
        y_ptr += ROWS * y_l
        x_ptr += ROWS * x_l
        z_ptr += ROWS * z_l
        dout_ptr += ROWS * dout_l
        dy_ptr += ROWS * C
        dx_ptr += ROWS * C
        dz_ptr += ROWS * C
    tl.store(sums_ptr + channel, dz_sum, mask=inside)
    tl.store(sums_ptr + C + channel, dD_sum, mask=inside)


# --- the operator -----------------------------------------------------------------------------------------------------

_FORWARD = "(Tensor y, Tensor? x, Tensor? D, Tensor z, Tensor? z_bias) -> Tensor"
_BACKWARD = (
    "(Tensor dout, Tensor y, Tensor? x, Tensor? D, Tensor z, Tensor? z_bias)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def gated_skip_triton(y: Tensor, x: Tensor | None, D: Tensor | None, z: Tensor, z_bias: Tensor | None) -> Tensor:
    """Run the kernels: see `limbeck.ops.gated_skip`; here y and x are (b, l, h·p) too.

    Returns:
        (b, l, h·p), in z's dtype.
    """
    return _gate(y, x, D, z, z_bias)


class Launch(NamedTuple):
    """How a kernel is cut up.

    Attributes:
        channels: Of a program; 16 bytes a thread.
        rows: Whose loads are under way together.
        span: Tokens of a program, a multiple of `rows`.
    """

    channels: int
    rows: int
    span: int


def launch_of(z: Tensor, backward: bool) -> Launch:
    """The launch for z (b, l, c): programs enough for the card, and no shorter spans than that takes."""
    (b, l, c), rows = z.shape, 2 if backward else 4
    channels = min(32 * 16 // z.element_size(), triton.next_power_of_2(c))
    wanted = card_of(z).multiprocessors * (16 if backward else 32)
    spans = max(1, wanted // (b * triton.cdiv(c, channels)))
    return Launch(channels, rows, rows * triton.cdiv(min(128, max(8, triton.cdiv(l, spans))), rows))


def _arguments(tensors: list[Tensor], D: Tensor | None, z_bias: Tensor | None, launch: Launch) -> tuple[Any, ...]:
    """The strides of these tensors, and what both kernels are specialised for."""
    strides = [stride for tensor in tensors for stride in tensor.stride()[:2]]
    align, c = math.gcd(8, *strides), tensors[0].shape[2]
    options = {
        "C": c,
        "P": 1 if D is None else c // len(D),
        "BC": launch.channels,
        "ROWS": launch.rows,
        "ALIGN": align,
        "HAS_SKIP": D is not None,
        "HAS_BIAS": z_bias is not None,
        "num_warps": 1,
    }
    return [stride // align for stride in strides], options


def _forward(y: Tensor, x: Tensor | None, D: Tensor | None, z: Tensor, z_bias: Tensor | None) -> Tensor:
    (b, l, _), launch = z.shape, launch_of(z, backward=False)
    out = z.new_empty(z.shape)
    y, x, z = rows_whole(y), rows_whole(y if x is None else x), rows_whole(z)
    D_, z_bias_ = (whole_or(tensor, y) for tensor in (D, z_bias))
    strides, options = _arguments([y, x, z], D, z_bias, launch)
    grid = (triton.cdiv(z.shape[2], launch.channels), triton.cdiv(l, launch.span), b)
    gate_forward[grid](y, x, D_, z, z_bias_, out, l, launch.span, *strides, **options)
    return out


def _backward(
    dout: Tensor, y: Tensor, x: Tensor | None, D: Tensor | None, z: Tensor, z_bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    (b, l, c), launch = z.shape, launch_of(z, backward=True)
    dy, dx, dD, dz, dz_bias = _backward_shapes(dout, y, x, D, z, z_bias)
    spans = triton.cdiv(l, launch.span)
    sums = z.new_empty(b * spans, 2, c, dtype=torch.float32)
    dout, y, x_, z = rows_whole(dout), rows_whole(y), rows_whole(y if x is None else x), rows_whole(z)
    D_, z_bias_ = (whole_or(tensor, y) for tensor in (D, z_bias))
    strides, options = _arguments([y, x_, z, dout], D, z_bias, launch)
    gate_backward[(triton.cdiv(c, launch.channels), spans, b)](
        dout, y, x_, D_, z, z_bias_, dy, dx, dz, sums, l, launch.span, *strides, **options
    )
    dz_sum, dD_sum = sums.sum(0)  # (c,) each
    if D is not None:
        dD.copy_(dD_sum.view(len(D), -1).sum(1))
    if z_bias is not None:
        dz_bias.copy_(dz_sum)
    return dy, dx, dD, dz, dz_bias


def _backward_shapes(
    dout: Tensor, y: Tensor, x: Tensor | None, D: Tensor | None, z: Tensor, z_bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dy, dx, dD, dz, dz_bias = (
        z.new_empty(0) if tensor is None else tensor.new_empty(tensor.shape) for tensor in (y, x, D, z, z_bias)
    )
    return dy, dx, dD, dz, dz_bias


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    inputs = ctx.saved_tensors
    gradients = _gate_backward(dout, *inputs)
    return tuple(None if tensor is None else grad for tensor, grad in zip(inputs, gradients, strict=True))


_gate = torch.library.custom_op("limbeck::gated_skip", _forward, mutates_args=(), schema=_FORWARD)
_gate.register_fake(lambda y, x, D, z, z_bias: z.new_empty(z.shape))
_gate.register_autograd(_differentiate, setup_context=_save)
_gate_backward = torch.library.custom_op("limbeck::gated_skip_backward", _backward, mutates_args=(), schema=_BACKWARD)
_gate_backward.register_fake(_backward_shapes)
