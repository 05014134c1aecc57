"""From logits to the next token, without a look at what comes out: so it can be part of a CUDA graph."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from limbeck.errors import LimbeckError


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: 0 takes the likeliest token every time; above that, tokens are drawn.
        top_k: Draw among so many likeliest tokens only; None or 0 for no limit.
        top_p: Draw among the likeliest tokens that together have this probability.
        min_p: Draw among tokens that are at least so likely, relative to the likeliest.
        repetition_penalty: Above 1, tokens that occurred become less likely.

    Raises:
        LimbeckError: When a value is out of range.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0

    def __post_init__(self):
        for name, fits, expected in (
            ("temperature", 0 <= self.temperature < math.inf, "0 (greedy) or more"),
            ("top_k", self.top_k is None or self.top_k >= 0, "1 or more, or 0 for no limit"),
            ("top_p", self.top_p is None or 0 < self.top_p <= 1, "above 0, at most 1"),
            ("min_p", self.min_p is None or 0 <= self.min_p <= 1, "between 0 and 1"),
            ("repetition_penalty", self.repetition_penalty > 0, "above 0; 1 changes nothing"),
        ):
            if not fits:
                raise LimbeckError(f"{name} is {getattr(self, name)}", expected=expected)


def choose(logits: Tensor, sampling: Sampling, seen: Tensor | None, generator: torch.Generator | None) -> Tensor:
    """Choose one token of each row.

    Args:
        logits: (b, v).
        sampling: How.
        seen: (b, v) bool, which tokens occurred; None where there is no repetition penalty.
        generator: What random numbers are drawn from; None for torch's own of the device.

    Returns:
        (b,) int64.
    """
    logits = logits.to(torch.float32)
    if seen is not None:
        penalty = sampling.repetition_penalty
        logits = torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)
    if sampling.temperature == 0:
        return logits.argmax(-1)
    logits, tokens = _candidates(logits / sampling.temperature, sampling)
    if sampling.top_p is not None and sampling.top_p < 1:  # sorted then
        probability = logits.softmax(-1)
        before = probability.cumsum(-1) - probability  # of all that are likelier
        keep = before < sampling.top_p
        keep[:, 0] = True  # rounding must not lose the first
        logits = logits.masked_fill(~keep, -math.inf)
    if sampling.min_p:
        least = logits.amax(-1, keepdim=True) + math.log(sampling.min_p)
        logits = logits.masked_fill(logits < least, -math.inf)
    # The largest of logit + Gumbel noise is a draw from the softmax; −log of an exponential is such noise.
    noise = torch.empty_like(logits).exponential_(generator=generator).log_()
    chosen = (logits - noise).argmax(-1)  # (b,)
    return chosen if tokens is None else tokens.gather(1, chosen[:, None])[:, 0]


def _candidates(logits: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor | None]:
    """The logits that can be drawn, likeliest first where that matters, and the tokens that they belong to."""
    if sampling.top_k:
        return logits.topk(min(sampling.top_k, logits.shape[-1]), dim=-1)
    if sampling.top_p is not None and sampling.top_p < 1:
        return logits.sort(dim=-1, descending=True)
    return logits, None
