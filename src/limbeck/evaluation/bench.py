"""Speed and memory of a model against context length and batch: prefill, first token, decode steps, cache, peak.

What is timed is what `generate` does: the model reads a prompt and hands back its cache, then goes on token by token
through its own forward with that cache. So a teacher's keys and values grow, and a student's state does not.
"""

import gc
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch
import transformers
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from limbeck.devices import choose_device, choose_dtype
from limbeck.errors import LimbeckError
from limbeck.progress import PlainProgress, make_progress
from limbeck.students import cache_bytes, load_config, load_model

Source = str | Path | PreTrainedModel
Role = Literal["teacher", "student", "model"]
CONTEXTS = (128, 512, 2048, 8192)
MOST_PASSES = 50
LEARNED_POSITIONS = ("wpe", "embed_positions", "position_embeddings")


@dataclass(frozen=True)
class BenchPoint:
    """What was measured at one context length and one batch; times are medians.

    Attributes:
        context: Tokens of each prompt.
        batch: How many prompts at once.
        prefill_tokens_per_second: Prompt tokens read per second, all rows together.
        first_token_seconds: From the prompt to the first new token in hand.
        decode_tokens_per_second: New tokens per second, all rows together.
        step_seconds: One decode step: every row gains a token.
        cache_bytes: What the cache's tensors hold after the prompt and one step, all rows together.
        peak_bytes: Most memory that was allocated on the GPU, weights included; None on a CPU.
    """

    context: int
    batch: int
    prefill_tokens_per_second: float
    first_token_seconds: float
    decode_tokens_per_second: float
    step_seconds: float
    cache_bytes: int
    peak_bytes: int | None


@dataclass(frozen=True)
class BenchLeftOut:
    """A point that could not be measured, and why."""

    context: int
    batch: int
    reason: str


@dataclass(frozen=True)
class BenchModel:
    """One model's points.

    Attributes:
        name: The model's folder or hub id, or its class where it was given as an object.
        role: ``"teacher"``, ``"student"`` (a model with mixers) or ``"model"``.
        device: Where it ran.
        dtype: Number format of its weights.
        points: What was measured, by batch and context.
        left_out: What did not fit into memory.
    """

    name: str
    role: Role
    device: str
    dtype: str
    points: list[BenchPoint] = field(default_factory=list)
    left_out: list[BenchLeftOut] = field(default_factory=list)


@dataclass(frozen=True)
class Bench:
    """Speed and memory of models, the teacher first.

    Attributes:
        models: One entry for each.
        new_tokens: Decode steps in each pass.
        machine: ``torch`` and ``transformers`` versions, ``threads``, and the ``gpu`` or None.
    """

    models: list[BenchModel]
    new_tokens: int
    machine: dict[str, Any]

    def as_json(self) -> dict[str, Any]:
        """Plain dicts and lists, as RUN/evaluation/bench.json holds them."""
        return asdict(self)


def bench(
    model: Source | Sequence[Source],
    *,
    teacher: Source | None = None,
    contexts: Sequence[int] = CONTEXTS,
    batches: Sequence[int] = (1,),
    new_tokens: int = 32,
    seconds: float = 2.0,
    device: str | None = None,
    dtype: str | None = None,
) -> Bench:
    """Measure speed and memory of one model or several against context length and batch.

    A pass reads a random prompt and decodes `new_tokens` more. Each point is passed over until `seconds` are spent;
    the first pass warms up, and counts only where there was no time for a second.

    Args:
        model: A model, or the folder or hub id of one; or several. Folders are loaded one after the other.
        teacher: The model to compare with; it is measured first.
        contexts: Lengths of the prompts.
        batches: Numbers of prompts at once.
        new_tokens: Decode steps in a pass.
        seconds: How long each point may go on starting passes; a single pass may take longer.
        device: Where to run what is loaded; by default a GPU if there is one. Models given as objects stay where
            they are.
        dtype: Number format of what is loaded; by default the checkpoint's.

    Returns:
        The figures; points that did not fit into memory are under `left_out`.

    Raises:
        LimbeckError: A number is out of range, a context goes beyond learned positions, or a model keeps no cache.
    """
    contexts, batches = _counts("contexts", contexts), _counts("batches", batches)
    if new_tokens < 1:
        raise LimbeckError(f"new_tokens = {new_tokens}", expected="1 or more")
    if not 0 <= seconds < float("inf"):
        raise LimbeckError(f"seconds = {seconds}", expected="0 or more; 0 makes one pass for each point")
    place, number_format = choose_device(device), choose_dtype(dtype)
    sources = [model] if isinstance(model, str | Path | PreTrainedModel) else list(model)
    given = ([(teacher, True)] if teacher is not None else []) + [(source, False) for source in sources]
    if not sources:
        raise LimbeckError("no model to measure", expected="one or more")
    for source, _ in given:
        if not isinstance(source, PreTrainedModel):
            load_config(source)  # what is not there is found before anything is measured
    cells = [(context, batch) for batch in batches for context in contexts]
    measured: list[BenchModel] = []
    with make_progress("bench", len(given) * len(cells)) as progress:
        progress.begin(0)
        for source, is_teacher in given:
            with _loaded(source, place, number_format) as subject:
                entry = _entry(subject, source, is_teacher)
                _check_positions(subject, entry.name, contexts[-1], new_tokens)
                _measure_all(subject, entry, cells, new_tokens, seconds, progress, len(measured) * len(cells))
                measured.append(entry)
            del subject
            _give_memory_back()
    return Bench(measured, new_tokens, _machine(measured))


