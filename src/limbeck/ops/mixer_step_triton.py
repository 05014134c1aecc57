"""One token of discrete Mamba-2 in Triton, in one launch: a program has one head of one sequence.

It convolves its channels of x and those of its group's B and C (heads of one group each do that again; the first of
them keeps the inputs), reads its state (p, n) once, and writes it, the gated output and the last k-1 inputs.
"""

# What stands in a kernel is Triton's language, which pyright takes for Python.
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from limbeck.ops.inputs import rows_whole, whole_or
from limbeck.ops.mixer_step_reference import mixer_step_reference

TILE = 16384
"""Entries of a state that a program holds at once."""


@triton.jit
def _window(xBC_ptr, conv_ptr, channel, inside, token, skip: tl.constexpr, K: tl.constexpr, KP: tl.constexpr):
    """The last k inputs of some channels without the first `skip`, (BC, KP)."""
    tap, row = skip + tl.arange(0, KP), channel[:, None]
    pointers = tl.where(tap < K - 1, conv_ptr + row * (K - 1) + tap, xBC_ptr + row)
    return tl.load(pointers, mask=inside[:, None] & ((tap < K - 1) | ((tap == K - 1) & token)), other=0.0)


@triton.jit
def _activated(u, bias_ptr, channel, inside, SILU: tl.constexpr, HAS_BIAS: tl.constexpr):
    """The sum over taps with its bias and activation."""
    if HAS_BIAS:
        u += tl.load(bias_ptr + channel, mask=inside, other=0.0).to(tl.float32)
    if SILU:
        u = u / (1.0 + tl.exp(-u))
    return u


@triton.jit
def _convolved(xBC_ptr, conv_ptr, weight_ptr, channel, inside, token, K: tl.constexpr, KP: tl.constexpr):
    """The sum over taps of some channels, (BC,), in float32; each input is read by one thread."""
    tap, window = tl.arange(0, KP), _window(xBC_ptr, conv_ptr, channel, inside, token, 0, K, KP)
    taps = tl.load(weight_ptr + channel[:, None] * K + tap, mask=inside[:, None] & (tap < K), other=0.0)
    return tl.sum(taps.to(tl.float32) * window.to(tl.float32), axis=1)


@triton.jit
def _convolved_where_used(xBC_ptr, conv_ptr, weight_ptr, channel, inside, token, K: tl.constexpr):
    """The same; each input is read by every thread that has use for it, which saves moving the sums (or the state)."""
    row = tl.load(xBC_ptr + channel, mask=inside & token, other=0.0).to(tl.float32)
    u = row * tl.load(weight_ptr + channel * K + K - 1, mask=inside, other=0.0).to(tl.float32)
    for j in tl.static_range(K - 1):
        row = tl.load(conv_ptr + channel * (K - 1) + j, mask=inside, other=0.0).to(tl.float32)
        u += row * tl.load(weight_ptr + channel * K + j, mask=inside, other=0.0).to(tl.float32)
    return u


@triton.jit
def _keep(conv_ptr, window, channel, inside, K: tl.constexpr, KP: tl.constexpr):
    """Store the last k-1 inputs."""
    tap = tl.arange(0, KP)
    tl.store(conv_ptr + channel[:, None] * (K - 1) + tap, window, mask=inside[:, None] & (tap < K - 1))


