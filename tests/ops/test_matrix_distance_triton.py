"""The kernels of `matrix_distance` against its reference: in Triton's interpreter on a CPU, in float64 on a GPU."""

from contextlib import contextmanager

import pytest
import torch

from limbeck.ops import matrix_distance

pytest.importorskip("triton")
NAMES = ("distance", "dlog_decay", "dB", "dC", "dD")


def draw(b=2, l=40, h=2, h_kv=1, g=1, d=16, n=16, *, strength=1.0, device="cpu"):
    """query, key, log_decay, B, C, D in float64; as in a model, query and key are views, B and C slices."""
    query, key = (
        torch.randn(b, l, heads, d, dtype=torch.float64, device=device).transpose(1, 2) for heads in (h, h_kv)
    )
    projected = torch.randn(b, l, 3 * g * n, dtype=torch.float64, device=device) * n**-0.25
    B, C, _ = (part.unflatten(-1, (g, n)) for part in projected.chunk(3, dim=-1))
    log_decay = -strength * torch.rand(b, l, h, dtype=torch.float64, device=device) ** 2
    return query, key, log_decay, B, C, torch.randn(h, dtype=torch.float64, device=device)


def run(inputs, weight, **options):
    """The distances, and the gradients of a weighted sum of them."""
    query, key, *learned = inputs
    leaves = [None if t is None else t.detach().requires_grad_() for t in learned]
    distance = matrix_distance(query, key, *leaves, **options)
    wanted = [leaf for leaf in leaves if leaf is not None]
    return [distance.detach(), *torch.autograd.grad((distance * weight).sum(), wanted)]


@contextmanager
def memory_as_it_comes():
    """Not as the fixture `poisoned` has it: with deterministic algorithms, torch's cumsum is quadratic in memory."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)
    yield
    torch.use_deterministic_algorithms(before, warn_only=True)


def compare(inputs, dtype, tolerance, *, mixer=None, **options):
    """The kernels, with q and k in `dtype` and B and C in `mixer`, against float64 on the same rounded numbers."""
    dtypes = (dtype, dtype, torch.float32, mixer or dtype, mixer or dtype, torch.float32)
    narrow = [None if t is None else t.to(to) for t, to in zip(inputs, dtypes, strict=True)]
    weight = torch.rand(inputs[0].shape[:2], device=inputs[0].device)
    found = run(narrow, weight, backend="triton", **options)
    wide = [None if t is None else t.double() for t in narrow]
    with memory_as_it_comes():
        expected = run(wide, weight.double(), backend="reference", **options)
    for name, ours, theirs in zip(NAMES, found, expected, strict=False):
        assert ours.isfinite().all(), name
        error = (ours.double() - theirs).norm() / theirs.norm().clamp_min(1e-30)
        assert error < tolerance, f"{name}: relative error {error:.2e}"


@pytest.fixture
def small_tiles(monkeypatch):
    """Many tiles in a short sequence."""
    from limbeck.ops import matrix_distance_triton as kernels

    tiles = kernels.Launch(32, 16, 4, 1)
    monkeypatch.setattr(kernels, "launches", lambda *_: (tiles, tiles))


@pytest.mark.parametrize("length", [1, 16, 63, 70])
def test_the_kernels_are_the_reference(length, poisoned, small_tiles):
    compare(draw(l=length), torch.float32, 2e-6)


def test_the_tiles_that_a_gpu_takes(poisoned):
    compare(draw(b=1, l=150), torch.float32, 2e-6)


OPTIONS = {
    "window": {"sliding_window": 20},
    "window of one": {"sliding_window": 1},
    "softcap": {"softcap": 1.5, "scale": 0.7},
    "padding": {"attention_mask": torch.cat([torch.zeros(2, 5), torch.ones(2, 60), torch.zeros(2, 5)], dim=1)},
    "documents": {"seq_idx": (torch.arange(70) >= torch.tensor([[13], [32]])).long() * 3},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", [*OPTIONS, "all"])
def test_options(name, poisoned, small_tiles):
    options = {key: value for each in OPTIONS.values() for key, value in each.items()} | {"sliding_window": 20}
    compare(draw(l=70), torch.float32, 2e-6, **(options if name == "all" else OPTIONS[name]))


@pytest.mark.parametrize(("h", "h_kv", "g", "d", "n"), [(4, 2, 4, 16, 16), (4, 4, 2, 40, 24), (2, 1, 1, 8, 20)])
def test_heads_share_and_widths_are_any(h, h_kv, g, d, n, poisoned, small_tiles):
    compare(draw(b=1, l=37, h=h, h_kv=h_kv, g=g, d=d, n=n), torch.float32, 2e-6)


@pytest.mark.slow
@pytest.mark.parametrize("strength", [1e-3, 3.0, 300.0])
def test_what_is_forgotten_and_what_is_not(strength, poisoned, small_tiles):
    """At 270 tokens whole blocks are out of the mixer's memory when it decays fast."""
    compare(draw(b=1, l=270, h=1, strength=strength), torch.float32, 5e-6)


