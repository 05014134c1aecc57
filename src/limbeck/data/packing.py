"""Tokens on disk, and samples of fixed length out of them."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from limbeck.data.samples import still_whole
from limbeck.errors import LimbeckError
from limbeck.files import replacing

HEADER_BYTES = 128


class TokenDataset:
    """Samples of ``sequence_length + 1`` tokens: the inputs, and the one token more that the labels need.

    Sample i covers tokens [i·l, i·l + l + 1), so that neighbours share one token and every token but the very first is
    predicted once. Tokens after the last whole sample are left out.

    Args:
        tokens: All tokens (t,), in memory or memory-mapped; they are never copied.
        sequence_length: l, the length of a sample's input.

    Raises:
        LimbeckError: The tokens are no row of integers, or too few for one sample.
    """

    def __init__(self, tokens: np.ndarray, sequence_length: int):
        if tokens.ndim != 1 or not np.issubdtype(tokens.dtype, np.integer):
            raise LimbeckError(f"tokens of shape {tokens.shape} and type {tokens.dtype}", expected="a row of integers")
        if sequence_length < 1:
            raise LimbeckError(f"sequence_length = {sequence_length}", expected="at least 1")
        if len(tokens) < sequence_length + 1:
            raise LimbeckError(
                f"a text of {len(tokens)} tokens is shorter than one sample",
                expected=f"at least sequence_length + 1 = {sequence_length + 1} tokens",
                hint="more text, or a smaller data.sequence_length",
            )
        self.tokens, self.sequence_length = tokens, sequence_length
        self._file = None
        if isinstance(tokens, np.memmap) and tokens.filename:
            self._file = Path(tokens.filename), tokens.offset + tokens.nbytes

    def __len__(self) -> int:
        """Count the samples."""
        return (len(self.tokens) - 1) // self.sequence_length

    def __getitem__(self, index: int) -> np.ndarray:
        """Give sample ``index``: tokens (l + 1,), a view.

        Raises:
            IndexError: There is no such sample.
            LimbeckError: The file behind it is gone or has shrunk.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        if self._file:
            still_whole(*self._file)
        start = index * self.sequence_length
        return self.tokens[start : start + self.sequence_length + 1]


def write_tokens(path: str | Path, chunks: Iterable[np.ndarray]) -> np.ndarray:
    """Write a stream of tokens as one ``.npy`` file; the file appears whole or not at all.

    Args:
        path: The file to write; one that exists is replaced.
        chunks: Tokens (t,) each, of one type.

    Returns:
        All tokens, memory-mapped from the file.

    Raises:
        LimbeckError: There is not a single token.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary, temporary.open("wb") as file:
        file.write(bytes(HEADER_BYTES))
        count, dtype = 0, None
        for chunk in chunks:
            dtype = chunk.dtype if dtype is None else dtype
            assert chunk.dtype == dtype, "all chunks are of one type"
            file.write(np.ascontiguousarray(chunk).data)
            count += chunk.size
        if dtype is None or not count:
            raise LimbeckError(f"no tokens to write to {path}", expected="at least one token")
        file.seek(0)
        file.write(_header(dtype, count))
    return load_tokens(path)


def load_tokens(path: str | Path) -> np.ndarray:
    """Map a ``.npy`` file of tokens into memory.

    Args:
        path: A file of `write_tokens`, or of ``numpy.save``.

    Returns:
        Tokens (t,), read-only, of the type they were written with.

    Raises:
        LimbeckError: The file is not there, is truncated, or holds something else.
    """
    expected = "a .npy file with a row of unsigned integers"
    if not Path(path).is_file():
        raise LimbeckError(f"no file {path}", expected=expected)
    try:
        tokens = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise LimbeckError(f"{path} cannot be read: {error}", expected, "remove it, and it is made again") from None
    if not isinstance(tokens, np.ndarray) or tokens.ndim != 1 or tokens.dtype.kind != "u":
        raise LimbeckError(f"{path} holds no tokens", expected=expected)
    return tokens


def _header(dtype: np.dtype, count: int) -> bytes:
    """Write the head of a .npy file, version 1.0, padded to its fixed length."""
    text = f"{{'descr': '{dtype.str}', 'fortran_order': False, 'shape': ({count},), }}"
    magic = b"\x93NUMPY\x01\x00" + (HEADER_BYTES - 10).to_bytes(2, "little")
    return magic + text.ljust(HEADER_BYTES - 11).encode("ascii") + b"\n"
