"""MOHAWK stage 1, matrix orientation (METHODS 2): each mixer's matrix moves towards its layer's attention matrix."""

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from limbeck.distill.base import Batch, Losses, Objective, reached, register_objective
from limbeck.distill.observe import LayerSignals, observe
from limbeck.errors import LimbeckError
from limbeck.mixers import Mixer
from limbeck.students import mixers

STORED_LENGTH = 512
"""Up to this length the l × l matrices of all layers are kept for the backward pass; beyond, they are made again layer
by layer, so that memory does not grow with the number of layers."""


@register_objective
class MatrixObjective(Objective):
    """Mean over batch and heads of ‖M_student − A_teacher‖_F, summed over the layers; only the mixers learn.

    Each mixer is given the teacher's own input of its layer, so the layers are independent of one another. M has D on
    its diagonal; A is the softmax attention after the rotary embedding, scale and mask (where the teacher has a mixer
    itself, that mixer's matrix). Not squared.
    """

    name = "matrix"
    scope = 0

    def trainable(self, student: PreTrainedModel) -> set[str]:
        """The parameters of the mixers that their matrices depend on (not the output projection, nor the gate)."""
        for index, mixer in mixers(student).items():
            if not mixer.has_mixing_matrix:
                raise LimbeckError(
                    f"the {type(mixer).__name__} mixer of layer {index} has no mixing matrix, so the objective "
                    "'matrix' does not apply to it",
                    expected="a mixer with one matrix per head, such as discrete-mamba2",
                    hint="leave the stage out, and start at 'hidden'",
                )

        def probe() -> Tensor:
            total = torch.zeros(())
            for mixer in mixers(student).values():
                weight = next(mixer.parameters())
                hidden_states = torch.ones(1, 2, mixer.d_model, device=weight.device, dtype=weight.dtype)
                total = total + mixer.mixing_matrix(hidden_states).sum().cpu()
            return total

        return reached(student, probe)

    def __call__(self, student: PreTrainedModel, teacher: PreTrainedModel | None, batch: Batch) -> Losses:
        """See the class."""
        assert teacher is not None
        swapped = mixers(student)
        mask = batch.get("attention_mask")
        signals = observe(teacher, batch["input_ids"], mask, layers=list(swapped), logits=False)
        distances = []
        for index, mixer in swapped.items():
            if batch["input_ids"].shape[1] > STORED_LENGTH and torch.is_grad_enabled():
                distances.append(checkpoint(matrix_distance, mixer, signals[index], mask, use_reentrant=False))
            else:
                distances.append(matrix_distance(mixer, signals[index], mask))
        loss = torch.stack(distances).sum()
        return {"loss": loss, "matrix_per_layer": loss.detach() / len(distances)}


def matrix_distance(mixer: Mixer, signals: LayerSignals, mask: Tensor | None) -> Tensor:
    """Mean over batch and heads of ‖M − A‖_F for one layer, a scalar; both matrices (b, h, l, l) are materialised."""
    assert signals.mixer_input is not None
    student_matrix = mixer.mixing_matrix(signals.mixer_input, mask)  # (b, h, l, l)
    teacher_matrix = signals.matrix()  # (b, h, l, l)
    if student_matrix.shape != teacher_matrix.shape:
        raise LimbeckError(
            f"layer {signals.index}: the mixer has {student_matrix.shape[1]} value heads",
            expected=f"the teacher's {teacher_matrix.shape[1]} attention heads",
            hint=f"convert with --set mixer.n_v_heads={teacher_matrix.shape[1]}, or leave stage 'matrix' out",
        )
    return torch.linalg.matrix_norm(student_matrix - teacher_matrix).mean()
