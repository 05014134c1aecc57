"""The kernels of `causal_conv` against its reference: in Triton's interpreter on a CPU, against float64 on a GPU."""

import math

import pytest
import torch

from limbeck.errors import LimbeckError
from limbeck.ops import causal_conv, causal_conv_split

pytest.importorskip("triton")
from limbeck.ops import causal_conv_triton as kernels


def draw(length, *, b=2, widths=(5, 19), k=4, bias=True, state=False, documents=False, padding=False, device="cpu"):
    """Inputs in float64 and options; x is a slice of a wider projection, as in a mixer."""
    c = sum(widths)

    def normal(*shape):
        return torch.randn(shape, dtype=torch.float64, device=device)

    inputs = [
        normal(b, length, c + 3)[..., :c],
        normal(c, k),
        normal(c) if bias else None,
        normal(b, c, k - 1) if state else None,
    ]
    mask = torch.rand(b, length) < 0.7
    seq_idx = (torch.rand(b, length) < 8 / (8 + length)).int().cumsum(1)
    if padding:
        inputs[0][~mask] = math.nan
    return inputs, {
        "widths": widths,
        "seq_idx": seq_idx.to(device) if documents else None,
        "mask": mask.to(device) if padding else None,
    }


def run(inputs, dtype, readings=None, *, widths, **options):
    """The pieces, the state, and all gradients of a random linear function of them; only x and the state are narrow."""
    wide = torch.promote_types(dtype, torch.float32)
    leaves = []
    for tensor, to in zip(inputs, (dtype, wide, wide, dtype), strict=True):
        leaves.append(None if tensor is None else tensor.to(to).detach().requires_grad_())
    x, weight, bias, state = leaves
    pieces, last = causal_conv_split(x, weight, bias, widths, initial_state=state, return_state=True, **options)
    outputs = [tensor for tensor in (*pieces, last) if tensor.numel()]
    readings = readings or [torch.randn_like(tensor) for tensor in outputs]
    given = [leaf for leaf in leaves if leaf is not None and leaf.numel()]
    gradients = torch.autograd.grad(
        outputs, given, [reading.to(tensor.dtype) for reading, tensor in zip(readings, outputs, strict=True)]
    )
    return [*(tensor.detach() for tensor in outputs), *gradients], readings


def compare(drawn, dtype, tolerance, **more):
    """The kernels, on `dtype`, against the reference in float64 on the same rounded numbers."""
    inputs, options = drawn
    options = options | more
    inputs = [
        None if tensor is None else tensor.to(torch.float32 if i in (1, 2) else dtype).double()
        for i, tensor in enumerate(inputs)
    ]
    found, readings = run(inputs, dtype, backend="triton", **options)
    expected, _ = run(inputs, torch.float64, [reading.double() for reading in readings], backend="reference", **options)
    for i, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        assert ours.isfinite().all(), f"result {i} has something that is not finite"
        error = (ours.double() - theirs).norm() / theirs.norm().clamp_min(1e-30)
        assert error < tolerance, f"result {i}: relative error {error:.2e}"


@pytest.fixture
def spans(monkeypatch):
    """Programs of few channels and tokens, so that a small input has many, and the last ones are ragged."""
    monkeypatch.setattr(kernels, "launch_of", lambda x, silu, backward: kernels.Launch(8, 4, 8))


@pytest.mark.parametrize("activation", ["identity", "silu"])
@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("length", [1, 3, 21])
def test_the_kernels_are_the_reference(length, k, activation, poisoned):
    compare(draw(length, k=k, bias=k != 2), torch.float32, 1e-6, activation=activation)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"state": True}, {"documents": True}, {"padding": True}], ids=str)
