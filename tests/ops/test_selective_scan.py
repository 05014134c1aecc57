"""selective_scan: the fast form is the definition, forward and backward; documents, states, types, strong decays."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from limbeck.errors import LimbeckError
from limbeck.ops import selective_scan, selective_scan_step
from limbeck.ops.selective_scan_reference import selective_scan_recurrent

EXACT = {"rtol": 1e-10, "atol": 1e-10}


def make_inputs(b=2, l=23, c=5, n=3, dtype=torch.float64):
    """x, Δ, A, B, C and an initial state, all of which want gradients."""
    x, B, C = (torch.randn(b, l, width, dtype=dtype) for width in (c, n, n))
    delta, A = torch.rand(b, l, c, dtype=dtype), -4 * torch.rand(c, n, dtype=dtype)
    return [tensor.requires_grad_() for tensor in (x, delta, A, B, C, torch.randn(b, c, n, dtype=dtype))]


def gradients(outputs, inputs):
    return torch.autograd.grad(sum(out.square().sum() for out in outputs), inputs)


@given(
    l=st.integers(1, 40),
    c=st.integers(1, 6),
    n=st.integers(1, 4),
    chunk_size=st.integers(1, 48),
    documents=st.booleans(),
    seed=st.integers(0, 100),
)
def test_chunks_are_the_definition(l, c, n, chunk_size, documents, seed):
    torch.manual_seed(seed)
    *inputs, state = make_inputs(l=l, c=c, n=n)
    seq_idx = (torch.rand(2, l) < 0.3).long().cumsum(1) if documents else None
    expected = selective_scan_recurrent(*inputs, state, seq_idx)
    found = selective_scan(
        *inputs, initial_state=state, seq_idx=seq_idx, return_state=True, chunk_size=chunk_size, backend="reference"
    )
    torch.testing.assert_close(found, expected, **EXACT)
    torch.testing.assert_close(
        gradients(found, [*inputs, state]), gradients(expected, [*inputs, state]), rtol=1e-8, atol=1e-8
    )


def test_gradients_are_those_of_finite_differences():
    inputs = make_inputs(l=7, c=3, n=2)
    seq_idx = torch.tensor([[0, 0, 0, 1, 1, 2, 2], [0] * 7])

    def scan(*tensors):
        return selective_scan(
            *tensors[:-1], initial_state=tensors[-1], return_state=True, seq_idx=seq_idx, chunk_size=3
        )

    torch.autograd.gradcheck(scan, inputs)


def test_outputs_alone_or_the_state_alone_may_be_used():
    *inputs, state = make_inputs()

    def run():
        return selective_scan(*inputs, initial_state=state, return_state=True)

    apart = []
    for part in (0, 1):
        found = torch.autograd.grad(run()[part].square().sum(), [*inputs, state], materialize_grads=True)
        apart.append(found)
    together = gradients(run(), [*inputs, state])
    for of_y, of_state, of_both in zip(*apart, together, strict=True):
        torch.testing.assert_close(of_y + of_state, of_both, **EXACT)


def test_steps_are_the_sequence():
    x, delta, A, B, C, state = make_inputs()
    y, last = selective_scan(x, delta, A, B, C, initial_state=state, return_state=True)
    for t in range(x.shape[1]):
        before = state.clone()
        out, after = selective_scan_step(state, x[:, t], delta[:, t], A, B[:, t], C[:, t])
        torch.testing.assert_close(out, y[:, t], **EXACT)
        assert torch.equal(state, before), "a step leaves the state it was given alone"
        state = after
    torch.testing.assert_close(state, last, **EXACT)


def test_only_states_between_chunks_are_kept():
    """What autograd saves is the inputs and one state per chunk, not one per token."""
    x, delta, A, B, C, _ = make_inputs(b=1, l=64, c=8, n=16)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor.numel()) or tensor, lambda t: t):
        y = selective_scan(x, delta, A, B, C, chunk_size=16)
    assert sum(saved) < 2 * sum(tensor.numel() for tensor in (x, delta, A, B, C)) + 5 * 8 * 16 < 64 * 8 * 16
    y.sum().backward()


@pytest.mark.parametrize("scale", [1e4, torch.inf])
def test_a_strong_decay_forgets_and_is_no_nan(scale):
    x, delta, A, B, C, state = make_inputs(dtype=torch.float32)
    delta, A = delta + 1, (A - 1) * min(scale, 1e38)
    y = selective_scan(x, delta, A, B, C, initial_state=state)
    torch.testing.assert_close(y, delta * x * (B * C).sum(-1, keepdim=True))
    assert all(gradient.isfinite().all() for gradient in gradients([y], [x, B, C, state]))


def test_a_step_of_zero_leaves_no_trace():
    x, delta, A, B, C, state = make_inputs()
    _, last = selective_scan(x, torch.zeros_like(delta), A, B, C, initial_state=state, return_state=True)
    assert torch.equal(last, state)


@pytest.mark.parametrize("length", [63, 500])
def test_float32_is_near_float64(length):
    x, _, A, B, C, _ = make_inputs(l=length, c=8, n=4)
    delta = F.softplus(torch.randn(2, length, 8, dtype=torch.float64) - 3).requires_grad_()
    inputs = [x, delta, A, B, C]
    y = selective_scan(*inputs)
    narrow = [tensor.detach().float().requires_grad_() for tensor in inputs]
    y32 = selective_scan(*narrow)
    torch.testing.assert_close(y32.double(), y, rtol=1e-4, atol=1e-5)
    for found, expected in zip(gradients([y32], narrow), gradients([y], inputs), strict=True):
        assert (found.double() - expected).norm() < 1e-5 * expected.norm()


def test_narrow_inputs_are_computed_in_float32():
    x, delta, A, B, C, _ = make_inputs(dtype=torch.float32)
    x, B, C = (tensor.detach().bfloat16().requires_grad_() for tensor in (x, B, C))
    with torch.autocast("cpu", torch.bfloat16):
        y, state = selective_scan(x, delta, A, B, C, return_state=True)
    wide = selective_scan(x.float(), delta, A, B.float(), C.float())
    assert (y.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(y, wide.bfloat16())
    assert [gradient.dtype for gradient in gradients([y], [x, delta])] == [torch.bfloat16, torch.float32]


@pytest.mark.slow
def test_the_operator_keeps_what_it_promises_to_compilers():
    inputs = make_inputs(l=9)
    seq_idx = torch.arange(9).expand(2, -1) // 4
    for fresh in (None, seq_idx == 4):
        torch.library.opcheck(torch.ops.limbeck.selective_scan.default, (*inputs, fresh, 4))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"B": torch.zeros(2, 23, 4)}, "B of shape"),
        ({"A": torch.zeros(6, 3)}, "A of shape"),
        ({"delta": torch.zeros(2, 23, 5, dtype=torch.bfloat16)}, "delta in torch.bfloat16"),
        ({"initial_state": torch.zeros(2, 3, 5)}, "initial_state of shape"),
        ({"seq_idx": torch.zeros(2, 22, dtype=torch.long)}, "seq_idx of shape"),
        ({"chunk_size": 0}, "chunk_size 0"),
        ({"backend": "fast"}, "unknown backend of selective_scan"),
    ],
    ids=str,
)
def test_bad_input_is_told(change, message):
    arguments = dict(zip(("x", "delta", "A", "B", "C"), make_inputs(dtype=torch.float32), strict=False))
    with pytest.raises(LimbeckError, match=message):
        selective_scan(**(arguments | change))
