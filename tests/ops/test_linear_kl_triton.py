"""The head in chunks against its reference: in Triton's interpreter on a CPU, against float64 on a GPU."""

import pytest
import torch

from limbeck import LimbeckError
from limbeck.ops import Head, linear_kl

pytest.importorskip("triton")
from limbeck.ops import linear_kl_triton as kernels

NAMES = ("loss", "kl", "ce", "dstates", "dweight", "dbias")
BOTH = {"kl_weight": 0.7, "ce_weight": 0.4}


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of 16 tokens, blocks of 64 logits."""
    monkeypatch.setattr(kernels, "LOGITS", 1)
    monkeypatch.setattr(kernels, "LEAST_CHUNK", 16)
    monkeypatch.setattr(kernels, "BLOCK", 64)


def draw(b=2, l=11, d=16, v=67, e=24, w=67, *, bias=True, device="cpu", **forms):
    """Student, teacher, labels and tokens, in float64; logits are of the size of a trained model's."""

    def normal(*shape):
        return torch.randn(*shape, dtype=torch.float64, device=device)

    states, teacher_states = normal(b, l, d), normal(b, l, e)
    student, teacher = (
        Head(normal(size, width) * 3 / width**0.5, normal(size) if bias else None, **forms)
        for size, width in ((v, d), (w, e))
    )
    labels = torch.randint(0, v, (b, l), device=device)
    labels[torch.rand(b, l, device=device) < 0.2] = -100
    return states, student, teacher_states, teacher, labels, torch.rand(b, l, device=device) < 0.8


def cast(inputs, dtype):
    """The inputs in a number type; student and teacher apart."""
    states, student, teacher_states, teacher, *rest = inputs
    heads = [
        head._replace(weight=head.weight.to(dtype), bias=None if head.bias is None else head.bias.to(dtype))
        for head in (student, teacher)
    ]
    return states.to(dtype), heads[0], teacher_states.to(dtype), heads[1], *rest


def run(inputs, factor=3.0, **options):
    """Losses, and the gradients of `factor` times the loss."""
    states, student, teacher_states, teacher, labels, tokens = inputs
    leaves = [None if t is None else t.detach().requires_grad_() for t in (states, student.weight, student.bias)]
    head = student._replace(weight=leaves[1], bias=leaves[2])
    losses = linear_kl(leaves[0], head, teacher_states, teacher, labels=labels, tokens=tokens, **(BOTH | options))
    gradients = torch.autograd.grad(losses.loss * factor, [leaf for leaf in leaves if leaf is not None])
    return [losses.loss.detach(), losses.kl, losses.ce, *gradients]


def compare(inputs, dtype, tolerance, **options):
    """The kernels, on `dtype`, against the reference in float64 on the same rounded numbers."""
    rounded = cast(inputs, dtype)
    found = run(rounded, backend="triton", **options)
    expected = run(cast(rounded, torch.float64), backend="reference", **options)
    for name, ours, theirs in zip(NAMES, found, expected, strict=False):
        if theirs is None:
            assert ours is None, name
            continue
        assert ours.isfinite().all(), name
        error = (ours.double() - theirs).norm() / theirs.norm().clamp_min(1e-30)
        assert error < tolerance, f"{name}: relative error {error:.2e}"


@pytest.mark.parametrize("weights", [(0.7, 0.0), (0.0, 0.4), (0.7, 0.4)])
@pytest.mark.parametrize("forms", [{}, {"scale": 0.25}, {"softcap": 3.0}])
def test_the_kernels_are_the_reference(weights, forms, poisoned, small_chunks):
    inputs = draw(**forms)
    compare(inputs, torch.float32, 2e-6, kl_weight=weights[0], ce_weight=weights[1], temperature=2.0)


@pytest.mark.parametrize(("l", "v", "w"), [(1, 1, 1), (7, 67, 60), (16, 60, 67), (33, 31, 130), (20, 64, 64)])
def test_any_vocabularies_and_lengths(l, v, w, poisoned, small_chunks):
    compare(draw(b=1, l=l, v=v, w=w, bias=False), torch.float32, 2e-6)


def test_every_token_counts(small_chunks):
    *inputs, labels, _ = draw()
    compare((*inputs, labels.clamp_min(0), None), torch.float32, 2e-6, ce_weight=0.0)
    compare((*inputs, labels.clamp_min(0), None), torch.float32, 2e-6)


