"""Linear layers of one row, and the norms and sums between them, in Triton.

A product of one row reads its weights once and does little with them, so it takes as long as the reading, if enough is
asked for at once and nothing stands between one product and the next. A program has a few rows of the weights and all
of the input; what comes before a product (the norm of its input) and after it (bias, activation, the sum with what runs
beside it and past it) is done by the same program. Products that read the same row share one launch.

Where the card can (`sm_90`), a kernel starts while the one before it still runs, and fetches its first weights before
it waits for that one's output.
"""

# What stands in a kernel is Triton's language, which pyright takes for Python.
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from limbeck.ops.cards import card_of
from limbeck.ops.inputs import whole_or
from limbeck.ops.one_row_reference import Linear, Norm


@triton.jit
def _weights(w_ptr, m, inside, k, K: tl.constexpr):
    """A tile of weights, (BM, BK): each is read once in the whole kernel."""
    at, here = m[:, None] * K + k[None, :], inside[:, None] & (k < K)[None, :]
    return tl.load(w_ptr + at, mask=here, other=0.0, eviction_policy="evict_first")


@triton.jit
def _wide(ptr, k, K: tl.constexpr):
    """A part of a row, (BK,), in float32."""
    return tl.load(ptr + k, mask=k < K, other=0.0).to(tl.float32)


@triton.jit
def _activated(y, ACTIVATION: tl.constexpr):
    if ACTIVATION == "silu":
        y = y / (1.0 + tl.exp(-y))
    elif ACTIVATION == "gelu_tanh":
        y = y / (1.0 + tl.exp(-1.5957691216057308 * (y + 0.044715 * y * y * y)))  # tanh by the logistic function
    elif ACTIVATION == "gelu":
        y = 0.5 * y * (1.0 + tl.erf(0.7071067811865476 * y))
    return y


