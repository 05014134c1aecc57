"""What one micro-batch holds and does on a GPU, found out without one.

The stage's own step module runs forward and backward on tensors that have shapes and no data (torch's fake tensors),
with the operators choosing as they would on a card. Every operation passes by here: what it makes is counted until
nobody holds it any more, and its arithmetic and the bytes that it reads and writes are written down. So no formula of a
family, a mixer or an objective is kept beside its code, and a plan follows the code.
"""

import weakref
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from limbeck.ops.cards import Card, planned_on
from limbeck.plan.arithmetic import flops_of, workspace_of

PLANNED = "limbeck_planned"
"""The attention of models that are traced: torch's own, causal, with no mask."""

HOPPER = Card((9, 0), 232448, 132)
"""The card whose kernels are traced. What they keep for the backward pass has been the same on every card so far."""

BLOCK = 512
"""Bytes of which torch's allocator on a GPU hands out multiples."""

WIDE_UNDER_AUTOCAST = {
    *(F.layer_norm, F.rms_norm, F.softmax, F.log_softmax, F.softplus, F.mse_loss, F.cosine_similarity),
    *(torch.layer_norm, torch.softmax, torch.log_softmax, torch.exp, torch.log, torch.pow, torch.rsqrt, torch.cumsum),
    *(Tensor.softmax, Tensor.log_softmax, Tensor.exp, Tensor.log, Tensor.pow, Tensor.rsqrt, Tensor.cumsum),
}
"""What autocast computes in float32 on a GPU, and not on a CPU, of what models and objectives call."""


@dataclass(frozen=True)
class Call:
    """One call of an operation that reads or writes memory.

    Attributes:
        name: The operation's, as torch knows it: ``aten::mm``.
        flops: A multiplication and an addition are two.
        bytes: Read and written.
    """

    name: str
    flops: float
    bytes: float


@dataclass(frozen=True)
class Trace:
    """One micro-batch, forward and backward; bytes at its fullest moment, beyond parameters and momenta.

    Attributes:
        gradients: Of the parameters.
        activations: What the backward pass needs of the forward pass, and what the teacher was asked for.
        workspace: What comes and goes: operands of the other number format, gradients of activations, logits.
        calls: Everything that was computed.
    """

    gradients: int
    activations: int
    workspace: int
    calls: tuple[Call, ...]

    @property
    def flops(self) -> float:
        """Floating-point operations."""
        return sum(call.flops for call in self.calls)


def fake() -> FakeTensorMode:
    """The mode in which tensors have no data; models are brought into it with `without_data`."""
    return FakeTensorMode(allow_non_fake_inputs=True)


def without_data(model: PreTrainedModel, mode: FakeTensorMode) -> None:
    """Bring a model from torch's meta device to the CPU, still without data, with an attention that can be traced."""
    with mode:
        model.to_empty(device="cpu")
        model.tie_weights()
    model.set_attn_implementation(PLANNED)


def trace(
    step: nn.Module,
    teacher: nn.Module | None,
    mode: FakeTensorMode,
    *,
    micro_batch: int,
    length: int,
    autocast: torch.dtype | None,
    again: bool,
    signals: Callable[[], dict[str, Tensor]] = dict,
) -> Trace:
    """Run a micro-batch through a step module whose models are without data.

    Args:
        step: Forward takes a batch and gives the losses.
        teacher: What it learns from, which is no part of it; None without one.
        mode: The mode of its models.
        micro_batch: b.
        length: l.
        autocast: What is computed in; None: in float32.
        again: Whether gradients of an earlier micro-batch are there already.
        signals: Gives what a batch carries beside its tokens; called in the mode.
    """
    watch = _Watch()
    models = [step] if teacher is None else [step, teacher]
    learning = [parameter for model in models for parameter in model.parameters() if parameter.requires_grad]
    watch.at_rest(models)
    with ExitStack() as stack:
        for context in (mode, planned_on(HOPPER), watch):
            stack.enter_context(context)
        for parameter in learning:
            parameter.grad = torch.empty_like(parameter) if again else None
            if again:
                watch.gradient(parameter)
            stack.callback(parameter.register_post_accumulate_grad_hook(watch.gradient).remove)
        ids = torch.zeros(micro_batch, length, dtype=torch.long)
        watch.calls.clear()
        with _WideUnderAutocast(), torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
            batch = {"input_ids": ids, "labels": ids, **signals()}  # is there until the update is over
            losses = step(batch)
        held = watch.live - watch.gradients
        total = sum(loss for loss in losses.values() if loss.requires_grad)
        del losses
        assert isinstance(total, Tensor)
        total.backward()
        del total, batch
    activations = min(held, watch.peak - watch.peak_gradients)
    workspace = watch.peak - watch.peak_gradients - activations
    return Trace(watch.peak_gradients, activations, workspace, tuple(watch.calls))


class _WideUnderAutocast(TorchFunctionMode):
    """Does what autocast does on a GPU beyond what it does on a CPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in WIDE_UNDER_AUTOCAST and torch.is_autocast_enabled("cpu"):
            args = tree_map(_wide, args)
        return func(*args, **(kwargs or {}))


def _wide(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value


class _Watch(TorchDispatchMode):
    """Counts the bytes of the tensors that live, and writes down what is called."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = self.gradients = self.peak_gradients = 0
        self.calls: list[Call] = []
        self._sizes: dict[int, int] = {}
        self._gradients: set[int] = set()

    def at_rest(self, models: list[nn.Module]) -> None:
        """Leave out what these models hold anyway."""
        for model in models:
            for tensor in (*model.parameters(), *model.buffers()):
                self._sizes[tensor.untyped_storage()._cdata] = 0

    def gradient(self, parameter: Tensor) -> None:
        """Tell a parameter's gradient from everything else."""
        assert parameter.grad is not None
        key = self._meet(parameter.grad)
        if key not in self._gradients:
            self._gradients.add(key)
            self.gradients += self._sizes[key]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        inputs, outputs = _tensors((args, kwargs)), _tensors(out)
        for tensor in outputs:
            self._meet(tensor)
        name = func._schema.name
        extra = workspace_of(name, args)
        if self.live + extra > self.peak:
            self.peak, self.peak_gradients = self.live + extra, self.gradients
        given = {tensor.untyped_storage()._cdata for tensor in inputs}
        if func._schema.is_mutable or any(tensor.untyped_storage()._cdata not in given for tensor in outputs):
            moved = float(sum(map(_bytes, inputs))) + sum(map(_bytes, outputs))
            self.calls.append(Call(name, flops_of(name, func, args, kwargs, out), moved if inputs else 0.0))
        return out

    def _meet(self, tensor: Tensor) -> int:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = -(-storage.nbytes() // BLOCK) * BLOCK
            self.live += self._sizes[key]
            weakref.finalize(storage, self._part, key)
        return key

    def _part(self, key: int) -> None:
        size = self._sizes.pop(key)
        self.live -= size
        if key in self._gradients:
            self._gradients.remove(key)
            self.gradients -= size


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _bytes(tensor: Tensor) -> int:
    """Of a tensor, as they are in memory: those of an expanded one once."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


AttentionInterface.register(PLANNED, ALL_ATTENTION_FUNCTIONS["sdpa"])
AttentionMaskInterface.register(PLANNED, lambda *_args, **_kwargs: None)
