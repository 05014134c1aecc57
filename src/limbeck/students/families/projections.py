"""The projections of an attention layer, brought from a family's layout into the one layout of `AttentionWeights`."""

from typing import Any

from torch import Tensor

from limbeck.mixers import AttentionWeights
from limbeck.students.families.family import attention_shape


def _bias(linear: Any) -> Tensor | None:
    return None if linear.bias is None else linear.bias.detach()


def separate_projections(attention: Any, config: Any, *, output: str = "o_proj") -> AttentionWeights:
    """Read an attention with `q_proj`, `k_proj`, `v_proj` and an output projection.

    Args:
        attention: The attention module.
        config: Its configuration.
        output: Name of the output projection.
    """
    q, k, v, o = attention.q_proj, attention.k_proj, attention.v_proj, getattr(attention, output)
    return AttentionWeights(
        query=q.weight.detach(),
        key=k.weight.detach(),
        value=v.weight.detach(),
        output=o.weight.detach(),
        query_bias=_bias(q),
        key_bias=_bias(k),
        value_bias=_bias(v),
        output_bias=_bias(o),
        scale=attention.scaling,
        **attention_shape(config)._asdict(),
    )


def fused_projections(
    attention: Any, config: Any, weight: Tensor, bias: Tensor | None, output: Tensor, output_bias: Tensor | None
) -> AttentionWeights:
    """Split a projection whose rows are all of the queries, then all of the keys, then all of the values.

    Args:
        attention: The attention module, for its scale.
        config: Its configuration.
        weight: ((h + 2·g)·p, d), the fused projection.
        bias: ((h + 2·g)·p,) or None.
        output: (d, h·p), the output projection.
        output_bias: (d,) or None.
    """
    heads, kv_heads, width = shape = attention_shape(config)
    parts = [heads * width, kv_heads * width, kv_heads * width]
    query, key, value = weight.detach().split(parts)
    biases = (None, None, None) if bias is None else bias.detach().split(parts)
    return AttentionWeights(
        query=query,
        key=key,
        value=value,
        output=output.detach(),
        query_bias=biases[0],
        key_bias=biases[1],
        value_bias=biases[2],
        output_bias=None if output_bias is None else output_bias.detach(),
        scale=attention.scaling,
        **shape._asdict(),
    )


def phi_projections(attention: Any, config: Any) -> AttentionWeights:
    """Separate projections, the output's named `dense`."""
    return separate_projections(attention, config, output="dense")


def phi3_projections(attention: Any, config: Any) -> AttentionWeights:
    """One fused projection, part by part."""
    fused, output = attention.qkv_proj, attention.o_proj
    return fused_projections(attention, config, fused.weight, fused.bias, output.weight, output.bias)


def gpt_neox_projections(attention: Any, config: Any) -> AttentionWeights:
    """One fused projection, head by head: q, k and v of head 0, then of head 1."""
    fused, output = attention.query_key_value, attention.dense
    heads, _, width = attention_shape(config)

    def part_by_part(tensor: Tensor) -> Tensor:
        by_head = tensor.unflatten(0, (heads, 3, width))  # (h, 3, p, …)
        return by_head.transpose(0, 1).flatten(0, 2)  # (3·h·p, …)

    bias = None if fused.bias is None else part_by_part(fused.bias)
    return fused_projections(attention, config, part_by_part(fused.weight), bias, output.weight, output.bias)


def gpt2_projections(attention: Any, config: Any) -> AttentionWeights:
    """One fused projection, part by part; GPT-2 keeps its weights as (inputs, outputs)."""
    fused, output = attention.c_attn, attention.c_proj
    return fused_projections(attention, config, fused.weight.T, fused.bias, output.weight.T, output.bias)
