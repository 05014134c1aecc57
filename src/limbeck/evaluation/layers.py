"""Which layers should keep their attention: each is given it back, alone, and the student measured against its teacher.

One teacher, one student and a few batches are enough; no model is copied. The scores are worth most when the student is
aligned with its teacher already: of mixers that have learned nothing they say which attention the model cannot be
without, not which attention a mixer cannot learn (KL-guided layer selection, arXiv 2512.20569).
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from limbeck.data import collate, open_samples
from limbeck.devices import choose_device, choose_dtype
from limbeck.distill import check_vocabularies, kl_divergence
from limbeck.errors import LimbeckError
from limbeck.evaluation.perplexity import evaluating
from limbeck.progress import make_progress, say
from limbeck.students import (
    attention_of,
    blocks,
    family_of,
    load_config,
    load_model,
    load_tokenizer,
    swapped_layers,
)
from limbeck.students.arguments import PADDING
from limbeck.students.convert import convert

Batches = Iterable[dict[str, Tensor]]
AUTO = "auto:"
"""``keep_attention="auto:4"`` asks for the four layers with the greatest gain."""


@dataclass(frozen=True)
class LayerScore:
    """What one layer's attention is worth to a student.

    Attributes:
        layer: Which layer, counted from 0.
        gain: By how much KL(teacher ‖ student) falls when this layer has the teacher's attention again, nats per token.
        kl: The KL that is left then, nats per token.
    """

    layer: int
    gain: float
    kl: float

    def as_json(self) -> dict[str, Any]:
        """The fields by name."""
        return asdict(self)


@torch.no_grad()
def score_layers(teacher: PreTrainedModel, student: PreTrainedModel, batches: Batches) -> list[LayerScore]:
    """Give every swapped layer of a student its teacher's attention back, one at a time, and measure what it helps.

    It takes as many forward passes a batch as there are swapped layers, and two.

    Args:
        teacher: The model the student was made from, on the student's device and in its dtype.
        student: Left as it is.
        batches: Of ``input_ids`` (b, l) and, where there is padding, ``attention_mask`` (b, l), 1 at tokens.

    Returns:
        One score for each layer that has a mixer, the greatest gain first.

    Raises:
        LimbeckError: The student has no mixer, the models do not belong together, or there is no batch.
    """
    layers = swapped_layers(student)
    _check_pair(teacher, student, layers)
    totals = torch.zeros(1 + len(layers), dtype=torch.float64)  # the student as it is, then with each layer restored
    tokens = 0
    with ExitStack() as stack:
        stack.enter_context(evaluating(teacher))
        stack.enter_context(evaluating(student))
        progress = stack.enter_context(make_progress("scoring layers: batch", None))
        for done, batch in enumerate(batches, start=1):
            inputs = {name: batch[name].to(student.device) for name in ("input_ids", "attention_mask") if name in batch}
            counted = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()  # (b, l)
            target = teacher(**inputs, use_cache=False).logits  # (b, l, v)
            totals[0] += _kl(student, inputs, target, counted)
            for place, layer in enumerate(layers, start=1):
                with restored_attention(teacher, student, layer):
                    totals[place] += _kl(student, inputs, target, counted)
            tokens += int(counted.sum())
            progress.update(done, {"kl": float(totals[0]) / max(tokens, 1)})
    if not tokens:
        raise LimbeckError("no tokens to score layers on", expected="at least one batch")
    before, *after = (totals / tokens).tolist()
    scores = [LayerScore(layer, before - kl, kl) for layer, kl in zip(layers, after, strict=True)]
    return sorted(scores, key=lambda score: (-score.gain, score.layer))


def choose_layers(scores: Iterable[LayerScore], count: int) -> list[int]:
    """The layers that should keep their attention: those with the greatest gain.

    Args:
        scores: From `score_layers`.
        count: How many layers may keep it.

    Returns:
        The layers in order, for ``convert(keep_attention=…)``.

    Raises:
        LimbeckError: There are not so many layers.
    """
    ranked = sorted(scores, key=lambda score: (-score.gain, score.layer))
    if not 1 <= count <= len(ranked):
        raise LimbeckError(
            f"attention to be kept in {count} layers", expected=f"1 to {len(ranked)}, the layers that have scores"
        )
    return sorted(score.layer for score in ranked[:count])


def auto_count(keep_attention: str) -> int | None:
    """Read ``"auto:4"``.

    Returns:
        4, or None where the text does not begin with ``auto``.

    Raises:
        LimbeckError: It begins with ``auto`` and goes on otherwise.
    """
    if not keep_attention.startswith(AUTO.rstrip(":")):
        return None
    count = keep_attention.removeprefix(AUTO)
    if not (count.isdecimal() and int(count)):
        raise LimbeckError(
            f"keep_attention {keep_attention!r}",
            expected="auto: and how many layers keep their attention",
            hint='"auto:4"',
        )
    return int(count)


def score_folder(
    teacher: str | Path,
    student: str | Path | None,
    data: str | Path,
    *,
    convert_options: Mapping[str, Any] | None = None,
    sequence_length: int = 512,
    samples: int = 32,
    batch_size: int = 4,
    device: str | None = None,
    dtype: str | None = None,
) -> list[LayerScore]:
    """Score the layers of checkpoints on a text: `score_layers` with folders for models.

    Args:
        teacher: Folder or hub id.
        student: Folder or hub id. None for the teacher with every layer converted and nothing learned.
        data: File or folder of text, tokens, or the prefix of a token file; see `limbeck.data.open_samples`.
        convert_options: Of `limbeck.convert`, where there is no student.
        sequence_length: Tokens in a sample.
        samples: Samples to read at most.
        batch_size: Samples in a forward pass.
        device: Where to run; by default a GPU if there is one.
        dtype: Number format of both; by default that of the student's checkpoint.

    Returns:
        As `score_layers`.

    Raises:
        LimbeckError: Something is not there or does not fit.
    """
    for name, value in (("samples", samples), ("batch_size", batch_size)):
        if value < 1:
            raise LimbeckError(f"{name} = {value}", expected="1 or more")
    place, number_format = choose_device(device), choose_dtype(dtype)
    config = load_config(teacher)
    if student is not None:
        check_vocabularies(load_config(student), config)
    dataset = open_samples(
        data, sequence_length, vocab_size=config.vocab_size, tokenizer=lambda: load_tokenizer(teacher), note=say
    )
    count = min(samples, len(dataset))
    batches = [collate(dataset, range(i, min(i + batch_size, count))) for i in range(0, count, batch_size)]
    if student is None:
        original = load_model(teacher, dtype=number_format, device=place)
        return score_layers(original, convert(original, **dict(convert_options or {})), batches)
    loaded = load_model(student, dtype=number_format, device=place)
    return score_layers(load_model(teacher, dtype=loaded.dtype, device=place), loaded, batches)


@contextmanager
def restored_attention(teacher: PreTrainedModel, student: PreTrainedModel, layer: int) -> Iterator[None]:
    """While open, a swapped layer of the student has its teacher's attention; no weight is copied.

    Everything that follows from which layers are swapped follows: the attention mask is made, in the form that the
    teacher's implementation of attention reads, and the block hands its attention what the teacher's block would.
    Run the student without a cache.

    Args:
        teacher: Lends its attention module.
        student: Has a mixer in this layer.
        layer: Which, from 0.
    """
    block, config = blocks(student)[layer], student.config
    mixed, name = attention_of(block), family_of(config).attention
    teachers_config: Any = teacher.config
    fields = {
        "swapped_layers": [index for index in config.swapped_layers if index != layer],
        "_attn_implementation_internal": teachers_config._attn_implementation,
    }
    before = {field: getattr(config, field) for field in fields}
    # Before the hook with which some families' swapped blocks carry the padding mask in another argument's place.
    handle = block.register_forward_pre_hook(_without_mixer_arguments, with_kwargs=True, prepend=True)
    try:
        setattr(block, name, attention_of(blocks(teacher)[layer]))
        for field, value in fields.items():
            setattr(config, field, value)
        yield
    finally:
        for field, value in before.items():
            setattr(config, field, value)
        setattr(block, name, mixed)
        handle.remove()


def _without_mixer_arguments(
    _block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return args, {name: value for name, value in kwargs.items() if name not in (PADDING, "seq_idx")}


def _kl(student: PreTrainedModel, inputs: dict[str, Tensor], target: Tensor, counted: Tensor) -> float:
    """Sum of KL(teacher ‖ student) over the tokens that count."""
    found = kl_divergence(student(**inputs, use_cache=False).logits, target)  # (b, l)
    return found[counted].double().sum().item()


def _check_pair(teacher: PreTrainedModel, student: PreTrainedModel, layers: tuple[int, ...]) -> None:
    if not layers:
        raise LimbeckError(
            f"{student.name_or_path or type(student).__name__} has attention in every layer",
            expected="a student with mixers",
            hint="limbeck convert makes one, limbeck distill aligns it",
        )
    if swapped_layers(teacher):
        raise LimbeckError("the teacher is a student itself", expected="the Transformer that the student was made from")
    ours, theirs = student.config, teacher.config
    check_vocabularies(ours, theirs)
    for what in ("hidden_size", "num_hidden_layers", "num_attention_heads"):
        if getattr(ours, what) != getattr(theirs, what) or family_of(ours) is not family_of(theirs):
            raise LimbeckError(
                f"a {family_of(ours).name} student with {what} {getattr(ours, what)} and a {family_of(theirs).name} "
                f"teacher with {getattr(theirs, what)}",
                expected="the teacher that the student was made from, or one of its family and size",
            )
    if (student.dtype, student.device) != (teacher.dtype, teacher.device):
        raise LimbeckError(
            f"a student in {student.dtype} on {student.device} and a teacher in {teacher.dtype} on {teacher.device}",
            expected="both in one dtype on one device, since the teacher's attention runs inside the student",
            hint="teacher.to(student.device, student.dtype)",
        )
