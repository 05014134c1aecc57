"""`causal_conv`: equal to torch's own convolution, to its steps, and to documents apart."""

import pytest
import torch
import torch.nn.functional as F

from limbeck.errors import LimbeckError
from limbeck.ops import causal_conv, causal_conv_split, causal_conv_step

EXACT = {"rtol": 0, "atol": 1e-12}


def random_inputs(length, *, batch=2, channels=5, k=4):
    """x, weight, bias, initial_state, in float64 with gradients."""
    shapes = (batch, length, channels), (channels, k), (channels,), (batch, channels, k - 1)
    return tuple(torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes)


@pytest.mark.parametrize("activation", ["identity", "silu"])
@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("length", [1, 2, 3, 4, 65])
def test_equals_conv1d(length, k, activation):
    inputs = random_inputs(length, k=k)
    x, weight, bias, state = inputs
    window = torch.cat([state, x.mT], dim=-1)  # (b, c, k-1+l)
    expected = F.conv1d(window, weight[:, None], bias, groups=len(bias)).mT
    expected = F.silu(expected) if activation == "silu" else expected
    y, last = causal_conv(x, weight, bias, activation=activation, initial_state=state, return_state=True)
    torch.testing.assert_close(y, expected, **EXACT)
    assert torch.equal(last, window[..., length:])
    reading = torch.randn_like(y)
    torch.testing.assert_close(
        torch.autograd.grad((y * reading).sum(), inputs, materialize_grads=True),
        torch.autograd.grad((expected * reading).sum(), inputs, materialize_grads=True),
        **EXACT,
    )


def test_backward_is_the_gradient():
    seq_idx = torch.tensor([[0, 0, 1, 1, 1, 2], [4, 4, 4, 4, 4, 4]])
    inputs = random_inputs(6, channels=2)
    assert torch.autograd.gradcheck(
        lambda x, w, b, s: causal_conv(x, w, b, initial_state=s, return_state=True, seq_idx=seq_idx), inputs
    )


@pytest.mark.parametrize("cut", [1, 2, 3, 7, 11])
def test_split_anywhere_and_carry_the_state(cut):
    x, weight, bias, state = random_inputs(12)
    y, last = causal_conv(x, weight, bias, initial_state=state, return_state=True)
    first, carried = causal_conv(x[:, :cut], weight, bias, initial_state=state, return_state=True)
    second, carried = causal_conv(x[:, cut:], weight, bias, initial_state=carried, return_state=True)
    torch.testing.assert_close((torch.cat([first, second], 1), carried), (y, last), **EXACT)


def test_steps_are_the_sequence():
    x, weight, bias, state = random_inputs(9)
    y, last = causal_conv(x, weight, bias, activation="silu", initial_state=state, return_state=True)
    for t in range(9):
        out, state = causal_conv_step(state, x[:, t], weight, bias, activation="silu")
        torch.testing.assert_close(out, y[:, t], **EXACT)
    assert torch.equal(state, last)


def test_the_future_changes_nothing_in_the_past():
    x, weight, bias, _ = (tensor.detach() for tensor in random_inputs(20))
    y = causal_conv(x, weight, bias)
    x[:, 11:] = torch.nan
    after = causal_conv(x, weight, bias)
    assert torch.equal(after[:, :11], y[:, :11])
    assert after[:, 11].isnan().all()


@pytest.mark.parametrize("lengths", [(1, 2, 9), (9, 1, 1), (6, 6, 2)])
def test_packed_documents_are_separate_ones(lengths):
    inputs = random_inputs(sum(lengths), batch=1)
    x, weight, bias, initial_state = inputs
    seq_idx = torch.cat([torch.full((1, n), i) for i, n in enumerate(lengths)], dim=1)
    y, last = causal_conv(x, weight, bias, initial_state=initial_state, return_state=True, seq_idx=seq_idx)
    outputs, state = [], initial_state
    for part in x.split(lengths, dim=1):
        out, separate_last = causal_conv(part, weight, bias, initial_state=state, return_state=True)
        outputs.append(out)
        state = torch.zeros_like(initial_state)
    separate = torch.cat(outputs, dim=1)
    torch.testing.assert_close((y, last), (separate, separate_last), **EXACT)
    reading = torch.randn_like(y)
    torch.testing.assert_close(
        torch.autograd.grad((y * reading).sum(), inputs),
        torch.autograd.grad((separate * reading).sum(), inputs),
        **EXACT,
    )
    assert not torch.allclose(y, causal_conv(x, weight, bias, initial_state=initial_state))


