"""MOHAWK stage 1, matrix orientation (METHODS 2): each mixer's matrix moves towards its layer's attention matrix."""

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from limbeck.distill.base import Batch, Losses, Objective, reached, register_objective
from limbeck.distill.observe import LayerSignals, observe
from limbeck.errors import LimbeckError
from limbeck.mixers import MatrixFactors, Mixer
from limbeck.ops import matrix_distance
from limbeck.ops.cards import on_gpu
from limbeck.students import mixers

STORED_LENGTH = 512
"""Where l × l matrices are made at all, those of all layers are kept for the backward pass up to this length; beyond,
they are made again layer by layer, so that memory does not grow with the number of layers."""


@register_objective
class MatrixObjective(Objective):
    """Mean over batch and heads of ‖M_student − A_teacher‖_F, summed over the layers; only the mixers learn.

    Each mixer is given the teacher's own input of its layer, so the layers are independent of one another. M has D on
    its diagonal; A is the softmax attention after the rotary embedding, scale and mask (where the teacher has a mixer
    itself, that mixer's matrix). Not squared. On a GPU no l × l matrix is stored where `limbeck.matrix_distance` can
    tell the distance from what both are made of: `Mixer.matrix_factors`, and the teacher's queries and keys.
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

    def units(self, student: PreTrainedModel) -> list[nn.Module]:
        """The mixers, each by itself."""
        return list(mixers(student).values())

    def __call__(self, student: PreTrainedModel, teacher: PreTrainedModel | None, batch: Batch) -> Losses:
        """See the class."""
        assert teacher is not None
        swapped = mixers(student)
        ids, mask = batch["input_ids"], batch.get("attention_mask")
        signals = observe(teacher, ids, mask, layers=list(swapped), logits=False)
        distances = [layer_distance(mixer, signals[index]) for index, mixer in swapped.items()]
        loss = torch.stack(distances).sum()
        return {"loss": loss, "matrix_per_layer": loss.detach() / len(distances)}


def layer_distance(mixer: Mixer, signals: LayerSignals) -> Tensor:
    """Mean over batch and heads of ‖M − A‖_F for one layer, a scalar.

    Args:
        mixer: The student's.
        signals: Of the teacher's layer.

    Raises:
        LimbeckError: The mixer has not as many heads as the teacher's layer.
    """
    inputs = signals.mixer_input
    assert inputs is not None
    factors = mixer.matrix_factors(inputs, signals.padding_mask) if _is_plain(signals) else None
    if factors is None:
        distance = partial(_from_matrices, mixer, signals)
    else:
        distance = partial(_from_factors, factors, signals)
    stores_matrices = factors is None or not on_gpu(inputs)
    if stores_matrices and inputs.shape[1] > STORED_LENGTH and torch.is_grad_enabled():
        return checkpoint(distance, use_reentrant=False)
    return distance()


def _is_plain(signals: LayerSignals) -> bool:
    """Whether the layer has attention, and its mask is causality, window and padding alone."""
    if signals.mixer is not None or signals.mask is None:
        return signals.mixer is None
    where = signals.mask.shape[-1], signals.mask.device
    plain = replace(signals, mask=None)._visible(*where)
    return not (plain & ~signals._visible(*where)).any()


def _from_factors(factors: MatrixFactors, signals: LayerSignals) -> Tensor:
    """The distance without matrices on a GPU, from what they are made of."""
    assert signals.query is not None
    assert signals.key is not None
    _check_heads(signals.index, factors.log_decay.shape[2], signals.query.shape[1])
    return matrix_distance(
        signals.query,
        signals.key,
        *factors,
        scale=signals.scale,
        attention_mask=signals.padding_mask,
        sliding_window=signals.sliding_window,
        softcap=signals.softcap,
    ).mean()


def _from_matrices(mixer: Mixer, signals: LayerSignals) -> Tensor:
    """The distance of both matrices (b, h, l, l), which are materialised."""
    assert signals.mixer_input is not None
    student_matrix = mixer.mixing_matrix(signals.mixer_input, signals.padding_mask)
    teacher_matrix = signals.matrix()
    _check_heads(signals.index, student_matrix.shape[1], teacher_matrix.shape[1])
    return torch.linalg.matrix_norm(student_matrix - teacher_matrix).mean()


def _check_heads(index: int, found: int, expected: int) -> None:
    if found != expected:
        raise LimbeckError(
            f"layer {index}: the mixer has {found} value heads",
            expected=f"the teacher's {expected} attention heads",
            hint=f"convert with --set mixer.n_v_heads={expected}, or leave stage 'matrix' out",
        )
