"""The kernel of `mixer_step` against its reference: in Triton's interpreter on a CPU, against float64 on a GPU."""

import importlib

import pytest
import torch

from limbeck.errors import LimbeckError
from limbeck.ops import mixer_step

pytest.importorskip("triton")

NARROW = 4
"""The first inputs are narrow, beside the state of the SSD and the weights, which are wide."""


def draw(b=2, h=4, g=2, p=3, n=5, k=4, *, biases=True, padding=False, device="cpu"):
    """Inputs in float64, xBC, A_log and z slices of one projection, and a mask."""
    c = h * p + 2 * g * n

    def normal(*shape):
        return torch.randn(shape, dtype=torch.float64, device=device)

    xBC, z, A_log = normal(b, c + h * p + h).split((c, h * p, h), dim=1)
    bias, z_bias = (normal(c), normal(h * p)) if biases else (None, None)
    mask = (torch.arange(b, device=device) % 2 == 0) if padding else None
    return [xBC, A_log, z, normal(b, c, k - 1), normal(b, h, p, n), normal(c, k), bias, normal(h), z_bias], mask


def to(inputs, dtype):
    """The inputs as a mixer of this dtype has them."""
    wide = torch.promote_types(dtype, torch.float32)
    return [None if t is None else t.to(dtype if i < NARROW else wide) for i, t in enumerate(inputs)]


def check(found, expected, tolerance):
    """Relative errors of all results."""
    for i, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        assert ours.isfinite().all(), f"result {i} has something that is not finite"
        error = (ours.double() - theirs).norm() / theirs.norm().clamp_min(1e-30)
        assert error < tolerance, f"result {i}: relative error {error:.2e}"


def compare(drawn, dtype, tolerance, **options):
    """The kernel, on `dtype`, against the reference in float64 on the same rounded numbers; in place the same bits."""
    inputs, mask = drawn
    rounded = [None if tensor is None else tensor.double() for tensor in to(inputs, dtype)]
    expected = mixer_step(*rounded, mask=mask, backend="reference", **options)
    given = to(rounded, dtype)
    before = [tensor.clone() for tensor in given[3:5]]
    found = mixer_step(*given, mask=mask, backend="triton", **options)
    check(found, expected, tolerance)
    assert all(torch.equal(one, other) for one, other in zip(before, given[3:5], strict=True))
    out, conv_state, state = mixer_step(*given, mask=mask, backend="triton", in_place=True, **options)
    assert conv_state is given[3]
    assert state is given[4]
    assert all(torch.equal(one, other) for one, other in zip((out, conv_state, state), found, strict=True))


@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("activation", ["identity", "silu"])
@pytest.mark.parametrize(("h", "g"), [(1, 1), (3, 3), (4, 2), (6, 1)])
def test_the_kernel_is_the_reference(h, g, activation, padding, poisoned):
    compare(draw(h=h, g=g, padding=padding), torch.float32, 1e-6, activation=activation)


@pytest.mark.parametrize("k", [1, 2, 3, 8])
def test_any_taps(k, poisoned):
    compare(draw(k=k, biases=k > 2), torch.float32, 1e-6)


def test_a_wide_state_comes_in_parts(poisoned, monkeypatch):
    from limbeck.ops import mixer_step_triton

    monkeypatch.setattr(mixer_step_triton, "TILE", 32)
    compare(draw(p=11, n=6), torch.float32, 1e-6)


def test_padding_that_is_not_a_number_leaves_no_trace(poisoned):
    inputs, mask = draw(padding=True)
    inputs = to(inputs, torch.float32)
    inputs[0][1], inputs[1][1] = torch.nan, torch.nan
    _, conv_state, state = mixer_step(*inputs, mask=mask, backend="triton")
    assert torch.equal(state[1], inputs[4][1])
    assert torch.equal(conv_state[1], torch.cat([inputs[3][1, :, 1:], torch.zeros(32, 1)], dim=1))