def test_one_document_keeps_its_initial_state():
    x, weight, bias, state = random_inputs(2)
    seq_idx = torch.full((2, 2), 5)
    with_ids = causal_conv(x, weight, bias, initial_state=state, return_state=True, seq_idx=seq_idx)
    torch.testing.assert_close(with_ids, causal_conv(x, weight, bias, initial_state=state, return_state=True), **EXACT)


def test_padding_enters_and_leaves_as_zero():
    inputs = random_inputs(9)
    x, weight, bias, state = inputs
    mask = torch.rand(2, 9) < 0.6
    options = {"activation": "silu", "initial_state": state, "return_state": True}
    y, last = causal_conv(x, weight, bias, mask=mask, **options)
    zeroed, last_zeroed = causal_conv(x * mask[..., None], weight, bias, **options)
    torch.testing.assert_close((y, last), (zeroed * mask[..., None], last_zeroed), **EXACT)
    x.data[~mask] = torch.nan
    poisoned, last = causal_conv(x, weight, bias, mask=mask, **options)
    assert torch.equal(poisoned, y)
    assert all(
        gradient.isfinite().all() for gradient in torch.autograd.grad(poisoned.square().sum() + last.sum(), inputs)
    )


def test_pieces_are_the_whole():
    x, weight, bias, state = random_inputs(9)
    y, last = causal_conv(x, weight, bias, initial_state=state, return_state=True)
    pieces, also_last = causal_conv_split(x, weight, bias, (1, 3, 1), initial_state=state, return_state=True)
    assert [piece.shape[-1] for piece in pieces] == [1, 3, 1]
    assert torch.equal(torch.cat(pieces, dim=-1), y)
    assert torch.equal(also_last, last)
    assert causal_conv_split(x, weight, bias, (5,))[1] is None


def test_the_state_is_a_copy():
    x, weight, bias, _ = random_inputs(8)
    x = x.detach()
    _, state = causal_conv(x, weight, bias, return_state=True)
    before = state.clone()
    x.zero_()
    assert torch.equal(state, before)


def test_narrow_types_are_summed_wide():
    x, weight, bias, _ = (tensor.detach().bfloat16() for tensor in random_inputs(40))
    y, state = causal_conv(x, weight, bias, return_state=True)
    assert (y.dtype, state.dtype) == (torch.bfloat16, torch.bfloat16)
    assert torch.equal(y, causal_conv(x.float(), weight.float(), bias.float()).bfloat16())
    assert causal_conv(x, weight.float(), bias.float()).dtype == torch.bfloat16


def test_bad_input_is_told():
    x, weight, bias, state = random_inputs(6)
    cases = [
        (lambda: causal_conv(x, weight[:-1], bias), "weight of shape"),
        (lambda: causal_conv(x, weight, bias[:-1]), "bias of shape"),
        (lambda: causal_conv(x, weight, initial_state=state[..., :-1]), "state of shape"),
        (lambda: causal_conv(x, weight, activation="relu"), "activation 'relu'"),
        (lambda: causal_conv(x, weight, seq_idx=torch.zeros(2, 5, dtype=torch.long)), "seq_idx of shape"),
        (lambda: causal_conv(x, weight, mask=torch.ones(2, 6)), "a mask of shape"),
        (lambda: causal_conv_split(x, weight, bias, (2, 2)), "widths"),
        (lambda: causal_conv(x, weight, backend="cuda"), "unknown backend"),
        (lambda: causal_conv_step(state, x, weight), "x of shape"),
    ]
    for call, message in cases:
        with pytest.raises(LimbeckError, match=message):
            call()