def test_options(options, poisoned):
    compare(draw(19, **options), torch.float32, 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(("length", "k"), [(2, 4), (19, 4), (9, 8)])
def test_all_options_over_many_spans(length, k, spans, poisoned):
    drawn = draw(length, k=k, widths=(9, 3), state=True, documents=True, padding=True)
    compare(drawn, torch.float32, 1e-6, activation="silu")


def test_any_layout(spans, poisoned):
    inputs, options = draw(10, widths=(9, 3))
    inputs[0] = inputs[0].mT.contiguous().mT
    inputs[1] = inputs[1].mT.contiguous().mT
    compare((inputs, options), torch.float32, 1e-6)


def test_one_piece_is_all():
    (x, weight, bias, _), _ = draw(12)
    inputs = x.float(), weight.float(), bias.float()
    pieces, state = causal_conv_split(*inputs, (5, 19), backend="triton")
    assert state is None
    assert torch.equal(torch.cat(pieces, dim=-1), causal_conv(*inputs, backend="triton"))


def test_a_piece_that_nobody_reads_counts_for_nothing(poisoned):
    found = []
    (x, weight, bias, _), _ = draw(7)
    for backend in ("triton", "reference"):
        leaves = [tensor.float().requires_grad_() for tensor in (x, weight, bias)]
        (_, piece), _ = causal_conv_split(*leaves, (5, 19), backend=backend)
        found.append(torch.autograd.grad(piece.sum(), leaves))
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_the_operators_keep_torchs_rules():
    inputs, drawn = draw(3, b=1, widths=(3, 5), state=True, documents=True, padding=True)
    inputs = [tensor.float().nan_to_num().requires_grad_() for tensor in inputs]
    rest = drawn["seq_idx"], drawn["mask"], [3, 5], True
    torch.library.opcheck(torch.ops.limbeck.causal_conv.default, (*inputs, *rest))


def test_what_the_kernels_do_not_take_is_told():
    (x, weight, bias, _), _ = draw(4, k=9)
    with pytest.raises(LimbeckError, match=r"no Triton kernel for torch\.float64"):
        causal_conv(x, weight, bias, backend="triton")
    with pytest.raises(LimbeckError, match="no Triton kernel for 9 taps"):
        causal_conv(x.float(), weight.float(), bias.float(), backend="triton")


# --- on a GPU ---------------------------------------------------------------------------------------------------------

TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 1e-2, torch.float32: 1e-4}


@pytest.mark.gpu
@pytest.mark.parametrize("everything", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("length", [1, 63, 64, 500, 2048, 4097])
def test_errors_on_a_gpu(length, dtype, everything, poisoned):
    options = dict.fromkeys(("state", "documents", "padding"), everything)
    drawn = draw(length, widths=(320, 300, 64), device="cuda", **options)
    compare(drawn, dtype, TOLERANCE[dtype], activation="silu" if everything else "identity")


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "widths", "k"), [(torch.float16, (96,), 2), (torch.bfloat16, (2560,) * 3, 3)])
def test_other_widths_on_a_gpu(dtype, widths, k, poisoned):
    compare(draw(300, widths=widths, k=k, device="cuda"), dtype, TOLERANCE[dtype], activation="silu")


@pytest.mark.gpu
@pytest.mark.parametrize("activation", ["identity", "silu"])
def test_the_same_bits_on_every_run(activation, poisoned):
    inputs, options = draw(2048, b=4, widths=(2048,) * 3, device="cuda")
    first, readings = run(inputs, torch.bfloat16, backend="triton", activation=activation, **options)
    again, _ = run(inputs, torch.bfloat16, readings, backend="triton", activation=activation, **options)
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))


@pytest.mark.gpu
def test_auto_on_a_gpu_is_triton():
    (x, weight, bias, _), _ = draw(20, device="cuda")
    inputs = x.float(), weight.float(), bias.float()
    assert torch.equal(causal_conv(*inputs), causal_conv(*inputs, backend="triton"))
    assert torch.equal(causal_conv(x, weight, bias), causal_conv(x, weight, bias, backend="reference"))