def test_one_block_is_enough_for_a_small_vocabulary():
    compare(draw(b=1, l=5), torch.float32, 2e-6)


def test_float16_keeps_small_gradients(small_chunks):
    """The gradient of one token's logits over the number of tokens would be below what float16 can hold."""
    compare(draw(), torch.float16, 2e-3, kl_weight=1e-7, ce_weight=1e-8, factor=1e6)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter tells of NaN
def test_gradients_of_padding_are_zero_even_where_it_is_not_a_number(small_chunks):
    states, student, teacher_states, teacher, labels, tokens = cast(draw(bias=False), torch.float32)
    labels[tokens] = labels[tokens].clamp_min(0)
    labels[~tokens] = -100
    whole = run((states, student, teacher_states, teacher, labels, tokens), backend="triton")
    teacher_states = teacher_states.masked_fill(~tokens[..., None], torch.nan)
    padded = run((states, student, teacher_states, teacher, labels, tokens), backend="triton")
    assert all(torch.equal(one, other) for one, other in zip(whole, padded, strict=True))
    assert not whole[3][~tokens].any()
    inputs = (states, student, teacher_states, teacher, labels.fill_(3), tokens)  # there the text counts, KL does not
    assert all(found.isfinite().all() for found in run(inputs, backend="triton"))


def test_a_student_that_is_its_teacher_has_no_kl(small_chunks):
    states, student, *_ = cast(draw(), torch.float32)
    losses = run((states, student, states, student, None, None), backend="triton", ce_weight=0.0)
    assert losses[0] == losses[1] == 0
    assert not any(gradient.any() for gradient in losses[3:])


def test_nothing_that_counts_is_nothing(small_chunks):
    states, student, teacher_states, teacher, labels, tokens = cast(draw(), torch.float32)
    inputs = (states, student, teacher_states, teacher, labels.fill_(-100), tokens.fill_(False))
    assert not any(found.any() for found in run(inputs, backend="triton"))


def test_a_label_that_is_no_token_shows(small_chunks):
    states, student, teacher_states, teacher, labels, tokens = cast(draw(), torch.float32)
    labels[1, 3] = 67
    assert run((states, student, teacher_states, teacher, labels, tokens), backend="triton")[0].isnan()


@pytest.mark.parametrize(
    "frozen", [(True, True, True), (False, True, True), (True, False, False), (False, False, True)]
)
def test_only_gradients_that_are_wanted_are_made(frozen, small_chunks):
    states, student, teacher_states, teacher, labels, tokens = cast(draw(), torch.float32)
    leaves = [t.requires_grad_(not fixed) for t, fixed in zip((states, *student[:2]), frozen, strict=True)]
    options = {"labels": labels, "tokens": tokens, "backend": "triton", **BOTH}
    losses = linear_kl(states, student, teacher_states, teacher, **options)
    expected = run((states, student, teacher_states, teacher, labels, tokens), factor=1.0)
    torch.testing.assert_close(losses.loss.detach(), expected[0])
    assert losses.loss.requires_grad == (not all(frozen))
    if all(frozen):
        return
    losses.loss.backward()
    for leaf, theirs, fixed in zip(leaves, expected[3:], frozen, strict=True):
        assert (leaf.grad is None) == fixed
        if not fixed:
            torch.testing.assert_close(leaf.grad, theirs)


def test_the_graph_may_be_walked_twice(small_chunks):
    states, student, *rest = cast(draw(), torch.float32)
    loss = linear_kl(states.requires_grad_(), student, *rest[:2], backend="triton").loss
    (once,) = torch.autograd.grad(loss, states, retain_graph=True)
    (twice,) = torch.autograd.grad(2 * loss, states)
    torch.testing.assert_close(2 * once, twice)


def test_number_types_must_fit():
    states, student, teacher_states, teacher, *_ = cast(draw(), torch.float32)
    with pytest.raises(LimbeckError, match=r"hidden states in torch\.float16 and a head in torch\.float32"):
        linear_kl(states.half(), student, teacher_states, teacher, backend="triton")


@pytest.mark.slow
def test_the_operator_keeps_what_it_promises_to_compilers(small_chunks):
    states, student, teacher_states, teacher, labels, tokens = cast(draw(b=1, l=3), torch.float32)
    leaves = [tensor.requires_grad_() for tensor in (states[0], *student[:2])]
    numbers = ([0.7, 0.4], [2.0, 1.0, 0.0, 1.0, 0.0], torch.float32, torch.float32)
    for arguments in (
        (*leaves, teacher_states[0], *teacher[:2], labels[0], tokens[0], *numbers, [True, True, True]),
        (leaves[0], leaves[1], None, None, None, None, labels[0], None, *numbers, [False, True, False]),
    ):
        torch.library.opcheck(torch.ops.limbeck.linear_kl_triton.default, arguments)


