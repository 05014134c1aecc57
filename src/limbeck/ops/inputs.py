"""How operators prepare what they are given, before a kernel or a reference reads it."""

import torch.nn.functional as F
from torch import Tensor


def document_starts(seq_idx: Tensor) -> Tensor:
    """Where documents begin, except the first: (b, l) bool from document ids (b, l)."""
    return F.pad(seq_idx.diff(dim=1) != 0, (1, 0))


def rows_whole(tensor: Tensor) -> Tensor:
    """The tensor as it is where its last dimension is one piece of memory, else a copy."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def whole_or(tensor: Tensor | None, stand_in: Tensor) -> Tensor:
    """The tensor, contiguous; where there is none, something whose pointer the kernel will not follow."""
    return stand_in if tensor is None else tensor.contiguous()
