"""Perplexity on held-out text, and agreement of a student with its teacher."""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from limbeck.data import TokenDataset, collate, is_megatron, open_samples, read_documents
from limbeck.devices import choose_device, choose_dtype
from limbeck.distill import check_vocabularies, kl_divergence
from limbeck.errors import LimbeckError
from limbeck.evaluation.tokens import check_tokenizers
from limbeck.ops.linear_kl_reference import IGNORED
from limbeck.progress import say
from limbeck.students import load_config, load_model, load_tokenizer
from limbeck.students.loading import has_tokenizer

Batches = Iterable[dict[str, Tensor]]
MOST_NLL = 709.0  # exp of more is no float


@dataclass(frozen=True)
class Perplexity:
    """How well a model predicts a text.

    Attributes:
        nll: Mean negative log-likelihood, nats per token.
        tokens: How many tokens were predicted.
    """

    nll: float
    tokens: int

    @property
    def perplexity(self) -> float:
        """exp(nll), infinite where a float cannot hold it."""
        return math.exp(self.nll) if not self.nll > MOST_NLL else math.inf


@dataclass(frozen=True)
class Agreement:
    """How close a student is to its teacher on a text.

    Attributes:
        kl: Mean KL(teacher ‖ student), nats per token.
        top1: Share of the positions where both hold the same token most likely.
        tokens: How many positions were compared.
    """

    kl: float
    top1: float
    tokens: int


@dataclass(frozen=True)
class Position:
    """The same measures over the positions [start, end) of every sample: what a longer context changes.

    Attributes:
        start: The first position.
        end: The one after the last.
        nll: The model's mean negative log-likelihood, nats per token; None where no token has a label.
        kl: As in `Agreement`; None without a teacher.
        top1: As in `Agreement`; None without a teacher.
    """

    start: int
    end: int
    nll: float | None
    kl: float | None = None
    top1: float | None = None

    def as_json(self) -> dict[str, Any]:
        """``from``, ``to``, ``nll``, ``kl``, ``top1``."""
        return {"from": self.start, "to": self.end, "nll": self.nll, "kl": self.kl, "top1": self.top1}


@torch.no_grad()
def perplexity(model: PreTrainedModel, batches: Batches) -> Perplexity:
    """Perplexity of `model` over batches of ``input_ids`` and next-token ``labels``, each (b, l); -100 is no label."""
    total, tokens = 0.0, 0
    with evaluating(model):
        for batch in _on_device(batches, model.device):
            logits = model(input_ids=batch["input_ids"], use_cache=False).logits  # (b, l, v)
            labels = batch["labels"].flatten()
            nll = F.cross_entropy(logits.flatten(0, 1).float(), labels, ignore_index=IGNORED, reduction="sum")
            total += nll.double().item()
            tokens += int((batch["labels"] != IGNORED).sum())
    return Perplexity(total / max(tokens, 1), tokens)


@torch.no_grad()
def agreement(student: PreTrainedModel, teacher: PreTrainedModel, batches: Batches) -> Agreement:
    """KL(teacher ‖ student) and top-1 match per token over batches of ``input_ids`` (b, l)."""
    kl, same, tokens = 0.0, 0, 0
    with evaluating(student), evaluating(teacher):
        for batch in _on_device(batches, student.device):
            student_logits = student(input_ids=batch["input_ids"], use_cache=False).logits  # (b, l, v)
            teacher_logits = teacher(input_ids=batch["input_ids"], use_cache=False).logits
            kl += kl_divergence(student_logits, teacher_logits).double().sum().item()
            same += int((student_logits.argmax(-1) == teacher_logits.argmax(-1)).sum())
            tokens += batch["input_ids"].numel()
    return Agreement(kl / max(tokens, 1), same / max(tokens, 1), tokens)


