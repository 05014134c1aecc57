"""One update: the gradients of its micro-batches, then a step of every optimiser whose turn it is."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from limbeck.errors import LimbeckError
from limbeck.training.distributed import World
from limbeck.training.parallel import Replicas

Batch = Mapping[str, Tensor]
WAITS = "limbeck_waits"
LEAST_SCALE = 2.0**-20


class OutOfMemory(Exception):  # noqa: N818
    """An update did not fit in memory; the stage is to be built anew, with smaller micro-batches."""

    def __init__(self, step: int):
        self.step = step
        super().__init__(f"out of memory in the update after {step}")


class Companion:
    """A second model that learns beside the step module, as a teacher does that is fine-tuned alongside.

    Its loss is a term of the step module's forward, with a graph of its own. It has its own optimiser, schedule and
    clip, and is part of every checkpoint while it is there.

    Args:
        module: The model.
        optimizer: Over its parameters.
        schedule: Updates of its own that are done → learning rate.
        until: Updates of the step module after which it is let go.
        every: It is updated in every so many-th update of the step module.
        clip: Largest global norm of its gradient; None: not clipped.
        name: What its figures begin with.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        schedule: Callable[[int], float],
        *,
        until: int,
        every: int = 1,
        clip: float | None = None,
        name: str = "teacher",
    ):
        self.module: nn.Module | None = module
        self.optimizer: torch.optim.Optimizer | None = optimizer
        self.schedule, self.until, self.every, self.clip, self.name = schedule, until, every, clip, name

    def enter(self, step: int) -> None:
        """Let go of the model, and of its optimiser's state, once its time is over."""
        if step >= self.until:
            self.module = self.optimizer = None

    def update(self, step: int, scaler: torch.amp.GradScaler | None, world: World) -> dict[str, Tensor]:
        """Learn from the gradients of the update that follows `step` finished ones, if it is its turn.

        Returns:
            Its figures: the learning rate and the gradient's norm.
        """
        if self.optimizer is None or (step + 1) % self.every:
            return {}
        assert self.module is not None
        world.average_gradients(self.module.parameters())
        lr = self.schedule((step + 1) // self.every - 1)
        norm = apply(self.optimizer, lr, self.clip, scaler)["grad_norm"]
        return {f"{self.name}_lr": torch.full_like(norm, lr, dtype=torch.float64), f"{self.name}_grad_norm": norm}


def wake(optimizer: torch.optim.Optimizer, step: int) -> None:
    """Let learn what may learn after `step` updates: a group waits until its ``learns_from``."""
    for group in optimizer.param_groups:
        waiting = step < group.get("learns_from", 0)
        for parameter in group["params"]:
            parameter.requires_grad_(not waiting)
            setattr(parameter, WAITS, waiting)


def learns(parameter: Tensor) -> bool:
    """Whether a parameter learns in this stage, now or later."""
    return parameter.requires_grad or getattr(parameter, WAITS, False)


def accumulate(
    step_module: Replicas,
    micro_batches: Sequence[Batch],
    device: torch.device,
    autocast: torch.dtype | None,
    scaler: torch.amp.GradScaler | None = None,
) -> dict[str, Tensor]:
    """Add up the gradient of the mean loss over micro-batches; return the means of the loss and its terms, detached.

    The gradient is the mean over all processes, the returned means are those of this one.

    Every term with a graph is learned from: ``loss``, and that of a `Companion`, whose graph is another.
    """
    shapes = {tuple((key, tensor.shape) for key, tensor in sorted(batch.items())) for batch in micro_batches}
    assert len(shapes) == 1, f"micro-batches of one update must be of equal size, got {shapes}"
    share = 1.0 / len(micro_batches)
    means: dict[str, Tensor] = {}
    for number, batch in enumerate(micro_batches, start=1):
        batch = {key: tensor.to(device, non_blocking=True) for key, tensor in batch.items()}
        with step_module.sync(last=number == len(micro_batches)):
            with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
                terms = step_module.called(batch)
            total = terms["loss"]
            for name, term in terms.items():
                if name != "loss" and term.requires_grad:
                    total = total + term
            total = total * share
            one = (
                total.detach() * 0.0 + 1.0
            )  # not a number where the loss is not finite: then no process learns from it
            (total if scaler is None else scaler.scale(total)).backward(one)
        for name, value in terms.items():
            part = value.detach() * share
            means[name] = means[name] + part if name in means else part
    return means


def agree(world: World, stop: Sequence[int], lacking: bool = False, step: int = 0) -> int:
    """Agree, once an update and on the hosts alone, on what each process met by itself.

    Args:
        world: The processes.
        stop: The signals that asked this process to stop.
        lacking: Whether it ran out of memory in this update.
        step: Updates done.

    Returns:
        The signal to stop for, which one of them got; 0 for none.

    Raises:
        OutOfMemory: All processes ran out of memory, at the same place.
        LimbeckError: One did and another did not: they wait in different exchanges, and cannot go on together.
    """
    exchanges = world.exchanges()
    signal = stop[0] if stop else 0
    stopping, some, not_all, *counts = world.agree(
        [signal, int(lacking), -int(lacking), *exchanges, *(-count for count in exchanges)]
    )
    if not some:
        return stopping
    greatest, least = counts[: len(exchanges)], [-count for count in counts[len(exchanges) :]]
    if not_all == 0 or greatest != least:
        raise LimbeckError(
            f"out of memory after {step} updates, in some processes and not in others",
            expected="memory for a micro-batch on every device",
            hint="a smaller micro_batch; the same command then goes on from the last checkpoint",
        )
    raise OutOfMemory(step)


def apply(
    optimizer: torch.optim.Optimizer, lr: float, clip: float | None, scaler: torch.amp.GradScaler | None = None
) -> dict[str, Tensor]:
    """Clip the gradient, take the optimiser's step at rate `lr`, and forget the gradient.

    Where the gradient is not finite, as after a loss that is not, nothing is learned: neither weights nor momenta nor
    decay move. The device decides that by itself, so an accelerator is not waited for.

    Args:
        optimizer: AdamW in its fused form, which reads ``found_inf``. Its groups may hold ``lr_scale``.
        lr: Learning rate of a group whose ``lr_scale`` is 1.
        clip: Largest global norm of the gradient; None: not clipped.
        scaler: Of the loss. A gradient that overflowed is not learned from.

    Returns:
        ``grad_norm``, the norm of the gradient before clipping, 0 where it overflowed under a scaler; ``skipped``,
        whether the update was left out, 1.0 or 0.0; and where groups have names, ``grad_norm_NAME`` for the mixers and
        for the teacher-born weights, if both learn.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
    if scaler is not None:
        scaler.unscale_(optimizer)
    norms = _group_norms(optimizer)
    norm = torch.linalg.vector_norm(torch.stack(list(norms.values()))) if norms else torch.zeros(())
    if clip is not None:
        nn.utils.clip_grads_with_norm_([p for group in optimizer.param_groups for p in group["params"]], clip, norm)
    skipped = (~norm.isfinite()).float()
    if scaler is None:
        optimizer.found_inf = skipped  # type: ignore[attr-defined]
        optimizer.step()
        del optimizer.found_inf  # type: ignore[attr-defined]
    else:
        scaler.step(optimizer)
        norm, norms = (
            torch.where(skipped > 0, 0.0, norm),
            {name: torch.where(skipped > 0, 0.0, value) for name, value in norms.items()},
        )
    optimizer.zero_grad(set_to_none=True)
    figures = {"grad_norm": norm, "skipped": skipped}
    if len(norms) > 1:
        figures |= {f"grad_norm_{name}": value for name, value in norms.items()}
    return figures


def rescale(scaler: torch.amp.GradScaler, stage: str, step: int) -> dict[str, Tensor]:
    """Adapt the loss scale after an update; the figure is the scale that the update had.

    Raises:
        LimbeckError: The gradient overflows however small the loss is scaled: it is not a number.
    """
    scale = scaler.get_scale()
    scaler.update()
    if scale < LEAST_SCALE:
        raise LimbeckError(
            f"stage {stage!r}, step {step}: the gradient overflows at a loss scale of {scale}",
            expected="a gradient that float16 can hold",
            hint='precision = "bfloat16" or "float32", or a lower lr',
        )
    return {"loss_scale": torch.tensor(scale)}


def _group_norms(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The gradient's norm over each kind of parameters, decayed or not; those without a gradient are left out.

    No host sync. The kind is the group's name up to a comma, as `parameter_groups` gives it.
    """
    gradients: dict[str, list[Tensor]] = {}
    for group in optimizer.param_groups:
        found = [parameter.grad for parameter in group["params"] if parameter.grad is not None]
        if found:
            kind = group.get("name", "").split(",")[0].replace("-", "_")
            gradients.setdefault(kind, []).extend(found)
    norms = {kind: nn.utils.get_total_norm(found) for kind, found in gradients.items()}
    return {kind: norm.full_tensor() if isinstance(norm, DTensor) else norm for kind, norm in norms.items()}
