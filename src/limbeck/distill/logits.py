"""MOHAWK stage 3, weight transfer and knowledge distillation (METHODS 2): the whole student, end to end."""

import torch
from transformers import PreTrainedModel

from limbeck.distill.base import WHOLE_MODEL, Batch, Losses, Objective, in_own_dtype, register_objective
from limbeck.distill.head import Predictions, head_losses, inputs_of, predict
from limbeck.distill.teacher_cache import target_of


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
        cached_vocabulary: How many tokens a teacher knows whose predictions come with the batches, from a
            `TeacherCache`; None runs the teacher.
    """

    name = "logits"
    scope = WHOLE_MODEL

    def __init__(
        self,
        temperature: float = 1.0,
        kl_weight: float = 1.0,
        ce_weight: float = 0.0,
        cached_vocabulary: int | None = None,
    ):
        self.temperature, self.kl_weight, self.ce_weight = temperature, kl_weight, ce_weight
        self.cached_vocabulary = cached_vocabulary
        self.needs_teacher = kl_weight > 0 and cached_vocabulary is None

    def trainable(self, student: PreTrainedModel) -> set[str]:
        """Everything."""
        return {name for name, _ in student.named_parameters()}

    def __call__(self, student: PreTrainedModel, teacher: PreTrainedModel | None, batch: Batch) -> Losses:
        """See the class."""
        inputs = inputs_of(batch)
        target = None
        if self.cached_vocabulary is not None:
            target = target_of(batch, self.cached_vocabulary)
        elif self.kl_weight:
            assert teacher is not None
            with torch.no_grad(), in_own_dtype(teacher):
                target = predict(teacher, inputs, lambda found: found)

        def losses(found: Predictions) -> Losses:
            return head_losses(
                found,
                target,
                batch,
                kl_weight=self.kl_weight,
                ce_weight=self.ce_weight,
                temperature=self.temperature,
                counted=batch.get("attention_mask"),
            )

        return predict(student, inputs, losses)