@torch.no_grad()
def by_position(model: PreTrainedModel, batches: Batches, teacher: PreTrainedModel | None = None) -> list[Position]:
    """Likelihood, and agreement with a teacher, by position in the sample: [0, 16), [16, 32), [32, 64), … doubling.

    Args:
        model: The model.
        batches: ``input_ids`` and ``labels``, (b, l) each, of one l; -100 is no label.
        teacher: The model to compare with.
    """
    rows: Tensor | float = 0.0
    with evaluating(model), evaluating(model if teacher is None else teacher):
        for batch in _on_device(batches, model.device):
            logits = model(input_ids=batch["input_ids"], use_cache=False).logits  # (b, l, v)
            labels = batch["labels"]
            nll = F.cross_entropy(logits.transpose(1, 2).float(), labels, ignore_index=IGNORED, reduction="none")
            sums = [nll, labels != IGNORED, torch.ones_like(labels)]  # (b, l) each
            if teacher is not None:
                reference = teacher(input_ids=batch["input_ids"], use_cache=False).logits
                sums += [kl_divergence(logits, reference), logits.argmax(-1) == reference.argmax(-1)]
            rows = rows + torch.stack([part.double().sum(0) for part in sums]).cpu()  # (3 or 5, l)
    if not isinstance(rows, Tensor):
        return []
    edges = position_edges(rows.shape[1])
    found = []
    for start, end in zip(edges[:-1], edges[1:], strict=True):
        nll, labelled, count, *compared = rows[:, start:end].sum(1).tolist()
        close = [part / count for part in compared]
        found.append(Position(start, end, nll / labelled if labelled else None, *close))
    return found


def position_edges(length: int, first: int = 16) -> list[int]:
    """Borders at 0, `first`, twice that, …, `length`."""
    edges = [0]
    while (following := 2 * edges[-1] or first) < length:
        edges.append(following)
    return [*edges, length]


def sliding_windows(tokens: np.ndarray, length: int, stride: int, batch_size: int = 8) -> Iterator[dict[str, Tensor]]:
    """Cut a text into windows that overlap, each of which predicts only what no earlier one has.

    Every token but the first is predicted once, and from at least ``length - stride`` tokens before it, where the text
    has so many. The last window ends with the text. A text that is shorter than a window is one window.

    Args:
        tokens: The text's tokens (t,).
        length: l, tokens that the model reads at once.
        stride: How far a window lies behind the one before, 1 … l; at l they do not overlap.
        batch_size: Windows in a batch.

    Yields:
        ``input_ids`` and ``labels``, (b, l) int64 each, for `perplexity`.

    Raises:
        LimbeckError: The stride does not suit the length, or there is no token to predict.
    """
    if not 1 <= stride <= length:
        raise LimbeckError(f"stride = {stride}", expected=f"1 … sequence_length = {length}")
    if len(tokens) < 2:
        raise LimbeckError(f"a text of {len(tokens)} tokens has none to predict", expected="two tokens or more")
    length = min(length, len(tokens) - 1)
    starts = [*range(0, len(tokens) - 1 - length, stride), len(tokens) - 1 - length]
    predicted, rows = 0, []
    for number, start in enumerate(starts, start=1):
        window = torch.from_numpy(np.asarray(tokens[start : start + length + 1], dtype=np.int64))  # (l+1,)
        labels = window[1:].clone()
        labels[: predicted - start] = IGNORED
        predicted = start + length
        rows.append((window[:-1], labels))
        if len(rows) == batch_size or number == len(starts):
            inputs, targets = zip(*rows, strict=True)
            yield {"input_ids": torch.stack(inputs), "labels": torch.stack(targets)}
            rows = []


@contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Eval mode while open; the mode it was in afterwards."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def _on_device(batches: Batches, device: torch.device) -> Iterator[dict[str, Tensor]]:
    for batch in batches:
        yield {name: tensor.to(device) for name, tensor in batch.items()}


