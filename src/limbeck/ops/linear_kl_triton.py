"""`linear_kl` on a GPU: products by cuBLAS, a chunk of tokens at a time, and one kernel between them.

Of each chunk: the logits of both models (products with a float32 result); `_head_losses`, which makes of a token's two
rows of logits its losses and the gradient of its logits, and the products of that gradient with the weight and with the
hidden states. So the gradients are made in the forward, and only scaled in the backward; the weight's is added up in
float32. Logits are float32 because the gradient is the difference of two distributions that come close to each other.

Of the weight that one token has in the loss, kl_weight/tokens or ce_weight/labels, the larger is left out until the
backward (`share`): with it, float16 would lose the gradient of the logits.

`_head_losses` walks a row twice: forwards for the log-sum-exp, with a running maximum and sum in every lane, and
backwards, to find what is still in the cache, for losses and gradient. Logarithms are to base 2 inside.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from limbeck.ops.linear_kl_reference import IGNORED, Head, HeadLosses

LOGITS = 2**27
"""Logits of one model that are in memory at once: half a gigabyte."""
LEAST_CHUNK = 1024
"""Tokens in a chunk at least: with fewer, the products are slow."""
ALIGNED = 64
"""Rows of logits begin at multiples of this, whatever the vocabulary, for the products' sake."""
BLOCK, WARPS = 4096, 16

_LOG2E = tl.constexpr(1.4426950408889634)
_LN2 = tl.constexpr(0.6931471805599453)
_NOTHING = tl.constexpr(-1e15)
"""A logit where there is none: finite, so that nothing becomes NaN."""
_IGNORED = tl.constexpr(IGNORED)


# pyright: reportCallIssue=false
# --- the kernel -------------------------------------------------------------------------------------------------------


@triton.jit
def _logits(
    pointer, bias_ptr, columns, in_memory, inside, scale, softcap, HAS_BIAS: tl.constexpr, CAPPED: tl.constexpr
):  # fmt: skip
    """Logits of some columns, after bias, scale and soft cap; `_NOTHING` where there is none.

    A row's memory ends at a multiple of `ALIGNED`, its logits anywhere: loads that end with the memory are wide.
    """
    x = tl.where(inside, tl.load(pointer + columns, in_memory, other=0.0), 0.0)
    if HAS_BIAS:
        x += tl.load(bias_ptr + columns, in_memory, other=0.0)
    x *= scale
    if CAPPED:
        x = softcap - 2.0 * softcap / (1.0 + tl.exp2(x * (2.0 * _LOG2E / softcap)))
    return tl.where(inside, x, _NOTHING)


@triton.jit
def _add(m, z, x):
    """Take 2^x into every lane's sum z·2^m."""
    rise = x - m
    factor = tl.exp2(-tl.abs(rise))
    return tl.maximum(m, x), tl.where(rise > 0, z * factor + 1.0, z + factor)


@triton.jit
def _log_sum(m, z):
    """log2 of all lanes' sums together."""
    top = tl.max(m, 0)
    return top + tl.log2(tl.sum(z * tl.exp2(m - top), 0))