def test_a_decay_of_minus_infinity_leaves_no_nan(poisoned, small_tiles):
    query, key, log_decay, B, C, D = draw(l=70)
    log_decay[:, ::9] = -torch.inf
    compare((query, key, log_decay, B, C, D), torch.float32, 2e-6)


def test_without_d(poisoned, small_tiles):
    compare((*draw()[:5], None), torch.float32, 2e-6)


def test_nan_at_padding_is_not_seen_and_elsewhere_it_is(small_tiles):
    query, key, *others = (t.float() for t in draw(l=40))
    mask = torch.ones(2, 40)
    mask[:, :7] = 0
    expected = matrix_distance(query, key, *others, attention_mask=mask, backend="triton")
    query, key = query.clone(), key.clone()
    query[:, :, :7], key[:, :, :7] = torch.nan, torch.nan
    assert torch.equal(matrix_distance(query, key, *others, attention_mask=mask, backend="triton"), expected)
    key[0, 0, 9] = torch.nan
    found = matrix_distance(query, key, *others, attention_mask=mask, backend="triton")
    assert found[0].isnan().all()
    assert torch.equal(found[1], expected[1])


def test_only_the_value_where_nothing_learns(poisoned, small_tiles):
    inputs = [t.float() for t in draw()]
    expected = matrix_distance(*inputs, backend="reference")
    torch.testing.assert_close(matrix_distance(*inputs, backend="triton"), expected)
    inputs[3].requires_grad_()
    with torch.no_grad():
        torch.testing.assert_close(matrix_distance(*inputs, backend="triton"), expected)
    (gradient,) = torch.autograd.grad(matrix_distance(*inputs, backend="triton").sum(), inputs[3])
    (theirs,) = torch.autograd.grad(matrix_distance(*inputs, backend="reference").sum(), inputs[3])
    torch.testing.assert_close(gradient, theirs)


def test_the_gradient_at_the_corner_is_zero(small_tiles):
    query, key, log_decay, B, C, D = (t.float() for t in draw())
    inputs = query, key, log_decay, torch.zeros_like(B), C, torch.ones_like(D)
    distance, *gradients = run(inputs, 1.0, sliding_window=1, backend="triton")
    assert not distance.any()
    assert not any(gradient.any() for gradient in gradients)


@pytest.mark.slow
def test_the_operator_keeps_what_it_promises_to_compilers(small_tiles):
    query, key, *learned = (t.float() for t in draw(b=1, l=20))
    learned = [t.contiguous().requires_grad_() for t in learned]
    tokens, seq_idx = torch.ones(1, 20, dtype=torch.bool), torch.zeros(1, 20, dtype=torch.long)
    operator = torch.ops.limbeck.matrix_distance_triton.default
    torch.library.opcheck(operator, (query, key, *learned, tokens, seq_idx, 0.3, 4, 2.0, True))
    arguments = (query, key, *(t.detach() for t in learned), None, None, 0.3, None, None, False)
    torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))
    torch.library.opcheck(
        torch.ops.limbeck.matrix_distance_triton_scale.default, (torch.randn(1, 20, 4, 16), torch.rand(1, 4), 2)
    )


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (9, 0), (10, 0)])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_every_width_has_a_launch_whose_tiles_divide_a_block(capability, itemsize):
    from limbeck.ops import matrix_distance_triton as kernels
    from limbeck.ops.cards import Card

    card = Card(capability, {(8, 0): 166912, (8, 6): 101376}.get(capability, 232448), 100)
    for K in (16, 64, 128, 256):
        for N in (16, 64, 128, 256):
            normaliser, walks = kernels.launches(K, N, itemsize, card)
            for launch in (normaliser, walks):
                assert kernels.BLOCK % launch.own == launch.own % launch.walk == 0
            assert walks.fits(K, N, itemsize, card) or walks.own == 16


