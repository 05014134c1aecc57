"""What a student's layers do with a text: its matrices beside the teacher's, how far apart, how long it remembers."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from limbeck.data import read_documents
from limbeck.devices import choose_device, choose_dtype
from limbeck.distill import LayerSignals, check_vocabularies, observe
from limbeck.errors import LimbeckError, unknown
from limbeck.students import blocks, load_config, load_model, load_tokenizer

MOST_CELLS = 64
"""Matrices are pooled to at most so many rows and columns."""

Inputs = Literal["student", "teacher"]
"""What the student's layers are given: what comes out of the student's own layers below, or what the teacher's gave."""


@dataclass(frozen=True)
class HeadInspection:
    """One head.

    Attributes:
        head: Which, from 0.
        distance: ‖M − A‖_F between the student's matrix and the teacher's; None where there is no such pair.
        decay_length: Tokens until the student's decay has fallen to 1/e, median over the text; None where the head has
            no decay.
        teacher: The teacher's attention, pooled to (s, s), s ≤ 64; None where it has no such head.
        student: The student's mixing matrix, likewise.
    """

    head: int
    distance: float | None
    decay_length: float | None
    teacher: Tensor | None
    student: Tensor | None

    def as_json(self) -> dict[str, Any]:
        """The fields by name, matrices as lists of rows rounded to five digits."""
        matrices = {"teacher": self.teacher, "student": self.student}
        rows = {name: None if m is None else _rounded(m) for name, m in matrices.items()}
        return {"head": self.head, "distance": self.distance, "decay_length": self.decay_length, **rows}


@dataclass(frozen=True)
class LayerInspection:
    """One layer.

    Attributes:
        layer: Which, from 0.
        heads: Its heads.
        mixer: The class of its mixer; None where the student kept attention.
        note: Why there are no distances, where there are none; otherwise empty.
    """

    layer: int
    heads: tuple[HeadInspection, ...]
    mixer: str | None = None
    note: str = ""

    def as_json(self) -> dict[str, Any]:
        """Plain lists and dicts."""
        heads = [head.as_json() for head in self.heads]
        return {"layer": self.layer, "mixer": self.mixer, "note": self.note, "heads": heads}


@dataclass(frozen=True)
class Inspection:
    """What `inspect_matrices` found.

    Attributes:
        tokens: The text's tokens.
        layers: The layers.
        inputs: What the student's layers were given.
    """

    tokens: tuple[str, ...]
    layers: tuple[LayerInspection, ...]
    inputs: Inputs = "student"

    def as_json(self) -> dict[str, Any]:
        """Plain lists and dicts, as `limbeck.report.matrices` reads them."""
        layers = [layer.as_json() for layer in self.layers]
        return {"tokens": list(self.tokens), "inputs": self.inputs, "layers": layers}


@torch.no_grad()
def inspect_matrices(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    input_ids: Tensor,
    *,
    layers: Sequence[int] | None = None,
    inputs: Inputs = "student",
    tokens: Sequence[str] | None = None,
) -> Inspection:
    """Lay a student's mixing matrices beside its teacher's attention matrices.

    Both are whole (l, l) matrices: a few hundred tokens are a good length.

    Args:
        student: A student, or any model whose layers stand for the teacher's.
        teacher: What it is compared with.
        input_ids: (1, l).
        layers: Which layers; all by default.
        inputs: ``"student"`` shows the student at work; ``"teacher"`` gives each layer the teacher's hidden states, so
            that errors of the layers below do not show, as in stage 1.
        tokens: The l tokens as text; by default their numbers.

    Raises:
        LimbeckError: The models do not fit, or `input_ids` is no single text.
    """
    if inputs not in get_args(Inputs):
        raise unknown("inputs", inputs, get_args(Inputs))
    if input_ids.ndim != 2 or input_ids.shape[0] != 1 or not input_ids.shape[1]:
        raise LimbeckError(f"input_ids of shape {tuple(input_ids.shape)}", expected="one text: (1, length)")
    if len(blocks(student)) != len(blocks(teacher)):
        raise LimbeckError(
            f"a student of {len(blocks(student))} layers and a teacher of {len(blocks(teacher))}",
            expected="the teacher that the student was made from",
        )
    modes = [(model, model.training) for model in (student, teacher)]
    try:
        student.eval()
        teacher.eval()
        ours = observe(student, input_ids.to(student.device), layers=layers, logits=False)
        theirs = observe(teacher, input_ids.to(teacher.device), layers=layers, logits=False)
        found = tuple(_layer(ours[signals.index], signals, inputs) for signals in theirs)
    finally:
        for model, training in modes:
            model.train(training)
    words = tokens if tokens is not None else [str(token) for token in input_ids[0].tolist()]
    return Inspection(tuple(words), found, inputs)


