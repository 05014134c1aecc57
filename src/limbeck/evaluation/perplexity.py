"""Perplexity on held-out text, and agreement of a student with its teacher."""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from limbeck.data import collate, open_samples
from limbeck.devices import choose_device, choose_dtype
from limbeck.distill import check_vocabularies, kl_divergence
from limbeck.errors import LimbeckError
from limbeck.ops.linear_kl_reference import IGNORED
from limbeck.progress import say
from limbeck.students import load_config, load_model, load_tokenizer

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


@torch.no_grad()
def perplexity(model: PreTrainedModel, batches: Batches) -> Perplexity:
    """Perplexity of `model` over batches of ``input_ids`` and next-token ``labels``, each (b, l); -100 is no label."""
    total, tokens = 0.0, 0
    with _evaluating(model):
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
    with _evaluating(student), _evaluating(teacher):
        for batch in _on_device(batches, student.device):
            student_logits = student(input_ids=batch["input_ids"], use_cache=False).logits  # (b, l, v)
            teacher_logits = teacher(input_ids=batch["input_ids"], use_cache=False).logits
            kl += kl_divergence(student_logits, teacher_logits).double().sum().item()
            same += int((student_logits.argmax(-1) == teacher_logits.argmax(-1)).sum())
            tokens += batch["input_ids"].numel()
    return Agreement(kl / max(tokens, 1), same / max(tokens, 1), tokens)


@contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
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

    Returns:
        ``perplexity``, ``nll``, ``tokens`` and, with a teacher, ``teacher_perplexity``, ``kl`` and ``top1``.

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

    student = load_model(model, dtype=number_format, device=place)
    own = perplexity(student, batches)
    figures = {"model": str(model), "tokens": own.tokens, "nll": own.nll, "perplexity": own.perplexity}
    if teacher is not None:
        reference = load_model(teacher, dtype=number_format, device=place)
        close = agreement(student, reference, batches)
        figures["teacher_perplexity"] = perplexity(reference, batches).perplexity
        figures |= {"kl": close.kl, "top1": close.top1}
    return figures
