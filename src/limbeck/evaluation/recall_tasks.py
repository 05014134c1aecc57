"""Questions whose answers stand in the prompt: associative recall, copying, repetition, a needle in a haystack.

Three tasks are made of tokens alone, so that any vocabulary will do, and a model with induction heads can solve them
without having been trained on them. The needle is a sentence in a text, read with the model's tokenizer.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.random import Generator
from torch import Tensor

from limbeck.data import encode_documents, read_documents
from limbeck.data.stdlib import standard_library_files
from limbeck.data.text import encoder
from limbeck.errors import LimbeckError
from limbeck.ops.linear_kl_reference import IGNORED

LEAST_LENGTH, LEAST_SYMBOLS = 4, 4
PASS_KEYS = (10_000, 100_000)
NEEDLE = "\n# The pass key is {key}. Remember it. {key} is the pass key.\n"
QUESTION = "\n# What is the pass key? The pass key is"
SPARE_TOKENS = 2
"""Tokens that are generated after a pass key, to see that it ends."""

MOST_CHARACTERS = 16
"""Characters of text to read for each token that is wanted: few texts have more to a token."""


@dataclass(frozen=True)
class Examples:
    """Some questions of one kind, all of one length.

    Attributes:
        tokens: (n, l) int64, prompts and answers.
        answer_length: The last so many tokens of each row are the answer, the rest is the prompt.
        known: (n, l) bool, the tokens that what stands before them determines: what a model can be trained on.
        chance: Probability that a guess among the symbols that may stand there is right.
    """

    tokens: Tensor
    answer_length: int
    known: Tensor
    chance: float

    @property
    def prompts(self) -> Tensor:
        """(n, l - answer_length) int64."""
        return self.tokens[:, : -self.answer_length]

    @property
    def answers(self) -> Tensor:
        """(n, answer_length) int64."""
        return self.tokens[:, -self.answer_length :]

    def batch(self) -> dict[str, Tensor]:
        """A batch to train on: ``input_ids`` and next-token ``labels``, (n, l - 1) each, -100 where none is known."""
        labels = self.tokens[:, 1:].masked_fill(~self.known[:, 1:], IGNORED)
        return {"input_ids": self.tokens[:, :-1], "labels": labels}


def mqar(symbols: np.ndarray, length: int, count: int, rng: Generator) -> Examples:
    """Multi-query associative recall (arXiv 2312.04927): pairs of key and value, then keys, each with its value.

    The first half of the symbols are keys, the second values. ``length // 4`` pairs, no more than there are keys, stand
    in front; queries of each key at the end; between them filler, where keys are few. The last value is the answer.

    Args:
        symbols: (s,) token ids; the first stands for filler.
        length: Tokens of prompt and answer; one less where it is odd.
        count: How many questions.
        rng: Where chance comes from.

    Raises:
        LimbeckError: The length or the symbols are too few; `copy` and `repeat` refuse the same.
    """
    _check(symbols, length)
    filler, keys, values = symbols[0], *np.array_split(symbols[1:], 2)
    pairs = min(length // 4, len(keys))
    tokens = np.full((count, length // 2, 2), filler)  # (n, l / 2, key and value)
    for row in tokens:
        chosen = np.stack([rng.permutation(keys)[:pairs], rng.choice(values, pairs)], axis=-1)  # (pairs, 2)
        row[:pairs], row[-pairs:] = chosen, rng.permutation(chosen)
    known = np.zeros(tokens.shape, dtype=bool)
    known[:, -pairs:, 1] = True
    return _examples(tokens.reshape(count, -1), 1, known.reshape(count, -1), 1 / len(values))


def copy(symbols: np.ndarray, length: int, count: int, rng: Generator) -> Examples:
    """Copying: a separator, a string, the separator again; the answer is the whole string.

    Args:
        symbols: (s,) token ids; the first is the separator. No other is used twice in a string while there are enough.
        length: Tokens of prompt and answer; one less where it is odd.
        count: How many questions.
        rng: Where chance comes from.
    """
    _check(symbols, length)
    size = length // 2 - 1
    strings = _strings(symbols[1:], size, count, rng)  # (n, size)
    separator = np.full((count, 1), symbols[0])
    tokens = np.concatenate([separator, strings, separator, strings], axis=1)
    return _examples(tokens, size, _last(tokens, size), (len(symbols) - 1.0) ** -size)


def repeat(symbols: np.ndarray, length: int, count: int, rng: Generator) -> Examples:
    """In-context repetition: a string of a quarter of the length stands there three times; the answer is the fourth.

    Args:
        symbols: (s,) token ids. None is used twice in a string while there are enough.
        length: Tokens of prompt and answer; rounded down to a multiple of four.
        count: How many questions.
        rng: Where chance comes from.
    """
    _check(symbols, length)
    size = length // 4
    tokens = np.tile(_strings(symbols[1:], size, count, rng), (1, 4))
    return _examples(tokens, size, _last(tokens, 3 * size), (len(symbols) - 1.0) ** -size)


TOKEN_TASKS: dict[str, Callable[[np.ndarray, int, int, Generator], Examples]] = {
    "mqar": mqar,
    "copy": copy,
    "repeat": repeat,
}


def _check(symbols: np.ndarray, length: int) -> None:
    if length < LEAST_LENGTH:
        raise LimbeckError(f"length {length}", expected=f"{LEAST_LENGTH} tokens or more")
    if len(symbols) < LEAST_SYMBOLS:
        raise LimbeckError(f"{len(symbols)} token ids to draw from", expected=f"{LEAST_SYMBOLS} or more")


def _strings(symbols: np.ndarray, size: int, count: int, rng: Generator) -> np.ndarray:
    """(n, size) of symbols; each comes back only after all others were used."""
    rounds = -(-size // len(symbols))
    return np.stack([np.concatenate([rng.permutation(symbols) for _ in range(rounds)])[:size] for _ in range(count)])


def _last(tokens: np.ndarray, size: int) -> np.ndarray:
    """(n, l) bool, True for the last `size` tokens of each row."""
    return np.broadcast_to(np.arange(tokens.shape[1]) >= tokens.shape[1] - size, tokens.shape).copy()


def _examples(tokens: np.ndarray, answer_length: int, known: np.ndarray, chance: float) -> Examples:
    return Examples(torch.from_numpy(tokens.astype(np.int64)), answer_length, torch.from_numpy(known), chance)


class Haystack:
    """A text as tokens, and pass keys to hide in it.

    Args:
        tokenizer: The model's; a fast one.
        tokens: Tokens of text to read at least, where there are so many.
        vocab_size: Of the model.
        text: Files and folders of text (`limbeck.data.read_documents`); by default the standard library's source.
        seed: The order of the standard library's files.

    Raises:
        LimbeckError: There is no text, or a token is beyond the vocabulary.
    """

    def __init__(self, tokenizer: Any, tokens: int, vocab_size: int, text: str | Path | None, seed: int):
        self.tokenizer, self.source = tokenizer, "the standard library" if text is None else str(text)
        documents, size = [], 0
        for document in read_documents(_shuffled_library(seed) if text is None else text):
            documents.append(document)
            size += len(document)
            if size >= tokens * MOST_CHARACTERS:
                break
        self.tokens = encode_documents(tokenizer, documents, None, vocab_size=vocab_size).astype(np.int64)  # (t,)
        self._encoder, _ = encoder(tokenizer)

    def questions(self, length: int, depth: float, count: int, rng: Generator) -> tuple[Tensor, list[str], int]:
        """Hide a pass key in each of some pieces of the text, and ask for it at the end.

        Args:
            length: Tokens of a prompt and its answer.
            depth: Where the needle is: 0 in front of the text, 1 behind it.
            count: How many.
            rng: Where chance comes from.

        Returns:
            Prompts (n, l - a) int64, the pass keys, and a, how many tokens to generate.

        Raises:
            LimbeckError: The length is too small for needle and question, or the text for the length.
        """
        keys = [str(key) for key in rng.integers(*PASS_KEYS, count)]
        answer_length = max(len(self._encode(f" {key}.")) for key in keys) + SPARE_TOKENS
        question = self._encode(QUESTION)
        prompts = []
        for key in keys:
            needle = self._encode(NEEDLE.format(key=key))
            room = length - answer_length - len(needle) - len(question)
            self._check(length, room)
            start = rng.integers(len(self.tokens) - room + 1)
            hay = self.tokens[start : start + room]
            cut = round(depth * room)
            prompts.append(np.concatenate([hay[:cut], needle, hay[cut:], question]))
        return torch.from_numpy(np.stack(prompts)), keys, answer_length

    def found(self, generated: Tensor, keys: Sequence[str]) -> list[bool]:
        """Whether the first number in each generated answer, (n, a), is the pass key."""
        texts = self.tokenizer.batch_decode(generated, skip_special_tokens=True)
        return [_first_number(text) == key for text, key in zip(texts, keys, strict=True)]

    def _encode(self, text: str) -> np.ndarray:
        return np.array(self._encoder([text])[0], dtype=np.int64)

    def _check(self, length: int, room: int) -> None:
        if room < 1:
            raise LimbeckError(
                f"length {length} for a needle", expected=f"{length - room + 1} tokens or more with this tokenizer"
            )
        if room > len(self.tokens):
            raise LimbeckError(
                f"{self.source} has {len(self.tokens)} tokens",
                expected=f"{room} or more, to hide a needle at length {length}",
                hint="more text, or smaller --lengths",
            )


def _shuffled_library(seed: int) -> list[Path]:
    files = standard_library_files()
    return [files[index] for index in np.random.default_rng(seed).permutation(len(files))]


def _first_number(text: str) -> str:
    """The first run of digits in a text, or nothing."""
    found = re.search(r"\d+", text)
    return found[0] if found else ""
