"""`mixer_step`: equal to its parts one after another, in place too, and what it refuses."""

import pytest
import torch

from limbeck.errors import LimbeckError
from limbeck.ops import causal_conv_step, gated_skip, mixer_step, ssd_step

EXACT = {"rtol": 0, "atol": 1e-12}


def draw(b=2, h=4, g=2, p=3, n=5, k=4, dtype=torch.float64):
    """xBC, A_log, z, conv_state, state, conv_weight, conv_bias, D, z_bias."""
    c = h * p + 2 * g * n
    shapes = (b, c), (b, h), (b, h * p), (b, c, k - 1), (b, h, p, n), (c, k), (c,), (h,), (h * p,)
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("activation", ["identity", "silu"])
@pytest.mark.parametrize(("g", "k"), [(1, 4), (2, 2), (4, 1)])
def test_is_its_parts_one_after_another(g, k, activation, masked):
    inputs = draw(g=g, k=k)
    xBC, A_log, z, conv_state, state, weight, bias, D, z_bias = inputs
    mask = torch.tensor([True, False]) if masked else None
    found = mixer_step(*inputs, activation=activation, mask=mask)
    token = torch.ones(2, 1) if mask is None else mask[:, None].double()
    convolved, new_conv = causal_conv_step(conv_state, xBC * token, weight, bias, activation)
    x, B, C = convolved.split((12, 5 * g, 5 * g), dim=-1)
    x, B, C = (x * token).unflatten(-1, (4, 3)), B.unflatten(-1, (g, 5)), C.unflatten(-1, (g, 5))
    y, new_state = ssd_step(state, x, -torch.nn.functional.softplus(A_log) * token, B, C)
    out = gated_skip(y[:, None], x[:, None], D, z[:, None], z_bias)[:, 0]
    torch.testing.assert_close(found, (out, new_conv, new_state), **EXACT)
    if masked:
        assert torch.equal(found[2][1], state[1])


def test_the_gradient():
    assert torch.autograd.gradcheck(mixer_step, draw(p=2, n=2))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("activation", ["identity", "silu"])
@pytest.mark.parametrize(("g", "k"), [(1, 4), (2, 2), (4, 1)])
def test_in_place_writes_what_would_be_returned(g, k, activation, masked):
    inputs = [tensor.detach() for tensor in draw(g=g, k=k)]
    options = {"activation": activation, "mask": torch.tensor([True, False]) if masked else None}
    expected = mixer_step(*inputs, **options)
    out, conv_state, state = mixer_step(*inputs, **options, in_place=True)
    assert conv_state is inputs[3]
    assert state is inputs[4]
    torch.testing.assert_close((out, conv_state, state), expected, **EXACT)


def test_in_place_without_biases_whatever_the_layout():
    inputs = [tensor.detach() for tensor in draw()]
    inputs[6] = inputs[8] = None
    expected = mixer_step(*inputs)
    inputs[3], inputs[4] = (tensor.mT.contiguous().mT for tensor in inputs[3:5])
    torch.testing.assert_close(mixer_step(*inputs, in_place=True), expected, **EXACT)


@pytest.mark.parametrize("conv_type", [torch.bfloat16, torch.float32])
def test_in_place_of_narrow_types(conv_type):
    inputs = [tensor.detach() for tensor in draw(dtype=torch.float32)]
    inputs = [tensor.bfloat16() if i < 3 else tensor for i, tensor in enumerate(inputs)]
    inputs[3] = inputs[3].to(conv_type)
    out, new_conv, new_state = mixer_step(*inputs)
    found = mixer_step(*inputs, in_place=True)
    assert found[0].dtype == torch.bfloat16
    torch.testing.assert_close(found, (out, new_conv.to(conv_type), new_state), rtol=1e-2, atol=1e-5)


def test_narrow_types():
    inputs = [tensor.detach() for tensor in draw(dtype=torch.float32)]
    narrow = [tensor.bfloat16() if i < 4 else tensor for i, tensor in enumerate(inputs)]
    narrow[3] = narrow[3].float()  # a state begun wider than what comes under autocast
    out, conv_state, state = mixer_step(*narrow)
    assert [out.dtype, conv_state.dtype, state.dtype] == [torch.bfloat16, torch.bfloat16, torch.float32]


def test_bad_input_is_told():
    inputs = draw()
    for place, wrong, message in (
        (0, inputs[0][:, :-1], "conv_weight of shape"),
        (1, inputs[1][:, :-1], "A_log of shape"),
        (2, inputs[2][:, :-1], "z_bias of shape"),
        (3, inputs[3][..., :-1], "conv_state of shape"),
        (4, inputs[4][..., :-1], "32 channels, z of width 12 and a state of shape"),
        (4, inputs[4].bfloat16(), "a state in torch.bfloat16"),
    ):
        with pytest.raises(LimbeckError, match=message):
            mixer_step(*inputs[:place], wrong, *inputs[place + 1 :])
    for options, message in (
        ({"activation": "relu"}, "activation 'relu'"),
        ({"mask": torch.ones(2)}, r"mask of shape \(2,\) in torch.float32"),
        ({"in_place": True}, "in place where gradients are wanted"),
        ({"backend": "cuda"}, "unknown backend"),
    ):
        with pytest.raises(LimbeckError, match=message):
            mixer_step(*inputs, **options)
