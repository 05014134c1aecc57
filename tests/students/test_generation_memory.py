"""A student's state does not grow with the text; benchmarks/generate_memory.py measures long ones."""

import pytest
import torch

import limbeck
from limbeck.mixers import MixerState
from limbeck.students import StudentCache, blocks, cache_bytes
from tiny import tiny_teacher


def held(model, prompt, new_tokens):
    """Bytes of the cache after a generation."""
    ids = torch.randint(3, 61, (2, prompt))
    options = {"do_sample": False, "eos_token_id": None, "return_dict_in_generate": True}
    return cache_bytes(model.generate(ids, max_new_tokens=new_tokens, **options).past_key_values)


@pytest.mark.parametrize("family", ["gpt_neox", "llama", "gpt2"])
@pytest.mark.parametrize("mixer", ["discrete-mamba2", "mamba", "mamba2"])
def test_the_state_does_not_grow(family, mixer):
    student = limbeck.convert(tiny_teacher(family, max_position_embeddings=256), mixer=mixer, init="random")
    sizes = {held(student, *lengths) for lengths in ((4, 2), (4, 30), (4, 120), (30, 2), (120, 2), (1, 8))}
    assert len(sizes) == 1
    (layer, *_), cache = (
        StudentCache(student.config).layers,
        student(torch.ones(2, 9, dtype=torch.long)).past_key_values,
    )
    state = cache.layers[0].state
    assert layer.state is None
    assert state.recurrent.dtype == torch.float32
    assert sizes.pop() <= 3 * sum(tensor.nbytes for tensor in state) * 4 / 3  # at most k for k-1 inputs are kept alive


@pytest.mark.parametrize("family", ["gpt_neox", "llama", "gpt2"])
def test_a_teachers_cache_grows_and_a_hybrids_by_its_attention(family):
    teacher = tiny_teacher(family, max_position_embeddings=256)
    student = limbeck.convert(teacher, keep_attention=[1], init="random")
    growth = {name: held(model, 4, 42) - held(model, 4, 2) for name, model in (("t", teacher), ("s", student))}
    assert growth["t"] > 0
    assert growth["s"] * 3 == growth["t"]  # one layer of three


def test_a_state_that_keeps_its_inputs_alive_would_be_seen(monkeypatch):
    """cache_bytes counts what a view holds on to."""
    student = limbeck.convert(tiny_teacher("llama"), init="random")
    forward = type(limbeck.students.mixers(student)[0]).forward

    def leaking(self, hidden_states, *args, **kwargs):
        output, state = forward(self, hidden_states, *args, **kwargs)
        wide = torch.zeros(state.conv.shape[0], state.conv.shape[1], 3 + hidden_states.shape[1])
        return output, MixerState(wide[..., :3], state.recurrent)

    monkeypatch.setattr(type(limbeck.students.mixers(student)[0]), "forward", leaking)
    assert held(student, 20, 1) > held(student, 4, 1)


@pytest.mark.parametrize("family", ["gpt_neox", "llama", "gpt2", "stablelm"])
def test_no_mask_is_made_that_nobody_reads(family):
    """A padded prompt of l tokens would cost l × l for the attention of an all-swapped student."""
    seen = {}
    for name, keep_attention in (("all", ()), ("some", (1,))):
        student = limbeck.convert(tiny_teacher(family), keep_attention=keep_attention)
        for block in blocks(student):
            block.register_forward_pre_hook(
                lambda _, args, kwargs, name=name: seen.setdefault(name, []).extend(
                    value
                    for value in (*args, *kwargs.values())
                    if isinstance(value, torch.Tensor) and value.shape[-2:] == (12, 12)
                ),
                with_kwargs=True,
            )
        mask = torch.ones(2, 12, dtype=torch.long)
        mask[0, :5] = 0
        student(torch.ones(2, 12, dtype=torch.long), attention_mask=mask)
    assert not seen["all"]
    assert seen["some"]
