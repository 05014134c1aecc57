"""Mamba and Mamba-2 against transformers' own mixers with the same weights; their starts; what they refuse."""

import copy
import inspect
import math

import pytest
import torch
from transformers import DynamicCache, Mamba2Config, MambaConfig
from transformers.models.mamba.modeling_mamba import MambaMixer
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer, MambaRMSNormGated

from limbeck.errors import LimbeckError
from limbeck.mixers import AttentionWeights, Mamba, Mamba2
from limbeck.testing import check_mixer

FORWARD = {"rtol": 1e-5, "atol": 1e-5}
GRADIENT = {"rtol": 1e-4, "atol": 1e-4}
WIDTH = 24


def make_mamba(bias=False, d_inner=40):
    config = MambaConfig(
        hidden_size=WIDTH, state_size=5, num_hidden_layers=1, time_step_rank=3, use_bias=bias, use_conv_bias=True
    )
    config.intermediate_size = d_inner
    return config, MambaMixer(config, 0), Mamba(WIDTH, d_inner=d_inner, d_state=5, dt_rank=3, bias=bias)


GROUPS = 2 if "group_size" in inspect.signature(MambaRMSNormGated).parameters else 1
"""Older releases of transformers normalise over all groups of heads at once, unlike the models' authors."""


def make_mamba2(bias=False, groups=GROUPS):
    config = Mamba2Config(
        hidden_size=WIDTH, state_size=5, num_hidden_layers=1, num_heads=6, head_dim=8, n_groups=groups, use_bias=bias
    )
    return config, Mamba2Mixer(config, 0), Mamba2(WIDTH, d_state=5, headdim=8, ngroups=groups, bias=bias)


CASES = {
    "mamba": make_mamba,
    "mamba with biases": lambda: make_mamba(bias=True, d_inner=48),
    "mamba2": make_mamba2,
    "mamba2 with biases": lambda: make_mamba2(bias=True, groups=1),
}


@pytest.fixture(params=list(CASES))
def pair(request):
    """A configuration, transformers' mixer, and ours with the same strong weights."""
    config, theirs, ours = CASES[request.param]()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    ours.load_state_dict(theirs.state_dict())  # strict: the names are the same
    return config, theirs, ours


def test_names_and_layouts_are_those_of_transformers(pair):
    _, theirs, ours = pair
    assert {name: p.shape for name, p in theirs.named_parameters()} == {n: p.shape for n, p in ours.named_parameters()}


@pytest.mark.parametrize("length", [1, 3, 63])
def test_forward_and_gradients_are_those_of_transformers(pair, length):
    _, theirs, ours = pair
    inputs = torch.randn(2, length, WIDTH, requires_grad=True)
    found, expected = ours(inputs), theirs(inputs)
    torch.testing.assert_close(found, expected, **FORWARD)
    weight = torch.randn_like(found)
    found_gradients = torch.autograd.grad(found, [inputs, *ours.parameters()], weight)
    names = [name for name, _ in ours.named_parameters()]
    theirs_by_name = dict(theirs.named_parameters())
    expected_gradients = torch.autograd.grad(expected, [inputs, *(theirs_by_name[name] for name in names)], weight)
    for name, got, wanted in zip(["inputs", *names], found_gradients, expected_gradients, strict=True):
        torch.testing.assert_close(got, wanted, **GRADIENT, msg=lambda text, name=name: f"{name}: {text}")


def states_of(cache):
    layer = cache.layers[0]
    found = (layer.conv_states, layer.recurrent_states)
    return [state[0] if isinstance(state, dict) else state for state in found]


@torch.no_grad()
def test_state_and_steps_are_those_of_transformers(pair):
    config, theirs, ours = pair
    inputs = torch.randn(2, 11 + 32, WIDTH)
    cache = DynamicCache(config=config)
    cache_keyword = "cache" if "cache" in inspect.signature(theirs.forward).parameters else "cache_params"
    expected = theirs(inputs[:, :11], **{cache_keyword: cache})
    found, state = ours(inputs[:, :11], return_state=True)
    torch.testing.assert_close(found, expected, **FORWARD)
    for t in range(11, 11 + 32):
        conv, recurrent = states_of(cache)
        torch.testing.assert_close(state.conv, conv[..., 1:], **FORWARD)
        torch.testing.assert_close(state.recurrent, recurrent, **FORWARD)
        expected = theirs(inputs[:, t : t + 1], **{cache_keyword: cache})
        found, state = ours.step(inputs[:, t], state)
        torch.testing.assert_close(found, expected[:, 0], **FORWARD)


@torch.no_grad()
def test_left_padding_is_that_of_transformers():
    for make in (make_mamba, make_mamba2):  # without biases: theirs let the bias of in_proj leak from padding
        _, theirs, ours = make()
        ours.load_state_dict(theirs.state_dict())
        inputs = torch.randn(2, 9, WIDTH)
        mask = (torch.arange(9) >= torch.tensor([[0], [4]])).long()
        found, expected = ours(inputs, mask), theirs(inputs, attention_mask=mask)
        torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], **FORWARD)
        torch.testing.assert_close(found[1, 4:], ours(inputs[1:, 4:])[0], **FORWARD)


@pytest.mark.parametrize(
    "options",
    [{}, {"d_inner": 24, "d_state": 3, "bias": True}, {"conv_bias": False, "d_conv": 1, "dt_rank": 5}],
    ids=str,
)
def test_mamba_keeps_every_law(options):
    check_mixer(Mamba, **options)


