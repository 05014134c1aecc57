"""The kernels of `gated_skip` against its reference: in Triton's interpreter on a CPU, against float64 on a GPU."""

import pytest
import torch

from limbeck.errors import LimbeckError
from limbeck.ops import gated_skip

pytest.importorskip("triton")
from limbeck.ops import gated_skip_triton as kernels


def draw(length, *, b=2, h=3, p=5, skip=True, bias=True, device="cpu"):
    """y, x, D, z and z_bias in float64; y is whole, x and z are slices of one projection."""
    projected = torch.randn(b, length, 2 * h * p + 3, dtype=torch.float64, device=device)
    y, D, z_bias = (
        torch.randn(shape, dtype=torch.float64, device=device) for shape in ((b, length, h, p), (h,), (h * p,))
    )
    x, z = projected[..., : h * p].unflatten(-1, (h, p)), projected[..., h * p : 2 * h * p]
    return [y, x if skip else None, D if skip else None, z, z_bias if bias else None]


def run(inputs, dtype, reading=None, **options):
    """The output and all gradients of a random linear function of it; D and z_bias stay wide."""
    wide = torch.promote_types(dtype, torch.float32)
    leaves = [
        None if tensor is None else tensor.to(wide if i in (2, 4) else dtype).detach().requires_grad_()
        for i, tensor in enumerate(inputs)
    ]
    out = gated_skip(*leaves, **options)
    reading = torch.randn_like(out) if reading is None else reading.to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, [leaf for leaf in leaves if leaf is not None], reading)], reading


def compare(inputs, dtype, tolerance):
    """The kernels, on `dtype`, against the reference in float64 on the same rounded numbers."""
    inputs = [
        None if tensor is None else tensor.to(torch.float32 if i in (2, 4) else dtype).double()
        for i, tensor in enumerate(inputs)
    ]
    found, reading = run(inputs, dtype, backend="triton")
    expected, _ = run(inputs, torch.float64, reading, backend="reference")
    for i, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        assert ours.isfinite().all(), f"result {i} has something that is not finite"
        error = (ours.double() - theirs).norm() / theirs.norm().clamp_min(1e-30)
        assert error < tolerance, f"result {i}: relative error {error:.2e}"


@pytest.mark.parametrize(("skip", "bias"), [(True, True), (True, False), (False, True), (False, False)])
@pytest.mark.parametrize("length", [1, 13])
def test_the_kernels_are_the_reference(length, skip, bias, poisoned):
    compare(draw(length, skip=skip, bias=bias), torch.float32, 1e-6)


@pytest.mark.parametrize(("h", "p"), [(7, 1), (1, 8), (4, 16)])
def test_heads_and_widths_are_any(h, p, poisoned):
    compare(draw(9, h=h, p=p), torch.float32, 1e-6)


def test_many_spans(poisoned, monkeypatch):
    monkeypatch.setattr(kernels, "launch_of", lambda z, backward: kernels.Launch(8, 2, 4))
    compare(draw(11), torch.float32, 1e-6)


def test_any_layout(poisoned):
    y, x, D, z, z_bias = draw(6)
    compare([y.transpose(1, 2).contiguous().transpose(1, 2), x.mT.contiguous().mT, D, z, z_bias], torch.float32, 1e-6)
    compare([y, x, D, z.mT.contiguous().mT, z_bias], torch.float32, 1e-6)


@pytest.mark.filterwarnings("ignore:.*overflow encountered in exp:RuntimeWarning")  # as it should: 1 / inf is 0
def test_a_closed_gate_is_no_nan():
    y, x, D, z, z_bias = (tensor.float() for tensor in draw(4))
    found, _ = run([y, x, D, z.sign() * 1e4, z_bias], torch.float32, backend="triton")
    assert all(tensor.isfinite().all() for tensor in found)


@pytest.mark.slow
def test_the_operators_keep_torchs_rules():
    for options in ({}, {"skip": False, "bias": False}):
        flat = [
            tensor.flatten(2) if tensor is not None and tensor.ndim == 4 else tensor for tensor in draw(2, **options)
        ]
        inputs = [None if tensor is None else tensor.float().requires_grad_() for tensor in flat]
        torch.library.opcheck(torch.ops.limbeck.gated_skip.default, tuple(inputs))


def test_what_the_kernels_do_not_take_is_told():
    with pytest.raises(LimbeckError, match=r"no Triton kernel for torch\.float64"):
        gated_skip(*draw(4), backend="triton")


# --- on a GPU ---------------------------------------------------------------------------------------------------------

TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 1e-2, torch.float32: 1e-4}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("length", [1, 63, 64, 500, 2048, 4097])
def test_errors_on_a_gpu(length, dtype, poisoned):
    compare(draw(length, h=10, p=48, device="cuda"), dtype, TOLERANCE[dtype])


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("dtype", "h", "p", "options"),
    [
        (torch.float16, 5, 9, {}),
        (torch.bfloat16, 1280, 1, {"bias": False}),
        (torch.bfloat16, 16, 64, {"skip": False}),
        (torch.bfloat16, 32, 80, {"bias": False}),
    ],
)
def test_other_widths_on_a_gpu(dtype, h, p, options, poisoned):
    compare(draw(300, h=h, p=p, device="cuda", **options), dtype, TOLERANCE[dtype])


@pytest.mark.gpu
def test_the_same_bits_on_every_run(poisoned):
    inputs = draw(2048, b=4, h=32, p=64, device="cuda")
    first, reading = run(inputs, torch.bfloat16, backend="triton")
    again, _ = run(inputs, torch.bfloat16, reading, backend="triton")
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
