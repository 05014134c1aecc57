"""Checks that every operator's door makes, with one wording."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from limbeck.errors import LimbeckError

# Asked once: torch 2.11 cannot compile the question.
_WITH_AUTOCAST = {device for device in ("cpu", "cuda", "mps", "xpu") if torch.amp.is_autocast_available(device)}


def check_shapes(operator: str, tensors: Mapping[str, tuple[Tensor, str]]) -> dict[str, int]:
    """Check that all tensors fit one reading of the dimension letters.

    Args:
        operator: Whose name to put in the message.
        tensors: For each name, the tensor and its layout, such as ``"b l h p"``.

    Returns:
        The size of each letter.

    Raises:
        LimbeckError: When a tensor has another rank, a letter two sizes, or a size is 0.
    """
    sizes: dict[str, int] = {}
    for name, (tensor, layout) in tensors.items():
        letters = layout.split()
        fits = tensor.ndim == len(letters) and all(
            sizes.setdefault(letter, size) == size and size > 0
            for letter, size in zip(letters, tensor.shape, strict=True)
        )
        if not fits:
            known = ", ".join(str(sizes.get(letter, letter)) for letter in letters)
            raise LimbeckError(
                f"{operator} was given {name} of shape {tuple(tensor.shape)}",
                expected=f"({', '.join(letters)}) = ({known}), none of them 0",
            )
    return sizes


def check_seq_idx(operator: str, seq_idx: Tensor | None, batch: int, length: int) -> None:
    """Check the shape and type of document ids.

    Raises:
        LimbeckError: When they are not (batch, length) integers.
    """
    if seq_idx is None:
        return
    if tuple(seq_idx.shape) != (batch, length) or seq_idx.is_floating_point():
        raise LimbeckError(
            f"{operator} was given seq_idx of shape {tuple(seq_idx.shape)} in {seq_idx.dtype}",
            expected=f"integers of shape (b, l) = ({batch}, {length})",
        )


def check_mask(operator: str, mask: Tensor | None, shape: tuple[int, ...]) -> None:
    """Check the shape and type of a mask of tokens.

    Raises:
        LimbeckError: When it is not bool of that shape.
    """
    if mask is not None and (tuple(mask.shape) != shape or mask.dtype != torch.bool):
        raise LimbeckError(
            f"{operator} was given a mask of shape {tuple(mask.shape)} in {mask.dtype}",
            expected=f"bool of shape {shape}, True at a token",
        )


def wide_dtype(*tensors: Tensor | None) -> torch.dtype:
    """float64 when one of the tensors is, else float32: what operators compute in."""
    wide = any(tensor is not None and tensor.dtype == torch.float64 for tensor in tensors)
    return torch.float64 if wide else torch.float32


def without_autocast(tensor: Tensor) -> AbstractContextManager:
    """Switch autocast off on the tensor's device, so that float32 products stay float32."""
    device = tensor.device.type
    return torch.autocast(device, enabled=False) if device in _WITH_AUTOCAST else nullcontext()
