"""MOHAWK stage 2, hidden-state alignment (METHODS 2): each student block moves towards its teacher's output."""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from limbeck.distill.base import (
    Batch,
    Losses,
    Objective,
    Target,
    block_parameters,
    mixer_parameters,
    register_objective,
    token_mean,
)
from limbeck.distill.observe import LayerSignals, observe
from limbeck.distill.teacher_states import STATES, signals_of
from limbeck.errors import LimbeckError
from limbeck.students import blocks, mixers, padding_keyword


@register_objective
class HiddenObjective(Objective):
    """Mean over tokens of the L2 norm of the difference of outputs, summed over the swapped layers.

    Each student layer is given the teacher's own input, so the layers are independent of one another. Not squared.

    Args:
        target: ``"block"`` compares block outputs and trains whole blocks, ``"mixer"`` compares mixer outputs and
            trains the mixers alone.
        cached: Whether the teacher's hidden states come with the batches, from a `TeacherCache`.
    """

    name = "hidden"
    scope = 1

    def __init__(self, target: Target = "block", cached: bool = False):
        if target not in ("block", "mixer"):
            raise LimbeckError(f"hidden target {target!r}", expected="'block' or 'mixer'")
        self.target: Target = target
        self.cached, self.needs_teacher = cached, not cached

    def trainable(self, student: PreTrainedModel) -> set[str]:
        """Parameters of the swapped blocks, or of their mixers."""
        return mixer_parameters(student) if self.target == "mixer" else block_parameters(student)

    def units(self, student: PreTrainedModel) -> list[nn.Module]:
        """The mixers or the blocks that are compared, each by itself."""
        found = mixers(student)
        return list(found.values()) if self.target == "mixer" else [blocks(student)[index] for index in found]

    def __call__(self, student: PreTrainedModel, teacher: PreTrainedModel | None, batch: Batch) -> Losses:
        """See the class."""
        swapped = list(mixers(student))
        mask = batch.get("attention_mask")
        if self.cached:
            signals = signals_of(batch[STATES], student, swapped, self.target, mask)
        else:
            assert teacher is not None
            signals = observe(teacher, batch["input_ids"], mask, layers=swapped, logits=False)
        distances = []
        for index in swapped:
            found, target = self._outputs(student, signals[index])  # (b, l, d) each
            norm = torch.linalg.vector_norm(found.float() - target.float(), dim=-1)  # (b, l)
            distances.append(token_mean(norm, mask))
        loss = torch.stack(distances).sum()
        return {"loss": loss, "hidden_per_layer": loss.detach() / len(distances)}

    def _outputs(self, student: PreTrainedModel, signals: LayerSignals) -> tuple[Tensor, Tensor]:
        """What the student's layer makes of the teacher's input, and what the teacher made of it."""
        if self.target == "mixer":
            assert signals.mixer_output is not None
            return mixers(student)[signals.index](signals.mixer_input, signals.padding_mask), signals.mixer_output
        assert signals.block_output is not None
        kwargs = {**signals.block_kwargs, **padding_keyword(signals.padding_mask)}
        output = blocks(student)[signals.index](signals.block_input, **kwargs)
        return output[0] if isinstance(output, tuple) else output, signals.block_output
