"""A frozen teacher whose layers lie in the host's memory, and come to the device one by one while it runs.

A layer's parameters are copied to the device before its forward and let go after it; the next layer's copy is under way
meanwhile, on a stream of its own. So the device holds two layers at most, and what lies outside of them: embeddings,
the last norm, the head, and all buffers.
"""

from collections.abc import Callable, Sequence
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from limbeck.students import blocks, mixers
from limbeck.training.parallel import tied_parameters


def offload_layers(teacher: PreTrainedModel, device: torch.device) -> None:
    """Keep a frozen teacher's layers in the host's memory, and all else on a device, in place.

    It may then be called like any other model under `torch.no_grad`. On a CPU the layers are copied all the same.

    Args:
        teacher: On the CPU. It must neither learn nor be moved afterwards.
        device: Where it computes.
    """
    tied = tied_parameters(teacher)
    streaming = [[p for p in block.parameters() if id(p) not in tied] for block in blocks(teacher)]
    away = {id(parameter) for layer in streaming for parameter in layer}
    for tensor in (*teacher.parameters(), *teacher.buffers()):
        if id(tensor) not in away:
            tensor.data = tensor.data.to(device)
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None
    layers = [_Layer(parameters, device, stream) for parameters in streaming]
    for index, block in enumerate(blocks(teacher)):
        bring, drop = partial(_bring, layers, index), layers[index].drop
        block.register_forward_pre_hook(lambda *_, bring=bring: bring(), prepend=True)
        block.register_forward_hook(lambda *_, drop=drop: drop(), always_call=True)
    for index, mixer in mixers(teacher).items():  # of a teacher that is a student: called by itself, for its matrix
        vars(mixer)["mixing_matrix"] = _within(mixer.mixing_matrix, layers[index])


class _Layer:
    """The parameters of one layer, at home in the host's memory.

    Args:
        parameters: Of the layer.
        device: Where they are used.
        stream: On which they are copied; None for copies that are waited for.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], device: torch.device, stream: torch.cuda.Stream | None):
        self.parameters, self.device, self.stream = parameters, device, stream
        self.home = [p.data if stream is None else p.data.pin_memory() for p in parameters]
        self.here: list[Tensor] | None = None
        self._copied: torch.cuda.Event | None = None
        self.drop()

    def fetch(self) -> None:
        """Begin to copy it to the device, unless it is there."""
        if self.here is not None:
            return
        # The memory is the computing stream's, which may still be at work in it: the copy waits for what is queued.
        self.here = [torch.empty_like(tensor, device=self.device) for tensor in self.home]
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            for copy, tensor in zip(self.here, self.home, strict=True):
                copy.copy_(tensor, non_blocking=True)
            if self.stream is not None:
                self._copied = torch.cuda.Event()
                self._copied.record(self.stream)

    def enter(self) -> None:
        """Have its parameters on the device: what is computed from now on reads them there."""
        self.fetch()
        assert self.here is not None
        self._wait()
        for parameter, copy in zip(self.parameters, self.here, strict=True):
            parameter.data = copy

    def drop(self) -> None:
        """Give the device's memory back: what is computed from now on may have it."""
        self._wait()
        for parameter, tensor in zip(self.parameters, self.home, strict=True):
            parameter.data = tensor
        self.here = None

    def _wait(self) -> None:
        """Let the computing stream wait for the copy."""
        if self._copied is not None:
            torch.cuda.current_stream(self.device).wait_event(self._copied)
            self._copied = None


def _bring(layers: Sequence[_Layer], index: int) -> None:
    """Have one layer on the device, and the next on its way."""
    for other in (*layers[:index], *layers[index + 1 :]):
        if other.here is not None:  # fetched ahead of a layer that failed
            other.drop()
    layers[index].enter()
    if index + 1 < len(layers):
        layers[index + 1].fetch()


def _within(method: Callable[..., Any], layer: _Layer) -> Callable[..., Any]:
    """A method that is called by itself, with its layer on the device meanwhile."""

    @wraps(method)
    def called(*args: Any, **kwargs: Any) -> Any:
        layer.enter()
        try:
            return method(*args, **kwargs)
        finally:
            layer.drop()

    return called
