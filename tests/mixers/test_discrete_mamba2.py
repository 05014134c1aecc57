"""Discrete Mamba-2: its formula, its layout, its starts. (The laws of any mixer: tests/test_testing.py.)"""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from limbeck.errors import LimbeckError
from limbeck.mixers import AttentionWeights, DiscreteMamba2

EXACT = {"rtol": 0, "atol": 1e-10}
WIDTH = 12


def make_mixer(d_model=WIDTH, **options):
    defaults = DiscreteMamba2.defaults_for(d_model, 3, 3, 4)
    return DiscreteMamba2(d_model, **(defaults | options)).double()


def make_attention(*, heads=4, kv_heads=2, width=3, biases=True, d_model=WIDTH):
    def normal(*shape):
        return torch.randn(*shape, dtype=torch.float64)

    weights = {
        "query": normal(heads * width, d_model),
        "key": normal(kv_heads * width, d_model),
        "value": normal(kv_heads * width, d_model),
        "output": normal(d_model, heads * width),
    }
    names = ("query", "key", "value", "output") if biases is True else biases or ()
    given_biases = {f"{name}_bias": normal(len(weights[name])) for name in names}
    return AttentionWeights(
        **weights, **given_biases, num_heads=heads, num_kv_heads=kv_heads, head_dim=width, scale=width**-0.5
    )


def mixer_for(weights, **options):
    d_model = weights.query.shape[1]
    options = DiscreteMamba2.defaults_for(d_model, weights.num_heads, weights.num_kv_heads, weights.head_dim) | options
    return DiscreteMamba2(d_model, **options).double()


def linear_attention(weights, inputs, decay):
    """Decayed, unnormalised linear attention without rotary embedding, written out token by token."""
    d_model, heads, width = weights.query.shape[1], weights.num_heads, weights.head_dim
    outputs = torch.zeros(*inputs.shape[:2], heads * width, dtype=inputs.dtype)

    def project(name, token, head):
        rows = slice(head * width, (head + 1) * width)
        bias = getattr(weights, f"{name}_bias")
        return token @ getattr(weights, name)[rows].mT + (0 if bias is None else bias[rows])

    for head in range(heads):
        group = head // (heads // weights.num_kv_heads)
        for t in range(inputs.shape[1]):
            query = project("query", inputs[:, t], head)
            for s in range(t + 1):
                score = weights.scale * (query * project("key", inputs[:, s], group)).sum(-1, keepdim=True)
                value = project("value", inputs[:, s], group)
                outputs[:, t, head * width : (head + 1) * width] += decay ** (t - s) * score * value
    assert weights.output.shape == (d_model, heads * width)
    return outputs @ weights.output.mT


def test_parameters_are_laid_out_as_published():
    mixer = DiscreteMamba2(64, d_state=16, n_qk_heads=4, n_v_heads=4)
    shapes = {name: tuple(parameter.shape) for name, parameter in mixer.named_parameters()}
    assert shapes == {
        "in_proj.weight": (64 + 2 * 4 * 16 + 64 + 4, 64),
        "z_bias": (64,),
        "conv1d.weight": (64 + 2 * 4 * 16, 1, 4),
        "conv1d.bias": (64 + 2 * 4 * 16,),
        "D": (4,),
        "out_proj.weight": (64, 64),
    }
    with_bias = dict(DiscreteMamba2(64, d_state=16, n_qk_heads=4, n_v_heads=4, bias=True).named_parameters())
    assert with_bias.keys() - shapes.keys() == {"in_proj.bias", "out_proj.bias"}
    assert shapes.keys() - with_bias.keys() == {"z_bias"}


