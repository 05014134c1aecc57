"""One way to open whatever a user names as data: text, tasks, ``.npy`` tokens, Megatron token files."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from limbeck.data.megatron import MegatronDataset, is_megatron, megatron_files
from limbeck.data.packing import TokenDataset, load_tokens
from limbeck.data.samples import Part, Samples
from limbeck.data.tasks import TaskDataset, is_task_file, read_tasks
from limbeck.data.text import encode_documents, read_documents, text_files, tokenize_to_file
from limbeck.errors import LimbeckError

NPY = ".npy"


def source_files(source: str | Path) -> list[Path]:
    """List the files that a source stands for.

    Args:
        source: See `open_samples`.

    Raises:
        LimbeckError: One is not there, or is of no known kind.
    """
    path = Path(source)
    if is_megatron(path):
        files = megatron_files(path)
    else:
        files = [path] if path.suffix == NPY else text_files(path)
    for file in files:
        if not file.is_file():
            raise LimbeckError(f"no file {file}", expected="text, tokens in a .npy file, or a Megatron token file")
    return files


def open_samples(
    source: str | Path,
    sequence_length: int,
    *,
    vocab_size: int,
    tokenizer: Callable[[], Any],
    cache: Path | None = None,
    least: int | None = None,
    note: Callable[[str], None] = lambda message: None,
) -> Samples:
    """Open a source of samples.

    Args:
        source: A file or folder of text; a ``.jsonl`` file of prompts and completions; a ``.npy`` file of tokens; or
            the prefix, ``.idx`` or ``.bin`` of a Megatron token file.
        sequence_length: l; every sample has l + 1 tokens.
        vocab_size: Tokens of the model's vocabulary.
        tokenizer: Gives the tokenizer, for sources that are text.
        cache: Where the tokens of a text are kept, and taken from if they are there; left out, they stay in memory.
        least: Samples that must be here, where shards of a token file are missing; by default those that are.
        note: Takes a line for the user.

    Returns:
        The samples that are here, in the order of the file.

    Raises:
        LimbeckError: The source is not there, is damaged, or does not suit the vocabulary or the length.
    """
    path = Path(source)
    if is_megatron(path):
        return _of_token_file(MegatronDataset(path, sequence_length, vocab_size=vocab_size), least, note)
    if path.suffix == NPY:
        return TokenDataset(known_tokens(path, vocab_size), sequence_length)
    if is_task_file(path):
        reader = tokenizer()
        return TaskDataset(read_tasks(path), reader, sequence_length, reader.eos_token_id, vocab_size=vocab_size)
    if cache is None:
        reader = tokenizer()
        tokens = encode_documents(reader, read_documents(path), reader.eos_token_id, vocab_size=vocab_size)
        return TokenDataset(tokens, sequence_length)
    if not cache.exists():
        note(f"tokenizing {path}")
        reader = tokenizer()
        tokenize_to_file(cache, reader, read_documents(path), reader.eos_token_id, vocab_size=vocab_size)
    return TokenDataset(load_tokens(cache), sequence_length)


def known_tokens(path: str | Path, vocab_size: int) -> np.ndarray:
    """Map a ``.npy`` file of tokens after making sure that the model knows them all.

    Raises:
        LimbeckError: The file holds no tokens, or one beyond the vocabulary.
    """
    tokens = load_tokens(path)
    if tokens.size and tokens.max() >= vocab_size:
        raise LimbeckError(
            f"{path} has token {tokens.max()}, beyond the vocabulary",
            expected=f"ids below {vocab_size}",
            hint="tokens made with the teacher's tokenizer",
        )
    return tokens


def _of_token_file(samples: MegatronDataset, least: int | None, note: Callable[[str], None]) -> Samples:
    """Leave out what lies in shards that are not here."""
    samples.require(1 if least is None else least)
    here = samples.available
    if here == len(samples):
        return samples
    note(f"{samples.prefix}: {here:,} of {len(samples):,} samples are here; {samples.files.missing[0].name} is missing")
    return Part(samples, 0, here)
