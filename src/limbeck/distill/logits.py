"""MOHAWK stage 3, weight transfer and knowledge distillation (METHODS 2): the whole student, end to end."""

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from limbeck.distill.base import WHOLE_MODEL, Batch, Losses, Objective, register_objective, token_mean

IGNORED = -100


@register_objective
class LogitsObjective(Objective):
    """Cross entropy against the teacher's soft distribution, in its KL form, averaged per token; everything learns.

    loss = kl_weight · KL(teacher ‖ student at temperature T) + ce_weight · CE(next token). KL differs from the soft
    cross entropy by the teacher's entropy, a constant, and is 0 where student = teacher.

    Args:
        temperature: Divides both logits.
        kl_weight: Weight of the KL term.
        ce_weight: Weight of the cross entropy against the text itself. With kl_weight 0 this is plain training on
            text, which needs no teacher.
    """

    name = "logits"
    scope = WHOLE_MODEL

    def __init__(self, temperature: float = 1.0, kl_weight: float = 1.0, ce_weight: float = 0.0):
        self.temperature, self.kl_weight, self.ce_weight = temperature, kl_weight, ce_weight
        self.needs_teacher = kl_weight > 0

    def trainable(self, student: PreTrainedModel) -> set[str]:
        """Everything."""
        return {name for name, _ in student.named_parameters()}

    def __call__(self, student: PreTrainedModel, teacher: PreTrainedModel | None, batch: Batch) -> Losses:
        """See the class."""
        mask = batch.get("attention_mask")
        inputs = {"input_ids": batch["input_ids"], "attention_mask": mask, "use_cache": False}
        student_logits = student(**inputs).logits  # (b, l, v)
        losses: Losses = {}
        if self.kl_weight:
            assert teacher is not None
            with torch.no_grad():
                teacher_logits = teacher(**inputs).logits  # (b, l, v)
            losses["kl"] = token_mean(kl_divergence(student_logits, teacher_logits, self.temperature), mask)
        if self.ce_weight:
            losses["ce"] = next_token_loss(student_logits, batch["labels"], mask)
        weights = {"kl": self.kl_weight, "ce": self.ce_weight}
        loss = torch.stack([weights[name] * term for name, term in losses.items()]).sum()
        return {"loss": loss, **{name: term.detach() for name, term in losses.items()}}


def next_token_loss(logits: Tensor, labels: Tensor, mask: Tensor | None = None) -> Tensor:
    """Cross entropy of `logits` (b, l, v) against `labels` (b, l), mean over labelled tokens that are no padding."""
    labels = labels if mask is None else labels.masked_fill(mask == 0, IGNORED)
    return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED)


def kl_divergence(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(teacher ‖ student) of each token, in float32.

    Args:
        student_logits: (b, l, v).
        teacher_logits: (b, l, v); where one vocabulary is padded further than the other, both are cut to the common
            part.
        temperature: Divides both.

    Returns:
        (b, l), in nats.
    """
    common = min(student_logits.shape[-1], teacher_logits.shape[-1])
    student_logits, teacher_logits = student_logits[..., :common], teacher_logits[..., :common]
    student_log_probs = (student_logits.float() / temperature).log_softmax(dim=-1)
    teacher_log_probs = (teacher_logits.float() / temperature).log_softmax(dim=-1)
    return F.kl_div(student_log_probs, teacher_log_probs, log_target=True, reduction="none").sum(dim=-1)