@triton.jit
def _head_losses(
    student_ptr, teacher_ptr, gradient_ptr, bias_ptr, teacher_bias_ptr, labels_ptr, tokens_ptr, shares_ptr,
    kl_ptr, ce_ptr, stride_student, stride_teacher, stride_gradient, v, common,
    inverse_temperature, scale, softcap, teacher_scale, teacher_softcap,
    HAS_KL: tl.constexpr, HAS_CE: tl.constexpr, HAS_TOKENS: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_TEACHER_BIAS: tl.constexpr, CAPPED: tl.constexpr, TEACHER_CAPPED: tl.constexpr, GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Losses of one token in nats, and shares times the gradient of its raw logits, maybe in place of the student's."""
    row = tl.program_id(0).to(tl.int64)
    student_ptr += row * stride_student
    teacher_ptr += row * stride_teacher
    gradient_ptr += row * stride_gradient
    lanes = tl.arange(0, BLOCK)
    blocks = tl.cdiv(v, BLOCK)
    counted = tl.full((), HAS_KL, tl.int1)
    if HAS_KL and HAS_TOKENS:
        counted = tl.load(tokens_ptr + row) != 0
    labelled = tl.full((), False, tl.int1)
    if HAS_CE:
        label = tl.load(labels_ptr + row)
        labelled = label != _IGNORED
    if (counted | labelled) == 0:  # padding: whatever its logits are, NaN too
        if HAS_KL:
            tl.store(kl_ptr + row, 0.0)
        if HAS_CE:
            tl.store(ce_ptr + row, 0.0)
        if GRADIENT:
            for i in tl.range(0, blocks):
                columns = i * BLOCK + lanes
                tl.store(
                    gradient_ptr + columns, tl.zeros((BLOCK,), gradient_ptr.dtype.element_ty), columns < stride_gradient
                )
        return

    # 1. Log-sum-exps: of both models over the common tokens at temperature, of the student over all.
    to_log2 = inverse_temperature * _LOG2E
    m_student = tl.full((BLOCK,), -1e30, tl.float32)
    m_teacher, m_text = m_student, m_student
    z_student = tl.zeros((BLOCK,), tl.float32)
    z_teacher, z_text = z_student, z_student
    for i in tl.range(0, blocks):
        columns = i * BLOCK + lanes
        x = _logits(
                student_ptr, bias_ptr, columns, columns < stride_student, columns < v, scale, softcap, HAS_BIAS, CAPPED
            )  # fmt: skip
        if HAS_KL:
            t = _logits(
                teacher_ptr, teacher_bias_ptr, columns, columns < stride_teacher, columns < common,
                teacher_scale, teacher_softcap, HAS_TEACHER_BIAS, TEACHER_CAPPED,
            )  # fmt: skip
            m_student, z_student = _add(m_student, z_student, tl.where(columns < common, x * to_log2, _NOTHING))
            m_teacher, z_teacher = _add(m_teacher, z_teacher, t * to_log2)
        if HAS_CE:
            m_text, z_text = _add(m_text, z_text, x * _LOG2E)

    if HAS_KL:
        student_sum, teacher_sum = _log_sum(m_student, z_student), _log_sum(m_teacher, z_teacher)
        kl_share = tl.where(counted, tl.load(shares_ptr), 0.0) * inverse_temperature
    if HAS_CE:
        text_sum = _log_sum(m_text, z_text)
        ce_share = tl.where(labelled, tl.load(shares_ptr + 1), 0.0)
        known = labelled & (label >= 0) & (label < v)
        own = _logits(student_ptr, bias_ptr, label, known, known, scale, softcap, HAS_BIAS, CAPPED)
        # A label that is no token makes the loss NaN.
        ce = tl.where(known, (text_sum - own * _LOG2E) * _LN2, float("nan"))
        tl.store(ce_ptr + row, tl.where(labelled, ce, 0.0))
        tl.debug_barrier()  # the label's logit is read by all before any of them is written over

    # 2. KL and the gradient.
    kl = tl.zeros((BLOCK,), tl.float32)
    if HAS_KL or GRADIENT:
        for i in tl.range(0, blocks):
            columns = (blocks - 1 - i) * BLOCK + lanes
            x = _logits(
                student_ptr, bias_ptr, columns, columns < stride_student, columns < v, scale, softcap, HAS_BIAS, CAPPED
            )  # fmt: skip
            gradient = tl.zeros((BLOCK,), tl.float32)
            if HAS_KL:
                t = _logits(
                    teacher_ptr, teacher_bias_ptr, columns, columns < stride_teacher, columns < common,
                    teacher_scale, teacher_softcap, HAS_TEACHER_BIAS, TEACHER_CAPPED,
                )  # fmt: skip
                log_p, log_q = t * to_log2 - teacher_sum, x * to_log2 - student_sum
                p = tl.exp2(log_p)
                kl += p * (log_p - log_q)
                if GRADIENT:
                    # Without weight even a NaN of the teacher is nothing.
                    moved = counted & (columns < common)
                    gradient += tl.where(moved, kl_share * (tl.exp2(log_q) - p), 0.0)
            if GRADIENT:
                if HAS_CE:
                    q = tl.exp2(x * _LOG2E - text_sum)
                    gradient += ce_share * tl.where(columns == label, q - 1.0, q)
                if CAPPED:
                    gradient *= 1.0 - (x / softcap) * (x / softcap)
                tl.store(
                    gradient_ptr + columns,
                    (gradient * scale).to(gradient_ptr.dtype.element_ty),
                    columns < stride_gradient,
                )
    if HAS_KL:
        tl.store(kl_ptr + row, tl.where(counted, tl.sum(kl, 0) * _LN2, 0.0))


# --- chunks -----------------------------------------------------------------------------------------------------------


def chunk_of(rows: int, v: int) -> int:
    """Tokens in a chunk: as many as memory allows, all chunks alike, 16 a pointer's alignment."""
    chunks = math.ceil(rows / max(LOGITS // v, LEAST_CHUNK))
    return math.ceil(rows / (16 * chunks)) * 16


def _forward(
    states: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    teacher_states: Tensor | None,
    teacher_weight: Tensor | None,
    teacher_bias: Tensor | None,
    labels: Tensor | None,
    tokens: Tensor | None,
    weights: list[float],
    forms: list[float],
    dtype: torch.dtype,
    teacher_dtype: torch.dtype,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    rows, v = len(states), len(weight)
    chunk = chunk_of(rows, v)
    size = min(chunk, rows)
    states, weight = states.to(dtype), weight.to(dtype)
    student_logits = _logits_buffer(states, size, v, torch.float32)
    teacher_logits = None
    if teacher_states is not None and teacher_weight is not None:
        teacher_weight = teacher_weight[:v].to(teacher_dtype)  # of the common part
        teacher_states = teacher_states.to(teacher_dtype)
        teacher_logits = _logits_buffer(states, size, len(teacher_weight), torch.float32)
    gradient = None
    if any(wanted):  # in place where the number types are the same
        gradient = student_logits if dtype == torch.float32 else _logits_buffer(states, size, v, dtype)
    dstates, dweight, dbias = _gradients(states, weight, wanted)
    kl = states.new_empty(0 if teacher_logits is None else rows, dtype=torch.float32)
    ce = states.new_empty(0 if labels is None else rows, dtype=torch.float32)
    biases = (_aligned(bias), None if teacher_bias is None else _aligned(teacher_bias[:v]))
    counts = _counts(states, labels, tokens)
    shares, share = _shares(counts, weights)
    for start in range(0, rows, chunk):
        part = slice(start, min(start + chunk, rows))
        size = part.stop - start
        _product(states[part], weight.T, student_logits[:size])
        if teacher_states is not None and teacher_weight is not None and teacher_logits is not None:
            _product(teacher_states[part], teacher_weight.T, teacher_logits[:size])
        per_token = (None if tensor is None else tensor[part] for tensor in (labels, tokens))
        out = (kl[part], ce[part])
        _launch(size, student_logits, teacher_logits, gradient, *biases, *per_token, shares, *out, forms)
        if gradient is None:
            continue
        if wanted[0]:
            _product(gradient[:size], weight, dstates[part])
        if wanted[1]:
            _product(gradient[:size].T, states[part], dweight, add=start > 0)
        if wanted[2]:
            dbias += gradient[:size].sum(0, dtype=torch.float32)
    means = torch.stack([kl.sum(), ce.sum()]) / counts
    loss = weights[0] * means[0] + weights[1] * means[1]
    return loss, means, share, dstates, dweight, dbias


def _launch(
    rows: int,
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    gradient: Tensor | None,
    bias: Tensor | None,
    teacher_bias: Tensor | None,
    labels: Tensor | None,
    tokens: Tensor | None,
    shares: Tensor,
    kl: Tensor,
    ce: Tensor,
    forms: list[float],
) -> None:
    """Losses of a chunk into `kl` and `ce`, and the gradient of its logits into `gradient`."""
    teacher = student_logits if teacher_logits is None else teacher_logits
    out = student_logits if gradient is None else gradient
    temperature, _, softcap, _, teacher_softcap = forms
    _head_losses[(rows,)](
        student_logits,
        teacher,
        out,
        *(shares if tensor is None else tensor for tensor in (bias, teacher_bias, labels, tokens)),
        shares,
        kl,
        ce,
        *(tensor.stride(0) for tensor in (student_logits, teacher, out)),
        student_logits.shape[1],
        teacher.shape[1],
        1 / temperature,
        *forms[1:],
        HAS_KL=teacher_logits is not None,
        HAS_CE=labels is not None,
        HAS_TOKENS=tokens is not None,
        HAS_BIAS=bias is not None,
        HAS_TEACHER_BIAS=teacher_bias is not None,
        CAPPED=softcap > 0,
        TEACHER_CAPPED=teacher_softcap > 0,
        GRADIENT=gradient is not None,
        BLOCK=BLOCK,
        num_warps=WARPS,
    )


def _logits_buffer(like: Tensor, rows: int, v: int, dtype: torch.dtype) -> Tensor:
    """Room for (rows, v) logits, each row aligned."""
    return like.new_empty(rows, v + -v % ALIGNED, dtype=dtype)[:, :v]


def _aligned(bias: Tensor | None) -> Tensor | None:
    """A bias in float32, as long as the memory of a row of logits."""
    return None if bias is None else torch.nn.functional.pad(bias.float(), (0, -len(bias) % ALIGNED))


def _gradients(states: Tensor, weight: Tensor, wanted: list[bool]) -> tuple[Tensor, Tensor, Tensor]:
    """Room for the gradients of states, weight and bias over shares; empty for those that are not wanted."""
    return (
        states.new_empty(states.shape if wanted[0] else 0),
        weight.new_empty(weight.shape if wanted[1] else 0, dtype=torch.float32),
        weight.new_zeros(len(weight) if wanted[2] else 0, dtype=torch.float32),
    )


def _counts(states: Tensor, labels: Tensor | None, tokens: Tensor | None) -> Tensor:
    """How many tokens KL and the cross entropy are means over, (2,), 1 at least."""
    kl = states.new_full((), len(states), dtype=torch.int64) if tokens is None else tokens.sum()
    ce = torch.ones_like(kl) if labels is None else (labels != IGNORED).sum()
    return torch.stack([kl, ce]).clamp_min(1).float()


def _shares(counts: Tensor, weights: list[float]) -> tuple[Tensor, Tensor]:
    """The weight of one token's KL and of its cross entropy, (2,), over the larger of them, and that one."""
    share = torch.stack([weights[0] / counts[0], weights[1] / counts[1]])
    return share / share.max(), share.max()


def _product(a: Tensor, b: Tensor, out: Tensor, add: bool = False) -> None:
    """Write a b into `out`, or add it: summed in float32, rounded to the number type of `out`."""
    if a.dtype == out.dtype:
        torch.addmm(out, a, b, out=out) if add else torch.mm(a, b, out=out)
    elif a.is_cuda:
        options = {"out_dtype": out.dtype, "out": out}
        torch.addmm(out, a, b, **options) if add else torch.mm(a, b, **options)
    else:  # no such product on a CPU
        _product(a.to(out.dtype), b.to(out.dtype), out, add)


# --- the operator -----------------------------------------------------------------------------------------------------


def linear_kl_triton(
    hidden_states: Tensor,
    head: Head,
    teacher_states: Tensor | None,
    teacher_head: Head | None,
    labels: Tensor | None,
    tokens: Tensor | None,
    kl_weight: float,
    ce_weight: float,
    temperature: float,
    dtype: torch.dtype,
    teacher_dtype: torch.dtype,
) -> HeadLosses:
    """See `linear_kl`; products are in `dtype` and `teacher_dtype`."""
    learns = torch.is_grad_enabled()
    student, teacher = head, head if teacher_head is None else teacher_head
    loss, means, *_ = _linear_kl(
        hidden_states.flatten(0, 1),
        *student[:2],
        None if teacher_states is None else teacher_states.flatten(0, 1),
        *(None, None) if teacher_head is None else teacher_head[:2],
        None if labels is None else labels.flatten(),
        None if tokens is None else tokens.flatten(),
        [kl_weight, ce_weight],
        [temperature, student.scale, student.softcap or 0.0, teacher.scale, teacher.softcap or 0.0],
        dtype,
        teacher_dtype,
        [learns and tensor is not None and tensor.requires_grad for tensor in (hidden_states, *student[:2])],
    )
    kl, ce = means.detach().unbind()
    return HeadLosses(loss, kl if kl_weight else None, ce if ce_weight else None)


def _shapes(
    states: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    teacher_states: Tensor | None,
    teacher_weight: Tensor | None,
    teacher_bias: Tensor | None,
    labels: Tensor | None,
    tokens: Tensor | None,
    weights: list[float],
    forms: list[float],
    dtype: torch.dtype,
    teacher_dtype: torch.dtype,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    scalar = states.new_empty((), dtype=torch.float32)
    gradients = _gradients(states.to(dtype), weight, wanted)
    return scalar, scalar.new_empty(2), torch.empty_like(scalar), *gradients


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in inputs[:3]]
    ctx.wanted = inputs[-1]
    ctx.save_for_backward(*output[2:])


def _differentiate(ctx: Any, dloss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    share, *gradients = ctx.saved_tensors
    factor = dloss.float() * share
    scaled = [
        (gradient.float() * factor).to(dtype) if wanted else None
        for gradient, dtype, wanted in zip(gradients, ctx.dtypes, ctx.wanted, strict=True)
    ]
    return *scaled, *[None] * 10


_linear_kl = torch.library.custom_op(
    "limbeck::linear_kl_triton",
    _forward,
    mutates_args=(),
    schema="(Tensor states, Tensor weight, Tensor? bias, Tensor? teacher_states, Tensor? teacher_weight,"
    " Tensor? teacher_bias, Tensor? labels, Tensor? tokens, float[] weights, float[] forms, ScalarType dtype,"
    " ScalarType teacher_dtype, bool[] wanted) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
_linear_kl.register_fake(_shapes)
_linear_kl.register_autograd(_differentiate, setup_context=_save)
