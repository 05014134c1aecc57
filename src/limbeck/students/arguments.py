"""What a student's backbone is called with, made ready for its mixers: cache, padding mask, packed documents."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from limbeck.errors import LimbeckError
from limbeck.students.cache import FixedCache, StudentCache, check_cache
from limbeck.students.families.family import CACHE

PADDING = "limbeck_padding_mask"
"""The keyword under which the padding mask travels to the mixers; attention layers that stay ignore it."""


def padding_keyword(attention_mask: Tensor | None) -> dict[str, Tensor]:
    """What to add to the keyword arguments of a block that is called by itself, so that its mixer sees the padding.

    Args:
        attention_mask: (b, l), 1 at a token, or None.
    """
    return {} if attention_mask is None else {PADDING: attention_mask}


def carry(
    carrier: str, _block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Forward pre-hook of a swapped block that drops unknown keyword arguments: put ours in place of a known one.

    They stay arguments of the call, so that a recomputed or compiled block sees those of its own call.

    Args:
        carrier: `Family.carrier`, the name of the argument whose place they take, as a dict.
        args: What the block was called with.
        kwargs: What the block was called with, by name.

    Returns:
        What the block is called with.
    """
    ours = {name: kwargs[name] for name in (PADDING, "seq_idx") if name in kwargs}
    return args, {**kwargs, carrier: ours} if ours else kwargs


def with_mixer_arguments(model: PreTrainedModel, arguments: dict[str, Any]) -> dict[str, Any]:
    """Add what the mixers need to the arguments of a backbone's forward.

    Args:
        model: The student's backbone.
        arguments: All arguments by name; changed in place.

    Returns:
        The arguments.

    Raises:
        LimbeckError: For a cache, a mask or a combination that cannot work.
    """
    if CACHE not in arguments and "past_key_values" in arguments:  # its name up to transformers 5.23
        arguments[CACHE] = arguments.pop("past_key_values")
    inputs = arguments.get("input_ids")
    inputs = arguments.get("inputs_embeds") if inputs is None else inputs
    if inputs is None:
        return arguments  # the teacher's own error is the right one
    if model.training and getattr(model, "gradient_checkpointing", False):
        arguments["use_cache"] = False
    elif arguments.get("use_cache") is None:
        arguments["use_cache"] = model.config.use_cache
    _add_documents(arguments, inputs)
    if arguments.get(CACHE) is not None:
        check_cache(arguments[CACHE])
    elif arguments["use_cache"]:
        arguments[CACHE] = StudentCache(model.config)
    if (mask := arguments.get("attention_mask")) is not None:
        if not isinstance(arguments.get(CACHE), FixedCache):  # which takes no padding, and whose mask is as long as it
            arguments[PADDING] = token_columns(mask, inputs.shape[1]).to(inputs.device)
        if len(model.config.swapped_layers) == model.config.num_hidden_layers:
            arguments["attention_mask"] = None  # nobody is left to read the (l, past + l) mask that it would become
    return arguments


def _add_documents(arguments: dict[str, Any], inputs: Tensor) -> None:
    """Packed documents: mixers know them by seq_idx, kept attention by position_ids that start over."""
    seq_idx, positions = arguments.get("seq_idx"), arguments.get("position_ids")
    mask, cache = arguments.get("attention_mask"), arguments.get(CACHE)
    if seq_idx is None:
        if positions is None or mask is not None or cache is not None or arguments["use_cache"]:
            return
        starts = positions.expand(inputs.shape[0], -1).diff(dim=-1) != 1  # attention reads them the same way
        if torch.compiler.is_compiling() or bool(starts.any()):
            arguments["seq_idx"] = nn.functional.pad(starts.long(), (1, 0)).cumsum(-1)
        return
    if cache is not None or (mask is not None and not bool(mask.all())):
        raise LimbeckError(
            f"seq_idx together with {'a cache' if cache is not None else 'padding'}",
            expected="packed documents without a cache and without padding",
            hint="fill the sample with one more document, or give each document a row",
        )
    arguments |= {"attention_mask": None, "use_cache": False}
    if positions is None:
        arguments["position_ids"] = positions_in_documents(seq_idx)


def positions_in_documents(seq_idx: Tensor) -> Tensor:
    """Positions that start over with every document.

    Args:
        seq_idx: (b, l) integer, non-decreasing document ids.

    Returns:
        (b, l) int64.
    """
    steps = torch.arange(seq_idx.shape[1], device=seq_idx.device).expand_as(seq_idx)
    starts = nn.functional.pad(seq_idx.diff(dim=-1) != 0, (1, 0), value=True)
    return steps - torch.where(starts, steps, 0).cummax(-1).values


def token_columns(attention_mask: Tensor, length: int) -> Tensor:
    """Cut a padding mask to the tokens of this call.

    Args:
        attention_mask: (b, past + l) or (b, l), 1 at a token.
        length: l.

    Returns:
        (b, l).

    Raises:
        LimbeckError: When the mask is not two-dimensional, or too short.
    """
    if not isinstance(attention_mask, torch.Tensor) or attention_mask.ndim != 2 or attention_mask.shape[1] < length:
        found = getattr(attention_mask, "shape", type(attention_mask).__name__)
        raise LimbeckError(
            f"a student was given an attention_mask of {tuple(found) if isinstance(found, tuple) else found}",
            expected=f"a padding mask of shape (batch, past + {length}): 1 at a token, 0 at padding",
            hint="for packed documents pass seq_idx instead of a 4-D mask",
        )
    return attention_mask[:, attention_mask.shape[1] - length :]
