"""The kernels of `selective_scan` against its reference: in Triton's interpreter on a CPU, against float64 on a GPU."""

import pytest
import torch
import torch.nn.functional as F

from limbeck.errors import LimbeckError
from limbeck.mixers import Mamba
from limbeck.ops import selective_scan

pytest.importorskip("triton")
NAMES = ("y", "state", "dx", "ddelta", "dA", "dB", "dC", "dinitial_state")


def draw(b=2, l=19, c=32, n=16, *, strength=1.0, state=True, device="cpu"):
    """x, Δ, A, B, C and an initial state in float64; x, B and C are slices of one projection."""
    projected = torch.randn(b, l, c + 2 * n, dtype=torch.float64, device=device)
    x, B, C = projected.split([c, n, n], dim=-1)
    delta = F.softplus(torch.randn(b, l, c, dtype=torch.float64, device=device) - 2)
    A = (
        -strength
        * torch.arange(1, n + 1, dtype=torch.float64, device=device)
        * torch.rand(c, n, device=device).double()
    )
    initial = torch.randn(b, c, n, dtype=torch.float64, device=device) if state else None
    return x, delta, A, B, C, initial


def rounded(inputs, dtype):
    """The numbers as the kernels get them: x, B and C in `dtype`, still slices of one tensor; the others in float32."""
    x, delta, A, B, C, initial = inputs
    x, B, C = torch.cat([x, B, C], dim=-1).to(dtype).split([x.shape[-1], B.shape[-1], C.shape[-1]], dim=-1)
    return [x, delta.float(), A.float(), B, C, None if initial is None else initial.float()]


def run(inputs, weights, **options):
    """y, the state and all gradients of a linear function of both."""
    leaves = [None if tensor is None else tensor.detach().requires_grad_() for tensor in inputs]
    y, last = selective_scan(*leaves[:5], initial_state=leaves[5], return_state=True, **options)
    weights = [weight.to(out.dtype) for weight, out in zip(weights, (y, last), strict=True)]
    gradients = torch.autograd.grad((y, last), [leaf for leaf in leaves if leaf is not None], weights)
    return [y.detach(), last.detach(), *gradients]


def draw_weights(inputs, dtype):
    x, _, A, *_ = inputs
    return torch.randn_like(x).to(dtype).double(), torch.randn(len(x), *A.shape, device=x.device).double()


def compare(inputs, dtype, tolerance, **options):
    """The kernels, on `dtype`, against the reference in float64 on the same numbers."""
    narrow, weights = rounded(inputs, dtype), draw_weights(inputs, dtype)
    wide = [None if tensor is None else tensor.double() for tensor in narrow]
    expected = run(wide, weights, backend="reference", **options)
    found = run(narrow, weights, backend="triton", **options)
    for name, ours, theirs in zip(NAMES, found, expected, strict=False):
        assert ours.shape == theirs.shape, name
        assert ours.isfinite().all(), name
        error = (ours.double() - theirs).norm() / theirs.norm().clamp_min(1e-30)
        assert error < tolerance, f"{name}: relative error {error:.2e}"
    assert [tensor.dtype for tensor in found[2:]] == [tensor.dtype for tensor in narrow if tensor is not None]


def launch_with(monkeypatch, **changes):
    """Launch the kernels otherwise."""
    from limbeck.ops import selective_scan_triton

    launch = selective_scan_triton.launch_for
    monkeypatch.setattr(selective_scan_triton, "launch_for", lambda x: launch(x)._replace(**changes))


@pytest.mark.parametrize("length", [1, 7, 8, 19])
def test_the_kernels_are_the_reference(length, poisoned):
    compare(draw(l=length), torch.float32, 1e-6)


@pytest.mark.parametrize("length", [9, 16, 35])
def test_fewer_states_may_be_kept(length, poisoned, monkeypatch):
    launch_with(monkeypatch, tiles_kept=2)
    compare(draw(b=1, l=length), torch.float32, 1e-6)


@pytest.mark.parametrize("changes", [{"product": "tf32"}, {"tile": 4}], ids=str)
def test_other_launches_give_the_same(changes, poisoned, monkeypatch):
    launch_with(monkeypatch, **changes)
    compare(draw(b=1, l=11), torch.float32, 1e-6)


@pytest.mark.parametrize("state", [False, True])
def test_documents_do_not_see_each_other(state, poisoned):
    seq_idx = (torch.rand(2, 19) < 0.2).long().cumsum(1)
    compare(draw(state=state), torch.float32, 1e-6, seq_idx=seq_idx)


@pytest.mark.parametrize(("c", "n"), [(5, 3), (33, 8), (20, 10), (19, 24), (6, 33), (4, 64)])
def test_widths_are_any(c, n, poisoned):
    compare(draw(b=1, l=10, c=c, n=n), torch.float32, 1e-6)


@pytest.mark.parametrize("strength", [1e-3, 30.0, 1e3])
def test_weak_and_strong_decays(strength, poisoned):
    compare(draw(b=1, strength=strength), torch.float32, 1e-6)


@pytest.mark.parametrize("largest", [1e38, 3e38, torch.inf])
def test_what_is_forgotten_leaves_no_nan(largest):
    x, delta, A, B, C, initial = rounded(draw(b=1), torch.float32)
    A = torch.full_like(A, -largest)
    found = run((x, delta, A, B, C, initial), draw_weights((x, delta, A), torch.float32), backend="triton")
    torch.testing.assert_close(found[0], delta * x * (B * C).sum(-1, keepdim=True))
    assert all(tensor.isfinite().all() for tensor in found)