# --- on a GPU ---------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 1e-2), (torch.float16, 1e-2), (torch.float32, 1e-4)])
@pytest.mark.parametrize("length", [1, 63, 64, 500, 2048, 4097])
def test_on_a_gpu_the_kernels_are_float64s(length, dtype, tolerance, poisoned):
    inputs = draw(b=2 if length < 4000 else 1, l=length, h=2, h_kv=2, g=2, d=64, n=64, strength=0.1, device="cuda")
    compare(inputs, dtype, tolerance)


@pytest.mark.gpu
@pytest.mark.parametrize("strength", [1e-4, 3.0, 100.0])
def test_on_a_gpu_weak_and_strong_decays(strength, poisoned):
    inputs = draw(b=1, l=1500, d=64, n=64, strength=strength, device="cuda")
    compare(inputs, torch.bfloat16, 1e-2)
    compare(inputs, torch.float32, 1e-4)


def gpu_options():
    """All of them at once, over 700 tokens."""
    mask = torch.ones(2, 700)
    mask[0, :37], mask[1, -50:] = 0, 0
    seq_idx = (torch.rand(2, 700) < 0.005).long().cumsum(1)
    tensors = {"attention_mask": mask.cuda(), "seq_idx": seq_idx.cuda()}
    return tensors | {"sliding_window": 300, "softcap": 4.0, "scale": 0.2}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("mixer", [torch.bfloat16, torch.float32])
def test_on_a_gpu_all_options_and_mixed_types(dtype, mixer, poisoned):
    inputs = draw(l=700, h=4, h_kv=2, g=1, d=64, n=64, strength=0.1, device="cuda")
    tolerance = 1e-2 if torch.bfloat16 in (dtype, mixer) else 1e-4
    compare(inputs, dtype, tolerance, mixer=mixer, **gpu_options())


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["attention_mask", "seq_idx", "sliding_window", "softcap"])
def test_on_a_gpu_every_option(name, poisoned):
    inputs = draw(l=700, h=4, h_kv=2, g=2, d=64, n=64, strength=0.1, device="cuda")
    compare(inputs, torch.bfloat16, 1e-2, **{name: gpu_options()[name]})


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("d", "n", "dtype"),
    [
        (80, 80, torch.bfloat16),
        (64, 128, torch.bfloat16),
        (128, 128, torch.bfloat16),
        (256, 256, torch.bfloat16),
        (16, 32, torch.float32),
        (96, 96, torch.float32),
        (256, 256, torch.float32),
    ],
)
def test_on_a_gpu_all_widths(d, n, dtype, poisoned):
    inputs = draw(b=1, l=500, d=d, n=n, strength=0.1, device="cuda")
    compare(inputs, dtype, 1e-2 if dtype == torch.bfloat16 else 1e-4)


@pytest.mark.gpu
def test_on_a_gpu_every_run_gives_the_same_bits():
    inputs = [t.bfloat16() for t in draw(l=2048, h=8, h_kv=8, g=4, d=64, n=64, strength=0.1, device="cuda")]
    inputs[2], inputs[5] = inputs[2].float(), inputs[5].float()
    runs = [run(inputs, 1.0) for _ in range(3)]
    assert all(torch.equal(a, b) for again in runs[1:] for a, b in zip(runs[0], again, strict=True))


@pytest.mark.gpu
def test_on_a_gpu_no_matrix_is_stored():
    l = 16384
    inputs = [t.bfloat16() for t in draw(b=1, l=l, h=4, h_kv=4, g=4, d=64, n=64, device="cuda")]
    inputs[2], inputs[5] = inputs[2].float(), inputs[5].float()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run(inputs, 1.0)
    assert torch.cuda.max_memory_allocated() - before < l * l / 4
