"""A language model's head, taught by the few likeliest tokens of a teacher whose logits are not there any more.

Of every token the teacher has left its k likeliest successors with their log-probabilities, and the mass of all others
together. KL is that of these k + 1 events:

kl = Σ_k p (log p − log q) + p_rest (log p_rest − log q_rest),   p the teacher's, q the student's

It never exceeds the KL of the whole distributions, equals it where k is the vocabulary, and is 0 where student =
teacher. The student's logits are made a chunk of tokens at a time, and their gradients right away: they are never all
in memory, and the backward needs no weights.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from limbeck.errors import LimbeckError
from limbeck.ops.checks import check_mask, check_shapes, without_autocast
from limbeck.ops.linear_kl import product_dtype
from limbeck.ops.linear_kl_reference import IGNORED, Head, HeadLosses, head_logits, wide

CHUNK_LOGITS = 2**25
"""Logits of a chunk at most."""

LEAST_CHUNK = 256
"""Tokens of a chunk at least: with fewer, the products are slow."""


class TopK(NamedTuple):
    """What a teacher has left of its predictions.

    Attributes:
        ids: (…, k) integer, its likeliest tokens.
        log_probs: (…, k), their log-probabilities, normalised over the whole vocabulary, at the temperature of KL.
        log_rest: (…), the logarithm of the mass of all other tokens; −inf where there are none.
        vocabulary: How many tokens it chose from. A student's tokens beyond them, which are padding, do not count.
    """

    ids: Tensor
    log_probs: Tensor
    log_rest: Tensor
    vocabulary: int


class _Terms(NamedTuple):
    """What the losses of a token are weighted with: (n,) each, or None for a term without a weight."""

    kl: Tensor | None
    ce: Tensor | None
    labels: Tensor | None
    temperature: float


def head_top_k(states: Tensor, head: Head, k: int, temperature: float = 1.0) -> TopK:
    """The `k` likeliest tokens that a head makes of hidden states (b, l, d), a chunk of tokens at a time."""
    found = [
        top_k_of_logits(head_logits(part, head), k, temperature)
        for part in states.flatten(0, 1).split(_chunk(head.weight.shape[0]))
    ]
    ids, log_probs, log_rest = (
        torch.cat(parts).unflatten(0, states.shape[:2]) for parts in list(zip(*found, strict=True))[:3]
    )
    return TopK(ids, log_probs, log_rest, head.weight.shape[0])


def top_k_of_logits(logits: Tensor, k: int, temperature: float = 1.0) -> TopK:
    """The `k` likeliest tokens of logits (…, v), in float32 (float64 stays)."""
    log_probs = (wide(logits) / temperature).log_softmax(dim=-1)
    top, ids = log_probs.topk(k, dim=-1)
    rest = log_probs.scatter(-1, ids, -torch.inf).logsumexp(dim=-1)
    return TopK(ids, top, rest, logits.shape[-1])


def top_k_divergence(student_logits: Tensor, top: TopK, temperature: float = 1.0) -> Tensor:
    """KL of the k + 1 events of each token, in float32 (float64 stays).

    Args:
        student_logits: (…, v), of at least the teacher's vocabulary.
        top: Of the teacher.
        temperature: Divides the student's logits.

    Returns:
        (…), in nats.
    """
    ids = top.ids.long()
    student = (wide(student_logits[..., : top.vocabulary]) / temperature).log_softmax(dim=-1)
    kl = F.kl_div(student.gather(-1, ids), top.log_probs, log_target=True, reduction="none").sum(dim=-1)
    if ids.shape[-1] == top.vocabulary:
        return kl
    rest = student.scatter(-1, ids, -torch.inf).logsumexp(dim=-1)
    return kl + F.kl_div(rest, top.log_rest, log_target=True, reduction="none")


def linear_top_k_kl(
    hidden_states: Tensor,
    head: Head | None,
    top: TopK,
    *,
    labels: Tensor | None = None,
    tokens: Tensor | None = None,
    kl_weight: float = 1.0,
    ce_weight: float = 0.0,
    temperature: float = 1.0,
) -> HeadLosses:
    """`limbeck.ops.linear_kl.linear_kl` with a teacher that has left its likeliest tokens alone.

    Args:
        hidden_states: (b, l, d), what the student's head is given; without a head its logits (b, l, v).
        head: The student's, v tokens; None where the logits are there already.
        top: The teacher's, (b, l, k), of at most v tokens.
        labels: (b, l) integer, −100 where there is none; needed where the cross entropy has a weight.
        tokens: (b, l) bool, which tokens count in KL; None for all.
        kl_weight: Weight of KL.
        ce_weight: Weight of the cross entropy.
        temperature: Divides the student's logits for KL; that of `top`.

    Returns:
        The loss, and each term detached.

    Raises:
        LimbeckError: When a shape does not fit, or the teacher has more tokens than the student.
    """
    vocabulary = hidden_states.shape[-1] if head is None else head.weight.shape[0]
    _check(hidden_states, top, labels, tokens, vocabulary)
    terms = _terms(hidden_states, labels if ce_weight else None, tokens, kl_weight, ce_weight, temperature)
    rows = hidden_states.flatten(0, 1)
    flat = top._replace(
        ids=top.ids.flatten(0, 1), log_probs=top.log_probs.flatten(0, 1), log_rest=top.log_rest.flatten()
    )
    if head is None:
        kl, ce = _weighted(rows, flat, terms)
        loss = kl + ce
    else:
        dtype = product_dtype(hidden_states, head)
        learns = torch.is_grad_enabled() and any(
            tensor is not None and tensor.requires_grad for tensor in (rows, *head[:2])
        )
        with without_autocast(hidden_states):
            loss, kl, ce = _Chunked.apply(rows, head.weight, head.bias, head, flat, terms, dtype, learns)
    return HeadLosses(
        loss,
        kl.detach() / kl_weight if kl_weight else None,
        ce.detach() / ce_weight if ce_weight else None,
    )


class _Chunked(torch.autograd.Function):
    """Losses of all rows, and their gradients in the forward."""

    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        head: Head,
        top: TopK,
        terms: _Terms,
        dtype: torch.dtype,
        learns: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`states` are (n, d); returns the loss and its two parts."""
        leaves = [weight.detach().to(dtype), None if bias is None else bias.detach().to(dtype)]
        asked = zip(leaves, ctx.needs_input_grad[1:3], strict=True)
        wanted = [leaf.requires_grad_() for leaf, needs in asked if learns and needs and leaf is not None]
        totals = [torch.zeros_like(leaf, dtype=wide(leaf[:0]).dtype) for leaf in wanted]
        found, size = [], _chunk(weight.shape[0])
        gradient = torch.empty_like(states) if learns else None
        for start in range(0, states.shape[0], size):
            part = slice(start, start + size)
            chunk = states[part].detach().to(dtype).requires_grad_(learns)
            with torch.set_grad_enabled(learns):
                logits = head_logits(chunk, Head(leaves[0], leaves[1], *head[2:]))  # type: ignore[arg-type]
                own = top._replace(ids=top.ids[part], log_probs=top.log_probs[part], log_rest=top.log_rest[part])
                kl, ce = _weighted(logits, own, _part(terms, part))
                loss = kl + ce
            found.append(torch.stack([kl.detach(), ce.detach()]))
            if gradient is not None:
                gradient[part], *others = torch.autograd.grad(loss, [chunk, *wanted])
                for total, other in zip(totals, others, strict=True):
                    total += other
        kl, ce = torch.stack(found).sum(dim=0).unbind()
        if gradient is not None:
            ctx.save_for_backward(gradient, *(total.to(weight.dtype) for total in totals))
        ctx.mark_non_differentiable(kl, ce)
        return kl + ce, kl, ce

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):  # pyright: ignore[reportIncompatibleMethodOverride]
        """Scale what the forward has found by the gradient of the loss."""
        found = iter([saved * grads[0].to(saved.dtype) for saved in ctx.saved_tensors])
        states = next(found)
        return states, *(next(found) if needs else None for needs in ctx.needs_input_grad[1:3]), *[None] * 5


