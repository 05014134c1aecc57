"""Fine-tuning tasks: lines of JSON with a prompt and its completion, of which only the completion is learned.

One line is ``{"prompt": "…", "completion": "…"}``, or ``{"text": "…"}``, all of which is learned.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from limbeck.data.samples import CONTEXT, LEARNED, PADDING
from limbeck.data.text import encoder, json_line
from limbeck.errors import LimbeckError

EXPECTED = 'one JSON object a line: {"prompt": "…", "completion": "…"} or {"text": "…"}'


@dataclass(frozen=True)
class Task:
    """One example: what is given, what is to be learned, and where it stands (``path:line``)."""

    prompt: str
    completion: str
    source: str


def read_tasks(paths: str | Path | Iterable[str | Path]) -> Iterator[Task]:
    """Read examples one by one; blank lines are left out.

    Args:
        paths: ``.jsonl`` files.

    Raises:
        LimbeckError: A file is not there, or a line (its number is named) is no such example.
    """
    for path in map(Path, [paths] if isinstance(paths, str | Path) else paths):
        if not path.is_file():
            raise LimbeckError(f"no file {path}", expected=EXPECTED)
        with path.open("rb") as lines:
            for number, raw in enumerate(lines, start=1):
                if raw.strip():
                    yield _task(json_line(raw, f"{path}:{number}", EXPECTED), f"{path}:{number}")


def is_task_file(path: str | Path) -> bool:
    """Tell whether a path is a ``.jsonl`` file whose first line has a prompt or a completion."""
    path = Path(path)
    if path.suffix != ".jsonl" or not path.is_file():
        return False
    with path.open("rb") as lines:
        first = next((raw for raw in lines if raw.strip()), b"")
    try:
        record = json.loads(first)
    except (ValueError, RecursionError):
        return False  # the reader of text names the line
    return isinstance(record, dict) and ("prompt" in record or "completion" in record)


class TaskDataset:
    """Samples made of whole examples, each token with its role: learned, context, or padding.

    Args:
        tasks: The examples.
        tokenizer: See `limbeck.data.encode_batches`.
        sequence_length: l; a sample has l + 1 tokens.
        eos_token_id: Written, and learned, after every example; it also pads. None leaves both out, and pads with 0.
        packed: Whether a sample takes as many examples as fit, in their order; otherwise each has its own.
        truncate: Whether examples that are too long lose their end; otherwise they are refused.
        vocab_size: Size of the model's vocabulary; left out, the tokenizer's own.

    Raises:
        LimbeckError: There are no examples; one is too long, or has a token beyond the vocabulary.
    """

    def __init__(
        self,
        tasks: Iterable[Task],
        tokenizer: Any,
        sequence_length: int,
        eos_token_id: int | None,
        *,
        packed: bool = True,
        truncate: bool = False,
        vocab_size: int | None = None,
    ):
        if sequence_length < 1:
            raise LimbeckError(f"sequence_length = {sequence_length}", expected="at least 1")
        self.sequence_length, self.padding = sequence_length, eos_token_id or 0
        tokens, roles, sizes = _encoded(tasks, tokenizer, eos_token_id, vocab_size, sequence_length + 1, truncate)
        self._tokens, self._roles = tokens, roles
        self._borders = _samples_of(sizes, sequence_length + 1, packed)

    def __len__(self) -> int:
        """Count the samples."""
        return len(self._borders) - 1

    def __getitem__(self, index: int) -> np.ndarray:
        """Give sample ``index``: tokens and their roles (2, l + 1), int64."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        start, stop = self._borders[index : index + 2]
        sample = np.empty((2, self.sequence_length + 1), np.int64)
        sample[0], sample[1] = self.padding, PADDING
        sample[0, : stop - start] = self._tokens[start:stop]
        sample[1, : stop - start] = self._roles[start:stop]
        return sample


def _task(record: dict[str, Any], source: str) -> Task:
    """Take an example out of a line's object."""
    keys = ("prompt", "completion") if "prompt" in record or "completion" in record else ("text",)
    for key in keys:
        if not isinstance(record.get(key), str):
            found = ", ".join(record) or "none"
            raise LimbeckError(f'{source} has no "{key}" that is a string; its keys: {found}', expected=EXPECTED)
        if any("\ud800" <= letter <= "\udfff" for letter in record[key]):
            raise LimbeckError(f"{source} has half of a surrogate pair", expected="text that UTF-8 can hold")
    if not record[keys[-1]]:
        raise LimbeckError(f'{source}: its "{keys[-1]}" is empty', expected="something to learn")
    return Task(record["prompt"], record["completion"], source) if len(keys) == 2 else Task("", record["text"], source)


def _encoded(
    tasks: Iterable[Task], tokenizer: Any, end: int | None, vocab_size: int | None, longest: int, truncate: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Encode all examples: tokens (t,), roles (t,), and the sizes of the examples (e,)."""
    encode, size = encoder(tokenizer, vocab_size)
    examples = list(tasks)
    if not examples:
        raise LimbeckError("no examples", expected=EXPECTED)
    prompts = encode([task.prompt for task in examples])
    completions = encode([task.completion for task in examples])
    tokens, roles, sizes = [], [], []
    for task, prompt, completion in zip(examples, prompts, completions, strict=True):
        ids = np.array([*prompt, *completion, *([] if end is None else [end])], np.uint32)
        if ids.max() >= size:
            raise LimbeckError(
                f"{task.source} has token {ids.max()}, beyond the vocabulary",
                expected=f"ids below {size}",
                hint="the tokenizer that the model was trained with: --tokenizer",
            )
        if len(ids) > longest and (not truncate or len(prompt) >= longest):
            raise LimbeckError(
                f"{task.source} has {len(ids)} tokens, {len(prompt)} of them the prompt's",
                expected=f"at most sequence_length + 1 = {longest}",
                hint="a larger data.sequence_length, or shorter examples",
            )
        tokens.append(ids[:longest])
        roles.append(np.repeat([CONTEXT, LEARNED], [len(prompt), len(tokens[-1]) - len(prompt)]).astype(np.uint8))
        sizes.append(len(tokens[-1]))
    return np.concatenate(tokens), np.concatenate(roles), np.array(sizes)


def _samples_of(sizes: np.ndarray, longest: int, packed: bool) -> np.ndarray:
    """Give the places where samples begin, and the end: as many examples to each as fit, or one."""
    borders, filled = [0], 0
    for size in sizes:
        if borders[-1] != filled and (not packed or filled + size - borders[-1] > longest):
            borders.append(filled)
        filled += int(size)
    return np.array([*borders, filled])
