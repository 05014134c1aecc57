"""Teacher signals without vendored models: what every layer of a Hugging Face causal language model saw and did.

Inputs and outputs come from forward hooks. Queries and keys, after the rotary embedding and whatever else the family
does to them, come from an attention function that is registered with transformers, writes down its arguments and
passes them on to the implementation the model was using (eager, sdpa, flash_attention_2). So every family works alike,
and nothing of a model's code is copied.
"""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from sys import modules as loaded_modules
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from limbeck.distill.base import in_own_dtype
from limbeck.errors import LimbeckError
from limbeck.mixers import Mixer
from limbeck.students import attention_of, backbone, blocks, mixers

OBSERVED = "limbeck_observed"


@dataclass
class LayerSignals:
    """What one layer saw and did; h query heads and g key heads of width p.

    Attributes:
        index: Which layer, counted from 0.
        block_input: (b, l, d) hidden states that entered the block.
        block_output: (b, l, d) hidden states that left it (of the last block: before the final norm).
        mixer_input: (b, l, d) what the attention, or the mixer in its place, was given: after the layer norm.
        mixer_output: (b, l, d) what it returned, after the output projection.
        query: (b, h, l, p) after the rotary embedding; None where the layer is a mixer.
        key: (b, g, l, p), likewise.
        scale: The softmax scale of this layer.
        mask: (b or 1, 1, l, l) bool, True where a query may look; None where it is just causal.
        sliding_window: How many tokens back a query looks, itself included; None for all.
        softcap: Logits are softcap · tanh(logits / softcap); None for plain logits.
        padding_mask: (b, l), 1 at tokens and 0 at padding; None for no padding.
        block_kwargs: All but the hidden states that the block was called with (masks, rotary tables), by name, to run
            its twin alone.
    """

    index: int
    block_input: Tensor | None = None
    block_output: Tensor | None = None
    mixer_input: Tensor | None = None
    mixer_output: Tensor | None = None
    query: Tensor | None = None
    key: Tensor | None = None
    scale: float | None = None
    mask: Tensor | None = None
    sliding_window: int | None = None
    softcap: float | None = None
    padding_mask: Tensor | None = None
    block_kwargs: dict[str, Any] = field(default_factory=dict, repr=False)
    mixer: Mixer | None = field(default=None, repr=False)

    def attention_matrix(self) -> Tensor:
        """The softmax attention matrix (b, h, l, l) of this layer in float32 (float64 stays); padding counts zero.

        Raises:
            LimbeckError: The layer has no attention.
        """
        if self.query is None or self.key is None or self.scale is None:
            raise LimbeckError(
                f"layer {self.index} has a mixer where its attention was",
                expected="a layer that kept its attention",
                hint="use matrix(), which gives the mixing matrix of a mixer",
            )
        query = self.query.to(torch.promote_types(self.query.dtype, torch.float32))
        groups = query.shape[1] // self.key.shape[1]
        key = self.key.to(query.dtype).repeat_interleave(groups, dim=1)  # (b, h, l, p)
        logits = query @ key.transpose(-1, -2) * self.scale  # (b, h, l, l)
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        visible = self._visible(logits.shape[-1], logits.device)
        # A padded row may see nothing at all: a finite floor keeps its softmax free of NaN until it is zeroed.
        attention = logits.masked_fill(~visible, torch.finfo(logits.dtype).min).softmax(dim=-1)
        return attention.masked_fill(~visible, 0.0)

    def matrix(self) -> Tensor:
        """The attention matrix of an attention layer, or the mixing matrix of a mixer: (b, h, l, l)."""
        if self.mixer is None:
            return self.attention_matrix()
        assert self.mixer_input is not None
        return self.mixer.mixing_matrix(self.mixer_input, self.padding_mask)

    def _visible(self, length: int, device: torch.device) -> Tensor:
        """Which (query, key) pairs exist: (b or 1, 1, l, l) bool."""
        position = torch.arange(length, device=device)
        distance = position[:, None] - position[None, :]
        visible = distance >= 0
        if self.sliding_window is not None:
            visible = visible & (distance < self.sliding_window)
        visible = visible[None, None]
        if self.mask is not None:
            visible = visible & self.mask
        if self.padding_mask is not None:
            token = self.padding_mask.bool()
            visible = visible & token[:, None, :, None] & token[:, None, None, :]
        return visible


@dataclass
class Observation:
    """What a model did with a batch: one `LayerSignals` a layer, and the logits.

    Attributes:
        layers: Signals by layer index; only the layers that were asked for.
        logits: (b, l, v), or None where they were not asked for.
    """

    layers: dict[int, LayerSignals]
    logits: Tensor | None = None

    def __getitem__(self, index: int) -> LayerSignals:
        return self.layers[index]

    def __iter__(self) -> Iterator[LayerSignals]:
        return iter(self.layers.values())

    def __len__(self) -> int:
        return len(self.layers)