@triton.jit(do_not_specialize=["xBC_b", "A_b", "z_b"])
def step(
    xBC_ptr, A_log_ptr, z_ptr, conv_ptr, state_ptr, weight_ptr, bias_ptr, D_ptr, z_bias_ptr, token_ptr,
    out_ptr, new_conv_ptr, new_state_ptr, xBC_b, A_b, z_b,
    H: tl.constexpr, G: tl.constexpr, P: tl.constexpr, N: tl.constexpr, K: tl.constexpr, KP: tl.constexpr,
    BP: tl.constexpr, BN: tl.constexpr, SILU: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_Z_BIAS: tl.constexpr, HAS_MASK: tl.constexpr, IN_PLACE: tl.constexpr,
):  # fmt: skip
    """Make out, new_conv and new_state of one head; with IN_PLACE the latter may be conv and state themselves."""
    head, batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    C: tl.constexpr = H * P + 2 * G * N
    HEADS: tl.constexpr = H // G
    xBC_ptr += batch * xBC_b
    conv_ptr += batch * C * (K - 1)
    new_conv_ptr += batch * C * (K - 1)
    z_ptr += batch * z_b + head * P
    out_ptr += (batch * H + head) * P
    state_ptr += (batch * H + head) * P * N
    new_state_ptr += (batch * H + head) * P * N
    decay = 1.0 / (1.0 + tl.exp(tl.load(A_log_ptr + batch * A_b + head).to(tl.float32)))  # exp(−softplus(A_log))
    token = head >= 0
    if HAS_MASK:
        token = tl.load(token_ptr + batch) != 0
        decay = tl.where(token, decay, 1.0)
    D = tl.load(D_ptr + head).to(tl.float32)

    n = tl.arange(0, BN)
    in_n, first = n < N, head % HEADS == 0
    of_B = H * P + (head // HEADS) * N + n
    of_C = of_B + G * N
    B = _convolved(xBC_ptr, conv_ptr, weight_ptr, of_B, in_n, token, K, KP)
    B = _activated(B, bias_ptr, of_B, in_n, SILU, HAS_BIAS)
    C_ = _convolved(xBC_ptr, conv_ptr, weight_ptr, of_C, in_n, token, K, KP)
    C_ = _activated(C_, bias_ptr, of_C, in_n, SILU, HAS_BIAS)
    kept_B = _window(xBC_ptr, conv_ptr, of_B, in_n & first, token, 1, K, KP)
    kept_C = _window(xBC_ptr, conv_ptr, of_C, in_n & first, token, 1, K, KP)
    for start in tl.static_range(0, P, BP):
        p = start + tl.arange(0, BP)
        in_p = p < P
        of_x = head * P + p
        at, inside = p[:, None] * N + n, in_p[:, None] & in_n  # (BP, BN)
        state = tl.load(state_ptr + at, mask=inside, other=0.0)
        x = _convolved_where_used(xBC_ptr, conv_ptr, weight_ptr, of_x, in_p, token, K)
        x = _activated(x, bias_ptr, of_x, in_p, SILU, HAS_BIAS)
        kept_x = _window(xBC_ptr, conv_ptr, of_x, in_p, token, 1, K, KP)
        gate = tl.load(z_ptr + p, mask=in_p, other=0.0).to(tl.float32)
        if HAS_Z_BIAS:
            gate += tl.load(z_bias_ptr + head * P + p, mask=in_p, other=0.0).to(tl.float32)
        if HAS_MASK:
            x = tl.where(token, x, 0.0)
        if IN_PLACE:
            tl.debug_barrier()  # threads that hold the same entry have all read it before one of them writes
        state = decay * state + x[:, None] * B
        tl.store(new_state_ptr + at, state, mask=inside)
        y = tl.sum(state * C_, axis=1) + D * x
        out = y * gate / (1.0 + tl.exp(-gate))
        tl.store(out_ptr + p, out.to(out_ptr.dtype.element_ty), mask=in_p)
        _keep(new_conv_ptr, kept_x, of_x, in_p, K, KP)
        if start == 0:
            _keep(new_conv_ptr, kept_B, of_B, in_n & first, K, KP)
            _keep(new_conv_ptr, kept_C, of_C, in_n & first, K, KP)


# --- the operator -----------------------------------------------------------------------------------------------------

_REST = "Tensor weight, Tensor? bias, Tensor D, Tensor? z_bias, Tensor? mask, bool silu"
_STEP = f"(Tensor xBC, Tensor A_log, Tensor z, Tensor conv, Tensor state, {_REST}) -> (Tensor, Tensor, Tensor)"
_STEP_IN_PLACE = f"(Tensor xBC, Tensor A_log, Tensor z, Tensor(a!) conv, Tensor(b!) state, {_REST}) -> Tensor"


def mixer_step_triton(
    xBC: Tensor, A_log: Tensor, z: Tensor, conv: Tensor, state: Tensor, weight: Tensor, bias: Tensor | None, D: Tensor,
    z_bias: Tensor | None, mask: Tensor | None, silu: bool, in_place: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Run the kernel: see `limbeck.ops.mixer_step`.

    Returns:
        out (b, h·p), the convolution's state (b, c, k-1) and the state (b, h, p, n).
    """
    inputs = (xBC, A_log, z, conv, state, weight, bias, D, z_bias, mask, silu)
    return (_step_in_place(*inputs), conv, state) if in_place else _step(*inputs)


def _launch(
    xBC: Tensor, A_log: Tensor, z: Tensor, conv: Tensor, state: Tensor, weight: Tensor, bias: Tensor | None, D: Tensor,
    z_bias: Tensor | None, mask: Tensor | None, silu: bool, new_conv: Tensor, new_state: Tensor,
) -> Tensor:  # fmt: skip
    """Write the new states where they belong; old and new ones are contiguous, conv ones in xBC's dtype."""
    (b, h, p, n), (c, k) = state.shape, weight.shape
    xBC, A_log, z = (rows_whole(tensor) for tensor in (xBC, A_log, z))
    bias_, z_bias_, mask_ = (whole_or(tensor, xBC) for tensor in (bias, z_bias, mask))
    out = z.new_empty(b, h * p)
    columns = triton.next_power_of_2(n)
    rows = min(triton.next_power_of_2(p), TILE // columns)
    step[(h, b)](
        xBC, A_log, z, conv, state, weight.contiguous(), bias_, D.contiguous(), z_bias_, mask_,
        out, new_conv, new_state, *(tensor.stride(0) for tensor in (xBC, A_log, z)),
        H=h, G=(c - h * p) // (2 * n), P=p, N=n, K=k, KP=triton.next_power_of_2(k),
        BP=rows, BN=columns,
        SILU=silu, HAS_BIAS=bias is not None, HAS_Z_BIAS=z_bias is not None, HAS_MASK=mask is not None,
        IN_PLACE=new_state is state, num_warps=4 if rows * columns <= TILE // 4 else 8,
    )  # fmt: skip
    return out


def _new_states(
    xBC: Tensor, A_log: Tensor, z: Tensor, conv: Tensor, state: Tensor, weight: Tensor, bias: Tensor | None, D: Tensor,
    z_bias: Tensor | None, mask: Tensor | None, silu: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    new_conv, new_state = xBC.new_empty(conv.shape), state.new_empty(state.shape)
    out = _launch(
        xBC,
        A_log,
        z,
        conv.to(xBC.dtype).contiguous(),
        state.contiguous(),
        weight,
        bias,
        D,
        z_bias,
        mask,
        silu,
        new_conv,
        new_state,
    )
    return out, new_conv, new_state


def _over_the_old(
    xBC: Tensor, A_log: Tensor, z: Tensor, conv: Tensor, state: Tensor, weight: Tensor, bias: Tensor | None, D: Tensor,
    z_bias: Tensor | None, mask: Tensor | None, silu: bool,
) -> Tensor:  # fmt: skip
    whole_conv, whole_state = conv.to(xBC.dtype).contiguous(), state.contiguous()
    shared = xBC.shape[1] < state.shape[1] * (state.shape[2] + 2 * state.shape[3])  # B and C, among several heads
    # Other heads of the group may still have to read what the first one would write.
    new_conv = torch.empty_like(whole_conv) if shared else whole_conv
    out = _launch(xBC, A_log, z, whole_conv, whole_state, weight, bias, D, z_bias, mask, silu, new_conv, whole_state)
    for given, written in ((conv, new_conv), (state, whole_state)):
        if written is not given:
            given.copy_(written)
    return out


def _shapes(
    xBC: Tensor, A_log: Tensor, z: Tensor, conv: Tensor, state: Tensor, weight: Tensor, bias: Tensor | None, D: Tensor,
    z_bias: Tensor | None, mask: Tensor | None, silu: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return z.new_empty(z.shape), xBC.new_empty(conv.shape), state.new_empty(state.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.silu = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
    """Through the reference, computed again: whoever trains on single steps is not in a hurry."""
    *tensors, mask = ctx.saved_tensors
    wanted = [i for i, needed in enumerate(ctx.needs_input_grad) if needed]
    with torch.enable_grad():
        leaves = [None if tensor is None else tensor.detach().requires_grad_() for tensor in tensors]
        wides = (None if leaf is None else leaf.to(torch.float32) for leaf in leaves)
        outputs = mixer_step_reference(*wides, mask, ctx.silu)
        found = torch.autograd.grad(
            outputs, [leaves[i] for i in wanted], [grad.to(torch.float32) for grad in gradients]
        )
    by_place = dict(zip(wanted, found, strict=True))
    return tuple(by_place.get(i) for i in range(len(ctx.needs_input_grad)))


_step = torch.library.custom_op("limbeck::mixer_step", _new_states, mutates_args=(), schema=_STEP)
_step.register_fake(_shapes)
_step.register_autograd(_differentiate, setup_context=_save)
_step_in_place = torch.library.custom_op(
    "limbeck::mixer_step_in_place", _over_the_old, mutates_args=("conv", "state"), schema=_STEP_IN_PLACE
)
_step_in_place.register_fake(lambda *inputs: inputs[2].new_empty(inputs[2].shape))