@triton.jit
def _normed_product(
    x_ptr, gamma_ptr, beta_ptr, w_ptr, bias_ptr, out_ptr, tile, M, eps,
    K: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, NORM: tl.constexpr,
    HAS_BETA: tl.constexpr, HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """activation(norm(x) · Wᵀ + bias) of BM rows of W."""
    m, k = tile * BM + tl.arange(0, BM), tl.arange(0, BK)
    inside = m < M
    w = _weights(w_ptr, m, inside, k, K)
    if PDL:
        gdc_wait()
    if NORM != "none":  # mean and mean square in one pass: in float32 that is enough for what models hold
        total, squares = tl.zeros((BK,), tl.float32), tl.zeros((BK,), tl.float32)
        for start in tl.static_range(0, K, BK):
            x = _wide(x_ptr, start + k, K)
            total += x
            squares += x * x
        mean = tl.sum(total) / K if NORM == "layer" else 0.0
        scale = tl.rsqrt(tl.maximum(tl.sum(squares) / K - mean * mean, 0.0) + eps)
    acc = tl.zeros((BM, BK), tl.float32)
    for start in tl.static_range(0, K, BK):
        x = _wide(x_ptr, start + k, K)
        if start > 0:
            w = _weights(w_ptr, m, inside, start + k, K)
        if NORM != "none":
            x = (x - mean) * scale * _wide(gamma_ptr, start + k, K)
            if HAS_BETA:
                x += _wide(beta_ptr, start + k, K)
        acc += x[None, :] * w.to(tl.float32)
    if PDL:
        gdc_launch_dependents()
    y = tl.sum(acc, axis=1)  # (BM,)
    if HAS_BIAS:
        y += tl.load(bias_ptr + m, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + m, _activated(y, ACTIVATION).to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["eps"])
def products(
    x_ptr, eps, gamma0_ptr, beta0_ptr, w0_ptr, b0_ptr, out0_ptr, M0,
    gamma1_ptr, beta1_ptr, w1_ptr, b1_ptr, out1_ptr, M1,
    K: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, NORM: tl.constexpr,
    HAS_BETA0: tl.constexpr, HAS_BETA1: tl.constexpr, HAS_B0: tl.constexpr, HAS_B1: tl.constexpr,
    ACT0: tl.constexpr, ACT1: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Outputs of one layer, or, with M1 > 0, of two that read the same row: the first programs have the first's."""
    tile, first = tl.program_id(0), tl.cdiv(M0, BM)
    if tile < first:
        _normed_product(
            x_ptr, gamma0_ptr, beta0_ptr, w0_ptr, b0_ptr, out0_ptr, tile, M0, eps,
            K, BM, BK, NORM, HAS_BETA0, HAS_B0, ACT0, PDL,
        )  # fmt: skip
    else:
        _normed_product(
            x_ptr, gamma1_ptr, beta1_ptr, w1_ptr, b1_ptr, out1_ptr, tile - first, M1, eps,
            K, BM, BK, NORM, HAS_BETA1, HAS_B1, ACT1, PDL,
        )  # fmt: skip


@triton.jit
def product_sum(
    x0_ptr, w0_ptr, b0_ptr, x1_ptr, w1_ptr, b1_ptr, residual_ptr, out_ptr, M,
    K0: tl.constexpr, K1: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
    HAS_B0: tl.constexpr, HAS_B1: tl.constexpr, HAS_RESIDUAL: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """x0 · W0ᵀ + b0 + x1 · W1ᵀ + b1 + residual of BM rows of the weights; with K1 = 0 there is no second product."""
    m, k = tl.program_id(0) * BM + tl.arange(0, BM), tl.arange(0, BK)
    inside = m < M
    w = _weights(w0_ptr, m, inside, k, K0)
    if PDL:
        gdc_wait()
    acc = tl.zeros((BM, BK), tl.float32)
    for start in tl.static_range(0, K0, BK):
        if start > 0:
            w = _weights(w0_ptr, m, inside, start + k, K0)
        acc += _wide(x0_ptr, start + k, K0)[None, :] * w.to(tl.float32)
    for start in tl.static_range(0, K1, BK):
        w = _weights(w1_ptr, m, inside, start + k, K1)
        acc += _wide(x1_ptr, start + k, K1)[None, :] * w.to(tl.float32)
    if PDL:
        gdc_launch_dependents()
    y = tl.sum(acc, axis=1)  # (BM,)
    if HAS_B0:
        y += tl.load(b0_ptr + m, mask=inside, other=0.0).to(tl.float32)
    if HAS_B1:
        y += tl.load(b1_ptr + m, mask=inside, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        y += tl.load(residual_ptr + m, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + m, y.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _normed(x, mean, scale, gamma_ptr, beta_ptr, out_ptr, at, k, here, HAS_BETA: tl.constexpr):
    y = (x - mean) * scale * tl.load(gamma_ptr + k, mask=here, other=0.0).to(tl.float32)
    if HAS_BETA:
        y += tl.load(beta_ptr + k, mask=here, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, y.to(out_ptr.dtype.element_ty), mask=here)


@triton.jit(do_not_specialize=["eps"])
def norm_of_sum(
    x0_ptr, x1_ptr, x2_ptr, sum_ptr, gamma0_ptr, beta0_ptr, out0_ptr, gamma1_ptr, beta1_ptr, out1_ptr, eps,
    K: tl.constexpr, BK: tl.constexpr, TERMS: tl.constexpr, NORMS: tl.constexpr, NORM: tl.constexpr,
    HAS_BETA0: tl.constexpr, HAS_BETA1: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One row of up to three terms: their sum, and one or two norms of it."""
    k = tl.arange(0, BK)
    here, at = k < K, tl.program_id(0).to(tl.int64) * K + k
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    x = tl.load(x0_ptr + at, mask=here, other=0.0).to(tl.float32)
    if TERMS > 1:
        x += tl.load(x1_ptr + at, mask=here, other=0.0).to(tl.float32)
    if TERMS > 2:
        x += tl.load(x2_ptr + at, mask=here, other=0.0).to(tl.float32)
    if TERMS > 1:
        rounded = x.to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + at, rounded, mask=here)
        x = rounded.to(tl.float32)  # what others will read is what is normed
    mean = tl.sum(x) / K if NORM == "layer" else 0.0
    off = tl.where(here, x - mean, 0.0)
    scale = tl.rsqrt(tl.sum(off * off) / K + eps)
    _normed(x, mean, scale, gamma0_ptr, beta0_ptr, out0_ptr, at, k, here, HAS_BETA0)
    if NORMS > 1:
        _normed(x, mean, scale, gamma1_ptr, beta1_ptr, out1_ptr, at, k, here, HAS_BETA1)


# --- the operators ----------------------------------------------------------------------------------------------------


ROWS_OF_WEIGHTS = 4
"""In a program."""
WIDEST_TILE = 1024
"""Columns of the weights that a program reads at once, at most."""


def _overlapping(tensor: Tensor) -> dict[str, Any]:
    """Whether the kernel may begin before the one before it has ended, as an option of its launch and for itself."""
    able = card_of(tensor).capability >= (9, 0)
    return {"PDL": able, "launch_pdl": True} if able else {"PDL": False}


def norm_linears_triton(x: Tensor, layers: Sequence[Linear], kind: str, eps: float) -> tuple[Tensor, ...]:
    """Run the kernel: see `limbeck.ops.norm_linears`."""
    x, K = x.contiguous(), x.shape[1]
    first, second = layers[0], layers[-1]
    outs = [x.new_empty(1, layer.weight.shape[0]) for layer in layers]
    M0, M1 = outs[0].shape[1], outs[1].shape[1] if len(layers) > 1 else 0
    BM, BK = ROWS_OF_WEIGHTS, min(WIDEST_TILE, triton.next_power_of_2(K))
    products[(triton.cdiv(M0, BM) + triton.cdiv(M1, BM),)](
        x, eps, *_tensors(first, x), outs[0], M0, *_tensors(second, x), outs[-1], M1,
        K=K, BM=BM, BK=BK, NORM=kind,
        HAS_BETA0=_has_bias(first.norm), HAS_BETA1=_has_bias(second.norm),
        HAS_B0=first.bias is not None, HAS_B1=second.bias is not None,
        ACT0=first.activation, ACT1=second.activation, num_warps=4, **_overlapping(x),
    )  # fmt: skip
    return tuple(outs)


def linear_sum_triton(inputs: Sequence[Tensor], layers: Sequence[Linear], residual: Tensor | None) -> Tensor:
    """Run the kernel: see `limbeck.ops.linear_sum`."""
    x0, x1 = inputs[0].contiguous(), inputs[-1].contiguous()
    first, second = layers[0], layers[-1]
    M = first.weight.shape[0]
    K0, K1 = x0.shape[1], x1.shape[1] if len(layers) > 1 else 0
    out = x0.new_empty(1, M)
    BM, BK = ROWS_OF_WEIGHTS, min(WIDEST_TILE, triton.next_power_of_2(max(K0, K1)))
    product_sum[(triton.cdiv(M, BM),)](
        x0, *_tensors(first, x0)[2:], x1, *_tensors(second, x0)[2:], whole_or(residual, x0), out, M,
        K0=K0, K1=K1, BM=BM, BK=BK,
        HAS_B0=first.bias is not None, HAS_B1=K1 > 0 and second.bias is not None, HAS_RESIDUAL=residual is not None,
        num_warps=2, **_overlapping(x0),
    )  # fmt: skip
    return out


def sum_norm_triton(terms: Sequence[Tensor], norms: Sequence[Norm], kind: str, eps: float) -> tuple[Tensor, ...]:
    """Run the kernel: see `limbeck.ops.sum_norm`."""
    terms = [term.contiguous() for term in terms]
    rows, K = terms[0].shape
    total = terms[0] if len(terms) == 1 else torch.empty_like(terms[0])
    outs = [torch.empty_like(total) for _ in norms]
    norm_of_sum[(rows,)](
        *(terms[min(i, len(terms) - 1)] for i in range(3)), total, *_norm_tensors(norms[0], total), outs[0],
        *_norm_tensors(norms[-1], total), outs[-1], eps,
        K=K, BK=triton.next_power_of_2(K), TERMS=len(terms), NORMS=len(norms), NORM=kind,
        HAS_BETA0=_has_bias(norms[0]), HAS_BETA1=_has_bias(norms[-1]),
        num_warps=min(16, max(1, triton.next_power_of_2(K) // 256)), **_overlapping(total),
    )  # fmt: skip
    return total, *outs


def _tensors(layer: Linear, stand_in: Tensor) -> tuple[Tensor, ...]:
    """The norm's weight and bias, the layer's weight and bias."""
    return *_norm_tensors(layer.norm, stand_in), layer.weight.contiguous(), whole_or(layer.bias, stand_in)


def _norm_tensors(norm: Norm | None, stand_in: Tensor) -> tuple[Tensor, Tensor]:
    return (stand_in, stand_in) if norm is None else (norm.weight.contiguous(), whole_or(norm.bias, stand_in))


def _has_bias(norm: Norm | None) -> bool:
    return norm is not None and norm.bias is not None
