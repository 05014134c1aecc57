"""What Limbeck must know of a family of Hugging Face causal language models, and the table they are entered into."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING

from limbeck.errors import LimbeckError
from limbeck.mixers import AttentionWeights

_INTERFACE: Any = GenerationMixin
_CALLED_WITH = inspect.signature(_INTERFACE.prepare_inputs_for_generation).parameters
CACHE = "cache" if "cache" in _CALLED_WITH else "past_key_values"
"""The name of the cache among the arguments of models: `past_key_values` up to transformers 5.23, then `cache`."""


class AttentionShape(NamedTuple):
    """Heads of an attention layer.

    Attributes:
        num_heads: h, the query heads.
        num_kv_heads: The key and value heads.
        head_dim: p, the width of a head.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int


class LogitForm(NamedTuple):
    """What a language model does to the output of its head: softcap · tanh(scale · output / softcap).

    Attributes:
        scale: What the output is multiplied with.
        softcap: None for no soft cap.
    """

    scale: float = 1.0
    softcap: float | None = None


def attention_shape(config: Any) -> AttentionShape:
    """Read the heads off a configuration, under the names that nearly all families use.

    Raises:
        LimbeckError: When the configuration is of a model that is no causal decoder.
    """
    for field in ("add_cross_attention", "use_bidirectional_attention"):
        if getattr(config, field, False):
            raise LimbeckError(f"{field} is set in this {config.model_type} model", expected="a causal decoder only")
    heads = config.num_attention_heads
    return AttentionShape(
        num_heads=heads,
        num_kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
    )


def _nothing_lost(_config: Any) -> Sequence[str]:
    return ()


def _plain(_config: Any) -> LogitForm:
    return LogitForm()


@dataclass(frozen=True)
class Family:
    """How one family of teachers is built.

    Attributes:
        config_class: The teacher's configuration class; its `model_type` names the family.
        attention_weights: From an attention module and its configuration to the projections in one layout.
        attention: Name of the attention module inside a block.
        blocks: Name of the list of blocks inside the backbone.
        cache_keyword: How a block hands the cache to its attention.
        carrier: None where blocks hand the keyword arguments they do not know on to their attention. Where they drop
            them: an argument that they do hand on and that a mixer has no use for. On its way through a swapped
            block it carries the padding mask and the document ids.
        attention_shape: From a configuration to the heads.
        not_carried: From a configuration to notes on what of its attention no mixer can start from.
        logits: From a configuration to what becomes of the head's output; None where it is something else. Then whole
            logits are made where a loss could do without.
    """

    config_class: type[PretrainedConfig]
    attention_weights: Callable[[Any, Any], AttentionWeights]
    attention: str = "self_attn"
    blocks: str = "layers"
    cache_keyword: str = CACHE
    carrier: str | None = None
    attention_shape: Callable[[Any], AttentionShape] = attention_shape
    not_carried: Callable[[Any], Sequence[str]] = _nothing_lost
    logits: Callable[[Any], LogitForm | None] = _plain

    @property
    def name(self) -> str:
        """The teacher's `model_type`."""
        return self.config_class.model_type

    @property
    def backbone_class(self) -> type[PreTrainedModel]:
        """The teacher's model without a head."""
        return MODEL_MAPPING[self.config_class]  # pyright: ignore[reportReturnType]

    @property
    def causal_lm_class(self) -> type[PreTrainedModel]:
        """The teacher's model with its language-modelling head."""
        return MODEL_FOR_CAUSAL_LM_MAPPING[self.config_class]  # pyright: ignore[reportReturnType]