def inspect_folder(
    model: str | Path,
    teacher: str | Path,
    *,
    text: str | None = None,
    data: str | Path | None = None,
    max_tokens: int = 128,
    layers: Sequence[int] | None = None,
    inputs: Inputs = "student",
    device: str | None = None,
    dtype: str | None = None,
) -> Inspection:
    """`inspect_matrices` with folders for models and a text for tokens.

    Args:
        model: Folder or hub id of the student.
        teacher: Folder or hub id of its teacher, whose tokenizer is used.
        text: The text, or
        data: a file or folder of text, whose first document is taken.
        max_tokens: Tokens to look at, from the first.
        layers: As in `inspect_matrices`.
        inputs: As in `inspect_matrices`.
        device: Where to run; by default a GPU if there is one.
        dtype: Number format; by default the checkpoint's.

    Raises:
        LimbeckError: Something is not there or does not fit, or there is no text.
    """
    if (text is None) == (data is None):
        given = "neither a text nor data" if text is None else "both a text and data"
        raise LimbeckError(f"inspect was given {given}", expected='one of them: --text "…" or --data FILE')
    if max_tokens < 1:
        raise LimbeckError(f"max_tokens = {max_tokens}", expected="1 or more")
    place, number_format = choose_device(device), choose_dtype(dtype)
    check_vocabularies(load_config(model), load_config(teacher))
    tokenizer = load_tokenizer(teacher)
    words = text if text is not None else next(read_documents(data))  # pyright: ignore[reportArgumentType]
    ids = tokenizer(words[: 32 * max_tokens], add_special_tokens=False)["input_ids"][:max_tokens]
    if not ids:
        raise LimbeckError("the text is empty", expected="a text of at least one token")
    return inspect_matrices(
        load_model(model, dtype=number_format, device=place),
        load_model(teacher, dtype=number_format, device=place),
        torch.tensor([ids]),
        layers=layers,
        inputs=inputs,
        tokens=[tokenizer.decode([token]) for token in ids],
    )


# --- one layer --------------------------------------------------------------------------------------------------------


def _layer(ours: LayerSignals, theirs: LayerSignals, inputs: Inputs) -> LayerInspection:
    mixer, note = ours.mixer, ""
    teachers = theirs.matrix()[0].float()  # (h, l, l)
    decay = None  # (l, h)
    if mixer is None:
        students = (theirs if inputs == "teacher" else ours).matrix()[0].float()
    else:
        given = theirs.mixer_input if inputs == "teacher" else ours.mixer_input
        assert given is not None
        given = given.to(next(mixer.parameters()).dtype) if any(True for _ in mixer.parameters()) else given
        factors = mixer.matrix_factors(given)
        decay = None if factors is None else factors.log_decay[0]
        students = mixer.mixing_matrix(given)[0].float() if mixer.has_mixing_matrix else None
    if students is None:
        note = f"{type(mixer).__name__} has no mixing matrix per head: no distance"
    elif len(students) != len(teachers):
        note = f"{len(students)} heads of the mixer against {len(teachers)} of attention: no distance"
    paired = students is not None and not note
    heads = []
    for head in range(max(len(teachers), 0 if students is None else len(students))):
        pair = [None if m is None or head >= len(m) else m[head].cpu() for m in (teachers, students)]
        distance = (pair[1] - pair[0]).norm().item() if paired and pair[0] is not None and pair[1] is not None else None
        length = None if decay is None or head >= decay.shape[1] else decay_length(decay[:, head])
        heads.append(HeadInspection(head, distance, length, *(None if m is None else pooled(m) for m in pair)))
    return LayerInspection(ours.index, tuple(heads), None if mixer is None else type(mixer).__name__, note)


def decay_length(log_decay: Tensor) -> float | None:
    """After how many tokens the decay has fallen to 1/e, median over the tokens of a text.

    Between two tokens the decay is taken as exponential. Where the text ends before it has fallen so far, it is taken
    to go on at its mean rate over the text.

    Args:
        log_decay: (l,), a ≤ 0 of one head.

    Returns:
        Tokens, more than 0; None where nothing decays.
    """
    rates = -log_decay.double().cpu().clamp(min=-60.0)  # what more than exp(−60) away is, is gone
    if not rates.sum() > 0:
        return None
    faded = F.pad(rates.cumsum(0), (1, 0))  # (l + 1,), before the first token and after each
    start, target = faded[:-1], faded[:-1] + 1.0
    after = torch.searchsorted(faded, target)  # (l,), the first place where so much has faded
    last = after.clamp(max=len(rates))
    within = last - (faded[last] - target) / rates[last - 1]
    beyond = len(rates) + (target - faded[-1]) / rates.mean()
    ends = torch.where(after <= len(rates), within, beyond)
    return (ends - torch.arange(len(start))).quantile(0.5).item()


def pooled(matrix: Tensor, cells: int = MOST_CELLS) -> Tensor:
    """Make a matrix small enough to show: sums over keys and means over queries, so that rows keep their sums.

    Args:
        matrix: (l, l).
        cells: Rows and columns at most.

    Returns:
        (s, s), s ≤ `cells`; the matrix itself where it is small enough.
    """
    length = matrix.shape[0]
    size = -(-length // cells)
    if size == 1:
        return matrix
    count = -(-length // size)
    padded = F.pad(matrix, (0, count * size - length, 0, count * size - length))
    sums = padded.view(count, size, count, size).sum(dim=(1, 3))
    rows = torch.full((count, 1), float(size))
    rows[-1] = length - (count - 1) * size
    return sums / rows


def _rounded(matrix: Tensor) -> list[list[float]]:
    return [[round(value, 5) for value in row] for row in matrix.tolist()]