def evaluate_on_text(
    model: str | Path,
    data: str | Path,
    *,
    teacher: str | Path | None = None,
    tokenizer: str | Path | None = None,
    sequence_length: int = 1024,
    samples: int | None = None,
    batch_size: int = 8,
    device: str | None = None,
    dtype: str | None = None,
    stride: int | None = None,
    details: bool = False,
) -> dict[str, Any]:
    """Measure a model's perplexity on a text and, with a teacher, their agreement.

    Args:
        model: Folder or hub id of a student or a teacher.
        data: File or folder of text, tokens, or the prefix of a token file; see `limbeck.data.open_samples`.
        teacher: Folder or hub id of the model to compare with.
        tokenizer: Folder or hub id; by default the model's.
        sequence_length: Tokens in a sample.
        samples: Samples to read at most; all by default.
        batch_size: Samples in a forward pass.
        device: Where to run; by default a GPU if there is one.
        dtype: Number format; by default the checkpoint's.
        stride: Perplexity by windows that overlap, see `sliding_windows`; by default samples lie side by side.
            Agreement is measured side by side all the same.
        details: Add ``bits_per_byte`` (None where `data` is no text) and ``by_position``, see `by_position`.

    Returns:
        ``model``, ``tokens``, ``nll``, ``perplexity`` and, with a teacher, ``teacher_perplexity``, ``kl``, ``top1``.

    Raises:
        LimbeckError: Something is not there or does not fit.
    """
    for name, value in (("samples", samples), ("batch_size", batch_size)):
        if value is not None and value < 1:
            raise LimbeckError(f"{name} = {value}", expected="1 or more")
    place, number_format = choose_device(device), choose_dtype(dtype)
    config = load_config(model)
    if teacher is not None:
        check_vocabularies(config, load_config(teacher))
        _check_readers(model, teacher, tokenizer)
    dataset = open_samples(
        data,
        sequence_length,
        vocab_size=config.vocab_size,
        tokenizer=lambda: load_tokenizer(tokenizer or model),
        least=samples,
        note=say,
    )
    count = len(dataset) if samples is None else min(samples, len(dataset))
    batches = [collate(dataset, range(i, min(i + batch_size, count))) for i in range(0, count, batch_size)]
    windows = batches if stride is None else list(_windows(dataset, count, stride, batch_size))

    student = load_model(model, dtype=number_format, device=place)
    own = perplexity(student, windows)
    figures = {"model": str(model), "tokens": own.tokens, "nll": own.nll, "perplexity": own.perplexity}
    reference = None
    if teacher is not None:
        reference = load_model(teacher, dtype=number_format, device=place)
        close = agreement(student, reference, batches)
        figures["teacher_perplexity"] = perplexity(reference, windows).perplexity
        figures |= {"kl": close.kl, "top1": close.top1}
    if details:
        density = tokens_per_byte(data, dataset)
        figures["bits_per_byte"] = None if density is None else own.nll / math.log(2) * density
        figures["by_position"] = [part.as_json() for part in by_position(student, batches, reference)]
    return figures


def tokens_per_byte(data: str | Path, dataset: Any) -> float | None:
    """Tokens, separators included, per byte of UTF-8 of a whole text; None where `data` is tokens or tasks."""
    if not isinstance(dataset, TokenDataset) or Path(data).suffix == ".npy" or is_megatron(Path(data)):
        return None
    return len(dataset.tokens) / sum(len(document.encode()) for document in read_documents(data))


def _windows(dataset: Any, count: int, stride: int, batch_size: int) -> Iterator[dict[str, Tensor]]:
    """Windows over the text that the first `count` samples cover."""
    if not isinstance(dataset, TokenDataset):
        raise LimbeckError("a stride over samples that are no running text", expected="text, or tokens in a .npy file")
    length = dataset.sequence_length
    end = len(dataset.tokens) if count == len(dataset) else count * length + 1
    return sliding_windows(dataset.tokens[:end], length, stride, batch_size)


def _check_readers(model: str | Path, teacher: str | Path, tokenizer: str | Path | None) -> None:
    """Refuse a teacher with another tokenizer; a folder without any reads what the other one makes."""
    folders = [Path(source) for source in (tokenizer or model, teacher)]
    if all(not folder.is_dir() or has_tokenizer(folder) for folder in folders):
        names = [str(folder) for folder in folders]
        check_tokenizers(load_tokenizer(names[0]), load_tokenizer(names[1]), *names)