def test_a_nan_in_a_decay_is_not_hidden():
    x, delta, A, B, C, _ = rounded(draw(b=1, state=False), torch.float32)
    A[0, 0] = torch.nan
    y = selective_scan(x, delta, A, B, C, backend="triton")
    assert y[..., 0].isnan().all()
    assert y[..., 1:].isfinite().all()


def test_a_step_of_zero_leaves_no_trace():
    x, delta, A, B, C, initial = rounded(draw(), torch.float32)
    _, last = selective_scan(
        x, torch.zeros_like(delta), A, B, C, initial_state=initial, return_state=True, backend="triton"
    )
    assert torch.equal(last, initial)


@pytest.mark.slow
@pytest.mark.parametrize("part", [0, 1])
def test_outputs_alone_or_the_state_alone_may_be_used(part):
    inputs = [tensor.requires_grad_() for tensor in rounded(draw(b=1), torch.float32)]
    found, expected = (
        torch.autograd.grad(
            selective_scan(*inputs[:5], initial_state=inputs[5], return_state=True, backend=backend)[part]
            .square()
            .sum(),
            inputs,
            materialize_grads=True,
        )
        for backend in ("triton", "reference")
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_inputs_and_gradients_may_be_strided():
    x, delta, A, B, C, _ = rounded(draw(b=1, state=False), torch.float32)
    inputs = [t.mT.contiguous().mT.requires_grad_() for t in (x, delta, A, B, C)]
    found, expected = (
        torch.autograd.grad(selective_scan(*inputs, backend=backend).sum(), inputs)
        for backend in ("triton", "reference")
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_no_state_is_kept_without_gradients():
    from limbeck.ops.selective_scan_triton import _scan

    x, delta, A, B, C, _ = rounded(draw(b=1, state=False), torch.float32)
    *_, kept = _scan(x, delta, A, B, C, None, None, False)
    assert kept.numel() == 0


def test_wider_states_go_to_the_reference():
    x, delta, A, B, C, _ = rounded(draw(b=1, l=3, c=2, n=65, state=False), torch.float32)
    assert selective_scan(x, delta, A, B, C).shape == x.shape
    with pytest.raises(LimbeckError, match="no Triton kernel for d_state 65"):
        selective_scan(x, delta, A, B, C, backend="triton")


@pytest.mark.slow
def test_the_operator_keeps_what_it_promises_to_compilers():
    from limbeck.ops import selective_scan_triton as _  # noqa: F401

    inputs = [tensor.requires_grad_() for tensor in rounded(draw(b=1, l=9, c=16), torch.float32)]
    resets = torch.zeros(1, 9)
    for arguments in ((*inputs, resets, True), (*inputs[:5], None, None, True)):
        torch.library.opcheck(torch.ops.limbeck.selective_scan_triton.default, arguments)


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 1e-2), (torch.float32, 1e-4)])
@pytest.mark.parametrize("length", [1, 63, 64, 500, 2048, 4097])
def test_on_a_gpu_the_kernels_are_float64s(length, dtype, tolerance, poisoned):
    compare(draw(b=2, l=length, c=160, device="cuda"), dtype, tolerance)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("c", "n", "dtype", "tolerance"),
    [
        (33, 8, torch.float16, 1e-2),
        (100, 24, torch.float32, 1e-4),
        (64, 32, torch.bfloat16, 1e-2),
        (40, 64, torch.float32, 1e-4),
    ],
)
def test_on_a_gpu_all_widths_and_documents(c, n, dtype, tolerance, poisoned):
    seq_idx = (torch.rand(2, 205, device="cuda") < 0.02).long().cumsum(1)
    compare(draw(b=2, l=205, c=c, n=n, device="cuda"), dtype, tolerance, seq_idx=seq_idx)


@pytest.mark.gpu
@pytest.mark.parametrize("strength", [1e-3, 30.0, 1e3])
def test_on_a_gpu_weak_and_strong_decays(strength, poisoned):
    compare(draw(l=500, c=160, strength=strength, device="cuda"), torch.bfloat16, 1e-2)


@pytest.mark.gpu
def test_on_a_gpu_fewer_states_may_be_kept(poisoned, monkeypatch):
    launch_with(monkeypatch, tiles_kept=2, product="bf16")
    compare(draw(l=203, c=160, device="cuda"), torch.bfloat16, 1e-2)


@pytest.mark.gpu
def test_on_a_gpu_every_run_gives_the_same_bits():
    inputs = draw(l=2048, c=160, device="cuda")
    weights = draw_weights(inputs, torch.bfloat16)
    first, second = (run(rounded(inputs, torch.bfloat16), weights, backend="triton") for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


@pytest.mark.gpu
def test_on_a_gpu_the_mixer_uses_the_kernels(monkeypatch):
    from limbeck.ops import selective_scan_triton

    calls = []
    kernels = selective_scan_triton.selective_scan_triton
    monkeypatch.setattr(
        selective_scan_triton, "selective_scan_triton", lambda *inputs: calls.append(inputs) or kernels(*inputs)
    )
    mixer = Mamba(64).cuda()
    hidden_states = torch.randn(2, 70, 64, device="cuda")
    found = mixer(hidden_states)
    torch.testing.assert_close(found, mixer.double()(hidden_states.double()).float(), rtol=1e-3, atol=1e-4)
    assert len(calls) == 1
