"""`gated_skip`: its formula, and what it refuses."""

import pytest
import torch

from limbeck.errors import LimbeckError
from limbeck.ops import gated_skip


def draw(b=2, l=5, h=3, p=4, dtype=torch.float64):
    """y, x, D, z, z_bias."""
    shapes = (b, l, h, p), (b, l, h, p), (h,), (b, l, h * p), (h * p,)
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_is_the_formula(skip, bias):
    y, x, D, z, z_bias = draw()
    found = gated_skip(y, x if skip else None, D if skip else None, z, z_bias if bias else None)
    for head in range(3):
        channels = slice(4 * head, 4 * head + 4)
        s = y[:, :, head] + (D[head] * x[:, :, head] if skip else 0)
        gate = z[..., channels] + (z_bias[channels] if bias else 0)
        torch.testing.assert_close(found[..., channels], s * gate * torch.sigmoid(gate))


def test_the_gradient():
    assert torch.autograd.gradcheck(gated_skip, draw())


def test_narrow_types_are_computed_wide():
    y, x, D, z, z_bias = draw(dtype=torch.float32)
    narrow = y.bfloat16(), x.bfloat16(), D, z.bfloat16(), z_bias
    found = gated_skip(*narrow)
    assert found.dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(gated_skip(*narrow), found)
    assert torch.equal(gated_skip(*(tensor.float() for tensor in narrow)).bfloat16(), found)


def test_bad_input_is_told():
    y, x, D, z, z_bias = draw()
    for inputs, message in (
        ((y, x[:, :-1], D, z), "x of shape"),
        ((y, x, D[:-1], z), "D of shape"),
        ((y, x, D, z[..., :-1]), "z of width 11"),
        ((y, x, D, z, z_bias[:-1]), "z_bias of shape"),
        ((y, x, None, z), "x or D alone"),
    ):
        with pytest.raises(LimbeckError, match=message):
            gated_skip(*inputs)
    with pytest.raises(LimbeckError, match="unknown backend"):
        gated_skip(y, x, D, z, backend="cuda")
