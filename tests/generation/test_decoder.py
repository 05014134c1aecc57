"""The decoder makes the tokens that Hugging Face's greedy `generate` makes: every family, whole, hybrid and teacher."""

from typing import Any

import pytest
import torch

import limbeck
from limbeck.generation import Decoder, Sampling, decodes
from limbeck.students import FAMILIES
from tiny import VOCABULARY, tiny_teacher

EOS, PAD = [5, 7], 2


def a_model(family: str, kept: tuple[int, ...] | None = (1,), **options: Any) -> Any:
    """A student that keeps attention in some layers, or the teacher."""
    teacher = tiny_teacher(family, **options)
    return teacher if kept is None else limbeck.convert(teacher, keep_attention=kept, init="random")


def padded_prompts() -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(8, VOCABULARY, (3, 9))
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    return ids, mask


def hugging_faces(model: Any, ids: torch.Tensor, mask: torch.Tensor, new: int) -> torch.Tensor:
    options = {"do_sample": False, "eos_token_id": EOS, "pad_token_id": PAD}
    return model.generate(ids, attention_mask=mask, max_new_tokens=new, **options)[:, ids.shape[1] :]


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_is_hugging_faces(family):
    """Past the windows of those that have some, and from where on calls are written down."""
    model, (ids, mask) = a_model(family), padded_prompts()
    decoder = Decoder(model, ids, mask, max_new_tokens=36, eos=EOS, pad=PAD)
    assert torch.equal(decoder.run(), hugging_faces(model, ids, mask, 36))
    assert decoder.tape is not None


@pytest.mark.slow
@pytest.mark.parametrize("new", [12, 36])
@pytest.mark.parametrize("kept", [(), (0, 2), None], ids=["whole", "hybrid", "teacher"])
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_is_hugging_faces_however_many_layers_were_swapped(family, kept, new):
    model, (ids, mask) = a_model(family, kept), padded_prompts()
    found = Decoder(model, ids, mask, max_new_tokens=new, eos=EOS, pad=PAD).run()
    assert torch.equal(found, hugging_faces(model, ids, mask, new))


@pytest.mark.parametrize("mixer", ["mamba2", "mamba"])
def test_other_mixers(mixer):
    model: Any = limbeck.convert(tiny_teacher("llama"), mixer=mixer, init="random", keep_attention=(2,))
    ids, mask = padded_prompts()
    found = Decoder(model, ids, mask, max_new_tokens=36, eos=EOS, pad=PAD).run()
    assert torch.equal(found, hugging_faces(model, ids, mask, 36))


def test_eager_attention():
    model, (ids, mask) = a_model("qwen2", attn_implementation="eager"), padded_prompts()
    found = Decoder(model, ids, mask, max_new_tokens=36, eos=EOS, pad=PAD).run()
    assert torch.equal(found, hugging_faces(model, ids, mask, 36))


def test_a_row_ends_at_its_end_and_all_when_all_have():
    model, (ids, mask) = a_model("phi"), padded_prompts()
    free = Decoder(model, ids, mask, max_new_tokens=12).run()
    eos = [int(free[0, 2]), int(free[1, 4]), int(free[2, 0])]
    ended = Decoder(model, ids, mask, max_new_tokens=12, eos=eos, pad=PAD).run()
    assert ended.shape[1] < 12
    for row, tokens in zip(free.tolist(), ended.tolist(), strict=True):
        end = next(place for place, token in enumerate(row) if token in eos) + 1
        assert tokens == row[:end] + [PAD] * (len(tokens) - end)


@pytest.mark.parametrize("new", [12, 40])
def test_tokens_come_one_by_one(new):
    model, (ids, mask) = a_model("gpt_neox"), padded_prompts()
    streamed = [token.clone() for token in Decoder(model, ids, mask, max_new_tokens=new).tokens()]
    assert torch.equal(torch.stack(streamed, 1), Decoder(model, ids, mask, max_new_tokens=new).run())


def test_it_runs_in_inference_mode_and_leaves_the_prompt_alone():
    model, (ids, mask) = a_model("llama"), padded_prompts()
    expected, given = Decoder(model, ids, mask, max_new_tokens=40).run(), ids.clone()
    with torch.inference_mode():
        assert torch.equal(Decoder(model, ids, mask, max_new_tokens=40).run(), expected)
    assert torch.equal(ids, given)


def test_rotary_embeddings_that_turn_with_the_length_are_not_written_down():
    scaling = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    model, (ids, mask) = a_model("llama", rope_parameters=scaling, max_position_embeddings=16), padded_prompts()
    decoder = Decoder(model, ids, mask, max_new_tokens=36, eos=EOS, pad=PAD)
    assert torch.equal(decoder.run(), hugging_faces(model, ids, mask, 36))
    assert decoder.tape is None


def test_padding_does_not_count_as_seen():
    model, (ids, mask) = a_model("phi"), padded_prompts()
    penalised = Sampling(repetition_penalty=3.0)
    alone = Decoder(model, ids[1:2, 4:], max_new_tokens=12, sampling=penalised).run()
    ids[1, :4] = int(alone[0, 0])  # what would be penalised, were it no padding
    together = Decoder(model, ids, mask, max_new_tokens=12, sampling=penalised).run()
    assert torch.equal(together[1:2], alone)


def test_what_it_takes():
    assert decodes(a_model("phi"))
    assert decodes(a_model("phi", None))
    assert not decodes(a_model("phi").to("meta"))
    model = a_model("phi")
    model.config._attn_implementation = "flex_attention"
    assert not decodes(model)
