"""CALD's layerwise distillation (METHODS 3): the text itself, while every layer stays near the teacher's."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from limbeck.distill.base import (
    WHOLE_MODEL,
    Batch,
    Losses,
    Objective,
    in_own_dtype,
    reached,
    register_objective,
    token_mean,
)
from limbeck.distill.head import Predictions, head_losses, inputs_of, predict
from limbeck.distill.teacher_cache import target_of
from limbeck.errors import LimbeckError, unknown
from limbeck.ops.linear_kl_reference import IGNORED
from limbeck.ops.linear_top_k_kl import TopK
from limbeck.students import attention_of, blocks

Position = Literal["block", "mixer"]
CHOICES = {
    "norm": ("layernorm", "rmsnorm", "loss_norm", "none"),
    "distance": ("mse", "cosine"),
    "position": ("block", "mixer"),
    "mask": ("padding", "labels"),
}
LAYER_NORM_EPS, RMS_NORM_EPS = 1e-5, 1e-6
LEAST_LOSS = 1e-12  # what loss_norm divides by at least: layers that are equal have a loss and a gradient of 0


@register_objective
class LayerwiseObjective(Objective):
    """alpha_ce · CE(next token) + alpha_layer · mean of the layers' distances + alpha_logits · KL; everything learns.

    Teacher and student run once each, on their own hidden states. The embeddings' output and the last `skip_last`
    layers are left out: for L blocks and skip_last = 1 the outputs of blocks 1 … L−1 are compared, counted from 1. All
    is averaged per token. Without a teacher only the cross entropy is left.

    A teacher whose parameters ask for gradients learns too: its forward pass then gives its own loss on the text
    (``teacher_loss``, with its graph) and, detached and before its update, what the student follows.

    Args:
        alpha_ce: Weight of the cross entropy against the text.
        alpha_layer: Weight of the layers' distance.
        alpha_logits: Weight of KL(teacher ‖ student).
        temperature: Divides both logits for KL. There is no factor T².
        norm: ``"layernorm"`` or ``"rmsnorm"`` over d, without parameters, of both sides; ``"loss_norm"`` divides each
            layer's distance by its own value, so that only its gradient counts; ``"none"``.
        distance: ``"mse"``, the mean over d of the squared difference, or ``"cosine"``, 1 − cosine over d.
        skip_last: Layers at the end that are left out.
        position: ``"block"`` compares block outputs (before the final norm), ``"mixer"`` what stands in the place of
            attention with attention.
        mask: Tokens that count in the distance and KL: all but ``"padding"``, or those with ``"labels"``.
        cached_vocabulary: How many tokens a teacher knows whose predictions come with batches, from a `TeacherCache`,
            as long as they do; there is no other teacher then, and none for the layers.
    """

    name = "layerwise"
    scope = WHOLE_MODEL
    needs_teacher = False

    def __init__(
        self,
        alpha_ce: float = 1.0,
        alpha_layer: float = 15.0,
        alpha_logits: float = 0.0,
        temperature: float = 2.0,
        norm: str = "layernorm",
        distance: str = "mse",
        skip_last: int = 1,
        position: Position = "block",
        mask: str = "padding",
        cached_vocabulary: int | None = None,
    ):
        self.alpha_ce, self.alpha_layer, self.alpha_logits = alpha_ce, alpha_layer, alpha_logits
        self.temperature, self.skip_last = temperature, skip_last
        self.norm, self.distance, self.mask = norm, distance, mask
        self.position: Position = position
        self.cached_vocabulary = cached_vocabulary
        for option, known in CHOICES.items():
            if getattr(self, option) not in known:
                raise unknown(f"{option} of layers", getattr(self, option), known)

    def trainable(self, student: PreTrainedModel) -> set[str]:
        """Everything; without a loss on the predictions, all that the compared layers depend on."""
        layers = range(len(blocks(student)) - self.skip_last)
        if self.alpha_ce or self.alpha_logits or not layers:
            return {name for name, _ in student.named_parameters()}

        def probe() -> Tensor:
            input_ids = torch.zeros(1, 2, dtype=torch.long, device=student.device)
            with layer_outputs(student, layers, self.position) as outputs:
                student(input_ids=input_ids, use_cache=False)
            return torch.stack([output.sum().cpu() for output in outputs.values()]).sum()

        return reached(student, probe)

    def __call__(self, student: PreTrainedModel, teacher: PreTrainedModel | None, batch: Batch) -> Losses:
        """See the class."""
        layers, inputs = self._layers(student, teacher), inputs_of(batch)
        own: Losses = {}
        targets: dict[int, Tensor] = {}
        target = None
        if self.cached_vocabulary is not None:
            target = target_of(batch, self.cached_vocabulary)
        elif teacher is not None:
            targets, target, own = self._follow(teacher, layers, batch)

        def losses(found: Predictions) -> Losses:  # called when all blocks have put out
            return self._losses(found, target, outputs, targets, batch)

        with layer_outputs(student, layers, self.position) as outputs:
            return own | predict(student, inputs, losses)

    def _losses(
        self,
        found: Predictions,
        target: Predictions | TopK | None,
        outputs: dict[int, Tensor],
        targets: dict[int, Tensor],
        batch: Batch,
    ) -> Losses:
        """All terms; `outputs` and `targets` are hidden states (b, l, d) of the layers that are compared."""
        counted, kl_weight = self._counted(batch), 0.0 if target is None else self.alpha_logits
        assert targets or self.alpha_ce or kl_weight, "a loss without a term"
        losses: Losses = {}
        if self.alpha_ce or kl_weight:
            losses = head_losses(
                found,
                target,
                batch,
                kl_weight=kl_weight,
                ce_weight=self.alpha_ce,
                temperature=self.temperature,
                counted=counted,
            )
        if targets:
            layer = torch.stack([self._distance(outputs[i], targets[i], counted) for i in targets]).mean()
            loss = self.alpha_layer * layer
            losses |= {"loss": losses["loss"] + loss if losses else loss, "layer": layer.detach()}
        return losses

    def _counted(self, batch: Batch) -> Tensor | None:
        """Which tokens count between teacher and student: (b, l), or None for all."""
        padding = batch.get("attention_mask")
        if self.mask == "padding":
            return padding
        labelled = batch["labels"] != IGNORED
        return labelled if padding is None else labelled & padding.bool()

    def _layers(self, student: PreTrainedModel, teacher: PreTrainedModel | None) -> range:
        """Which layers are compared, counted from 0: none without a teacher."""
        if teacher is None or not self.alpha_layer:
            return range(0)
        found, expected = _shape(student), _shape(teacher)
        if found != expected:
            raise LimbeckError(
                "layers are compared with those of a teacher of {} layers of width {}".format(*expected),
                expected="as many layers of the same width as the student has: {} of {}".format(*found),
                hint="alpha_layer = 0 and alpha_logits above 0 follow such a teacher",
            )
        layers = range(found[0] - self.skip_last)
        if not layers:
            raise LimbeckError(f"skip_last = {self.skip_last} of {found[0]} layers", expected="a layer to compare")
        return layers

    def _follow(
        self, teacher: PreTrainedModel, layers: range, batch: Batch
    ) -> tuple[dict[int, Tensor], Predictions | None, Losses]:
        """Run the teacher once: hidden states (b, l, d) of the layers, detached, predictions, and its own loss."""
        learns = torch.is_grad_enabled() and any(parameter.requires_grad for parameter in teacher.parameters())

        def predictions(found: Predictions) -> tuple[Predictions, Losses]:
            if not learns:
                return found, {}
            target = found._replace(states=found.states.detach())
            return target, head_losses(found, None, batch, kl_weight=0.0, ce_weight=1.0, temperature=1.0)

        with ExitStack() as stack:
            if not learns:
                stack.enter_context(torch.no_grad())
                stack.enter_context(in_own_dtype(teacher))
            outputs = stack.enter_context(layer_outputs(teacher, layers, self.position))
            target, own = predict(teacher, inputs_of(batch), predictions)
        targets = {index: hidden.detach() for index, hidden in outputs.items()}
        teacher_loss = {"teacher_loss": own["loss"]} if learns else {}
        return targets, target if self.alpha_logits else None, teacher_loss

    def _distance(self, found: Tensor, target: Tensor, counted: Tensor | None) -> Tensor:
        """Distance of one layer's hidden states (b, l, d), mean over the tokens that count."""
        found, target = (_normed(hidden.float(), self.norm) for hidden in (found, target))
        if self.distance == "mse":
            per_token = (found - target).square().mean(dim=-1)  # (b, l)
        else:
            per_token = 1.0 - F.cosine_similarity(found, target, dim=-1)
        distance = token_mean(per_token, counted)
        if self.norm == "loss_norm":
            distance = distance / distance.detach().clamp_min(LEAST_LOSS)
        return distance


