"""Arithmetic of operations: torch's own count where it has one, and that of attention and of Limbeck's kernels.

A multiplication and an addition are two operations. What is elementwise has none: it is memory that it costs.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch.utils.flop_counter import flop_registry

SSD_CHUNK = 64
"""Tokens within which `ssd` multiplies tokens with tokens."""


def flops_of(name: str, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> float:
    """Floating-point operations of one call.

    Args:
        name: The operation's, such as ``aten::mm``.
        func: The operation.
        args: What it is called with.
        kwargs: The same by name.
        out: What it returns.
    """
    if name in _FLOPS:
        return _FLOPS[name](args)
    counted = flop_registry.get(func._overloadpacket)
    return 0.0 if counted is None else float(counted(*args, **kwargs, out_val=out))


def workspace_of(name: str, args: Sequence[Any]) -> int:
    """Bytes that a kernel of Limbeck's holds while it runs, beside what it is given and what it returns."""
    if name != "limbeck::linear_kl_triton":
        return 0
    from limbeck.ops.linear_kl_triton import chunk_of

    states, weight, _, teacher_states, *_, dtype, _, wanted = args
    logits = min(chunk_of(len(states), len(weight)), len(states)) * len(weight)
    gradient = dtype.itemsize if any(wanted) and dtype.itemsize < 4 else 0
    return logits * (4 + 4 * (teacher_states is not None) + gradient)


def _attention(args: Sequence[Any], products: int) -> float:
    """Half of `products` products of (l, l, p): a token attends to those before it."""
    (b, h, l, p), keys = args[0].shape, args[1].shape[2]
    return float(products * b * h * l * keys * p)


def _ssd(x: Any, B: Any, products: float) -> float:
    """Chunks against themselves, B into the state and C out of it."""
    (b, l, h, p), n = x.shape, B.shape[-1]
    return products * b * l * h * (SSD_CHUNK * (n + p) + 4 * n * p)


def _scan(x: Any, A: Any, operations: float) -> float:
    """So many operations for each entry of each channel's state."""
    return operations * x.numel() * A.shape[-1]


def _distance(args: Sequence[Any]) -> float:
    """For each pair of tokens: queries with keys twice, C with B, and both gradients."""
    query, B = args[0], args[3]
    (b, h, l, p), n = query.shape, B.shape[-1]
    return float(b * h * l * l * (2 * p + 3 * n))


def _head(args: Sequence[Any]) -> float:
    """Logits of student and teacher, and the two gradients that are wanted."""
    states, weight, _, teacher_states, teacher_weight, *_, wanted = args
    student = 2.0 * len(states) * weight.numel() * (1 + sum(wanted[:2]))
    return student + (0.0 if teacher_states is None else 2.0 * len(states) * teacher_weight.numel())


_FLOPS: Mapping[str, Callable[[Sequence[Any]], float]] = {
    "aten::_scaled_dot_product_flash_attention_for_cpu": lambda args: _attention(args, 2),
    "aten::_scaled_dot_product_flash_attention_for_cpu_backward": lambda args: _attention(args[1:], 5),
    "limbeck::ssd_triton": lambda args: _ssd(args[0], args[2], 1.0),
    "limbeck::ssd_triton_backward": lambda args: _ssd(args[2], args[4], 2.5),
    "limbeck::selective_scan_triton": lambda args: _scan(args[0], args[2], 7.0),
    "limbeck::selective_scan_triton_backward": lambda args: _scan(args[2], args[4], 20.0),
    "limbeck::matrix_distance_triton": _distance,
    "limbeck::linear_kl_triton": _head,
}