@pytest.mark.parametrize(
    "options", [{}, {"activation": "silu", "bias": True}, {"n_qk_heads": 1, "d_state": 7}], ids=str
)
def test_forward_is_the_formula(options):
    """An independent evaluation of METHODS 1.2, one token and one head at a time, from the parameters alone."""
    mixer = make_mixer(**options)
    for parameter in mixer.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    inputs = torch.randn(2, 9, WIDTH, dtype=torch.float64)
    h, p, g, n = mixer.n_v_heads, mixer.head_dim, mixer.n_qk_heads, mixer.d_state
    projected = F.linear(inputs, mixer.in_proj.weight, mixer.in_proj.bias)
    xBC = projected[..., : h * p + 2 * g * n]
    z = projected[..., h * p + 2 * g * n : -h] + (0 if mixer.z_bias is None else mixer.z_bias)
    decay = torch.exp(-torch.log(1 + torch.exp(projected[..., -h:])))  # (b, l, h)
    convolved = torch.zeros_like(xBC)
    for t in range(9):
        for lag in range(min(4, t + 1)):
            convolved[:, t] += xBC[:, t - lag] * mixer.conv1d.weight[:, 0, 3 - lag]
    convolved = convolved + mixer.conv1d.bias
    convolved = F.silu(convolved) if mixer.activation == "silu" else convolved
    y = torch.zeros(2, 9, h * p, dtype=torch.float64)
    for head in range(h):
        group = head // (h // g)
        x = convolved[..., head * p : (head + 1) * p]
        B = convolved[..., h * p + group * n : h * p + (group + 1) * n]
        C = convolved[..., h * p + (g + group) * n : h * p + (g + group + 1) * n]
        state = torch.zeros(2, p, n, dtype=torch.float64)
        for t in range(9):
            state = decay[:, t, head, None, None] * state + x[:, t, :, None] * B[:, t, None, :]
            y[:, t, head * p : (head + 1) * p] = (state * C[:, t, None, :]).sum(-1) + mixer.D[head] * x[:, t]
    expected = F.linear(y * F.silu(z), mixer.out_proj.weight, mixer.out_proj.bias)
    torch.testing.assert_close(mixer(inputs), expected, **EXACT)


@settings(max_examples=25, deadline=None)
@given(length=st.integers(1, 80), pad=st.integers(0, 40), seed=st.integers(0, 99))
def test_left_padding_is_invisible_at_any_length(length, pad, seed):
    torch.manual_seed(seed)
    mixer = make_mixer(bias=True)
    for parameter in mixer.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    inputs = torch.randn(1, pad + length, WIDTH, dtype=torch.float64)
    mask = torch.arange(pad + length)[None] >= pad
    padded, padded_state = mixer(inputs, mask, return_state=True)
    whole, state = mixer(inputs[:, pad:], return_state=True)
    torch.testing.assert_close((padded[:, pad:], padded_state), (whole, state), **EXACT)


def test_a_strong_decay_is_no_nan():
    """Rows of A_log far from zero, where x / softplus(A_log) would overflow: everything stays finite."""
    mixer = make_mixer().float()
    for scale in (1e4, -1e4):
        mixer.in_proj.weight.data[-3:] = scale
        out = mixer(torch.randn(2, 70, WIDTH))
        out.sum().backward()
        assert out.isfinite().all()
        assert all(parameter.grad.isfinite().all() for parameter in mixer.parameters())


def test_d_stays_float32_inside_other_modules():
    model = torch.nn.Sequential(DiscreteMamba2(WIDTH, **DiscreteMamba2.defaults_for(WIDTH, 3, 3, 4)))
    model[0].D.data += 1e-4
    before = model[0].D.detach().clone()
    model.to(torch.bfloat16)
    assert model[0].in_proj.weight.dtype == torch.bfloat16
    assert torch.equal(model[0].D, before), "the value must survive, not only the type"
    assert model.double()[0].D.dtype == torch.float64


def test_copies_and_pickles():
    mixer, inputs = make_mixer(), torch.randn(1, 5, WIDTH, dtype=torch.float64)
    buffer = io.BytesIO()
    torch.save(mixer.state_dict(), buffer)
    buffer.seek(0)
    other = make_mixer()
    other.load_state_dict(torch.load(buffer, weights_only=True))
    for twin in (copy.deepcopy(mixer), other):
        assert torch.equal(twin(inputs), mixer(inputs))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own tracing does
def test_compiles_without_a_graph_break():
    mixer = make_mixer()
    inputs = torch.randn(2, 40, WIDTH, dtype=torch.float64)
    compiled = torch.compile(mixer, fullgraph=True, backend="aot_eager")
    out, expected = compiled(inputs), mixer(inputs)
    torch.testing.assert_close(out, expected, **EXACT)
    torch.testing.assert_close(
        torch.autograd.grad(out.square().sum(), list(mixer.parameters())),
        torch.autograd.grad(expected.square().sum(), list(mixer.parameters())),
        **EXACT,
    )


# --- starts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [False, True])
def test_identity_start(bias):
    mixer = make_mixer(bias=bias)
    inputs = torch.randn(2, 7, WIDTH, dtype=torch.float64)
    x = F.linear(inputs, mixer.in_proj.weight[: mixer.d_inner], None if not bias else mixer.in_proj.bias[:WIDTH])
    torch.testing.assert_close(mixer.values(inputs).flatten(-2), x, **EXACT)  # identity convolution
    mixed = torch.randn(2, 7, 3, 4, dtype=torch.float64)
    torch.testing.assert_close(mixer.readout(mixed, inputs), mixer.out_proj(mixed.flatten(-2)), rtol=1e-6, atol=1e-6)
    assert (mixer.D == 1).all()


