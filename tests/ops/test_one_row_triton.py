"""The kernels of `one_row` against their reference: in Triton's interpreter on a CPU, against float64 on a GPU."""

import pytest
import torch
from torch.utils._pytree import tree_map_only

from limbeck.ops import Linear, Norm, linear_sum, norm_linears, sum_norm

pytest.importorskip("triton")
overflows = pytest.mark.filterwarnings(
    "ignore:.*overflow encountered in exp:RuntimeWarning"
)  # as it should: 1 / inf is 0


def draw(*shape, device="cpu"):
    return torch.randn(shape, dtype=torch.float64, device=device)


def a_norm(width, bias, device):
    return Norm(1 + draw(width, device=device), draw(width, device=device) if bias else None)


def a_linear(m, k, bias, device, activation="identity", norm=None):
    return Linear(draw(m, k, device=device) / k**0.5, draw(m, device=device) if bias else None, activation, norm)


def compare(operator, inputs, dtype, tolerance):
    """The kernel on `dtype`, against the reference in float64 on the same rounded numbers."""
    narrow = tree_map_only(torch.Tensor, lambda tensor: tensor.to(dtype), inputs)
    found = operator(*narrow, backend="triton")
    expected = operator(*tree_map_only(torch.Tensor, torch.Tensor.double, narrow), backend="reference")
    for ours, theirs in zip(*((x if isinstance(x, tuple) else (x,)) for x in (found, expected)), strict=True):
        assert ours.isfinite().all()
        error = (ours.double() - theirs).norm() / theirs.norm()
        assert error < tolerance, f"relative error {error:.2e}"


def norm_linears_case(k, ms, kind, activations=("gelu_tanh", "identity"), biases=(True, False), device="cpu"):
    def layer(i, m):
        norm = None if kind == "none" else a_norm(k, kind == "layer" and i == 0, device)
        return a_linear(m, k, biases[i], device, activations[i], norm)

    x = 3 + 5 * draw(1, k, device=device)
    return x, [layer(i, m) for i, m in enumerate(ms)], kind, 1e-5


def linear_sum_case(ks, m, residual=True, device="cpu"):
    layers = [a_linear(m, k, i == 0, device) for i, k in enumerate(ks)]
    inputs = [draw(1, k, device=device) for k in ks]
    return inputs, layers, draw(1, m, device=device) if residual else None


def sum_norm_case(rows, k, terms, norms, kind, device="cpu"):
    given = [1 + draw(rows, k, device=device) for _ in range(terms)]
    return given, [a_norm(k, kind == "layer" and i == 0, device) for i in range(norms)], kind, 1e-5


@overflows
@pytest.mark.parametrize("kind", ["none", "layer", "rms"])
@pytest.mark.parametrize(("k", "ms"), [(16, (7, 5)), (21, (4,)), (1100, (3, 9))])
def test_norm_linears(k, ms, kind, poisoned):
    compare(norm_linears, norm_linears_case(k, ms, kind), torch.float32, 1e-6)


@overflows
@pytest.mark.parametrize("activation", ["identity", "silu", "gelu", "gelu_tanh"])
def test_activations(activation, poisoned):
    compare(norm_linears, norm_linears_case(16, (9,), "none", (activation,)), torch.float32, 1e-6)


@pytest.mark.parametrize(("ks", "m", "residual"), [((16, 40), 7, True), ((9,), 5, False), ((1100, 8), 4, True)])
def test_linear_sum(ks, m, residual, poisoned):
    compare(linear_sum, linear_sum_case(ks, m, residual), torch.float32, 1e-6)


@pytest.mark.parametrize("kind", ["layer", "rms"])
@pytest.mark.parametrize(("rows", "terms", "norms"), [(1, 1, 1), (5, 2, 2), (7, 3, 1)])
def test_sum_norm(rows, terms, norms, kind, poisoned):
    compare(sum_norm, sum_norm_case(rows, 37, terms, norms, kind), torch.float32, 1e-6)


def test_inputs_of_any_layout():
    sliced = draw(1, 40)[:, 3:19], [Linear(draw(16, 7).mT, None, "silu")]
    compare(norm_linears, (*sliced, "none", 0.0), torch.float32, 1e-6)


# --- on a GPU ---------------------------------------------------------------------------------------------------------

TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 1e-2, torch.float32: 1e-4}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_errors_on_a_gpu(dtype, poisoned):
    tolerance, options = TOLERANCE[dtype], {"device": "cuda"}
    for kind in ("layer", "rms", "none"):
        compare(norm_linears, norm_linears_case(2048, (8224, 8192), kind, **options), dtype, tolerance)
        compare(norm_linears, norm_linears_case(500, (63,), kind, ("silu",), **options), dtype, tolerance)
    compare(linear_sum, linear_sum_case((2048, 8192), 2048, **options), dtype, tolerance)
    compare(linear_sum, linear_sum_case((63,), 500, residual=False, **options), dtype, tolerance)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(("rows", "k"), [(1, 2048), (64, 2048), (63, 500), (500, 16384)])
def test_errors_of_sums_on_a_gpu(rows, k, dtype, poisoned):
    for kind, terms, norms in (("layer", 3, 2), ("rms", 2, 1), ("layer", 1, 1)):
        compare(sum_norm, sum_norm_case(rows, k, terms, norms, kind, device="cuda"), dtype, TOLERANCE[dtype])


@pytest.mark.gpu
def test_a_chain_in_a_graph_is_the_calls(poisoned):
    """Kernels that begin before the one before them has ended wait for what they read of it."""
    x, layers, *_ = norm_linears_case(2048, (2048, 8192), "layer", device="cuda")
    narrow = tree_map_only(
        torch.Tensor, lambda tensor: tensor.to(torch.bfloat16), (x, layers, draw(2048, 8192, device="cuda") / 90)
    )
    x, layers, down = narrow

    def chain():
        hidden = x
        for _ in range(20):
            first, second = norm_linears(hidden, layers, "layer", 1e-5)
            hidden = linear_sum([second], [Linear(down)], hidden + first)
            _, hidden = sum_norm([hidden, first], [layers[0].norm], "layer", 1e-5)
        return hidden

    expected = chain()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = chain()
    for _ in range(10):
        found.zero_()
        graph.replay()
        assert torch.equal(found, expected)
