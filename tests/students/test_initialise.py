"""How mixers start, and what a start leaves alone."""

import pytest
import torch

from limbeck import LimbeckError
from limbeck.mixers import DiscreteMamba2
from limbeck.students.initialise import check_init, reset_mixer


def mixer(**options):
    return DiscreteMamba2(8, d_state=4, n_qk_heads=2, n_v_heads=2, **options)


def test_loaded_tensors_stay():
    one = mixer()
    for parameter in one.parameters():
        parameter.data.fill_(7)
    one.D._is_hf_initialized = True
    one.in_proj.weight._is_hf_initialized = True
    reset_mixer(one, "identity")
    assert one.D.eq(7).all()
    assert one.in_proj.weight.eq(7).all()
    assert one.conv1d.weight[..., :-1].eq(0).all()
    assert not one.out_proj.weight.eq(7).any()


@pytest.mark.parametrize(("init", "open_gate"), [("attention", True), ("identity", True), ("random", False)])
def test_starts(init, open_gate):
    one = mixer()
    reset_mixer(one, init)
    assert one.conv1d.weight[..., :-1].eq(0).all().item() is open_gate


def test_a_mixer_on_the_meta_device_is_left_alone():
    with torch.device("meta"):
        one = mixer()
    reset_mixer(one, "random")
    assert one.D.is_meta


def test_a_fully_loaded_mixer_draws_no_random_numbers():
    one = mixer()
    for parameter in one.parameters():
        parameter._is_hf_initialized = True
    state = torch.get_rng_state()
    reset_mixer(one, "random")
    assert torch.equal(torch.get_rng_state(), state)


def test_an_unknown_start():
    with pytest.raises(LimbeckError, match="did you mean 'identity'"):
        check_init("idenity", "discrete-mamba2")
