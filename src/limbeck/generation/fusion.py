"""A tape with fewer calls: linear layers of a token together with the norm before them and the sums after them.

Found in the calls themselves, so whatever family they come from: what `norm_linears`, `linear_sum` and `sum_norm` do at
once becomes one call. A call may move past others as long as nothing that it reads is ever changed in place.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from math import prod
from operator import getitem
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from limbeck.generation.tape import prune
from limbeck.ops.one_row import WIDEST_NORM, Linear, Norm, linear_sum, norm_linears, sum_norm

Node = Any
"""An `fx.Node`: what it has for arguments can be anything."""
VIEWS = {Tensor.__getitem__, Tensor.flatten, Tensor.reshape, Tensor.squeeze, Tensor.unsqueeze, Tensor.view}
CASTS = {Tensor.float, Tensor.to}


def fuse(graph: fx.Graph) -> None:
    """Draw calls of a recorded graph together, in place; the results are the same to rounding.

    Args:
        graph: A tape's, whose nodes tell shape and dtype and whether the tensor ever changes in place.
    """
    _sums_of_linears(graph)
    prune(graph)
    _linears_of_one_input(graph)
    prune(graph)
    _norms_of_sums(graph)
    prune(graph)


# --- what is drawn together -------------------------------------------------------------------------------------------


def _sums_of_linears(graph: fx.Graph) -> None:
    """x_0 · W_0ᵀ + x_1 · W_1ᵀ + residual, as at the end of a block."""
    for node in reversed(list(graph.nodes)):
        if not node.users or not _is_sum(node):
            continue
        terms = _terms(node)
        linears = [linear for term in terms if (linear := _linear_alone(term)) is not None]
        others = [term for term in terms if _linear_alone(term) is None]
        if len(linears) not in (1, 2) or len(others) > 1:
            continue
        with graph.inserting_before(node):
            inputs = [_rows(graph, linear.args[0]) for linear in linears]
            residual = _rows(graph, others[0]) if others else None
            layers = [graph.call_function(Linear, _weight_and_bias(linear)) for linear in linears]
            total = graph.call_function(linear_sum, (inputs, layers, residual))
            _replace(graph, node, total)


def _linears_of_one_input(graph: fx.Graph) -> None:
    """activation(norm(x) · Wᵀ + bias), two at a time."""
    groups = defaultdict(list)
    for node in graph.nodes:
        if _is_linear(node):
            x = _unviewed(node.args[0])
            found = _norm_of(x) or _Normed(x, "none", 0.0)
            groups[found[:3]].append((node, found.parameters))
    for (x, kind, eps), members in groups.items():
        for pair in _pairs(members):
            with graph.inserting_before(pair[0][0]):
                layers, ends = [], []
                for linear, parameters in pair:
                    weight, bias = _weight_and_bias(linear)
                    activation, end = _activation(linear)
                    norm = graph.call_function(Norm, parameters) if parameters else None
                    layers.append(graph.call_function(Linear, (weight, bias, activation, norm)))
                    ends.append(end)
                outs = graph.call_function(norm_linears, (_rows(graph, x), layers, kind, eps))
                for i, end in enumerate(ends):
                    _replace(graph, end, graph.call_function(getitem, (outs, i)))


def _norms_of_sums(graph: fx.Graph) -> None:
    """norm(Σ terms), where products of many rows stand between."""
    groups = defaultdict(list)
    for node in graph.nodes:
        found = _norm_of(node)
        if found is not None and found.x.meta["shape"][-1] <= WIDEST_NORM:
            groups[found[:3]].append((node, found.parameters))
    for (x, kind, eps), members in groups.items():
        pair = members[:2]
        terms = _terms(x) if _is_sum(x) else [x]
        whole = len(terms) in (2, 3)
        with graph.inserting_before(x if whole else pair[0][0]):
            rows = [_rows(graph, term) for term in (terms if whole else [x])]
            norms = [graph.call_function(Norm, parameters) for _, parameters in pair]
            outs = graph.call_function(sum_norm, (rows, norms, kind, eps))
            if whole:
                _replace(graph, x, graph.call_function(getitem, (outs, 0)))
            for i, (node, _) in enumerate(pair, 1):
                _replace(graph, node, graph.call_function(getitem, (outs, i)))


def _pairs(members: Sequence[Any]) -> Iterable[Sequence[Any]]:
    return (members[i : i + 2] for i in range(0, len(members), 2))


def _rows(graph: fx.Graph, node: Node) -> Node:
    """The tensor as (r, k)."""
    *rows, width = node.meta["shape"]
    return node if len(rows) == 1 else graph.call_function(Tensor.reshape, (node, (prod(rows), width)))


def _replace(graph: fx.Graph, old: Node, rows: Node) -> None:
    """Let `rows`, in the old tensor's shape, stand for it."""
    shaped = graph.call_function(Tensor.reshape, (rows, tuple(old.meta["shape"])))
    shaped.meta = dict(old.meta)
    old.replace_all_uses_with(shaped)


# --- what is found ----------------------------------------------------------------------------------------------------


