"""Head and losses with all logits in memory: the specification of `linear_kl`.

logits = softcap · tanh(scale · (W h + bias) / softcap)                       (b, l, v)
kl     = mean over tokens of KL(teacher ‖ student), both logits over temperature, no factor T²
ce     = mean over labelled tokens of the cross entropy
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = -100
"""The label of a token that has none."""


class Head(NamedTuple):
    """How a model makes logits of hidden states.

    Attributes:
        weight: (v, d).
        bias: (v,), or None.
        scale: What the product is multiplied with.
        softcap: Logits are softcap · tanh(logits / softcap) in the end; None for plain logits.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None


class HeadLosses(NamedTuple):
    """What a head is taught by.

    Attributes:
        loss: kl_weight · kl + ce_weight · ce, a scalar with its graph.
        kl: Mean KL per token, in nats, detached; None where it has no weight.
        ce: Mean cross entropy per labelled token, detached; None where it has no weight.
    """

    loss: Tensor
    kl: Tensor | None
    ce: Tensor | None


def head_logits(hidden_states: Tensor, head: Head) -> Tensor:
    """The logits (b, l, v) of hidden states (b, l, d)."""
    logits = F.linear(hidden_states, head.weight, head.bias)
    if head.scale != 1:
        logits = logits * head.scale
    return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)


def kl_divergence(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(teacher ‖ student) of each token, in float32 (float64 stays).

    Args:
        student_logits: (b, l, v).
        teacher_logits: (b, l, v); where one vocabulary is padded further than the other, both are cut to the common
            part.
        temperature: Divides both.

    Returns:
        (b, l), in nats.
    """
    common = min(student_logits.shape[-1], teacher_logits.shape[-1])
    student, teacher = (
        (wide(logits[..., :common]) / temperature).log_softmax(dim=-1) for logits in (student_logits, teacher_logits)
    )
    return F.kl_div(student, teacher, log_target=True, reduction="none").sum(dim=-1)


def next_token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy of `logits` (b, l, v) against `labels` (b, l), mean over those labelled; 0 where none is."""
    total = F.cross_entropy(wide(logits).flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum")
    return total / (labels != IGNORED).sum().clamp_min(1)


def losses_of_logits(
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    labels: Tensor | None,
    tokens: Tensor | None,
    kl_weight: float,
    ce_weight: float,
    temperature: float,
) -> HeadLosses:
    """See `linear_kl`; a term without a weight is left out, and what it would need may be None.

    Args:
        student_logits: (b, l, v).
        teacher_logits: (b, l, v), of any other padded size.
        labels: (b, l), `IGNORED` where there is none.
        tokens: (b, l) bool, which tokens count in KL; None for all.
        kl_weight: Weight of KL.
        ce_weight: Weight of the cross entropy.
        temperature: Divides both logits for KL.
    """
    kl = ce = None
    if kl_weight:
        assert teacher_logits is not None
        per_token = kl_divergence(student_logits, teacher_logits, temperature)  # (b, l)
        if tokens is None:
            kl = per_token.mean()
        else:
            kl = per_token.masked_fill(~tokens, 0).sum() / tokens.sum().clamp_min(1)
    if ce_weight:
        assert labels is not None
        ce = next_token_loss(student_logits, labels)
    terms = [weight * term for weight, term in ((kl_weight, kl), (ce_weight, ce)) if term is not None]
    return HeadLosses(torch.stack(terms).sum(), *(None if term is None else term.detach() for term in (kl, ce)))


def linear_kl_reference(
    hidden_states: Tensor,
    head: Head,
    teacher_states: Tensor | None,
    teacher_head: Head | None,
    labels: Tensor | None,
    tokens: Tensor | None,
    kl_weight: float,
    ce_weight: float,
    temperature: float,
) -> HeadLosses:
    """`losses_of_logits` of two heads."""
    teacher_logits = None
    if teacher_states is not None and teacher_head is not None:
        with torch.no_grad():
            teacher_logits = head_logits(teacher_states, teacher_head)
    student_logits = head_logits(hidden_states, head)
    return losses_of_logits(student_logits, teacher_logits, labels, tokens, kl_weight, ce_weight, temperature)


def wide(logits: Tensor) -> Tensor:
    """In float32; float64 stays."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