@pytest.mark.parametrize(
    "options",
    [{}, {"d_state": 5, "headdim": 4, "ngroups": 2, "bias": True}, {"conv_bias": False, "d_conv": 1, "expand": 1}],
    ids=str,
)
def test_mamba2_keeps_every_law(options):
    check_mixer(Mamba2, **options)


@pytest.mark.slow
@pytest.mark.parametrize("mixer", [Mamba(32), Mamba2(32)], ids=["mamba", "mamba2"])
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own tracing does
def test_compiles_without_a_graph_break(mixer):
    mixer, inputs = copy.deepcopy(mixer).double(), torch.randn(2, 40, 32, dtype=torch.float64)
    compiled = torch.compile(mixer, fullgraph=True, backend="aot_eager")
    out, expected = compiled(inputs), mixer(inputs)
    torch.testing.assert_close(out, expected)
    learned = list(mixer.parameters())
    torch.testing.assert_close(
        torch.autograd.grad(out.square().sum(), learned), torch.autograd.grad(expected.square().sum(), learned)
    )


# --- starts -----------------------------------------------------------------------------------------------------------


def test_mamba_starts_the_standard_way():
    mixer = Mamba(256, dt_rank=20)
    mixer.reset_parameters("random")
    assert (mixer.d_inner, Mamba(40).dt_rank) == (512, 3)
    assert torch.equal(mixer.A_log, torch.arange(1, 17).log().expand(512, 16))
    assert (mixer.D == 1).all()
    delta = torch.nn.functional.softplus(mixer.dt_proj.bias)
    check_log_uniform(delta)
    assert 0.9 * 20**-0.5 < mixer.dt_proj.weight.abs().max() <= 20**-0.5
    for linear in (mixer.in_proj, mixer.x_proj, mixer.out_proj):  # torch's default: uniform on ± 1/√(width of input)
        bound = linear.in_features**-0.5
        assert 0.99 * bound < linear.weight.abs().max() <= bound
    assert mixer.conv1d.weight.std() > 0


def test_mamba2_starts_the_standard_way():
    mixer = Mamba2(1024, headdim=4)
    mixer.reset_parameters("random")
    assert (mixer.D == 1).all()
    assert (mixer.norm.weight == 1).all()
    check_log_uniform(torch.nn.functional.softplus(mixer.dt_bias))
    A = mixer.A_log.exp()
    assert 1 <= A.min() < 1.2 < 15 < A.max() <= 16.001
    assert abs(A.mean() - 8.5) < 1


def test_starts_are_wide_in_a_narrow_default():
    torch.set_default_dtype(torch.bfloat16)
    try:
        mixer = Mamba(32)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(mixer.A_log, torch.arange(1, 17, dtype=torch.float32).log().expand(64, 16))
    assert mixer.in_proj.weight.dtype == torch.bfloat16


def check_log_uniform(delta):
    assert 1e-3 * 0.999 <= delta.min() < 1.1e-3
    assert 0.09 < delta.max() <= 0.1001
    assert abs(delta.log().mean() - math.log(1e-2)) < 0.2


@pytest.mark.parametrize("cls", [Mamba, Mamba2])
def test_identity_start_has_an_identity_convolution(cls):
    mixer = cls(64)
    mixer.reset_parameters("identity")
    taps = mixer.conv1d.weight.squeeze(1)
    assert torch.equal(taps, torch.tensor([0.0, 0, 0, 1]).expand_as(taps))
    assert not mixer.conv1d.bias.any()
    with pytest.raises(LimbeckError, match="unknown init"):
        mixer.reset_parameters("identitiy")


@pytest.mark.parametrize("cls", [Mamba, Mamba2])
def test_attention_has_no_place_to_go(cls):
    projections = {name: torch.zeros(64, 64) for name in ("query", "key", "value", "output")}
    weights = AttentionWeights(**projections, num_heads=4, num_kv_heads=4, head_dim=16, scale=0.25)
    with pytest.raises(LimbeckError, match='init="random"'):
        cls(64).load_attention(weights)


def test_mamba_has_no_matrix():
    assert not Mamba.has_mixing_matrix
    with pytest.raises(LimbeckError, match="no mixing matrix"):
        Mamba(8).mixing_matrix(torch.zeros(1, 2, 8))


def test_what_must_be_float32_stays_so():
    for mixer, names in ((Mamba(32), ("A_log", "D", "dt_proj.weight", "dt_proj.bias")), (Mamba2(32), ("A_log", "D"))):
        mixer.to(torch.bfloat16)
        assert mixer.in_proj.weight.dtype == torch.bfloat16
        assert {mixer.get_parameter(name).dtype for name in names} == {torch.float32}


def test_defaults_for_an_attention():
    assert Mamba.defaults_for(40, 4, 2, 10) == {"d_inner": 80, "d_state": 16, "d_conv": 4, "dt_rank": 3}
    assert Mamba2(64, **Mamba2.defaults_for(64, 8, 2, 8)).num_heads == 8
    assert Mamba2.defaults_for(64, 24, 24, 8) == {}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Mamba(8, d_state=0), "d_state 0"),
        (lambda: Mamba(8, dt_rank=0), "dt_rank 0"),
        (lambda: Mamba2(8, headdim=3), "over headdim 3"),
        (lambda: Mamba2(8, headdim=8, ngroups=3), "ngroups 3"),
    ],
)
def test_bad_options_are_told(make, message):
    with pytest.raises(LimbeckError, match=message):
        make()