def _weighted(logits: Tensor, top: TopK, terms: _Terms) -> tuple[Tensor, Tensor]:
    """The weighted sums over rows of KL and of the cross entropy; logits are (n, v)."""
    zero = logits.new_zeros((), dtype=wide(logits[:0]).dtype)
    kl = ce = zero
    if terms.kl is not None:
        kl = (top_k_divergence(logits, top, terms.temperature) * terms.kl).sum()
    if terms.ce is not None and terms.labels is not None:
        per_token = F.cross_entropy(wide(logits), terms.labels, ignore_index=IGNORED, reduction="none")
        ce = (per_token * terms.ce).sum()
    return kl, ce


def _terms(
    states: Tensor,
    labels: Tensor | None,
    tokens: Tensor | None,
    kl_weight: float,
    ce_weight: float,
    temperature: float,
) -> _Terms:
    """Means over tokens as weights of each."""
    dtype = wide(states[:0]).dtype
    kl = ce = None
    if kl_weight:
        counted = torch.ones(states.shape[:2], device=states.device) if tokens is None else tokens
        kl = kl_weight * counted.flatten().to(dtype) / counted.sum().clamp_min(1)
    if labels is not None:
        labels = labels.flatten()
        ce = ce_weight * (labels != IGNORED).to(dtype) / (labels != IGNORED).sum().clamp_min(1)
    return _Terms(kl, ce, labels, temperature)


def _part(terms: _Terms, part: slice) -> _Terms:
    kl, ce, labels = (None if tensor is None else tensor[part] for tensor in terms[:3])
    return _Terms(kl, ce, labels, terms.temperature)


def _chunk(vocabulary: int) -> int:
    """Tokens in a chunk."""
    return max(CHUNK_LOGITS // vocabulary, LEAST_CHUNK)


def _check(states: Tensor, top: TopK, labels: Tensor | None, tokens: Tensor | None, vocabulary: int) -> None:
    layouts = {
        "hidden_states": (states, "b l d"),
        "ids": (top.ids, "b l k"),
        "log_probs": (top.log_probs, "b l k"),
        "log_rest": (top.log_rest, "b l"),
    }
    if labels is not None:
        layouts["labels"] = (labels, "b l")
    check_shapes("linear_top_k_kl", layouts)
    check_mask("linear_top_k_kl", tokens, tuple(states.shape[:2]))
    if top.vocabulary > vocabulary:
        raise LimbeckError(
            f"predictions over {top.vocabulary} tokens for a student of {vocabulary}",
            expected="a teacher that knows no more tokens than the student",
            hint="run this teacher live: a stage without teacher_cache",
        )
