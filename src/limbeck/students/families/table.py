"""The families: one entry each."""

from collections.abc import Sequence
from typing import Any

from transformers import (
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    Phi3Config,
    PhiConfig,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
    StableLmConfig,
    Starcoder2Config,
)

from limbeck.students.families.family import Family, LogitForm
from limbeck.students.families.projections import (
    gpt2_projections,
    gpt_neox_projections,
    phi3_projections,
    phi_projections,
    separate_projections,
)


def _query_key_norm(_config: Any) -> Sequence[str]:
    return ("the norms of queries and keys are lost",)


def _query_key_layer_norm(config: Any) -> Sequence[str]:
    return ("the layer norms of queries and keys are lost",) if config.qk_layernorm else ()


def _soft_cap(config: Any) -> Sequence[str]:
    return ("the soft cap of the scores is lost",) if config.attn_logit_softcapping is not None else ()


def _capped(config: Any) -> LogitForm:
    return LogitForm(softcap=config.final_logit_softcapping)


def _scaled(config: Any) -> LogitForm:
    return LogitForm(scale=1 / config.logits_scaling)


FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Family(Gemma2Config, separate_projections, not_carried=_soft_cap, logits=_capped),
        Family(Gemma3TextConfig, separate_projections, not_carried=_query_key_norm, logits=_capped),
        Family(GPT2Config, gpt2_projections, attention="attn", blocks="h"),
        Family(GPTNeoXConfig, gpt_neox_projections, attention="attention", cache_keyword="layer_past"),
        Family(GraniteConfig, separate_projections, logits=_scaled),
        Family(LlamaConfig, separate_projections),
        Family(MistralConfig, separate_projections),
        Family(Olmo2Config, separate_projections, not_carried=_query_key_norm),
        Family(PhiConfig, phi_projections, not_carried=_query_key_layer_norm),
        Family(Phi3Config, phi3_projections),
        Family(Qwen2Config, separate_projections),
        Family(Qwen3Config, separate_projections, not_carried=_query_key_norm),
        Family(SmolLM3Config, separate_projections),
        Family(
            StableLmConfig,
            separate_projections,
            carrier="position_embeddings",
            not_carried=_query_key_layer_norm,
        ),
        Family(Starcoder2Config, separate_projections),
    )
}
"""The families by their teachers' `model_type`."""
