"""Students with Mamba and Mamba-2 mixers: start, cache, padding, saving. (The laws of mixers: tests/mixers.)"""

import pytest
import torch
from transformers import AutoModelForCausalLM

import limbeck
from limbeck.errors import LimbeckError
from limbeck.students import StudentCache, mixers

CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(params=["mamba", "mamba2"])
def mixer(request):
    return request.param


@pytest.fixture
def student(mixer, teacher_folder):
    """A hybrid whose mixer is strong enough to show in the logits."""
    student = limbeck.convert(teacher_folder, mixer=mixer, init="random", keep_attention=[0]).eval()
    with torch.no_grad():
        for parameter in mixers(student)[1].parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return student


@torch.no_grad()
def test_prefill_chunk_and_steps_are_the_whole(student):
    ids = torch.randint(0, 288, (2, 14))
    whole, cache, parts = student(ids).logits, StudentCache(student.config), []
    for piece in ids.split([6, 5, 1, 1, 1], dim=1):
        parts.append(student(piece, past_key_values=cache).logits)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, **CLOSE)
    assert not torch.allclose(student(ids[:, 1:]).logits[:, -1], whole[:, -1], **CLOSE)


@torch.no_grad()
def test_generate_is_what_uncached_forward_gives(student):
    ids = torch.randint(0, 288, (2, 5))
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    for beams in (1, 3):
        cached, uncached = (student.generate(ids, num_beams=beams, use_cache=on, **options) for on in (True, False))
        assert torch.equal(cached, uncached)


@torch.no_grad()
def test_left_padding_leaves_no_trace(student):
    ids = torch.randint(0, 288, (2, 9))
    padding = torch.zeros(2, 3, dtype=torch.long)
    mask = torch.cat([padding, torch.ones_like(ids)], dim=1)
    padded = student(torch.cat([padding, ids], dim=1), attention_mask=mask).logits
    torch.testing.assert_close(padded[:, 3:], student(ids).logits, **CLOSE)


def test_saved_is_loaded_bit_for_bit(student, tmp_path):
    student.to(torch.bfloat16).save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    for name, tensor in student.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    wide = {f"mixer.{name}" for name in type(mixers(student)[1]).float32_parameters}
    found = {name.split("attention.")[1] for name, t in loaded.state_dict().items() if t.dtype == torch.float32}
    assert found == wide


def test_a_start_without_a_teacher_is_the_mixers_own(mixer, teacher_folder):
    """Not the family's normal(0.02): transformers' initialisation must leave the mixer's parts alone."""
    config = limbeck.student_config(limbeck.load_model(teacher_folder).config, mixer, init="random")
    for student in (
        AutoModelForCausalLM.from_config(config),
        AutoModelForCausalLM.from_pretrained(teacher_folder, config=config),
    ):
        for found in mixers(student).values():
            assert (found.D == 1).all()
            assert 0.98 * 32**-0.5 < found.in_proj.weight.abs().max() <= 32**-0.5
            assert (found.A_log.exp() <= 16.001).all()
            assert (found.A_log.exp() >= 0.999).all()


def test_attention_is_no_start(mixer, teacher_folder):
    teacher = limbeck.load_model(teacher_folder)
    with pytest.raises(LimbeckError, match="cannot start from attention"):
        limbeck.convert(teacher, mixer=mixer)