@pytest.mark.parametrize(("rows", "v"), [(1, 50), (1000, 51200), (8192, 51200), (8191, 256000), (5, 10**7)])
def test_chunks_are_alike_and_aligned(rows, v):
    chunk = kernels.chunk_of(rows, v)
    chunks = -(-rows // chunk)
    assert chunk % 16 == 0
    assert chunk * v <= max(kernels.LOGITS, kernels.LEAST_CHUNK * v) + 16 * v
    assert chunk * chunks - rows < 16 * chunks


# --- on a GPU ---------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 1e-2), (torch.float16, 1e-2), (torch.float32, 1e-4)])
@pytest.mark.parametrize("length", [1, 63, 64, 500, 2048, 4097])
def test_on_a_gpu_the_kernels_are_float64s(length, dtype, tolerance, poisoned):
    inputs = draw(b=1, l=length, d=256, v=5003, e=192, w=5056, device="cuda")
    compare(inputs, dtype, tolerance, temperature=2.0)


@pytest.mark.gpu
@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.0, 1.0), (1.0, 1.0)])
@pytest.mark.parametrize("forms", [{"softcap": 5.0}, {"scale": 0.5, "bias": False}])
def test_on_a_gpu_every_option(weights, forms, poisoned, monkeypatch):
    monkeypatch.setattr(kernels, "LEAST_CHUNK", 128)
    monkeypatch.setattr(kernels, "LOGITS", 1)
    inputs = draw(b=2, l=300, d=128, v=50257, e=128, w=50304, device="cuda", **forms)
    compare(inputs, torch.bfloat16, 1e-2, kl_weight=weights[0], ce_weight=weights[1])


@pytest.mark.gpu
def test_on_a_gpu_a_student_close_to_its_teacher(poisoned):
    """What bfloat16 logits would lose: here both have the same inputs, and weights 1% apart."""
    states, student, *_ = draw(b=1, l=500, d=256, v=5003, bias=False, device="cuda")
    student = student._replace(weight=student.weight.bfloat16())
    teacher = Head((student.weight.float() * (1 + 0.01 * torch.randn_like(student.weight))).bfloat16())
    inputs = (states.bfloat16(), student, states.bfloat16(), teacher, None, None)
    compare(inputs, torch.bfloat16, 1e-2, ce_weight=0.0)
    same = run((states.bfloat16(), student, states.bfloat16(), student, None, None), ce_weight=0.0)[0]
    assert same.abs() < 1e-6  # two sums of the same numbers, in the order of two reads


@pytest.mark.gpu
def test_on_a_gpu_under_autocast(poisoned):
    """Weights are float32 and products bfloat16: what is rounded is what autocast rounds."""
    inputs = draw(b=1, l=500, d=256, v=5003, device="cuda")
    narrow = cast(cast(inputs, torch.bfloat16), torch.float32)
    with torch.autocast("cuda", torch.bfloat16):
        found = run(narrow)
    expected = run(cast(narrow, torch.float64), backend="reference")
    for name, ours, theirs in zip(NAMES, found, expected, strict=True):
        assert ours.dtype == torch.float32, name
        assert (ours.double() - theirs).norm() / theirs.norm() < 1e-2, name


@pytest.mark.gpu
def test_on_a_gpu_every_run_gives_the_same_bits():
    inputs = cast(draw(b=2, l=2048, d=256, v=32003, e=192, w=32064, device="cuda"), torch.bfloat16)
    assert all(torch.equal(one, other) for one, other in zip(run(inputs), run(inputs), strict=True))


@pytest.mark.gpu
def test_on_a_gpu_logits_are_never_whole():
    inputs = cast(draw(b=4, l=2048, d=256, v=65536, e=256, w=65536, bias=False, device="cuda"), torch.bfloat16)
    run(inputs)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run(inputs)
    chunk = kernels.chunk_of(8192, 65536) * 65536
    weight = 65536 * 256 * 4
    assert torch.cuda.max_memory_allocated() - before < chunk * (4 + 4 + 2) + 4 * weight + 2**26
