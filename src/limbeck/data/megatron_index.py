"""The ``.idx`` of a Megatron (GPT-NeoX) token file: read, checked as a whole, written. METHODS 4 has the format.

The index says how long each stored sequence is, where it begins in the ``.bin``, and where documents end. All that it
says is checked against itself and the size of the file, so that damage is an error here and never a wrong token later.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from limbeck.errors import LimbeckError

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = np.dtype([("magic", "S9"), ("version", "<u8"), ("code", "u1"), ("sequences", "<u8"), ("documents", "<u8")])
TYPES = {code: np.dtype(kind) for code, kind in enumerate(("u1", "i1", "<i2", "<i4", "<i8", "<f4", "<f8", "<u2"), 1)}
CHUNK = 1 << 20
LONGEST = 2**31 - 1

Chunks = Callable[[], Iterable[np.ndarray]]


@dataclass(frozen=True)
class MegatronIndex:
    """What an ``.idx`` says.

    Attributes:
        path: The file.
        dtype: Type of the tokens in the ``.bin``, little endian.
        sizes: Tokens of each stored sequence (s,), int32, memory-mapped.
        documents: Sequence at which each document begins, and the end (e,), int64, memory-mapped; ``[0]`` alone where
            the writer marked no documents.
        tokens: Tokens of all sequences together.
    """

    path: Path
    dtype: np.dtype
    sizes: np.ndarray
    documents: np.ndarray
    tokens: int

    @property
    def bytes(self) -> int:
        """Size of the whole ``.bin``."""
        return self.tokens * self.dtype.itemsize

    @property
    def agrees_with_itself(self) -> bool:
        """Whether pointers confirm the type and the sizes before the last: one past the start of the file does."""
        return self.tokens > int(self.sizes[-1])

    def common_size(self, *, trust_last: bool = True) -> int | None:
        """Give the length that all sequences have, or None if they differ.

        Args:
            trust_last: Whether the last size counts; only the end of the ``.bin`` can confirm it.
        """
        sizes = self.sizes if trust_last else self.sizes[:-1]
        same = len(sizes) and all(bool((chunk == sizes[0]).all()) for chunk in _chunks(sizes))
        return int(sizes[0]) if same else None


def read_index(path: str | Path) -> MegatronIndex:
    """Map an ``.idx`` and check all of it, in constant memory.

    Args:
        path: The file.

    Raises:
        LimbeckError: The file is not there, is no such index, is truncated or longer than it says, or its sizes,
            pointers and documents contradict each other.
    """
    path = Path(path)
    expected = "the .idx of a Megatron token file"
    if not path.is_file():
        raise LimbeckError(f"no file {path}", expected=expected)
    length = path.stat().st_size
    if length < HEADER.itemsize:
        raise LimbeckError(f"{path} is {'truncated' if length else 'empty'}: {length} bytes", expected)
    raw = np.memmap(path, np.uint8, "r").view(np.ndarray)
    header = raw[: HEADER.itemsize].view(HEADER)[0]
    if raw[: len(MAGIC)].tobytes() != MAGIC:
        raise LimbeckError(f"{path} begins with {raw[:9].tobytes()!r}", expected=f"{expected}, which has {MAGIC!r}")
    if header["version"] != VERSION:
        raise LimbeckError(f"{path} is of version {header['version']}", expected=f"version {VERSION}")
    if int(header["code"]) not in TYPES:
        raise LimbeckError(f"{path} has type code {header['code']}", expected=f"one of {_known_types()}")
    sequences, documents = int(header["sequences"]), int(header["documents"])
    meant = HEADER.itemsize + 12 * sequences + 8 * documents
    if length != meant:
        raise LimbeckError(
            f"{path} is {'truncated' if length < meant else 'longer than it says'}: {length} bytes",
            expected=f"{meant} bytes for {sequences} sequences and {documents} marks of documents",
            hint="fetch the file again",
        )
    if not sequences:
        raise LimbeckError(f"{path} is empty: it has no sequences", expected="at least one")
    borders = np.cumsum([HEADER.itemsize, 4 * sequences, 8 * sequences, 8 * documents])
    sizes, pointers, marks = (
        raw[start:end].view(kind)
        for start, end, kind in zip(borders[:-1], borders[1:], ("<i4", "<i8", "<i8"), strict=True)
    )
    dtype = TYPES[int(header["code"])]
    tokens = _checked_pointers(path, sizes, pointers, dtype.itemsize)
    _check_documents(path, marks, sequences)
    if not tokens:
        raise LimbeckError(f"{path} is empty: none of its {sequences} sequences has a token", expected="tokens")
    return MegatronIndex(path, dtype, sizes, marks, tokens)


def write_index(file: BinaryIO, dtype: np.dtype, sizes: Chunks, documents: Chunks) -> None:
    """Write an ``.idx`` in constant memory.

    Args:
        file: Where to write.
        dtype: Type of the tokens in the ``.bin``.
        sizes: Gives the sizes of the sequences, in chunks; called several times.
        documents: Gives the sequences at which documents begin, and the end, in chunks; called several times.
    """
    counts = [sum(len(chunk) for chunk in chunks()) for chunks in (sizes, documents)]
    file.write(np.array([(MAGIC, VERSION, type_code(dtype), *counts)], HEADER).tobytes())
    for chunk in sizes():
        file.write(chunk.astype("<i4").tobytes())
    start = 0
    for chunk in sizes():
        ends = start + np.cumsum(chunk, dtype=np.int64) * dtype.itemsize
        file.write((ends - chunk.astype(np.int64) * dtype.itemsize).astype("<i8").tobytes())
        start = int(ends[-1]) if len(ends) else start
    for chunk in documents():
        file.write(chunk.astype("<i8").tobytes())


def type_code(dtype: np.typing.DTypeLike) -> int:
    """Give the format's code of a type.

    Raises:
        LimbeckError: The format has none.
    """
    for code, known in TYPES.items():
        if np.dtype(dtype).newbyteorder("<") == known:
            return code
    raise LimbeckError(f"a token file cannot hold {np.dtype(dtype)}", expected=f"one of {_known_types()}")


def _checked_pointers(path: Path, sizes: np.ndarray, pointers: np.ndarray, itemsize: int) -> int:
    """Make sure that every sequence begins where the one before it ends; count the tokens."""
    start = first = 0
    for chunk, found in zip(_chunks(sizes), _chunks(pointers), strict=True):
        if chunk.min() < 0:
            place = first + int(np.argmax(chunk < 0))
            raise LimbeckError(f"{path}: sequence {place} has {sizes[place]} tokens", expected="sizes of 0 or more")
        spans = chunk.astype(np.int64) * itemsize
        ends = start + np.cumsum(spans)
        wrong = found != ends - spans
        if wrong.any():
            place = int(np.argmax(wrong))
            raise LimbeckError(
                f"{path}: sequence {first + place} begins at byte {found[place]}",
                expected=f"byte {ends[place] - spans[place]}, where the sizes of those before it end",
                hint="the index is damaged: fetch or make it again",
            )
        start, first = int(ends[-1]), first + len(chunk)
    return start // itemsize


def _check_documents(path: Path, marks: np.ndarray, sequences: int) -> None:
    """Make sure that documents begin at 0, never go back, and end with the sequences."""
    if len(marks) == 0 or (len(marks) == 1 and marks[0] == 0):  # a writer that marks no documents
        return
    steady = all(bool((np.diff(marks[at : at + CHUNK + 1]) >= 0).all()) for at in range(0, len(marks), CHUNK))
    if marks[0] != 0 or marks[-1] != sequences or not steady:
        raise LimbeckError(
            f"{path}: documents from sequence {marks[0]} to {marks[-1]}{'' if steady else ', not in order'}",
            expected=f"from 0 to {sequences}, in order",
            hint="the index is damaged: fetch or make it again",
        )


def _chunks(values: np.ndarray) -> Iterator[np.ndarray]:
    return (values[at : at + CHUNK] for at in range(0, len(values), CHUNK))


def _known_types() -> str:
    return ", ".join(f"{code} ({dtype.name})" for code, dtype in TYPES.items())