def observe(
    model: PreTrainedModel,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    layers: Sequence[int] | None = None,
    logits: bool = True,
    grad: bool = False,
) -> Observation:
    """Run a teacher or a student once and return what each of its layers saw and did (METHODS 2).

    Args:
        model: A causal language model of a supported family, or a student of one.
        input_ids: (b, l) token ids.
        attention_mask: (b, l), 1 at tokens and 0 at padding.
        layers: Which layers to record; all by default.
        logits: Whether to run the head too. Without it `Observation.logits` is None.
        grad: Whether to build the autograd graph. A teacher needs none.

    Returns:
        The signals. Tensors are the model's own, not copies: do not change them in place.
    """
    with torch.set_grad_enabled(grad), in_own_dtype(model), recording(model, attention_mask, layers=layers) as record:
        run = model if logits else backbone(model)
        output = run(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
    return Observation(record, output.logits if logits else None)


# ---------------------------------------------------------------------------------------------- recording


@dataclass(frozen=True)
class _Observed:
    """The observation under way: the implementation the model was using, and whose attention writes where."""

    implementation: str
    signals_of: dict[nn.Module, LayerSignals]


_under_way: ContextVar[_Observed] = ContextVar("limbeck_observation")


def layer_of(model: PreTrainedModel, index: int) -> int:
    """A layer's number, counted from 0; as in lists, -1 is the last."""
    count = len(blocks(model))
    if not -count <= index < count:
        raise LimbeckError(f"layer {index}", expected=f"a layer of this model: 0 to {count - 1}")
    return index % count


def padding_of(attention_mask: Tensor | None) -> Tensor | None:
    """A mask (b, l) where it hides something, or None."""
    return attention_mask if attention_mask is not None and not bool(attention_mask.all()) else None


@contextmanager
def recording(
    model: PreTrainedModel, attention_mask: Tensor | None = None, *, layers: Sequence[int] | None = None
) -> Iterator[dict[int, LayerSignals]]:
    """While open, a forward pass of `model` fills the signals that this yields, by layer; see `observe`."""
    wanted = range(len(blocks(model))) if layers is None else [layer_of(model, index) for index in layers]
    padding_mask, mixer_at = padding_of(attention_mask), mixers(model)
    record = {i: LayerSignals(i, padding_mask=padding_mask, mixer=mixer_at.get(i)) for i in wanted}
    attentions = {attention_of(blocks(model)[i]): signals for i, signals in record.items()}
    config: Any = model.config
    original = config._attn_implementation
    with ExitStack() as stack:
        for attention, signals in attentions.items():
            block = blocks(model)[signals.index]
            for handle in (
                block.register_forward_pre_hook(partial(on_block_input, signals), with_kwargs=True, prepend=True),
                block.register_forward_hook(partial(_on_block_output, signals)),
                attention.register_forward_pre_hook(partial(_on_mixer_input, signals), with_kwargs=True),
                attention.register_forward_hook(partial(_on_mixer_output, signals)),
            ):
                stack.callback(handle.remove)
        token = _under_way.set(_Observed(original, attentions))
        stack.callback(_under_way.reset, token)
        config._attn_implementation_internal = OBSERVED
        stack.callback(setattr, config, "_attn_implementation_internal", original)
        yield record


def _hidden_states(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    return args[0] if args else kwargs["hidden_states"]


def on_block_input(signals: LayerSignals, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forward pre-hook of a block: write down what it is called with."""
    signals.block_input = _hidden_states(args, kwargs)
    by_name = dict(zip(inspect.signature(block.forward).parameters, args, strict=False)) | kwargs
    signals.block_kwargs = {name: value for name, value in by_name.items() if name != "hidden_states"}


def _on_block_output(signals: LayerSignals, _block: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
    signals.block_output = output[0] if isinstance(output, tuple) else output


def _on_mixer_input(signals: LayerSignals, _mixer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    signals.mixer_input = _hidden_states(args, kwargs)


def _on_mixer_output(signals: LayerSignals, _mixer: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
    signals.mixer_output = output[0]


# ---------------------------------------------------------------------------------------------- attention


def _observed_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """Write down what the attention was called with, then let the model's own implementation do it."""
    observed = _under_way.get()
    signals = observed.signals_of.get(module)
    if signals is not None:
        scale = kwargs.get("scaling")
        signals.query, signals.key = query, key
        signals.scale = query.shape[-1] ** -0.5 if scale is None else scale
        signals.mask = _as_visible(attention_mask)
        signals.sliding_window = kwargs.get("sliding_window")
        signals.softcap = kwargs.get("softcap")
    # Implementations read their own name from the configuration, and eager lives in the family's module.
    config: Any = module.config
    config._attn_implementation_internal = observed.implementation
    try:
        eager = getattr(loaded_modules[type(module).__module__], "eager_attention_forward", None)
        implementation = ALL_ATTENTION_FUNCTIONS.get_interface(observed.implementation, eager)  # type: ignore[arg-type]
        return implementation(module, query, key, value, attention_mask, **kwargs)
    finally:
        config._attn_implementation_internal = OBSERVED


def _observed_mask(*args: Any, **kwargs: Any) -> Any:
    """The mask of the implementation the model was using."""
    return ALL_MASK_ATTENTION_FUNCTIONS[_under_way.get().implementation](*args, **kwargs)


def _as_visible(attention_mask: Tensor | None) -> Tensor | None:
    """A mask as attention functions get it (bool, additive or 2-D padding) as bool, True where a query may look."""
    if attention_mask is None:
        return None
    if attention_mask.is_floating_point():
        attention_mask = attention_mask > torch.finfo(attention_mask.dtype).min / 2
    if attention_mask.ndim == 2:  # flash attention is given the padding mask itself
        return attention_mask.bool()[:, None, None, :]
    return attention_mask.bool()


AttentionInterface.register(OBSERVED, _observed_attention)
AttentionMaskInterface.register(OBSERVED, _observed_mask)
