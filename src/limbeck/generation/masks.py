"""The masks of one new token over a cache with room for all: built in place of transformers', which look at numbers."""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel


class DecodingMasks:
    """Which of the cache's places a new token sees, in the form in which the model's attention takes it.

    Args:
        model: The model, with ``"sdpa"`` or ``"eager"`` attention.
        input_ids: (b, l), the prompt.
        attention_mask: (b, l), 1 at a token of the prompt, or None when all are.
        room: How many tokens there may be at most.

    Attributes:
        filled: (b, room) bool, which places hold a token.
    """

    def __init__(self, model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor | None, room: int):
        rows, length = input_ids.shape
        self.filled = torch.zeros(rows, room, dtype=torch.bool, device=input_ids.device)
        self.filled[:, :length] = True if attention_mask is None else attention_mask
        self.places = torch.arange(room, device=input_ids.device)
        self.additive = model.dtype if model.config._attn_implementation == "eager" else None
        # As transformers.masking_utils.create_masks_for_generate: by kind of layer, or one for all.
        self.kinds: list[str] | None = None
        config: Any = model.config
        if (kinds := getattr(config, "layer_types", None)) is not None:
            self.kinds = sorted(set(kinds))
        self.window: int | None = getattr(config, "sliding_window", None)

    def tensors(self) -> list[Tensor]:
        """What a token's work reads or changes."""
        return [self.filled, self.places]

    def add(self, position: Tensor) -> Any:
        """Fill the next place, and return what the model takes as its attention_mask.

        Args:
            position: () int64, the place.

        Returns:
            (b, 1, 1, room), or a dict of these by kind of layer.
        """
        self.filled.index_fill_(1, position.reshape(1), True)
        if self.kinds is None:
            return self._mask(position, self.window)
        windows = {kind: self.window if kind == "sliding_attention" else None for kind in self.kinds}
        return {kind: self._mask(position, window) for kind, window in windows.items()}

    def _mask(self, position: Tensor, window: int | None) -> Tensor:
        seen = self.filled if window is None else self.filled & (self.places > position - window)
        if self.additive is not None:
            least = torch.finfo(self.additive).min
            seen = torch.zeros(seen.shape, dtype=self.additive, device=seen.device).masked_fill(~seen, least)
        return seen[:, None, None]