class _Normed(NamedTuple):
    """A norm among the calls: of what, of which kind, with which eps, and its weight and bias."""

    x: Node
    kind: str
    eps: float
    parameters: tuple[Node, ...] = ()


def _is_weight(node: Any) -> bool:
    return isinstance(node, fx.Node) and node.op == "placeholder" and node.name.startswith("constant")


def _is_linear(node: Any) -> bool:
    """Whether it is a linear layer of one row that changes nowhere, all in one dtype: under autocast it is not."""
    if node.target is not F.linear or node.kwargs or not _is_weight(node.args[1]):
        return False
    x, weight, *bias = node.args
    rows = prod(x.meta["shape"][:-1])
    dtypes = {one.meta["dtype"] for one in (node, x, weight)}
    fits = len(dtypes) == 1 and all(b is None or _is_weight(b) for b in bias)
    return fits and x.meta["steady"] and rows == 1


def _weight_and_bias(linear: Node) -> tuple[Node, Node | None]:
    _, weight, *bias = linear.args
    return weight, bias[0] if bias else None


def _linear_alone(term: Node) -> Node | None:
    """The linear layer whose output, in some shape, a term is, if nobody else reads it."""
    node = _unviewed(term)
    seen = [term, *_views(term)]
    return node if _is_linear(node) and all(len(one.users) == 1 for one in seen) else None


def _views(node: Node) -> list[Node]:
    """What a node shows in another shape, and what that shows, and so on."""
    shown = []
    while node.target in VIEWS and len(node.all_input_nodes) == 1:
        source = node.args[0]
        same = source.meta["shape"][-1:] == node.meta["shape"][-1:]
        if not (same and source.meta["steady"]) or source.meta["shape"].numel() != node.meta["shape"].numel():
            break
        shown.append(source)
        node = source
    return shown


def _unviewed(node: Node) -> Node:
    return [node, *_views(node)][-1]


def _is_sum(node: Node) -> bool:
    """Whether it is a sum of two tensors of its own shape and dtype, which change nowhere."""
    if node.target is not Tensor.add or node.kwargs or len(node.args) != 2:
        return False
    nodes = [node, *node.args]
    if not all(isinstance(one, fx.Node) and one.meta.get("steady") for one in nodes):
        return False
    return len({(one.meta["shape"], one.meta["dtype"]) for one in nodes}) == 1


def _terms(node: Node) -> list[Node]:
    """What a sum of sums adds up; sums that others read as well stay whole."""
    inner = (_terms(x) if _is_sum(x) and len(x.users) == 1 else [x] for x in node.args)
    return [term for terms in inner for term in terms]


def _activation(linear: Node) -> tuple[str, Node]:
    """What alone reads a linear layer, by name, if it is an activation, and the node of the result."""
    (*others, user) = linear.users
    if others or user.meta.get("changes"):
        return "identity", linear
    if user.target is F.silu:
        return "silu", user
    if user.target is F.gelu:
        return {"none": "gelu", "tanh": "gelu_tanh"}[user.kwargs.get("approximate", "none")], user
    return "identity", linear


def _norm_of(node: Node) -> _Normed | None:
    """The norm that a node is the result of, if neither it nor what it reads changes."""
    found = _layer_norm(node) if node.target is F.layer_norm else _rms_norm(node)
    if found is None or found.x.meta["dtype"] != node.meta["dtype"]:
        return None
    return found if node.meta["steady"] and found.x.meta["steady"] else None


def _layer_norm(node: Node) -> _Normed | None:
    names = ("x", "shape", "weight", "bias", "eps")
    given = dict(zip(names, node.args, strict=False)) | node.kwargs
    weight, bias = given.get("weight"), given.get("bias")
    if len(given["shape"]) != 1 or not _is_weight(weight) or not (bias is None or _is_weight(bias)):
        return None
    return _Normed(given["x"], "layer", given.get("eps", 1e-5), (weight, bias))


def _rms_norm(node: Node) -> _Normed | None:
    """Weight · (x / √(mean(x²) + eps)), as transformers writes it out."""
    weight, normed = _arguments(node, Tensor.mul)
    x, scale = _arguments(_uncast(normed), Tensor.mul)
    (shifted,) = _arguments(scale, torch.rsqrt, 1)
    mean, eps = _arguments(shifted, Tensor.add)
    squares, dim = _arguments(mean, Tensor.mean)
    base, power = _arguments(squares, Tensor.pow)
    if base is None or base is not x or (dim, power) != (-1, 2) or not _is_weight(weight):
        return None
    if not mean.kwargs.get("keepdim") or not isinstance(eps, float):
        return None
    return _Normed(_uncast(x), "rms", eps, (weight,))


def _arguments(node: Any, target: Any, number: int = 2) -> Sequence[Any]:
    """The arguments of a call of `target`; Nones for any other."""
    is_it = isinstance(node, fx.Node) and node.target is target and len(node.args) == number
    return node.args if is_it else (None,) * number


def _uncast(node: Any) -> Any:
    return node.args[0] if isinstance(node, fx.Node) and node.target in CASTS else node
