"""Single blocks, without those before and after them."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from limbeck.distill.observe import LayerSignals, layer_of, on_block_input, padding_of, recording
from limbeck.students import backbone, blocks, family_of


@dataclass
class LayerOutput:
    """What `run_layer` returns: mixer_output (b, l, d), block_output (b, l, d) and, on demand, the mixing matrix."""

    mixer_output: Tensor
    block_output: Tensor
    signals: LayerSignals = field(repr=False)

    @property
    def mixing_matrix(self) -> Tensor:
        """(b, h, l, l): the mixer's matrix, or the softmax attention of a layer that kept its attention."""
        return self.signals.matrix()


def run_layer(
    model: PreTrainedModel, index: int, hidden_states: Tensor, attention_mask: Tensor | None = None
) -> LayerOutput:
    """Run one block alone on hidden states of your own; masks and rotary embeddings are supplied.

    Gradients flow, so a stage of your own is ten lines: see ``examples/mohawk_stage1.py``.

    Args:
        model: A teacher or a student.
        index: Which block, counted from 0.
        hidden_states: (b, l, d) input of the block, before its layer norm.
        attention_mask: (b, l), 1 at tokens and 0 at padding.
    """
    layer_list, index = blocks(model), layer_of(model, index)
    with ExitStack() as stack:
        record = stack.enter_context(recording(model, attention_mask, layers=[index]))
        stack.enter_context(_bypassed(model, keep=index))
        # Families scale or shift their embeddings on the way to the first block: put the caller's tensor back.
        handle = layer_list[index].register_forward_pre_hook(
            lambda _, args, kwargs: _with_hidden_states(args, kwargs, hidden_states), with_kwargs=True, prepend=True
        )
        stack.callback(handle.remove)
        backbone(model)(inputs_embeds=hidden_states, attention_mask=attention_mask, use_cache=False)
    signals = record[index]
    assert signals.mixer_output is not None
    assert signals.block_output is not None
    return LayerOutput(signals.mixer_output, signals.block_output, signals)


@torch.no_grad()
def block_arguments(
    model: PreTrainedModel, hidden_states: Tensor, attention_mask: Tensor | None = None
) -> list[dict[str, Any]]:
    """What each block of a model is called with beside hidden states, by name (masks, rotary tables); no block runs.

    Args:
        model: A teacher or a student.
        hidden_states: (b, l, d) of any block, for shape, dtype and device.
        attention_mask: (b, l), 1 at tokens and 0 at padding.
    """
    layers = list(blocks(model))
    seen = [LayerSignals(index) for index in range(len(layers))]
    with _bypassed(model):
        for signals, block, stand_in in zip(seen, layers, blocks(model), strict=True):
            stand_in.register_forward_pre_hook(partial(_on_stand_in, signals, block), with_kwargs=True)
        backbone(model)(inputs_embeds=hidden_states, attention_mask=padding_of(attention_mask), use_cache=False)
    return [signals.block_kwargs for signals in seen]


def _on_stand_in(
    signals: LayerSignals, block: nn.Module, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    on_block_input(signals, block, args, kwargs)


def _with_hidden_states(
    args: tuple[Any, ...], kwargs: dict[str, Any], hidden_states: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if args:
        return (hidden_states, *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": hidden_states}


@contextmanager
def _bypassed(model: PreTrainedModel, keep: int | None = None) -> Iterator[None]:
    """While open, every block, or every one but one, hands its input on untouched."""
    body, name = backbone(model), family_of(model.config).blocks
    original = blocks(model)
    setattr(body, name, nn.ModuleList(b if i == keep else _Bypass(b) for i, b in enumerate(original)))
    try:
        yield
    finally:
        setattr(body, name, original)


class _Bypass(nn.Module):
    """Stands in for a block: same attributes (some backbones read them), but its input is its output."""

    def __init__(self, block: nn.Module):
        super().__init__()
        self.__dict__["_block"] = block  # not a submodule: the weights belong to the block

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_block"], name)

    def forward(self, hidden_states: Tensor, *_args: Any, **_kwargs: Any) -> Tensor:
        return hidden_states
