"""Losses from a teacher's likeliest tokens: exact where they are all, a bound that rises with k where they are not."""

import pytest
import torch
from torch.testing import assert_close

from limbeck import LimbeckError
from limbeck.ops import linear_top_k_kl as module
from limbeck.ops.linear_kl import linear_kl
from limbeck.ops.linear_kl_reference import Head, head_logits
from limbeck.ops.linear_top_k_kl import head_top_k, linear_top_k_kl, top_k_divergence, top_k_of_logits

B, L, D, V = 2, 5, 6, 19


def normal(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype)


@pytest.fixture(params=[(False, 1.0, None), (True, 0.7, 1.5)], ids=["plain", "bias, scale and softcap"])
def case(request):
    """Student and teacher: states and heads, and all else that a loss is made of."""
    biased, *form = request.param
    torch.manual_seed(0)

    def head(width, v=V):
        return Head(normal(v, width).requires_grad_(), normal(v).requires_grad_() if biased else None, *form)

    labels = torch.randint(0, V, (B, L))
    labels[0, :2] = -100
    tokens = torch.ones(B, L, dtype=torch.bool)
    tokens[1, 3:] = False
    terms = {"labels": labels, "tokens": tokens, "kl_weight": 0.8, "ce_weight": 0.5, "temperature": 2.0}
    return normal(B, L, D).requires_grad_(), head(D), normal(B, L, 4), head(4), terms


def gradients(loss, states, head):
    return torch.autograd.grad(3 * loss, [states, *(tensor for tensor in head[:2] if tensor is not None)])


@pytest.mark.parametrize("tokens_in_a_chunk", [1, 4, 100])
def test_the_whole_vocabulary_gives_loss_and_gradient_of_whole_logits(case, tokens_in_a_chunk, monkeypatch):
    monkeypatch.setattr(module, "_chunk", lambda vocabulary: tokens_in_a_chunk)
    states, head, teacher_states, teacher_head, terms = case
    top = head_top_k(teacher_states, teacher_head, V, terms["temperature"])
    found = linear_top_k_kl(states, head, top, **terms)
    expected = linear_kl(states, head, teacher_states, teacher_head, **terms)
    for ours, theirs in zip(found, expected, strict=True):
        assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(gradients(found[0], states, head), gradients(expected[0], states, head), strict=True):
        assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


def test_the_gradient_is_that_of_the_loss_for_any_k(case, monkeypatch):
    monkeypatch.setattr(module, "_chunk", lambda vocabulary: 3)
    states, head, teacher_states, teacher_head, terms = case
    top = head_top_k(teacher_states, teacher_head, 4, terms["temperature"])

    def loss(*tensors):
        weight, *bias = tensors[1:]
        return linear_top_k_kl(tensors[0], Head(weight, bias[0] if bias else None, *head[2:]), top, **terms).loss

    assert torch.autograd.gradcheck(
        loss, [states, *(tensor for tensor in head[:2] if tensor is not None)], fast_mode=True
    )
    whole = linear_top_k_kl(head_logits(states, head), None, top, **terms)
    found = linear_top_k_kl(states, head, top, **terms)
    for ours, theirs in zip(gradients(found.loss, states, head), gradients(whole.loss, states, head), strict=True):
        assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


def test_the_loss_rises_with_k_to_that_of_the_whole_distribution():
    student, teacher = normal(40, V), normal(40, V)
    found = [top_k_divergence(student, top_k_of_logits(teacher, k)).mean() for k in range(1, V + 1)]
    assert all(less < more for less, more in zip(found[: V - 2], found[1 : V - 1], strict=True))
    assert_close(found[-2], found[-1])  # a rest of one token is that token
    assert found[0] < 0.8 * found[-1]


def test_a_student_that_equals_its_teacher_has_no_loss_and_no_gradient():
    logits = normal(8, V, dtype=torch.float32).requires_grad_()
    loss = top_k_divergence(logits, top_k_of_logits(logits.detach(), 3)).sum()
    assert abs(loss.item()) < 1e-5
    assert torch.autograd.grad(loss, logits)[0].abs().max() < 1e-6


def test_the_padding_of_a_students_vocabulary_does_not_count():
    student, teacher = normal(8, V + 3), normal(8, V)
    top = top_k_of_logits(teacher, V)
    assert_close(top_k_divergence(student, top), top_k_divergence(student[:, :V], top))


def test_nothing_is_learned_without_gradients(case):
    states, head, teacher_states, teacher_head, terms = case
    top = head_top_k(teacher_states, teacher_head, 4)
    with torch.no_grad():
        found = linear_top_k_kl(states, head, top, **terms)
    assert not found.loss.requires_grad
    assert_close(found.loss, linear_top_k_kl(states, head, top, **terms).loss)
    frozen = Head(head.weight.detach(), None, *head[2:])
    assert torch.autograd.grad(linear_top_k_kl(states, frozen, top, **terms).loss, states)[0].abs().sum() > 0


def test_autocast_makes_narrow_products_and_wide_losses(case):
    states, head, teacher_states, teacher_head, terms = case
    states, head = states.detach().float().requires_grad_(), Head(head.weight.detach().float().requires_grad_())
    top = head_top_k(teacher_states.float(), Head(teacher_head.weight.detach().float()), 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = linear_top_k_kl(states, head, top, **terms)
    wide = linear_top_k_kl(states, head, top, **terms)
    assert found.loss.dtype == torch.float32
    assert_close(found.loss, wide.loss, rtol=2e-2, atol=2e-2)
    assert not torch.equal(found.loss, wide.loss)
    assert [tensor.dtype for tensor in gradients(found.loss, states, head)] == [torch.float32] * 2


def test_a_teacher_that_knows_more_is_refused(case):
    states, head, *_ = case
    with pytest.raises(LimbeckError, match=f"predictions over {V + 1} tokens for a student of {V}"):
        linear_top_k_kl(states, head, top_k_of_logits(normal(B, L, V + 1), 2))
