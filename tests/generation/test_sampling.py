"""Drawing one token: from the distribution that transformers' own processors leave."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from limbeck import LimbeckError
from limbeck.generation import Sampling
from limbeck.generation.sampling import choose

DRAWS, V = 40_000, 12


def theirs(logits: torch.Tensor, sampling: Sampling, seen: torch.Tensor) -> torch.Tensor:
    """The probabilities, (v,), after transformers' processors."""
    tiny = LlamaConfig(vocab_size=V, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    settings = GenerationConfig(
        do_sample=True,
        temperature=sampling.temperature,
        top_k=sampling.top_k or 0,
        top_p=sampling.top_p or 1.0,
        min_p=sampling.min_p,
        repetition_penalty=sampling.repetition_penalty,
    )
    model: Any = LlamaForCausalLM(tiny)
    processors = model._get_logits_processor(settings, input_ids_seq_length=3)
    ids = seen.nonzero()[:, 0][None]
    return processors(ids, logits[None]).softmax(-1)[0]


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(1.0),
        Sampling(0.6, top_k=5),
        Sampling(1.4, top_p=0.7),
        Sampling(1.1, min_p=0.2, repetition_penalty=1.7),
        Sampling(0.9, top_k=6, top_p=0.8, min_p=0.1, repetition_penalty=0.8),
    ],
    ids=str,
)
def test_frequencies_are_transformers_probabilities(sampling):
    logits, seen = 2 * torch.randn(V), torch.rand(V) < 0.4
    penalised = seen.expand(DRAWS, V) if sampling.repetition_penalty != 1 else None
    drawn = choose(logits.expand(DRAWS, V), sampling, penalised, torch.Generator().manual_seed(0))
    frequencies = torch.bincount(drawn, minlength=V) / DRAWS
    expected = theirs(logits, sampling, seen)
    assert (frequencies[expected == 0] == 0).all()
    torch.testing.assert_close(frequencies, expected, rtol=0, atol=4 * 0.5 / DRAWS**0.5)


@given(st.integers(0, 2**31), st.sampled_from([{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}]))
def test_narrowed_to_one_it_is_the_likeliest(seed, narrow):
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(seed))
    drawn = choose(logits, Sampling(1.0, **narrow), None, None)
    assert torch.equal(drawn, choose(logits, Sampling(), None, None))
    assert torch.equal(drawn, logits.argmax(-1))


@pytest.mark.parametrize("value", [{"temperature": -1.0}, {"top_k": -2}, {"top_p": 0.0}, {"min_p": 2.0}], ids=str)
def test_values_out_of_range_are_refused(value):
    with pytest.raises(LimbeckError, match=next(iter(value))):
        Sampling(**value)
