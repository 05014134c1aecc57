"""A fused tape does what the recorded one does, with fewer calls, and leaves alone what it must not move."""

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import limbeck
from limbeck.generation import Decoder
from limbeck.generation.fusion import fuse
from limbeck.generation.tape import Tape
from limbeck.students import FAMILIES
from tiny import VOCABULARY, tiny_teacher


def calls(tape):
    return Counter(node.target.__name__ for node in tape.code.graph.nodes if node.op == "call_function")


@torch.no_grad()
def check(function, x, **expected):
    """Fused, it makes the same of new numbers; and so many of the calls are these."""
    tape = Tape(function, [x], fuse)
    other = torch.randn_like(x)
    torch.testing.assert_close(tape(other.clone()), function(other.clone()))
    found = calls(tape)
    assert {name: found[name] for name in expected} == expected, found


class Rms(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width).double())

    def forward(self, x):
        wide = x.to(torch.float64)
        return self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def layers(*widths):
    return [nn.Linear(*pair).double() for pair in zip(widths, widths[1:], strict=False)]


@pytest.mark.parametrize("norm", [nn.LayerNorm(8).double(), Rms(8)], ids=["layer", "rms"])
@pytest.mark.parametrize("rows", [1, 2])
def test_parallel_block(norm, rows):
    (first, last), beside = layers(8, 6, 8), nn.Linear(8, 8, bias=False).double()

    def function(x):
        normed = norm(x)
        return norm(beside(normed[:, 0])[:, None] + last(F.gelu(first(normed), approximate="tanh")) + x)

    one = {"norm_linears": 1, "linear_sum": 1, "sum_norm": 2, "linear": 0, "gelu": 0, "add": 0}
    many = {"norm_linears": 0, "linear_sum": 0, "sum_norm": 2, "linear": 3, "gelu": 1, "add": 0}
    check(function, torch.randn(rows, 1, 8).double(), **(one if rows == 1 else many))


def test_two_norms_of_one_input_and_a_gate():
    one, other = nn.LayerNorm(8).double(), nn.LayerNorm(8).double()
    (gate, down), up = layers(8, 6, 8), nn.Linear(8, 6).double()

    def function(x):
        return down(F.silu(gate(one(x))) * up(other(x))) + x

    check(function, torch.randn(1, 8).double(), norm_linears=1, linear_sum=1, linear=0, layer_norm=0, silu=0)


def test_three_layers_of_one_input():
    triple = [nn.Linear(8, 4).double() for _ in range(3)]
    check(lambda x: torch.cat([layer(x) for layer in triple], -1), torch.randn(1, 8).double(), norm_linears=2, linear=0)


def test_what_others_read_is_still_there():
    norm, (first, last) = nn.LayerNorm(8).double(), layers(8, 8, 8)

    def function(x):
        middle, normed = first(norm(x)), norm(x)
        total = last(normed) + middle
        return F.silu(middle) + total + normed + (total + x)

    check(function, torch.randn(1, 8).double(), linear=0, silu=1)


def test_what_is_changed_in_place_is_left_alone():
    norm, (first, last) = nn.LayerNorm(8).double(), layers(8, 8, 8)

    def function(x):
        hidden = x * 1
        before = first(norm(hidden))
        hidden.add_(1)
        changed = last(hidden) + before
        changed[:, :4].mul_(2)
        return norm(hidden) + changed

    left = {"linear": 1, "layer_norm": 2, "linear_sum": 0, "sum_norm": 0}
    check(function, torch.randn(1, 8).double(), norm_linears=1, **left)  # only the first has an input that stays


def test_what_a_view_hides_is_seen():
    norm, (layer,) = nn.LayerNorm(8).double(), layers(8, 8)

    def function(x):
        normed = norm(x)
        normed.mul_(3)
        return layer(normed.view(1, 8))

    check(function, torch.randn(8).double(), layer_norm=1, mul_=1)


@torch.no_grad()
def test_autocast_is_left_alone():
    layer, x = nn.Linear(8, 8), torch.randn(1, 8)
    with torch.autocast("cpu", torch.bfloat16):
        tape = Tape(layer, [x], fuse)
        assert tape(x).dtype == torch.bfloat16
    assert calls(tape)["linear"] == 1


def test_sums_that_are_wider_than_their_terms_are_left_alone():
    (layer,) = layers(8, 8)
    check(lambda x: layer(x) + x.new_ones(3, 8), torch.randn(1, 8).double(), linear_sum=0, norm_linears=1)
    check(lambda x: layer(x).add(x, alpha=2), torch.randn(1, 8).double(), linear_sum=0, norm_linears=1)


def tokens(model, rows, rewrite):
    ids = torch.randint(8, VOCABULARY, (rows, 9), generator=torch.Generator().manual_seed(rows))
    decoder = Decoder(model, ids, max_new_tokens=36)
    decoder.rewrite = rewrite
    return decoder.run(), calls(decoder.tape)


@pytest.mark.slow
@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family, rows):
    """Fewer calls of what is fused, and the same tokens."""
    model = limbeck.convert(tiny_teacher(family, dtype=torch.float64), keep_attention=(1,), init="random").double()
    (expected, before), (found, after) = (tokens(model, rows, rewrite) for rewrite in (None, fuse))
    assert torch.equal(found, expected)
    if rows == 1:
        assert after["linear"] <= 2 < before["linear"]  # out_proj of two mixers, whose input a CPU makes in place
    if "gemma" not in family:  # whose norms have weights that are computed
        assert after["layer_norm"] + after["rsqrt"] < before["layer_norm"] + before["rsqrt"]
