"""`linear_kl`: a language model's head and what it is taught by, KL from a teacher and the text, in one.

On a GPU neither the student's logits nor the teacher's are ever all in memory: a chunk of tokens at a time, and the
gradients of the chunk right away. This is the door: shapes, number types, the choice of backend. The specification,
which has all logits in memory, is in `linear_kl_reference.py`; the chunks are in `linear_kl_triton.py`.
"""

from typing import Literal

import torch
from torch import Tensor

from limbeck.errors import LimbeckError
from limbeck.ops.backends import choose_backend
from limbeck.ops.checks import check_mask, check_shapes, without_autocast
from limbeck.ops.linear_kl_reference import Head, HeadLosses, linear_kl_reference

Backend = Literal["auto", "reference", "triton"]


def linear_kl(
    hidden_states: Tensor,
    head: Head,
    teacher_states: Tensor | None = None,
    teacher_head: Head | None = None,
    *,
    labels: Tensor | None = None,
    tokens: Tensor | None = None,
    kl_weight: float = 1.0,
    ce_weight: float = 0.0,
    temperature: float = 1.0,
    backend: Backend = "auto",
) -> HeadLosses:
    """kl_weight · KL(teacher ‖ student) + ce_weight · CE(labels) of the logits that two heads make, mean per token.

    Differentiable once in the student's hidden states, weight and bias; the teacher gets no gradient. Products are in
    autocast's number type, without autocast in the inputs'. The kernels keep logits, softmax and the weight's gradient
    in float32; the reference rounds logits to the products' type, as models do.

    Args:
        hidden_states: (b, l, d), what the student's head is given.
        head: The student's, v tokens.
        teacher_states: (b, l, d') of the teacher, whose width may differ; None where KL has no weight.
        teacher_head: The teacher's. Where one vocabulary is padded further than the other, KL is of the common part.
        labels: (b, l) integer, −100 where there is none; needed where the cross entropy has a weight.
        tokens: (b, l) bool, which tokens count in KL; None for all. Those of the cross entropy are the labelled ones.
        kl_weight: Weight of KL.
        ce_weight: Weight of the cross entropy.
        temperature: Divides both logits for KL; there is no factor T².
        backend: ``"auto"`` chooses by device and dtype; ``"reference"`` has all logits in memory; ``"triton"``.

    Returns:
        The loss, and each term detached.

    Raises:
        LimbeckError: When a shape or dtype does not fit, or the backend cannot run.
    """
    if not kl_weight:
        teacher_states = teacher_head = None
    if not ce_weight:
        labels = None
    _check(hidden_states, head, teacher_states, teacher_head, labels, tokens, kl_weight, ce_weight)
    if teacher_states is not None and teacher_head is not None:
        teacher_states = teacher_states.detach()
        bias = None if teacher_head.bias is None else teacher_head.bias.detach()
        teacher_head = teacher_head._replace(weight=teacher_head.weight.detach(), bias=bias)
    wide = _float64(hidden_states, head, teacher_states, teacher_head)
    chosen = choose_backend("linear_kl", backend, hidden_states, "torch.float64" if wide else None)
    terms = (labels, tokens, kl_weight, ce_weight, temperature)
    if chosen == "reference":
        return linear_kl_reference(hidden_states, head, teacher_states, teacher_head, *terms)
    from limbeck.ops.linear_kl_triton import linear_kl_triton

    dtype = product_dtype(hidden_states, head)
    teacher_dtype = dtype
    if teacher_states is not None and teacher_head is not None:
        teacher_dtype = product_dtype(teacher_states, teacher_head)
    with without_autocast(hidden_states):
        return linear_kl_triton(hidden_states, head, teacher_states, teacher_head, *terms, dtype, teacher_dtype)


def _check(
    hidden_states: Tensor,
    head: Head,
    teacher_states: Tensor | None,
    teacher_head: Head | None,
    labels: Tensor | None,
    tokens: Tensor | None,
    kl_weight: float,
    ce_weight: float,
) -> None:
    taught = teacher_states is not None and teacher_head is not None
    for wrong, found in (
        (not kl_weight and not ce_weight, "neither kl_weight nor ce_weight"),
        (kl_weight and not taught, "kl_weight and no teacher"),
        (ce_weight and labels is None, "ce_weight and no labels"),
    ):
        if wrong:
            raise LimbeckError(
                f"linear_kl was given {found}",
                expected="kl_weight with a teacher's hidden states and head, ce_weight with labels, or both",
            )
    layouts = {"hidden_states": (hidden_states, "b l d"), "weight": (head.weight, "v d")}
    if head.bias is not None:
        layouts["bias"] = (head.bias, "v")
    if teacher_states is not None and teacher_head is not None:
        layouts |= {"teacher_states": (teacher_states, "b l e"), "the teacher's weight": (teacher_head.weight, "w e")}
        if teacher_head.bias is not None:
            layouts["the teacher's bias"] = (teacher_head.bias, "w")
    if labels is not None:
        layouts["labels"] = (labels, "b l")
    check_shapes("linear_kl", layouts)
    check_mask("linear_kl", tokens, tuple(hidden_states.shape[:2]))


def _float64(states: Tensor, head: Head, teacher_states: Tensor | None, teacher_head: Head | None) -> bool:
    tensors = [states, head.weight, head.bias, teacher_states, *(teacher_head or ())[:2]]
    return any(isinstance(tensor, Tensor) and tensor.dtype == torch.float64 for tensor in tensors)


def product_dtype(states: Tensor, head: Head) -> torch.dtype:
    """The number type of a head's product: autocast's where it is on, else that of both factors.

    Raises:
        LimbeckError: They differ.
    """
    device = states.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    if states.dtype != head.weight.dtype:
        raise LimbeckError(
            f"linear_kl was given hidden states in {states.dtype} and a head in {head.weight.dtype}",
            expected="one number type, or autocast",
        )
    return states.dtype
