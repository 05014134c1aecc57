"""Text from a model, teacher or student, in one call."""

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from limbeck.errors import LimbeckError


def generate(
    model: PreTrainedModel,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    seed: int | None = None,
) -> list[str]:
    """Continue prompts, all in one batch.

    For beams, streaming, stopping criteria and the rest call `model.generate`, which students keep in full.

    Args:
        model: A causal language model.
        tokenizer: The model's tokenizer; it needs no padding token.
        prompts: One text or more, of any lengths.
        max_new_tokens: How many tokens to add at most; a text also ends at the model's end-of-text token.
        temperature: 0 takes the likeliest token every time; above that, tokens are drawn.
        top_k: Draw among so many likeliest tokens only.
        top_p: Draw among the likeliest tokens that together have this probability.
        min_p: Draw among tokens that are at least so likely, relative to the likeliest.
        repetition_penalty: Above 1, tokens that occurred become less likely.
        seed: Makes drawing repeatable; the global random state is left as it was. None draws on from that.

    Returns:
        The continuations, without the prompts.

    Raises:
        LimbeckError: When a value is out of range, or a prompt has no token.
    """
    if isinstance(prompts, str):
        raise LimbeckError("prompts is one string", expected="a list of strings", hint="[prompt]")
    _check_ranges(max_new_tokens, temperature, top_k, top_p, min_p, repetition_penalty)
    if not prompts:
        return []
    pad = _pad_token(model, tokenizer)
    input_ids, attention_mask = _left_padded([_encode(tokenizer, prompt) for prompt in prompts], pad)
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=temperature > 0,
        repetition_penalty=repetition_penalty,
        pad_token_id=pad,
        bos_token_id=model.config.bos_token_id,
        eos_token_id=_own(model, "eos_token_id"),
        num_beams=1,
        # Every knob is set, so that none is taken from the checkpoint's generation_config.json.
        temperature=temperature if temperature > 0 else 1.0,
        top_k=top_k or 0,
        top_p=1.0 if top_p is None else top_p,
        min_p=min_p,
    )
    with ExitStack() as stack:
        if seed is not None:
            devices = [model.device] if model.device.type == "cuda" else []
            stack.enter_context(torch.random.fork_rng(devices=devices))
            torch.manual_seed(seed)
        generating: Any = model
        output: Tensor = generating.generate(
            input_ids.to(model.device), attention_mask=attention_mask.to(model.device), generation_config=settings
        )
    return tokenizer.batch_decode(output[:, input_ids.shape[1] :], skip_special_tokens=True)


def _check_ranges(
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    min_p: float | None,
    repetition_penalty: float,
) -> None:
    for name, value, fits, expected in (
        ("max_new_tokens", max_new_tokens, max_new_tokens >= 1, "1 or more"),
        ("temperature", temperature, 0 <= temperature < float("inf"), "0 (greedy) or more"),
        ("top_k", top_k, top_k is None or top_k >= 0, "1 or more, or 0 for no limit"),
        ("top_p", top_p, top_p is None or 0 < top_p <= 1, "above 0, at most 1"),
        ("min_p", min_p, min_p is None or 0 <= min_p <= 1, "between 0 and 1"),
        ("repetition_penalty", repetition_penalty, repetition_penalty > 0, "above 0; 1 changes nothing"),
    ):
        if not fits:
            raise LimbeckError(f"{name} is {value}", expected=expected)


def _own(model: PreTrainedModel, name: str) -> Any:
    """A token id from the model's generation settings, or else from its configuration."""
    value = getattr(model.generation_config, name, None)
    return getattr(model.config, name, None) if value is None else value


def _pad_token(model: PreTrainedModel, tokenizer: Any) -> int:
    """Any token will do, since the mask hides it."""
    eos = _own(model, "eos_token_id")
    for found in (tokenizer.pad_token_id, _own(model, "pad_token_id"), eos[0] if isinstance(eos, list) else eos):
        if found is not None:
            return found
    return 0


def _encode(tokenizer: Any, prompt: str) -> list[int]:
    ids = tokenizer(prompt)["input_ids"]
    if not ids and tokenizer.bos_token_id is not None:
        ids = [tokenizer.bos_token_id]
    if not ids:
        raise LimbeckError(f"the prompt {prompt!r} has no token", expected="a prompt with at least one token")
    return ids


def _left_padded(rows: list[list[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Token rows as input_ids and attention_mask, (b, l) int64 each, with the padding in front."""
    length = max(map(len, rows))
    input_ids = torch.tensor([[pad] * (length - len(row)) + row for row in rows])
    attention_mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
    return input_ids, attention_mask
