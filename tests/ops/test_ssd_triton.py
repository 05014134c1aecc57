"""The kernels of `ssd` against its reference: in Triton's interpreter on a CPU, against float64 on a GPU."""

import pytest
import torch
import torch.nn.functional as F

from limbeck.ops import ssd
from limbeck.ops.ssd_reference import ssd_recurrent

pytest.importorskip("triton")
NAMES = ("y", "state", "dx", "dlog_decay", "dB", "dC", "dinitial_state")


def draw(b=2, l=40, h=2, g=2, p=16, n=16, *, strength=1.0, state=True, device="cpu"):
    """x, log decay, B, C and an initial state in float64; x, B and C are slices of one projection, as in a mixer."""
    projected = torch.randn(b, l, h * p + 2 * g * n, dtype=torch.float64, device=device)
    x, B, C = projected.split([h * p, g * n, g * n], dim=-1)
    log_decay = -strength * torch.rand(b, l, h, dtype=torch.float64, device=device) ** 2
    initial = torch.randn(b, h, p, n, dtype=torch.float64, device=device) if state else None
    return x.unflatten(-1, (h, p)), log_decay, B.unflatten(-1, (g, n)) / n**0.5, C.unflatten(-1, (g, n)), initial


def run(inputs, dtype, weights=None, **options):
    """y, the state and all gradients of a random linear function of both; log decays and states stay wide."""
    x, log_decay, B, C, initial = inputs
    wide = torch.promote_types(dtype, torch.float32)
    narrow = [x.to(dtype), log_decay.to(wide), B.to(dtype), C.to(dtype)]
    leaves = [t.detach().requires_grad_() for t in [*narrow, *([] if initial is None else [initial.to(wide)])]]
    y, last = ssd(*leaves[:4], initial_state=leaves[4] if len(leaves) > 4 else None, return_state=True, **options)
    weights = weights or (torch.randn_like(y), torch.randn_like(last))
    gradients = torch.autograd.grad((y, last), leaves, [w.to(t.dtype) for w, t in zip(weights, (y, last), strict=True)])
    return [y.detach(), last.detach(), *gradients], weights


def compare(inputs, dtype, tolerance, **options):
    """The kernels, on `dtype`, against the reference in float64 on the same rounded numbers."""
    rounded = [None if t is None else t.to(dtype).double() for t in inputs]
    rounded[1] = inputs[1].float().double()
    expected, weights = run(rounded, torch.float64, backend="reference", **options)
    weights = [w.to(dtype if i == 0 else torch.float32).double() for i, w in enumerate(weights)]
    expected, _ = run(rounded, torch.float64, weights, backend="reference", **options)
    found, _ = run(rounded, dtype, weights, backend="triton", **options)
    for name, ours, theirs in zip(NAMES, found, expected, strict=False):
        assert ours.isfinite().all(), name
        error = (ours.double() - theirs).norm() / theirs.norm().clamp_min(1e-30)
        assert error < tolerance, f"{name}: relative error {error:.2e}"


@pytest.fixture
def segments(monkeypatch):
    """Cut sequences as a card with very many multiprocessors would have it."""
    from limbeck.ops import cards

    monkeypatch.setattr(cards, "INTERPRETER", cards.INTERPRETER._replace(multiprocessors=1000))


@pytest.mark.parametrize("length", [1, 16, 63, 70])
def test_the_kernels_are_the_reference(length, poisoned):
    compare(draw(l=length), torch.float32, 1e-6)


def test_documents_do_not_see_each_other(poisoned):
    seq_idx = (torch.rand(2, 70) < 0.1).long().cumsum(1)
    compare(draw(l=70), torch.float32, 1e-6, seq_idx=seq_idx)


@pytest.mark.parametrize("documents", [False, True])
def test_a_sequence_in_segments_is_the_sequence(documents, poisoned, segments):
    seq_idx = (torch.rand(1, 150) < 0.02).long().cumsum(1) if documents else None
    compare(draw(b=1, l=150, strength=0.2), torch.float32, 1e-6, seq_idx=seq_idx)


@pytest.mark.parametrize(("h", "g", "p", "n"), [(2, 1, 16, 16), (4, 2, 40, 24), (1, 1, 8, 20)])
def test_heads_share_groups_and_widths_are_any(h, g, p, n, poisoned):
    compare(draw(b=1, l=37, h=h, g=g, p=p, n=n), torch.float32, 1e-6)