def _measure_all(
    model: PreTrainedModel,
    entry: BenchModel,
    cells: Sequence[tuple[int, int]],
    new_tokens: int,
    seconds: float,
    progress: PlainProgress,
    done: int,
) -> None:
    for number, (context, batch) in enumerate(cells, done + 1):
        try:
            point = measure_point(model, context, batch, new_tokens=new_tokens, seconds=seconds)
            entry.points.append(point)
        except RuntimeError as error:  # torch.OutOfMemoryError is one
            if not _out_of_memory(error):
                raise
            entry.left_out.append(BenchLeftOut(context, batch, "out of memory"))
            progress.note(f"{entry.name}: context {context}, batch {batch}: out of memory, left out")
        _give_memory_back()
        progress.update(number, {"model": entry.name, "context": str(context), "batch": str(batch)})


@torch.no_grad()
def measure_point(
    model: PreTrainedModel, context: int, batch: int, *, new_tokens: int = 32, seconds: float = 2.0
) -> BenchPoint:
    """Measure a model, in eval mode, at one context length and batch; see `bench`."""
    device = model.device
    vocabulary: Any = model.get_input_embeddings()
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(vocabulary.num_embeddings, (batch, context), generator=generator).to(device)  # (b, l)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    passes: list[_Pass] = []
    end = time.monotonic() + seconds
    while not passes or (time.monotonic() < end and len(passes) < MOST_PASSES):
        passes.append(_one_pass(model, prompt, new_tokens))
    counted = passes[1:] or passes
    step = median(seconds for one in counted for seconds in one.steps)
    return BenchPoint(
        context=context,
        batch=batch,
        prefill_tokens_per_second=batch * context / median(one.prefill for one in counted),
        first_token_seconds=median(one.first_token for one in counted),
        decode_tokens_per_second=batch / step,
        step_seconds=step,
        cache_bytes=counted[-1].cache_bytes,
        peak_bytes=torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
    )


@dataclass(frozen=True)
class _Pass:
    """Seconds of one prompt and its continuation, and the bytes of its cache."""

    prefill: float
    first_token: float
    steps: list[float]
    cache_bytes: int


def _one_pass(model: PreTrainedModel, prompt: Tensor, new_tokens: int) -> _Pass:
    start = _now(prompt.device)
    logits, cache = _forward(model, prompt, None)
    prefill = _now(prompt.device) - start
    token = logits[:, -1:].argmax(-1)  # (b, 1)
    before = _now(prompt.device)
    first_token = before - start
    steps, held = [], 0
    for number in range(new_tokens):
        logits, cache = _forward(model, token, cache)
        token = logits[:, -1:].argmax(-1)
        steps.append(_now(prompt.device) - before)
        if number == 0:  # not before: the layers of a sliding window hold on to the whole prompt until a step is made
            held = cache_bytes(cache)
        before = _now(prompt.device)
    return _Pass(prefill, first_token, steps, held)


def _forward(model: PreTrainedModel, input_ids: Tensor, cache: Cache | None) -> tuple[Tensor, Cache]:
    """The last position's logits (b, 1, v), or more where the model cannot leave them out, and the cache after it."""
    running: Any = model
    options = {"logits_to_keep": 1} if running._supports_logits_to_keep() else {}  # generate asks the same
    output = running(input_ids=input_ids, past_key_values=cache, use_cache=True, **options)
    if not isinstance(output.get("past_key_values"), Cache):
        raise LimbeckError(
            f"{type(model).__name__} gives back no cache that Limbeck knows",
            expected="a causal language model with past_key_values, such as a student or a teacher",
        )
    return output.logits, output.past_key_values


def _now(device: torch.device) -> float:
    """Seconds, once everything that was asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
    return time.perf_counter()


# --- models and numbers ---------------------------------------------------------------------------------------------


@contextmanager
def _loaded(source: Source, device: torch.device, dtype: torch.dtype | None) -> Iterator[PreTrainedModel]:
    """A model in eval mode; one that was given as an object goes back into the mode that it was in."""
    model = source if isinstance(source, PreTrainedModel) else load_model(source, dtype=dtype, device=device)
    training = model.training
    model.eval()
    try:
        yield model
    finally:
        model.train(training)


def _entry(model: PreTrainedModel, source: Source, is_teacher: bool) -> BenchModel:
    name = (model.name_or_path or type(model).__name__) if isinstance(source, PreTrainedModel) else str(source)
    role: Role = "model"
    if is_teacher:
        role = "teacher"
    elif getattr(model.config, "swapped_layers", None):
        role = "student"
    return BenchModel(name, role, str(model.device), str(model.dtype).removeprefix("torch."))


def _check_positions(model: PreTrainedModel, name: str, context: int, new_tokens: int) -> None:
    """Rotary positions go on for ever; a table of learned ones ends."""
    for path, module in model.named_modules():
        if isinstance(module, nn.Embedding) and path.rpartition(".")[2] in LEARNED_POSITIONS:
            limit = getattr(model.config, "max_position_embeddings", None) or module.num_embeddings
            if context + new_tokens > limit:
                raise LimbeckError(
                    f"{name}: context {context} and {new_tokens} new tokens, but its learned positions end at {limit}",
                    expected=f"contexts up to {limit - new_tokens}; only families with rotary positions go beyond",
                    hint=f"--contexts {max(limit - new_tokens, 1)}",
                )


def _counts(name: str, values: Sequence[int]) -> list[int]:
    if not values or min(values) < 1:
        raise LimbeckError(f"{name} = {list(values)}", expected="one number or more, each 1 or more")
    return sorted(set(values))


def _out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


def _give_memory_back() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _machine(models: Sequence[BenchModel]) -> dict[str, Any]:
    on_gpu = [model.device for model in models if model.device.startswith("cuda")]
    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(on_gpu[0]) if on_gpu else None,
    }
