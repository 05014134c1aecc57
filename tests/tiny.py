"""One tiny teacher for each family, with what is particular to the family switched on."""

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

VOCABULARY, WIDTH, HEADS, WINDOW = 61, 32, 4, 4
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "num_attention_heads": HEADS,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
GROUPED = {"num_key_value_heads": 2}


def _alternating(layers: int) -> dict[str, Any]:
    kinds = ["sliding_attention" if layer % 2 == 0 else "full_attention" for layer in range(layers)]
    return {"layer_types": kinds, "sliding_window": WINDOW}


def _particular(family: str, layers: int) -> dict[str, Any]:
    """Options of a family beside the sizes: grouped queries, windows, wide heads, multipliers, tied embeddings."""
    alternating = _alternating(layers)
    return {
        "gemma2": GROUPED | alternating | {"head_dim": 12, "query_pre_attn_scalar": 5, "attn_logit_softcapping": 0.5},
        "gemma3_text": GROUPED | alternating | {"head_dim": 12, "query_pre_attn_scalar": 5},
        "gpt2": {"n_inner": 48, "scale_attn_by_inverse_layer_idx": True}
        | dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
        "granite": GROUPED
        | {"attention_multiplier": 0.3, "embedding_multiplier": 3.0, "residual_multiplier": 0.7, "logits_scaling": 2.0},
        "llama": GROUPED,
        "mistral": GROUPED | {"sliding_window": WINDOW, "head_dim": 12},
        "olmo2": GROUPED,
        "phi3": GROUPED | {"sliding_window": WINDOW},
        "qwen2": GROUPED | alternating | {"use_sliding_window": True},
        "qwen3": GROUPED | alternating | {"use_sliding_window": True, "head_dim": 12, "attention_bias": True},
        "smollm3": GROUPED
        | alternating
        | {"use_sliding_window": True, "no_rope_layer_interval": 2, "attention_bias": True},
        "stablelm": GROUPED | {"use_qkv_bias": True, "qk_layernorm": True, "use_parallel_residual": True},
        "starcoder2": GROUPED | {"sliding_window": WINDOW},
    }.get(family, {})


def tiny_teacher(
    family: str,
    layers: int = 3,
    *,
    dtype: torch.dtype = torch.float32,
    attn_implementation: str | None = None,
    **options: Any,
) -> Any:
    """Build a teacher with random weights, large enough that every path shows in the logits, biases included."""
    given = SIZES | {"num_hidden_layers": layers} | _particular(family, layers) | options
    config = AutoConfig.for_model(family, **given)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attn_implementation)
    return shaken(model.eval())


@torch.no_grad()
def shaken(module: Any) -> Any:
    """Add noise to every parameter, so that none is zero or one."""
    for parameter in module.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.15)
    return module
