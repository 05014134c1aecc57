"""Tokens from tokens: the prompt in one pass, then one token after another.

A token's work is the model's own forward with a cache at fixed addresses, then the choice of the next token. Shapes
are the same every time, and nothing looks at a number: so its torch calls are written down once and made again without
the modules around them, on a GPU fused into fewer, and captured as a CUDA graph.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from limbeck.generation.fusion import fuse
from limbeck.generation.masks import DecodingMasks
from limbeck.generation.sampling import Sampling, choose
from limbeck.generation.tape import LookedAtNumbersError, Tape
from limbeck.ops.backends import has_triton
from limbeck.students import FAMILIES, StudentCache
from limbeck.students.cache import FixedCache
from limbeck.students.families import STUDENT_PREFIX

WARM_UPS = 2
"""Tokens that are made before the graph is captured: kernels are compiled and libraries set up by then."""
WORTH_A_TAPE = 32
"""New tokens from which on writing the calls down pays on a CPU."""


def decodes(model: PreTrainedModel) -> bool:
    """Whether `Decoder` takes a model: of a known family, on one device, with attention that takes a mask."""
    known = model.config.model_type.removeprefix(STUDENT_PREFIX) in FAMILIES
    devices = {parameter.device for parameter in model.parameters()}
    attention = getattr(model.config, "_attn_implementation", None)
    return known and len(devices) == 1 and devices.pop().type != "meta" and attention in ("sdpa", "eager")


@contextmanager
def _plain_tensors() -> Iterator[None]:
    """No gradients, and tensors that count their changes whatever mode the caller is in."""
    with torch.inference_mode(False), torch.no_grad():
        yield


class Decoder:
    """A batch of prompts being continued.

    Args:
        model: A causal language model that `decodes` takes, in eval mode.
        input_ids: (b, l) int64, padded on the left, where the model is.
        attention_mask: (b, l), 1 at a token, or None when all are.
        max_new_tokens: How many tokens may be added.
        sampling: How they are chosen; greedily by default.
        eos: Tokens that end a row; none for no end.
        pad: What comes after the end of a row.
        generator: What random numbers are drawn from, on the model's device; None for torch's own.
        graph: Whether to capture a CUDA graph; by default on a GPU.

    Attributes:
        output: (b, max_new_tokens) int64, what was added so far, padded.
        graph: The graph, once it is captured.
        tape: The calls, once they are written down.
    """

    @_plain_tensors()
    def __init__(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        max_new_tokens: int,
        sampling: Sampling | None = None,
        eos: Sequence[int] = (),
        pad: int = 0,
        generator: torch.Generator | None = None,
        graph: bool | None = None,
    ):
        self.model: Any = model
        self.sampling = sampling or Sampling()
        self.generator, self.pad, self.max_new_tokens = generator, pad, max_new_tokens
        device, rows = input_ids.device, input_ids.shape[0]
        on_gpu = device.type == "cuda"
        turns = on_gpu and _turns_with_length(model)
        self.wants_graph = on_gpu and not turns if graph is None else graph
        self.wants_tape = not turns if on_gpu else max_new_tokens >= WORTH_A_TAPE
        self.rewrite = fuse if on_gpu and has_triton() else None
        self.graph: torch.cuda.CUDAGraph | None = None
        self.tape: Tape | None = None
        self._work: Callable[[], Tensor] = self._advance
        self.output = torch.full((rows, max_new_tokens), pad, device=device)
        self.eos = torch.tensor(list(eos), device=device) if eos else None
        self.finished = torch.zeros(rows, dtype=torch.bool, device=device)
        self.made = torch.zeros(1, dtype=torch.int64, device=device)
        self.token = torch.zeros(rows, 1, dtype=torch.int64, device=device)  # the last one that was made
        self.seen: Tensor | None = None
        self._prefill(input_ids, attention_mask)

    # --- the prompt -----------------------------------------------------------------------------------------------

    def _prefill(self, input_ids: Tensor, attention_mask: Tensor | None) -> None:
        rows, length = input_ids.shape
        if attention_mask is not None and bool(attention_mask.all()):
            attention_mask = None  # no padding: the model has less to do
        filled, padding = StudentCache(self.model.config), {}
        positions = torch.arange(length, device=input_ids.device).expand(rows, length)
        if attention_mask is not None:
            padding = {"attention_mask": attention_mask}
            positions = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
        logits = self._logits(input_ids, position_ids=positions, past_key_values=filled, use_cache=True, **padding)
        self.positions = positions[:, -1:] + 1  # (b, 1), of the next token
        if self.sampling.repetition_penalty != 1:
            own = input_ids if attention_mask is None else input_ids.where(attention_mask.bool(), input_ids[:, -1:])
            self.seen = torch.zeros(logits.shape, dtype=torch.bool, device=logits.device).scatter_(1, own, True)
        room = length + self.max_new_tokens
        self.cache = FixedCache(self.model.config, filled, length, room)
        attends = self.cache.attends
        self.masks = DecodingMasks(self.model, input_ids, attention_mask, room) if attends else None
        self._take(logits)

    def _logits(self, input_ids: Tensor, **options: Any) -> Tensor:
        """The last token's logits, (b, v)."""
        return self.model(input_ids=input_ids, logits_to_keep=1, **options).logits[:, -1]

    # --- one token ------------------------------------------------------------------------------------------------

    def _advance(self, *_: Tensor) -> Tensor:
        """Put the last token through the model."""
        mask = None if self.masks is None else self.masks.add(self.cache.position)
        return self._logits(
            self.token, position_ids=self.positions, attention_mask=mask, past_key_values=self.cache, use_cache=True
        )

    def _take(self, logits: Tensor) -> None:
        """Choose from (b, v), and write down what was chosen."""
        token = choose(logits, self.sampling, self.seen, self.generator)
        if self.eos is not None:
            token = token.masked_fill(self.finished, self.pad)
            self.finished.logical_or_((token[:, None] == self.eos).any(-1))
        self.token.copy_(token[:, None])
        self.output.index_copy_(1, self.made, self.token)
        if self.seen is not None:
            self.seen.scatter_(1, self.token, True)
        self.made.add_(1)

    def _step(self) -> None:
        logits = self._work()
        self.cache.position.add_(1)
        self.positions.add_(1)
        self._take(logits)

    @_plain_tensors()
    def step(self) -> None:
        """Make one more token for every row."""
        self._step() if self.graph is None else self.graph.replay()

    @_plain_tensors()
    def capture(self) -> None:
        """Capture one token's work; it must have been done before."""
        graph = torch.cuda.CUDAGraph()
        if self.generator is not None:
            graph.register_generator_state(self.generator)
        with torch.cuda.graph(graph):
            self._step()
        self.graph = graph

    def record(self) -> None:
        """Write down the calls of the model's work, while it is done; nothing changes where that is impossible."""
        masks = [] if self.masks is None else self.masks.tensors()
        held = self.cache.tensors()
        inputs = [self.token, self.positions, *held, *masks]

        def written_down() -> Tensor:
            states = self.cache.states()  # masks, keys and values would only be written again
            before = [tensor.clone() for tensor in states]
            try:
                self.tape = Tape(self._advance, inputs, self.rewrite)
            except LookedAtNumbersError:
                for tensor, old in zip(states, before, strict=True):
                    tensor.copy_(old)  # it stopped halfway
                self._work = self._advance
                return self._advance()
            self._work = partial(self.tape, *inputs)
            return self.tape.output

        self._work = written_down

    # --- all of them ----------------------------------------------------------------------------------------------

    def tokens(self) -> Iterator[Tensor]:
        """Make token after token, until every row has ended or there is no more room.

        Yields:
            (b,) int64, on the device; valid until the next is asked for.
        """
        side = torch.cuda.Stream() if self.wants_graph else None
        ended = _Ended(self.finished) if self.eos is not None else None
        if self.wants_tape:
            self.record()
        for number in range(self.max_new_tokens):
            if number > 0:  # the prompt's pass has made the first
                if side is not None and number <= WARM_UPS:
                    side.wait_stream(torch.cuda.current_stream())
                    with torch.cuda.stream(side):
                        self.step()
                    torch.cuda.current_stream().wait_stream(side)
                else:
                    if side is not None and self.graph is None:
                        self.capture()
                    self.step()
            yield self.token[:, 0]
            if ended is not None and ended.before():
                return

    def run(self) -> Tensor:
        """Make all tokens.

        Returns:
            (b, n) int64, n as many as the longest row needed; after a row's end stands `pad`.
        """
        for _ in self.tokens():
            pass
        output = self.output[:, : int(self.made)]
        if self.eos is None:
            return output
        ends = torch.isin(output, self.eos)
        lengths = torch.where(ends.any(-1), ends.int().argmax(-1) + 1, output.shape[1])
        return output[:, : int(lengths.max())]


class _Ended:
    """Whether every row has ended, known without waiting for a GPU's newest token: so it may come one token late."""

    def __init__(self, finished: Tensor):
        self.finished = finished
        self.copied = torch.cuda.Event() if finished.device.type == "cuda" else None
        self.host = torch.zeros(finished.shape, dtype=torch.bool, pin_memory=self.copied is not None)

    def before(self) -> bool:
        """Ask after every token."""
        if self.copied is None:
            return bool(self.finished.all())
        self.copied.synchronize()  # with the copy of a token ago; an event that was never recorded is done
        ended = bool(self.host.all())
        self.host.copy_(self.finished, non_blocking=True)
        self.copied.record()
        return ended


def _turns_with_length(model: PreTrainedModel) -> bool:
    """Whether rotary embeddings are chosen by how long the text is: transformers looks at the positions then."""
    kinds = (getattr(module, "rope_type", None) for module in model.modules())
    return any(isinstance(kind, str) and ("dynamic" in kind or kind == "longrope") for kind in kinds)
