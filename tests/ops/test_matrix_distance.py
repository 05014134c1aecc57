"""matrix_distance: the reference is the definition, token by token; its gradients, its corner, what it refuses."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from limbeck.errors import LimbeckError
from limbeck.ops import matrix_distance


def draw(b=2, l=7, h=4, h_kv=2, g=2, d=5, n=3, dtype=torch.float64):
    """query, key, log_decay, B, C, D; the last four want gradients."""
    query, key = torch.randn(b, h, l, d, dtype=dtype), torch.randn(b, h_kv, l, d, dtype=dtype)
    log_decay, D = -torch.rand(b, l, h, dtype=dtype), torch.randn(h, dtype=dtype)
    B, C = (torch.randn(b, l, g, n, dtype=dtype) for _ in range(2))
    return [query, key, *(tensor.requires_grad_() for tensor in (log_decay, B, C, D))]


def by_hand(query, key, log_decay, B, C, D, *, mask, seq_idx, scale, window, softcap):
    """The definition in loops, (b, h)."""
    b, h, l, _ = query.shape
    squares = torch.zeros(b, h, dtype=torch.float64)
    for i in range(b):
        for j in range(h):
            k, group = key[i, j // (h // key.shape[1])], j // (h // B.shape[2])
            for t in range(l):
                pairs = [s for s in range(t + 1) if mask[i, t] and mask[i, s] and seq_idx[i, t] == seq_idx[i, s]]
                logits = {s: scale * query[i, j, t] @ k[s] for s in pairs if window is None or t - s < window}
                if softcap is not None:
                    logits = {s: softcap * torch.tanh(x / softcap) for s, x in logits.items()}
                total = sum(torch.exp(x) for x in logits.values())
                for s in pairs:
                    decay = torch.exp(log_decay[i, s + 1 : t + 1, j].sum())
                    M = C[i, t, group] @ B[i, s, group] * decay + (D[j] if s == t else 0)
                    A = torch.exp(logits[s]) / total if s in logits else 0
                    squares[i, j] += (M - A) ** 2
    return squares.sqrt()


@given(
    window=st.sampled_from([None, 1, 3, 9]),
    softcap=st.sampled_from([None, 0.7]),
    scale=st.sampled_from([None, 0.3]),
    padding=st.booleans(),
    documents=st.booleans(),
    seed=st.integers(0, 100),
)
def test_the_reference_is_the_definition(window, softcap, scale, padding, documents, seed):
    torch.manual_seed(seed)
    inputs = [tensor.detach() for tensor in draw()]
    mask = torch.rand(2, 7) < 0.7 if padding else torch.ones(2, 7, dtype=torch.bool)
    seq_idx = (torch.rand(2, 7) < 0.3).long().cumsum(1) if documents else torch.zeros(2, 7)
    found = matrix_distance(
        *inputs,
        scale=scale,
        attention_mask=mask if padding else None,
        sliding_window=window,
        softcap=softcap,
        seq_idx=seq_idx if documents else None,
    )
    scale = 5**-0.5 if scale is None else scale
    expected = by_hand(*inputs, mask=mask, seq_idx=seq_idx, scale=scale, window=window, softcap=softcap)
    torch.testing.assert_close(found, expected)


def test_gradients_are_those_of_finite_differences():
    query, key, *learned = draw(b=1, h=2, h_kv=1, g=1)
    options = {"sliding_window": 4, "softcap": 3.0, "attention_mask": torch.tensor([[0, 1, 1, 1, 1, 1, 1]])}
    torch.autograd.gradcheck(lambda *tensors: matrix_distance(query, key, *tensors, **options), learned)


def test_the_teacher_gets_no_gradient():
    query, key, *learned = draw()
    query.requires_grad_(), key.requires_grad_()
    found = torch.autograd.grad(matrix_distance(query, key, *learned).sum(), [query, key], allow_unused=True)
    assert found == (None, None)


def test_the_gradient_at_the_corner_is_zero():
    """Where M is A: both are the identity."""
    query, key, log_decay, B, C, D = draw()
    with torch.no_grad():
        B.zero_(), D.fill_(1)
    distance = matrix_distance(query, key, log_decay, B, C, D, sliding_window=1)
    assert not distance.any()
    gradients = torch.autograd.grad(distance.sum(), [log_decay, B, C, D])
    assert not any(gradient.any() for gradient in gradients)


def test_without_d_and_with_a_decay_of_minus_infinity():
    query, key, log_decay, B, C, _ = draw()
    with torch.no_grad():
        log_decay[:, 3] = -torch.inf
    documents = (torch.arange(7) >= 3).long().expand(2, -1)
    apart = matrix_distance(query, key, log_decay, B, C, seq_idx=documents, sliding_window=1)
    together = matrix_distance(query, key, log_decay, B, C, sliding_window=1)  # A is the identity in both
    assert together.isfinite().all()
    torch.testing.assert_close(apart, together)
    torch.testing.assert_close(matrix_distance(query, key, log_decay, B, C, torch.zeros(4), sliding_window=1), together)


def test_narrow_inputs_are_computed_in_float32():
    query, key, log_decay, B, C, D = draw(dtype=torch.float32)
    query, key, B, C = (tensor.detach().bfloat16() for tensor in (query, key, B, C))
    with torch.autocast("cpu", torch.bfloat16):
        found = matrix_distance(query, key, log_decay, B.requires_grad_(), C, D)
    wide = matrix_distance(query.float(), key.float(), log_decay, B.float(), C.float(), D)
    assert found.dtype == torch.float32
    assert torch.equal(found, wide)
    (gradient,) = torch.autograd.grad(found.sum(), B)
    assert gradient.dtype == torch.bfloat16


def test_garbage_at_padding_is_not_seen():
    query, key, log_decay, B, C, D = (tensor.detach() for tensor in draw())
    mask = torch.ones(2, 7)
    mask[:, :2] = 0
    expected = matrix_distance(query, key, log_decay, B, C, D, attention_mask=mask)
    query[:, :, :2], key[:, :, :2], B[:, :2], C[:, :2] = torch.nan, torch.nan, 9.0, 9.0
    assert torch.equal(matrix_distance(query, key, log_decay, B, C, D, attention_mask=mask), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"key": torch.zeros(2, 3, 7, 5)}, "4 heads over h_kv = 3"),
        ({"B": torch.zeros(2, 7, 3, 3), "C": torch.zeros(2, 7, 3, 3)}, "4 heads over g = 3"),
        ({"C": torch.zeros(2, 7, 2, 4)}, "C of shape"),
        ({"D": torch.zeros(3)}, "D of shape"),
        ({"log_decay": torch.zeros(2, 7, 4, dtype=torch.bfloat16)}, "log_decay in torch.bfloat16"),
        ({"attention_mask": torch.ones(2, 6)}, "attention_mask of shape"),
        ({"seq_idx": torch.zeros(2, 7)}, "seq_idx of shape"),
        ({"sliding_window": 0}, "sliding_window 0"),
        ({"softcap": 0.0}, "softcap 0"),
        ({"backend": "fast"}, "unknown backend of matrix_distance"),
        ({"backend": "triton", "query": torch.zeros(2, 4, 7, 5, dtype=torch.float64)}, "no Triton kernel for torch"),
    ],
    ids=str,
)
def test_bad_input_is_told(change, message):
    names = ("query", "key", "log_decay", "B", "C", "D")
    arguments = dict(zip(names, draw(dtype=torch.float32), strict=True))
    with pytest.raises(LimbeckError, match=message):
        matrix_distance(**(arguments | change))