def test_states_of_any_layout_and_type(poisoned):
    inputs, mask = draw()
    inputs = to(inputs, torch.float32)
    expected = mixer_step(*inputs, mask=mask, backend="triton")
    inputs[3], inputs[4] = inputs[3].double().mT.contiguous().mT, inputs[4].mT.contiguous().mT
    inputs[3] = inputs[3].float()
    for in_place in (False, True):
        found = mixer_step(*inputs, mask=mask, backend="triton", in_place=in_place)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_gradients_go_through_the_reference():
    inputs, mask = draw(padding=True)

    def gradients(backend):
        leaves = [tensor.float().requires_grad_() for tensor in inputs]
        outputs = mixer_step(*leaves, mask=mask, activation="silu", backend=backend)
        return torch.autograd.grad(sum(tensor.square().sum() for tensor in outputs), leaves)

    torch.testing.assert_close(gradients("triton"), gradients("reference"), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_the_operators_keep_torchs_rules():
    importlib.import_module("limbeck.ops.mixer_step_triton")  # registers them
    inputs, mask = draw(b=1, h=2, g=1, padding=True)
    tensors = [tensor.float() for tensor in inputs]
    torch.library.opcheck(torch.ops.limbeck.mixer_step_in_place.default, (*tensors, mask, True))
    tensors = [tensor.requires_grad_() for tensor in tensors]
    torch.library.opcheck(torch.ops.limbeck.mixer_step.default, (*tensors, mask, True))


def test_what_the_kernel_does_not_take_is_told():
    for drawn, dtype, message in (
        (draw(), torch.float64, "torch.float64"),
        (draw(k=9), torch.float32, "9 taps"),
        (draw(n=257), torch.float32, "d_state 257"),
    ):
        with pytest.raises(LimbeckError, match=f"no Triton kernel for {message}"):
            mixer_step(*to(drawn[0], dtype), backend="triton")


# --- on a GPU ---------------------------------------------------------------------------------------------------------

TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 1e-2, torch.float32: 1e-4}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("h", "g", "p", "n"), [(32, 32, 64, 64), (32, 8, 128, 128), (24, 1, 64, 128), (3, 3, 80, 96), (2, 1, 256, 256)]
)
def test_errors_on_a_gpu(h, g, p, n, dtype, poisoned):
    compare(draw(3, h, g, p, n, padding=True, device="cuda"), dtype, TOLERANCE[dtype], activation="silu")


@pytest.mark.gpu
@pytest.mark.parametrize("g", [8, 32])
def test_in_place_many_times_is_the_same_as_not(g, poisoned):
    """Heads and threads that read what others overwrite would show as a difference between the two."""
    inputs, _ = draw(16, 32, g, 64, 64, device="cuda")
    given = to(inputs, torch.bfloat16)
    expected, kept = given[3:5], [tensor.clone() for tensor in given[3:5]]
    for _ in range(50):
        given[0] = torch.randn_like(given[0])
        out, *expected = mixer_step(*given[:3], *expected, *given[5:], backend="triton")
        again, *kept = mixer_step(*given[:3], *kept, *given[5:], in_place=True, backend="triton")
        assert torch.equal(out, again)
        assert all(torch.equal(one, other) for one, other in zip(expected, kept, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("g", [4, 8])
def test_a_graph_of_steps(g):
    inputs, _ = draw(2, 8, g, 64, 64, device="cuda")
    given = to(inputs, torch.bfloat16)
    expected = given[3:5]
    kept = [tensor.clone() for tensor in expected]
    mixer_step(*given[:3], *[tensor.clone() for tensor in kept], *given[5:], in_place=True)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, *_ = mixer_step(*given[:3], *kept, *given[5:], in_place=True)
    for _ in range(3):
        given[0].copy_(torch.randn_like(given[0]))
        graph.replay()
        once, *expected = mixer_step(*given[:3], *expected, *given[5:])
        assert torch.equal(out, once)
        assert all(torch.equal(one, other) for one, other in zip(kept, expected, strict=True))
