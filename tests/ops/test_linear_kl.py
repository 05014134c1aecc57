"""The head's losses: by hand, whatever the vocabularies, labels and masks, and what the door refuses."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from limbeck import LimbeckError
from limbeck.ops import Head, linear_kl


def draw(b=2, l=5, d=8, v=11, e=6, w=11, **forms):
    """Student, teacher and labels in float64."""
    states, teacher_states = (torch.randn(b, l, width, dtype=torch.float64) for width in (d, e))
    student, teacher = (
        Head(torch.randn(size, width, dtype=torch.float64), torch.randn(size, dtype=torch.float64), **forms)
        for size, width in ((v, d), (w, e))
    )
    return states.requires_grad_(), student, teacher_states, teacher, torch.randint(0, v, (b, l))


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("forms", [{}, {"scale": 0.5}, {"softcap": 2.0}, {"scale": 3.0, "softcap": 4.0}])
def test_by_hand(temperature, forms):
    states, student, teacher_states, teacher, labels = draw(**forms)
    losses = linear_kl(
        states, student, teacher_states, teacher, labels=labels, kl_weight=0.7, ce_weight=0.2, temperature=temperature
    )
    logits = []
    for hidden, head in ((states, student), (teacher_states, teacher)):
        raw = (hidden @ head.weight.T + head.bias) * head.scale
        logits.append(raw if head.softcap is None else head.softcap * torch.tanh(raw / head.softcap))
    q, p = ((x / temperature).softmax(-1) for x in logits)
    kl = (p * (p / q).log()).sum(-1).mean()
    ce = -logits[0].log_softmax(-1).gather(-1, labels[..., None]).mean()
    assert_close(losses.kl, kl.detach())
    assert_close(losses.ce, ce.detach())
    assert_close(losses.loss, 0.7 * kl + 0.2 * ce)
    assert not losses.kl.requires_grad
    assert not losses.ce.requires_grad


@pytest.mark.parametrize("w", [9, 13])
def test_kl_is_of_the_common_tokens_and_ce_of_all(w):
    states, student, teacher_states, teacher, labels = draw(w=w)
    losses = linear_kl(states, student, teacher_states, teacher, labels=labels, ce_weight=1.0)
    cut = min(11, w)
    heads = [Head(head.weight[:cut], head.bias[:cut]) for head in (student, teacher)]
    assert_close(losses.kl, linear_kl(states, heads[0], teacher_states, heads[1]).kl)
    logits = F.linear(states, student.weight, student.bias)
    assert_close(losses.ce, F.cross_entropy(logits.flatten(0, 1), labels.flatten()).detach())


def test_means_are_of_the_tokens_that_count():
    states, student, teacher_states, teacher, labels = draw()
    tokens = torch.ones(2, 5, dtype=torch.bool)
    tokens[0, :3] = False
    labels[1, 2:] = -100
    losses = linear_kl(states, student, teacher_states, teacher, labels=labels, tokens=tokens, ce_weight=1.0)
    kl, ce = [], []
    for i in range(2):
        for t in range(5):
            one = (states[i : i + 1, t : t + 1], student)
            taught = (teacher_states[i : i + 1, t : t + 1], teacher)
            if tokens[i, t]:
                kl.append(linear_kl(*one, *taught).kl)
            if labels[i, t] >= 0:
                ce.append(linear_kl(*one, labels=labels[i : i + 1, t : t + 1], kl_weight=0.0, ce_weight=1.0).ce)
    assert_close(losses.kl, torch.stack(kl).mean())
    assert_close(losses.ce, torch.stack(ce).mean())


def test_nothing_that_counts_is_nothing():
    states, student, teacher_states, teacher, labels = draw()
    tokens, labels = torch.zeros(2, 5, dtype=torch.bool), labels.fill_(-100)
    losses = linear_kl(states, student, teacher_states, teacher, labels=labels, tokens=tokens, ce_weight=1.0)
    (gradient,) = torch.autograd.grad(losses.loss, states)
    assert losses.loss == losses.kl == losses.ce == 0
    assert not gradient.any()


def test_a_term_without_weight_is_left_out():
    states, student, teacher_states, teacher, labels = draw()
    assert linear_kl(states, student, teacher_states, teacher).ce is None
    assert linear_kl(states, student, labels=labels, kl_weight=0.0, ce_weight=2.0).kl is None


def test_the_teacher_gets_no_gradient():
    states, student, teacher_states, teacher, _ = draw()
    teacher_states.requires_grad_()
    teacher.weight.requires_grad_()
    losses = linear_kl(states, student, teacher_states, teacher)
    found = torch.autograd.grad(losses.loss, [teacher_states, teacher.weight], allow_unused=True)
    assert found == (None, None)


def test_refusals():
    states, student, teacher_states, teacher, labels = draw()
    with pytest.raises(LimbeckError, match="kl_weight and no teacher"):
        linear_kl(states, student)
    with pytest.raises(LimbeckError, match="ce_weight and no labels"):
        linear_kl(states, student, kl_weight=0.0, ce_weight=1.0)
    with pytest.raises(LimbeckError, match="neither kl_weight nor ce_weight"):
        linear_kl(states, student, teacher_states, teacher, kl_weight=0.0)
    with pytest.raises(LimbeckError, match=r"given bias of shape \(10,\)"):
        linear_kl(states, student._replace(bias=student.bias[1:]), teacher_states, teacher)
    with pytest.raises(LimbeckError, match=r"given teacher_states of shape \(2, 4, 6\)"):
        linear_kl(states, student, teacher_states[:, 1:], teacher)
    with pytest.raises(LimbeckError, match="given a mask of shape"):
        linear_kl(states, student, teacher_states, teacher, tokens=labels)
    with pytest.raises(LimbeckError, match=r"no Triton kernel for torch\.float64"):
        linear_kl(states, student, teacher_states, teacher, backend="triton")