def _normed(hidden: Tensor, norm: str) -> Tensor:
    """Normalise (…, d) over d, without parameters."""
    width = hidden.shape[-1:]
    if norm == "layernorm":
        return F.layer_norm(hidden, width, eps=LAYER_NORM_EPS)
    if norm == "rmsnorm":
        return F.rms_norm(hidden, width, eps=RMS_NORM_EPS)
    return hidden


def _shape(model: PreTrainedModel) -> tuple[int, int]:
    config: Any = model.config
    return len(blocks(model)), config.hidden_size


@contextmanager
def layer_outputs(model: PreTrainedModel, layers: range, position: Position = "block") -> Iterator[dict[int, Tensor]]:
    """While open, a forward pass of `model` writes what some of its layers put out, and keeps nothing else.

    Args:
        model: A teacher or a student.
        layers: Which, counted from 0.
        position: ``"block"`` for block outputs, ``"mixer"`` for those of the attention or the mixer in its place.

    Yields:
        By layer (b, l, d), with their graph where there is one.
    """
    outputs: dict[int, Tensor] = {}

    def keep(index: int, module: nn.Module) -> Any:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            outputs[index] = output[0] if isinstance(output, tuple) else output

        return module.register_forward_hook(hook)

    with ExitStack() as stack:
        for index in layers:
            block = blocks(model)[index]
            stack.callback(keep(index, block if position == "block" else attention_of(block)).remove)
        yield outputs
