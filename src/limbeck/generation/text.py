"""Text from a model, teacher or student, in one call."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation import BaseStreamer

from limbeck.errors import LimbeckError
from limbeck.generation.decoder import Decoder, decodes
from limbeck.generation.sampling import Sampling


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
    streamer: BaseStreamer | None = None,
) -> list[str]:
    """Continue prompts, all in one batch.

    Students and teachers of the known families go through `Decoder`; all other models through their own `generate`.
    For beams, stopping criteria and the rest call `model.generate`, which students keep in full.

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
        streamer: Is given the prompts' tokens, then every new one as it is made, as `model.generate` gives them:
            ``TextStreamer(tokenizer, skip_prompt=True)`` of transformers prints one prompt's text as it comes.

    Returns:
        The continuations, without the prompts.

    Raises:
        LimbeckError: When a value is out of range, a prompt has no token, or several prompts are to be streamed.
    """
    if isinstance(prompts, str):
        raise LimbeckError("prompts is one string", expected="a list of strings", hint="[prompt]")
    if max_new_tokens < 1:
        raise LimbeckError(f"max_new_tokens is {max_new_tokens}", expected="1 or more")
    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
    if not prompts:
        return []
    if streamer is not None and len(prompts) > 1:
        raise LimbeckError(f"{len(prompts)} prompts and a streamer", expected="one prompt: their tokens come in turn")
    pad = _pad_token(model, tokenizer)
    input_ids, attention_mask = _left_padded([_encode(tokenizer, prompt) for prompt in prompts], pad)
    order = _Order(
        input_ids.to(model.device),
        attention_mask.to(model.device),
        max_new_tokens,
        sampling,
        eos=_own(model, "eos_token_id"),
        pad=pad,
        seed=seed,
        streamer=streamer,
    )
    output = _decode(model, order) if decodes(model) else _stock_generate(model, order)
    return tokenizer.batch_decode(output, skip_special_tokens=True)


@dataclass(frozen=True)
class _Order:
    """What is to be generated, in tokens."""

    input_ids: Tensor
    attention_mask: Tensor
    max_new_tokens: int
    sampling: Sampling
    eos: int | list[int] | None
    pad: int
    seed: int | None
    streamer: BaseStreamer | None


def _decode(model: PreTrainedModel, order: _Order) -> Tensor:
    """The new tokens, (b, n)."""
    decoder = Decoder(
        model,
        order.input_ids,
        order.attention_mask,
        max_new_tokens=order.max_new_tokens,
        sampling=order.sampling,
        eos=[order.eos] if isinstance(order.eos, int) else order.eos or [],
        pad=order.pad,
        generator=None if order.seed is None else torch.Generator(model.device).manual_seed(order.seed),
    )
    if order.streamer is None:
        return decoder.run()
    order.streamer.put(order.input_ids.cpu())
    for token in decoder.tokens():
        order.streamer.put(token.cpu())
        if bool(decoder.finished.all()):
            break
    order.streamer.end()
    return decoder.output[:, : int(decoder.made)]


def _stock_generate(model: PreTrainedModel, order: _Order) -> Tensor:
    """The same from the model's own `generate`."""
    sampling = order.sampling
    settings = GenerationConfig(
        max_new_tokens=order.max_new_tokens,
        do_sample=sampling.temperature > 0,
        repetition_penalty=sampling.repetition_penalty,
        pad_token_id=order.pad,
        bos_token_id=model.config.bos_token_id,
        eos_token_id=order.eos,
        num_beams=1,
        # Every knob is set, so that none is taken from the checkpoint's generation_config.json.
        temperature=sampling.temperature or 1.0,
        top_k=sampling.top_k or 0,
        top_p=1.0 if sampling.top_p is None else sampling.top_p,
        min_p=sampling.min_p,
    )
    with ExitStack() as stack:
        if order.seed is not None:
            devices = [model.device] if model.device.type == "cuda" else []
            stack.enter_context(torch.random.fork_rng(devices=devices))
            torch.manual_seed(order.seed)
        generating: Any = model
        output: Tensor = generating.generate(
            order.input_ids,
            attention_mask=order.attention_mask,
            generation_config=settings,
            streamer=order.streamer,
        )
    return output[:, order.input_ids.shape[1] :]


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
