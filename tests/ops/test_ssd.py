"""`ssd`: three forms of one operator, and the laws that all of them keep."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from limbeck.errors import LimbeckError
from limbeck.ops import ssd, ssd_matrix, ssd_step
from limbeck.ops.ssd_reference import ssd_chunked, ssd_quadratic, ssd_recurrent

LENGTHS = (1, 2, 63, 64, 65, 500)
TOLERANCE = {"rtol": 0, "atol": 1e-10}


def random_inputs(length, *, batch=2, heads=4, groups=2, width=3, state=5, seed=0, dtype=torch.float64):
    """Inputs of ssd that require gradients: x, log_decay, B, C, initial_state."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    inputs = (
        normal(batch, length, heads, width),
        -torch.nn.functional.softplus(2 * normal(batch, length, heads)),
        normal(batch, length, groups, state),
        normal(batch, length, groups, state),
        normal(batch, heads, width, state),
    )
    return tuple(tensor.to(dtype).requires_grad_() for tensor in inputs)


def documents(length, *, batch=2, seed=0):
    """Document ids that differ between the rows and have documents of one token and of many."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(batch, length, generator=generator) < 0.15).cumsum(1)


def values_and_gradients(form, inputs, **options):
    """Outputs, final state, and the gradient of a fixed random reading of both."""
    generator = torch.Generator().manual_seed(7)
    outputs = form(*inputs, **options)
    reading = sum(
        (out * torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.dtype)).sum() for out in outputs
    )
    return *outputs, *torch.autograd.grad(reading, inputs)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("length", LENGTHS)
def test_three_forms_agree(length, groups, packed):
    inputs = random_inputs(length, groups=groups, batch=1 if length == 500 else 2)
    seq_idx = documents(length, batch=len(inputs[0])) if packed else None
    expected = values_and_gradients(ssd_recurrent, inputs, seq_idx=seq_idx)
    torch.testing.assert_close(values_and_gradients(ssd_quadratic, inputs, seq_idx=seq_idx), expected, **TOLERANCE)
    for chunk_size in (1, 7, 32, 64, 1000):
        chunked = values_and_gradients(ssd_chunked, inputs, seq_idx=seq_idx, chunk_size=chunk_size)
        torch.testing.assert_close(chunked, expected, **TOLERANCE)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_chunked_is_recurrent_at_any_shape(data):
    def size(low, high):
        return data.draw(st.integers(low, high))

    length, groups = size(1, 40), size(1, 3)
    inputs = random_inputs(
        length,
        batch=size(1, 3),
        groups=groups,
        heads=groups * size(1, 3),
        width=size(1, 5),
        state=size(1, 5),
        seed=size(0, 9),
    )
    seq_idx = documents(length, batch=len(inputs[0]), seed=size(0, 9)) if data.draw(st.booleans()) else None
    chunked = values_and_gradients(ssd_chunked, inputs, seq_idx=seq_idx, chunk_size=size(1, 45))
    torch.testing.assert_close(chunked, values_and_gradients(ssd_recurrent, inputs, seq_idx=seq_idx), **TOLERANCE)


def test_backward_is_the_gradient():
    inputs = random_inputs(11, batch=1, heads=2, groups=1, width=2, state=2)
    seq_idx = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1, 2, 2]])
    assert torch.autograd.gradcheck(lambda *tensors: ssd_chunked(*tensors, seq_idx=seq_idx, chunk_size=4), inputs)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("length", [2, 5, 65])
def test_split_anywhere_and_carry_the_state(length, packed):
    x, log_decay, B, C, initial_state = random_inputs(length)
    seq_idx = documents(length) if packed else None
    y, state = ssd(x, log_decay, B, C, initial_state=initial_state, return_state=True, seq_idx=seq_idx)
    for cut in range(1, length):
        # The second part's first document is the carried state's only where the id does not change at the cut.
        ids = (None, None) if seq_idx is None else (seq_idx[:, :cut], seq_idx[:, cut:])
        carried, parts = initial_state, []
        for part, (start, end) in enumerate(((0, cut), (cut, length))):
            if part and seq_idx is not None:
                fresh = seq_idx[:, cut] != seq_idx[:, cut - 1]
                carried = carried.masked_fill(fresh[:, None, None, None], 0)
            tensors = (tensor[:, start:end] for tensor in (x, log_decay, B, C))
            out, carried = ssd(*tensors, initial_state=carried, return_state=True, seq_idx=ids[part], chunk_size=16)
            parts.append(out)
        torch.testing.assert_close((torch.cat(parts, 1), carried), (y, state), **TOLERANCE)


def test_steps_are_the_sequence():
    x, log_decay, B, C, state = random_inputs(33)
    y, final = ssd(x, log_decay, B, C, initial_state=state, return_state=True)
    before = state.clone()
    current = state
    for t in range(33):
        out, current = ssd_step(current, x[:, t], log_decay[:, t], B[:, t], C[:, t])
        torch.testing.assert_close(out, y[:, t], **TOLERANCE)
    torch.testing.assert_close(current, final, **TOLERANCE)
    assert torch.equal(state, before), "a step must leave the state it was given as it is"


def test_the_future_changes_nothing_in_the_past():
    x, log_decay, B, C, _ = (tensor.detach() for tensor in random_inputs(70))
    y = ssd(x, log_decay, B, C)
    for t in (1, 31, 32, 33, 69):
        changed = [tensor.clone() for tensor in (x, log_decay, B, C)]
        for tensor in changed:
            tensor[:, t:] = 100 * torch.randn_like(tensor[:, t:]) if tensor is not changed[1] else -1e3
        after = ssd(*changed)
        assert torch.equal(after[:, :t], y[:, :t])
        assert (after[:, t] != y[:, t]).all()


@pytest.mark.parametrize("packed", [False, True])
def test_matrix_is_the_operator(packed):
    x, log_decay, B, C, _ = random_inputs(65)
    seq_idx = documents(65) if packed else None
    matrix = ssd_matrix(log_decay, B, C, seq_idx=seq_idx)
    assert torch.equal(matrix, matrix.tril())
    mixed = torch.einsum("bhts,bshp->bthp", matrix, x)
    torch.testing.assert_close(mixed, ssd(x, log_decay, B, C, seq_idx=seq_idx), **TOLERANCE)
    t, s, head = 40, 37, 3  # one entry by hand, its group being 3 // 2 = 1
    by_hand = (C[0, t, 1] * B[0, s, 1]).sum() * log_decay[0, s + 1 : t + 1, head].sum().exp()
    if not packed:
        torch.testing.assert_close(matrix[0, head, t, s], by_hand, **TOLERANCE)


def test_packed_documents_are_separate_ones():
    lengths = (1, 2, 40, 3, 64)
    inputs = random_inputs(sum(lengths), batch=1)
    x, *_, initial_state = inputs
    seq_idx = torch.cat([torch.full((1, n), 3 * i) for i, n in enumerate(lengths)], dim=1)
    reading = torch.randn_like(x)

    y, state = ssd(*inputs[:4], initial_state=initial_state, return_state=True, seq_idx=seq_idx)
    packed = torch.autograd.grad((y * reading).sum() + state.sum(), inputs)

    outputs, carried = [], initial_state
    for parts in zip(*(tensor.split(lengths, dim=1) for tensor in inputs[:4]), strict=True):
        out, last = ssd(*parts, initial_state=carried, return_state=True)
        outputs.append(out)
        carried = torch.zeros_like(initial_state)
    separate_y = torch.cat(outputs, dim=1)
    separate = torch.autograd.grad((separate_y * reading).sum() + last.sum(), inputs)
    torch.testing.assert_close((y, state), (separate_y, last), **TOLERANCE)
    torch.testing.assert_close(packed, separate, **TOLERANCE)
    assert not torch.allclose(y, ssd(*inputs[:4], initial_state=initial_state)), "without seq_idx documents must leak"


@pytest.mark.parametrize("form", [ssd_recurrent, ssd_quadratic, ssd_chunked])
def test_a_decay_that_is_no_number_shows(form):
    x, log_decay, B, C, state = random_inputs(40)
    log_decay = log_decay.detach().clone()
    log_decay[:, 20] = torch.nan
    y = values_and_gradients(form, (x, log_decay.requires_grad_(), B, C, state))[0]
    assert y[:, 20:].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("decay", [-1e4, -torch.inf])
@pytest.mark.parametrize("form", [ssd_recurrent, ssd_quadratic, ssd_chunked])
def test_a_decay_without_bottom_forgets_cleanly(form, decay, dtype):
    inputs = random_inputs(70, dtype=dtype)
    x, log_decay, B, C, state = inputs
    log_decay = log_decay.detach().clone()
    log_decay[:, [0, 5, 6, 32, 50]] = decay
    inputs = (x, log_decay.requires_grad_(), B, C, state)
    out = values_and_gradients(form, inputs)
    assert all(tensor.isfinite().all() for tensor in out)
    alone = ssd(x[:, 50:], torch.zeros_like(log_decay[:, 50:]) + log_decay[:, 50:], B[:, 50:], C[:, 50:])
    tolerance = TOLERANCE if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(out[0][:, 50:], alone, **tolerance)
    torch.testing.assert_close(out[0], values_and_gradients(ssd_recurrent, inputs)[0], **tolerance)


@pytest.mark.parametrize("strength", [0.01, 1.0, 30.0])
def test_float32_gradients_are_close_to_float64(strength):
    exact = random_inputs(500, batch=1, width=16, state=16)
    exact = (exact[0], (strength * exact[1]).detach().requires_grad_(), *exact[2:])
    single = tuple(tensor.detach().float().requires_grad_() for tensor in exact)
    exact = tuple(tensor.detach().double().requires_grad_() for tensor in single)
    expected = values_and_gradients(ssd_chunked, exact)
    for got, want in zip(values_and_gradients(ssd_chunked, single), expected, strict=True):
        assert (got - want).norm() <= 1e-6 * want.norm()


def test_number_types():
    x, log_decay, B, C, _ = (tensor.detach().float() for tensor in random_inputs(40))
    y, state = ssd(x.bfloat16(), log_decay, B.bfloat16(), C.bfloat16(), return_state=True)
    assert (y.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ssd(x, log_decay, B, C), ssd(x, log_decay, B, C, backend="reference"))
        under_autocast = ssd(x, log_decay, B, C)
    assert torch.equal(under_autocast, ssd(x, log_decay, B, C)), "autocast must not narrow the products"


def test_autocast_changes_nothing_on_the_way_back():
    inputs = random_inputs(70, dtype=torch.float32)

    def gradients():
        return torch.autograd.grad(ssd(*inputs[:4], initial_state=inputs[4]).square().sum(), inputs)

    expected = gradients()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert all(torch.equal(one, other) for one, other in zip(gradients(), expected, strict=True))


def test_bad_input_is_told():
    x, log_decay, B, C, state = (tensor.detach() for tensor in random_inputs(8))
    cases = [
        (lambda: ssd(x, log_decay[:, :-1], B, C), "log_decay of shape"),
        (lambda: ssd(x, log_decay, B[:, :, :, 0], C), "B of shape"),
        (lambda: ssd(x[:, :, :3], log_decay[:, :, :3], B, C), "3 heads of x and 2 groups"),
        (lambda: ssd(x, log_decay.bfloat16(), B, C), "log_decay in torch.bfloat16"),
        (lambda: ssd(x, log_decay, B, C, initial_state=state[..., :-1]), "initial_state of shape"),
        (lambda: ssd(x, log_decay, B, C, seq_idx=torch.zeros(2, 7, dtype=torch.long)), "seq_idx of shape"),
        (lambda: ssd(x, log_decay, B, C, seq_idx=torch.zeros(2, 8)), "seq_idx of shape"),
        (lambda: ssd(x, log_decay, B, C, chunk_size=0), "chunk_size 0"),
        (lambda: ssd(x, log_decay, B, C, backend="referense"), "did you mean 'reference'"),
        (lambda: ssd(x[:, :0], log_decay[:, :0], B[:, :0], C[:, :0]), "x of shape"),
        (lambda: ssd_step(state, x[:, 0], log_decay[:, 0], B[:, 0], C[:, 0, :, :2]), "C of shape"),
    ]
    for call, message in cases:
        with pytest.raises(LimbeckError, match=message):
            call()
