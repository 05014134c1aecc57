"""A function of tensors as the bare list of its torch calls.

At one token, on a CPU, a small model's modules, checks and keyword arguments cost more than its arithmetic. Shapes are
the same at every token, so the calls are too: they are written down once and made again without what led to them.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from operator import getitem
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_aggregate
from torch.overrides import TorchFunctionMode

READS = frozenset(
    {"__bool__", "__float__", "__index__", "__int__", "allclose", "equal", "is_nonzero", "item", "tolist"}
)
"""Torch's functions, by name, that tell what is in a tensor."""


class LookedAtNumbersError(Exception):
    """The function takes its way by what is in a tensor: another call could take another."""


class _Recorder(TorchFunctionMode):
    """Writes down every torch call that makes or changes a tensor, as a graph."""

    def __init__(self, inputs: Sequence[Tensor]):
        super().__init__()
        self.graph = fx.Graph()
        self.constants: list[Tensor] = []
        self.nodes: dict[int, fx.Node] = {}
        self.alive: list[Tensor] = list(inputs)  # an id is a tensor's as long as it lives
        self.changes: set[fx.Node] = set()
        for number, tensor in enumerate(inputs):
            self.nodes[id(tensor)] = self.last_placeholder = self.graph.placeholder(f"input_{number}")

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in READS:
            raise LookedAtNumbersError(str(func))
        given = [*_tensors(args), *_tensors(kwargs)]
        versions = list(map(_version, given))
        result = func(*args, **kwargs)
        made = list(_tensors(result))
        if not made:
            return result
        changed = list(map(_version, given)) != versions
        if not changed and all(any(new is old for old in given) for new in made):
            return result  # nothing was made, such as by .to() of what is there already
        if not changed and all(map(self._constant, given)) and given and self._views(made, given):
            return result  # a view of a weight is as constant as the weight
        self._write(func, args, kwargs, result, changed)
        return result

    def _constant(self, tensor: Tensor) -> bool:
        return id(tensor) not in self.nodes or self.nodes[id(tensor)].name.startswith("constant")

    @staticmethod
    def _views(made: Iterable[Tensor], given: Iterable[Tensor]) -> bool:
        storages = {tensor.untyped_storage().data_ptr() for tensor in given}
        return all(tensor.untyped_storage().data_ptr() in storages for tensor in made)

    def _write(self, func: Any, args: Any, kwargs: Any, result: Any, changed: bool) -> None:
        args, kwargs = map_aggregate(args, self._node), map_aggregate(kwargs, self._node)
        if getattr(func, "__name__", "") == "__get__":  # a property, such as x.mT
            func, args = getattr, (*args[:1], func.__self__.__name__)
        node = self.graph.call_function(func, args, kwargs)
        if changed:
            self.changes.add(node)
        self._name(node, result)

    def _node(self, leaf: Any) -> Any:
        """The node of a tensor that was met before; one that was not is a weight."""
        if not isinstance(leaf, Tensor):
            return leaf
        if id(leaf) not in self.nodes:
            with self.graph.inserting_after(self.last_placeholder):
                self.last_placeholder = self.graph.placeholder(f"constant_{len(self.constants)}")
            self.nodes[id(leaf)] = self.last_placeholder
            self.constants.append(leaf)
            self.alive.append(leaf)
        return self.nodes[id(leaf)]

    def _name(self, node: fx.Node, result: Any) -> None:
        if isinstance(result, Tensor):
            if id(result) not in self.nodes:  # else it was changed in place and is the same one
                self.nodes[id(result)] = node
                self.alive.append(result)
        elif isinstance(result, tuple | list):
            for number, part in enumerate(result):
                if isinstance(part, Tensor | tuple | list):
                    self._name(self.graph.call_function(getitem, (node, number)), part)

    def finish(self, output: Tensor) -> fx.Graph:
        """Leave out what nobody uses."""
        self.graph.output(self._node(output))
        for node in reversed(list(self.graph.nodes)):
            if node.op == "call_function" and not node.users and node not in self.changes:
                self.graph.erase_node(node)
        self.graph.lint()
        return self.graph


def _tensors(nested: Any) -> Iterator[Tensor]:
    """Those in a value, or in tuples, lists and dictionaries of them; torch's own way to find them takes far longer."""
    if isinstance(nested, Tensor):
        yield nested
    elif isinstance(nested, tuple | list):
        for part in nested:
            yield from _tensors(part)
    elif isinstance(nested, dict):
        yield from _tensors(list(nested.values()))


def _version(tensor: Tensor) -> int:
    """How often a tensor was changed in place; weights loaded in inference mode do not count, and do not change."""
    return 0 if tensor.is_inference() else tensor._version


class Tape:
    """A function of tensors, written down.

    Args:
        function: From the inputs to one tensor; it may change tensors in place. It is called once.
        inputs: Tensors; those of later calls have their shapes. All others that the function meets count as weights.

    Attributes:
        output: What that call returned.

    Raises:
        LookedAtNumbersError: The function depends on what is in a tensor.
    """

    def __init__(self, function: Callable[..., Tensor], inputs: Sequence[Tensor]):
        recorder = _Recorder(inputs)
        with recorder:
            self.output = function(*inputs)
        graph = recorder.finish(self.output)
        self.weights = recorder.constants
        self.code = fx.GraphModule(torch.nn.Module(), graph)
        self._calls: Callable[..., Tensor] = self.code.forward

    def __call__(self, *inputs: Tensor) -> Tensor:
        """Make the calls again with other inputs."""
        return self._calls(*inputs, *self.weights)
