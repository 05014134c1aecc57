"""What a model predicts, without its logits: hidden states and the head, for losses that do both at once.

The model runs as it always does, through its own forward, but its head's forward is replaced meanwhile. It hands what
it was called with, and its weights, to the loss, and the loss comes out of the model in place of the model's output. So
data-parallel wrappers see nothing unusual. FSDP2 may wrap the step or the student, with or without resharding: the
weights are whole while the head is called, later they may not be, and it sets its hooks for the backward on what leaves
the model. A head that is a group of its own has no such hook: it will do with the kernels, which need no weights in the
backward, but not with the reference.
"""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, NamedTuple, TypeVar
from weakref import WeakSet

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from limbeck.distill.base import Batch, Losses
from limbeck.errors import LimbeckError
from limbeck.ops.linear_kl import Head, linear_kl
from limbeck.ops.linear_kl_reference import IGNORED, head_logits, losses_of_logits
from limbeck.ops.linear_top_k_kl import TopK, linear_top_k_kl
from limbeck.students import LogitForm, plain_head

T = TypeVar("T")

PROBE = (-100.0, -10.0, -0.5, 0.0, 0.5, 10.0, 100.0)
"""Outputs of a head, to see once what a model does to them."""

_as_described: WeakSet[nn.Module] = WeakSet()


class Predictions(NamedTuple):
    """What a model predicts for each token.

    Attributes:
        states: (b, l, d), what the head is called with; the logits (b, l, v) themselves where there is no head.
        head: What makes logits of them, or None.
    """

    states: Tensor
    head: Head | None

    def logits(self) -> Tensor:
        """(b, l, v)."""
        return self.states if self.head is None else head_logits(self.states, self.head)


def inputs_of(batch: Batch) -> dict[str, Any]:
    """What a model is called with in a batch's forward pass."""
    return {"input_ids": batch["input_ids"], "attention_mask": batch.get("attention_mask"), "use_cache": False}


def predict(model: PreTrainedModel, inputs: dict[str, Any], then: Callable[[Predictions], T]) -> T:
    """Run a model, its head apart, and return what `then` makes of its predictions.

    A head that is more than a matrix product runs as it is, and then the predictions are logits.

    Args:
        model: A causal language model.
        inputs: What to call it with.
        then: Called once, within the model's forward. Its result must hold every tensor that is learned from.

    Raises:
        LimbeckError: The model does something else to its head's output than its family tells.
    """
    plain = plain_head(model)
    if plain is None:
        return then(Predictions(model(**inputs).logits, None))
    linear, form = plain
    results: list[T] = []

    def stand_in(states: Tensor) -> Tensor:
        results.append(then(Predictions(states, Head(linear.weight, linear.bias, *form))))
        output = states.new_tensor(() if model in _as_described else PROBE)
        return output.expand(*states.shape[:-1], -1)

    def in_place_of_output(_model: nn.Module, _args: Any, output: Any) -> T:
        if model not in _as_described:
            _check(model, form, output.logits)
            _as_described.add(model)
        return results.pop()

    with ExitStack() as stack:
        vars(linear)["forward"] = stand_in
        stack.callback(vars(linear).pop, "forward")
        # First of the hooks: a data-parallel wrapper's own must see what is learned from.
        stack.callback(model.register_forward_hook(in_place_of_output, prepend=True).remove)
        return model(**inputs)


def take_as_described(*models: PreTrainedModel) -> None:
    """Do without the look at what models do to their head's output: for models without data."""
    _as_described.update(models)


def _check(model: PreTrainedModel, form: LogitForm, logits: Tensor) -> None:
    """Does a model do to its head's output, which was `PROBE`, what its family tells?"""
    found = logits.detach()[0, 0].float()
    identity = torch.eye(len(PROBE), device=found.device)
    expected = head_logits(found.new_tensor(PROBE)[None, None], Head(identity, None, *form))[0, 0].float()
    if found.shape != expected.shape or not torch.allclose(found, expected, rtol=1e-2, atol=1e-2):
        raise LimbeckError(
            f"{type(model).__name__} makes {_numbers(found)} of a head's output {_numbers(torch.tensor(PROBE))}",
            expected=f"{_numbers(expected)}, as its family tells: {form}",
            hint="`Family.logits` says what becomes of it, or None (docs/add-a-family.md)",
        )


def _numbers(values: Tensor) -> str:
    return ", ".join(f"{value:.4g}" for value in values.tolist())


def head_losses(
    student: Predictions,
    teacher: Predictions | TopK | None,
    batch: Batch,
    *,
    kl_weight: float,
    ce_weight: float,
    temperature: float,
    counted: Tensor | None = None,
) -> Losses:
    """``loss`` = kl_weight · KL(teacher ‖ student) + ce_weight · CE(next token), means per token, and each term.

    A term without a weight is left out; one at least has a weight.

    Args:
        student: Predictions with their graph.
        teacher: Those it is to match, or what is left of them on disk, at this temperature; None where KL has no
            weight.
        batch: Its ``labels`` where the cross entropy has a weight; those of padding do not count.
        kl_weight: Weight of KL.
        ce_weight: Weight of the cross entropy.
        temperature: Divides both logits for KL. There is no factor T².
        counted: (b, l), nonzero at tokens that count in KL; None for all.
    """
    tokens = None if counted is None else counted != 0
    labels, padding = batch["labels"] if ce_weight else None, batch.get("attention_mask")
    if labels is not None and padding is not None:
        labels = labels.masked_fill(padding == 0, IGNORED)
    if isinstance(teacher, TopK):
        losses = linear_top_k_kl(
            student.states,
            student.head,
            teacher,
            labels=labels,
            tokens=tokens,
            kl_weight=kl_weight,
            ce_weight=ce_weight,
            temperature=temperature,
        )
    elif student.head is not None and (teacher is None or teacher.head is not None):
        losses = linear_kl(
            student.states,
            student.head,
            *(None, None) if teacher is None else teacher,
            labels=labels,
            tokens=tokens,
            kl_weight=kl_weight,
            ce_weight=ce_weight,
            temperature=temperature,
        )
    else:
        teacher_logits = None if teacher is None else teacher.logits().detach()
        losses = losses_of_logits(student.logits(), teacher_logits, labels, tokens, kl_weight, ce_weight, temperature)
    return {name: term for name, term in losses._asdict().items() if term is not None}