@pytest.mark.parametrize("strength", [1e-3, 30.0, 300.0])
def test_weak_and_strong_decays(strength, poisoned):
    compare(draw(b=1, l=70, strength=strength), torch.float32, 1e-6)


def test_what_is_forgotten_leaves_no_nan():
    x, log_decay, B, C, initial = draw(b=1, l=33)
    log_decay[:, ::5] = -torch.inf
    compare((x, log_decay, B, C, initial), torch.float32, 1e-6)


def test_without_a_state():
    x, log_decay, B, C, _ = (None if t is None else t.float() for t in draw(l=20, state=False))
    y = ssd(x, log_decay, B, C, backend="triton")
    expected, _ = ssd_recurrent(x, log_decay, B, C)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)


def test_the_state_alone_may_be_used():
    inputs = [t.float().requires_grad_() for t in draw(l=20)]
    for backend in ("triton", "reference"):
        _, last = ssd(*inputs[:4], initial_state=inputs[4], return_state=True, backend=backend)
        found = torch.autograd.grad(last.square().sum(), inputs, materialize_grads=True)
        if backend == "triton":
            ours = found
    torch.testing.assert_close(ours, found, rtol=1e-5, atol=1e-4)


@pytest.mark.slow
def test_the_operator_keeps_what_it_promises_to_compilers():
    from limbeck.ops import ssd_triton as _  # noqa: F401

    inputs = [t.float().requires_grad_() for t in draw(b=1, l=20)]
    fresh = torch.zeros(1, 20, dtype=torch.bool)
    for arguments in ((*inputs, fresh, True), (*inputs[:4], None, None, True)):
        torch.library.opcheck(torch.ops.limbeck.ssd_triton.default, arguments)


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 1e-2), (torch.float16, 1e-2), (torch.float32, 1e-4)])
@pytest.mark.parametrize("length", [1, 63, 64, 500, 2048, 4097])
def test_on_a_gpu_the_kernels_are_float64s(length, dtype, tolerance, poisoned):
    compare(draw(b=2, l=length, h=4, g=4, p=64, n=64, device="cuda", strength=0.5), dtype, tolerance)


@pytest.mark.gpu
@pytest.mark.parametrize("strength", [1e-3, 20.0, 100.0])
@pytest.mark.parametrize("batch", [1, 300])
def test_on_a_gpu_weak_and_strong_decays(strength, batch, poisoned):
    compare(draw(b=batch, l=500, h=1, g=1, p=64, n=64, device="cuda", strength=strength), torch.bfloat16, 1e-2)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("h", "g", "p", "n"),
    [
        (4, 1, 64, 128),
        (2, 2, 80, 80),
        (2, 1, 96, 96),
        (2, 2, 32, 16),
        (2, 2, 128, 128),
        (1, 1, 256, 256),
        (2, 2, 64, 32),
    ],
)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 1e-2), (torch.float32, 1e-4)])
def test_on_a_gpu_all_widths(h, g, p, n, dtype, tolerance, poisoned):
    seq_idx = (torch.rand(2, 500, device="cuda") < 0.01).long().cumsum(1)
    compare(draw(b=2, l=500, h=h, g=g, p=p, n=n, device="cuda"), dtype, tolerance, seq_idx=seq_idx)


@pytest.mark.gpu
def test_on_a_gpu_every_run_gives_the_same_bits():
    inputs = draw(b=2, l=2048, h=4, g=2, p=64, n=64, device="cuda")
    first, weights = run(inputs, torch.bfloat16, backend="triton")
    second, _ = run(inputs, torch.bfloat16, weights, backend="triton")
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


@pytest.mark.gpu
def test_on_a_gpu_the_door_chooses_the_kernels(monkeypatch):
    from limbeck.ops import ssd_triton

    x, log_decay, B, C, _ = (None if t is None else t.to("cuda", torch.float32) for t in draw(state=False))
    monkeypatch.setattr(ssd_triton, "ssd_triton", lambda *_: (x, None))
    assert ssd(x, log_decay, B, C) is x
    assert ssd(*(F.pad(t, (0, 0)).double() for t in (x, log_decay, B, C))).dtype == torch.float64
