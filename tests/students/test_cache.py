"""Recurrent layers in a cache: rows move, sizes stay, and what cannot work is refused before any token is made."""

import copy
from functools import partial

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

from limbeck import LimbeckError
from limbeck.students import RecurrentLayer, StudentCache
from limbeck.students.families.family import CACHE


@torch.no_grad()
def test_rows_move(make_student, tokens):
    student = make_student("llama", (1,))
    cache = student(tokens, use_cache=True).past_key_values
    before = copy.deepcopy(cache)
    cache.batch_repeat_interleave(2)
    for old, new in zip(before.layers[0].state, cache.layers[0].state, strict=True):
        assert torch.equal(new, old[[0, 0, 1, 1]])
    cache.batch_select_indices(torch.tensor([0, 3]))
    assert torch.equal(cache.layers[0].state.recurrent, before.layers[0].state.recurrent)
    cache.reorder_cache(torch.tensor([1, 1]))
    assert torch.equal(cache.layers[0].state.recurrent, before.layers[0].state.recurrent[[1, 1]])
    assert torch.equal(cache.layers[1].keys, before.layers[1].keys[[1, 1]])


@torch.no_grad()
def test_a_copy_of_the_cache_is_a_point_to_go_back_to(make_student, family, keep, tokens):
    student = make_student(family, keep)
    cache = student(tokens[:, :8], use_cache=True).past_key_values
    point = copy.deepcopy(cache)
    first = student(tokens[:, 8:], past_key_values=cache).logits
    assert torch.equal(student(tokens[:, 8:], past_key_values=point).logits, first)


@torch.no_grad()
def test_a_cache_is_taken_under_both_its_names(make_student, family, keep, tokens):
    """Models call it `past_key_values` up to transformers 5.23 and `cache` from then on; dropped, the state is lost."""
    student = make_student(family, keep)
    for model in (student, student.base_model):
        whole = model(tokens)[0][:, 8:]
        for name in {CACHE, "past_key_values"}:
            cache = StudentCache(student.config)
            model(tokens[:, :8], **{name: cache})
            torch.testing.assert_close(model(tokens[:, 8:], **{name: cache})[0], whole, rtol=1e-5, atol=1e-5)
            assert cache.get_seq_length() == tokens.shape[1]


def test_the_state_does_not_grow(make_student, family):
    student = make_student(family)
    sizes = set()
    for length in (1, 3, 40):
        cache = student(torch.full((1, length), 5), use_cache=True).past_key_values
        assert cache.get_seq_length() == length
        sizes.add(sum(t.numel() for layer in cache.layers for t in layer.state))
    assert len(sizes) == 1


def test_reset_forgets(make_student, family, keep, tokens):
    student = make_student(family, keep)
    cache = StudentCache(student.config)
    first = student(tokens, past_key_values=cache).logits
    cache.reset()
    assert cache.get_seq_length() == 0
    assert torch.equal(student(tokens, past_key_values=cache).logits, first)


def test_cropping_is_refused_and_changes_nothing(make_student, tokens):
    student = make_student("gpt_neox", (0,))
    cache = student(tokens, use_cache=True).past_key_values
    with pytest.raises(LimbeckError, match="cannot be cropped"):
        cache.crop(-1)
    assert not cache.is_croppable
    assert cache.layers[0].get_seq_length() == cache.layers[1].get_seq_length() == 12
    with pytest.raises(LimbeckError, match="cannot be cropped"):
        RecurrentLayer().crop(-1)


def test_a_cache_without_recurrent_layers_is_an_ordinary_one(make_student, tokens):
    student = make_student("phi", (0, 1, 2))
    cache = student(tokens, past_key_values=StudentCache(student.config)).past_key_values
    cache.crop(-2)
    assert cache.get_seq_length() == 10
    output = student.generate(tokens, max_new_tokens=3, cache_implementation="static", disable_compile=True)
    assert output.shape == (2, 15)


@pytest.mark.parametrize(
    "options",
    [
        {"cache_implementation": "static"},
        {"cache_implementation": "quantized"},
        {"cache_implementation": "offloaded"},
        {"prompt_lookup_num_tokens": 2},
    ],
    ids=str,
)
def test_what_cannot_work_is_refused_first(make_student, family, tokens, options, monkeypatch):
    student = make_student(family, (1,))
    monkeypatch.setattr(type(student), "forward", lambda *a, **k: pytest.fail("a token was made"))
    with pytest.raises(LimbeckError, match="with a student"):
        student.generate(tokens[:1], max_new_tokens=3, **options)


def test_assisted_decoding_is_refused_in_both_roles(make_student, make_teacher, tokens):
    student, teacher = make_student("llama", (1,)), make_teacher("llama")
    for model, assistant in ((student, teacher), (teacher, student)):
        with pytest.raises(LimbeckError, match="assisted decoding"):
            model.generate(tokens[:1], max_new_tokens=3, assistant_model=assistant)


def test_continuous_batching_is_refused(make_student, tokens):
    with pytest.raises(LimbeckError, match="continuous batching"):
        make_student("llama").generate_batch(tokens.tolist(), progress_bar=False)


@pytest.mark.parametrize("how", ["forward", "generate"])
def test_foreign_caches_are_refused(make_student, tokens, how):
    student = make_student("llama", (1,))
    run = partial(student.generate, max_new_tokens=2) if how == "generate" else student
    for cache in (DynamicCache(), StaticCache(config=student.config, max_cache_len=32)):
        with pytest.raises(LimbeckError, match=type(cache).__name__):
            run(tokens, past_key_values=cache)


def test_streaming(make_student, tokens):
    class Streamer:
        def __init__(self):
            self.pieces = []

        def put(self, value):
            self.pieces.append(value.reshape(-1))

        def end(self):
            self.ended = True

    student, streamer = make_student("phi", (1,)), Streamer()
    output = student.generate(tokens[:1], max_new_tokens=5, eos_token_id=None, do_sample=False, streamer=streamer)
    assert torch.equal(torch.cat(streamer.pieces), output[0])
    assert streamer.ended


def test_use_cache_follows_the_configuration(make_student, tokens):
    student = make_student("llama", (1,))
    assert isinstance(student(tokens).past_key_values, StudentCache)
    assert student(tokens, use_cache=False).past_key_values is None
    student.config.use_cache = False
    assert student(tokens).past_key_values is None
    assert isinstance(AutoModelForCausalLM.from_config(student.config)(tokens, use_cache=True)[1], StudentCache)