def test_random_start_has_a_random_gate_and_convolution():
    mixer = make_mixer()
    mixer.reset_parameters("random")
    gate = mixer.in_proj.weight.split(mixer.in_proj_widths)[1]
    assert gate.std() > 0
    assert mixer.conv1d.weight.std() > 0
    with pytest.raises(LimbeckError, match="unknown init"):
        mixer.reset_parameters("identitiy")


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("d_state", [3, 5])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_attention_start_is_decayed_linear_attention(kv_heads, d_state, biases, bias):
    weights = make_attention(kv_heads=kv_heads, biases=biases)
    mixer = mixer_for(weights, d_state=d_state, bias=bias)
    notes = mixer.load_attention(weights)
    inputs = torch.randn(2, 7, WIDTH, dtype=torch.float64)
    output_bias = weights.output_bias if bias and biases else torch.zeros(WIDTH, dtype=torch.float64)

    expected = linear_attention(weights, inputs, decay=0.5) + output_bias
    torch.testing.assert_close(mixer(inputs), expected, rtol=1e-9, atol=1e-9)
    assert notes == (["the attention's output bias is lost: the mixer has bias=False"] if biases and not bias else [])

    inputs[..., 0] = 1  # a constant feature through which the decay's projection can reach minus infinity
    mixer.in_proj.weight.data[-weights.num_heads :, 0] = -1e4
    expected = linear_attention(weights, inputs, decay=1.0) + output_bias
    torch.testing.assert_close(mixer(inputs), expected, rtol=1e-9, atol=1e-9)


def test_attention_start_trains_the_extra_state():
    weights = make_attention()
    mixer = mixer_for(weights, d_state=5)
    mixer.load_attention(weights)
    inputs = torch.randn(2, 7, WIDTH, dtype=torch.float64)
    (gradient,) = torch.autograd.grad(mixer(inputs).square().sum(), [mixer.in_proj.weight])
    C = gradient.split(mixer.in_proj_widths)[0].split(mixer.conv_widths)[2].unflatten(0, (4, 5))
    assert (C[:, 3:].flatten(1).norm(dim=1) > 0).all()


def test_attention_start_tells_what_is_lost():
    weights = make_attention(biases=("query", "value", "output"))
    assert mixer_for(weights, conv_bias=False, activation="silu").load_attention(weights) == [
        "the attention's query, value bias is lost: the mixer has bias=False and conv_bias=False",
        "the attention's output bias is lost: the mixer has bias=False",
        "the silu after the convolution bends queries, keys and values",
    ]


def test_attention_start_is_over_whatever_was_there():
    weights = make_attention()
    mixers = [mixer_for(weights, bias=True) for _ in range(2)]
    for parameter in mixers[1].parameters():
        parameter.data += torch.randn_like(parameter)
    for mixer in mixers:
        mixer.load_attention(weights)
    for name, parameter in mixers[0].named_parameters():
        assert torch.equal(parameter, mixers[1].get_parameter(name)), name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"d_state": 2}, "d_state 2 is below the attention's head width 3"),
        ({"n_qk_heads": 2}, "n_qk_heads is 2"),
        ({"d_inner": 24}, "d_inner is 24"),
    ],
)
def test_attention_that_does_not_fit_is_told(options, message):
    weights = make_attention()
    mixer = mixer_for(weights, **options)
    before = copy.deepcopy(mixer.state_dict())
    with pytest.raises(LimbeckError, match=message):
        mixer.load_attention(weights)
    assert all(torch.equal(value, before[name]) for name, value in mixer.state_dict().items()), "half-written"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"d_inner": 10}, "d_inner 10 over n_v_heads 3"),
        ({"n_qk_heads": 2}, "n_v_heads 3 over n_qk_heads 2"),
        ({"activation": "relu"}, "activation 'relu'"),
        ({"d_state": 0}, "d_state 0"),
    ],
)
def test_bad_options_are_told(options, message):
    with pytest.raises(LimbeckError, match=message):
        make_mixer(**options)


def test_bad_input_is_told():
    mixer = make_mixer()
    inputs = torch.randn(2, 5, WIDTH, dtype=torch.float64)
    cases = [
        (lambda: mixer(inputs[..., :-1]), "hidden_states of shape"),
        (lambda: mixer(inputs[0]), "hidden_states of shape"),
        (lambda: mixer(inputs, torch.ones(2, 1, 5, 5)), "attention_mask of shape"),
        (lambda: mixer(inputs, seq_idx=torch.zeros(2, 4, dtype=torch.long)), "seq_idx of shape"),
    ]
    for call, message in cases:
        with pytest.raises(LimbeckError, match=message):
            call()
