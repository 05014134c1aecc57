"""Writing Megatron (GPT-NeoX) token files; METHODS 4 has the format."""

import array
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from limbeck.data.megatron import index_file, megatron_prefix
from limbeck.data.megatron_index import LONGEST, type_code, write_index
from limbeck.errors import LimbeckError
from limbeck.files import replacing, sync


class MegatronWriter:
    """Writes sequences into ``prefix.bin`` and ``prefix.idx``, which appear whole or not at all.

    ::

        with MegatronWriter("corpus/document", vocab_size=50304) as writer:
            for tokens in documents:
                writer.add(tokens)

    Args:
        prefix: Path of the files without ``.idx``; files that exist are replaced.
        dtype: Type of the tokens; by default the smallest that holds the vocabulary.
        vocab_size: Tokens of the vocabulary; with it, every id is checked.

    Raises:
        LimbeckError: The format has no such type.
    """

    def __init__(self, prefix: str | Path, dtype: np.typing.DTypeLike | None = None, *, vocab_size: int | None = None):
        self.prefix = megatron_prefix(prefix)
        self.dtype = np.dtype(file_dtype(vocab_size) if dtype is None else dtype).newbyteorder("<")
        type_code(self.dtype)
        self.vocab_size = vocab_size
        self._sizes, self._documents = array.array("i"), array.array("q", [0])
        self._bin = self.prefix.with_name(f".writing-{self.prefix.name}.bin")
        self.prefix.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._bin.open("wb")

    def add(self, tokens: np.typing.ArrayLike, *, end_document: bool = True) -> None:
        """Write one sequence.

        Args:
            tokens: Whole numbers (t,).
            end_document: Whether a document ends with it.

        Raises:
            LimbeckError: The tokens are no row of whole numbers, or one is beyond the vocabulary or the type.
        """
        values = np.asarray(tokens)
        if values.ndim != 1 or (values.size and values.dtype.kind not in "iuf"):
            raise LimbeckError(f"tokens of shape {values.shape} and type {values.dtype}", expected="a row of integers")
        if len(values) > LONGEST:
            raise LimbeckError(f"a sequence of {len(values)} tokens", expected=f"at most {LONGEST}")
        written = values.astype(self.dtype)
        if not np.array_equal(written, values):
            raise LimbeckError(
                f"{self.prefix}: tokens from {values.min()} to {values.max()} do not fit {self.dtype.name}",
                expected="a dtype that holds every id",
            )
        if self.vocab_size is not None and values.size and not 0 <= values.min() <= values.max() < self.vocab_size:
            raise LimbeckError(
                f"{self.prefix}: tokens from {values.min()} to {values.max()}, beyond the vocabulary",
                expected=f"ids below {self.vocab_size}",
            )
        self._file.write(written.tobytes())
        self._sizes.append(len(values))
        if end_document:
            self.end_document()

    def end_document(self) -> None:
        """Mark that a document ends with the sequence written last."""
        self._documents.append(len(self._sizes))

    def close(self) -> None:
        """Bring both files to the disk and give them their names.

        Raises:
            LimbeckError: Not one token was written.
        """
        if self._file.closed:
            return
        if not any(self._sizes):
            self.discard()
            raise LimbeckError(f"no tokens to write to {self.prefix}", expected="at least one token")
        if self._documents[-1] != len(self._sizes):
            self.end_document()
        self._file.close()
        publish(
            self.prefix,
            self._bin,
            self.dtype,
            np.frombuffer(self._sizes, np.int32),
            np.frombuffer(self._documents, np.int64),
        )

    def discard(self) -> None:
        """Leave nothing behind."""
        self._file.close()
        self._bin.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close it, or leave nothing behind if something failed."""
        if error is None:
            self.close()
        else:
            self.discard()


def publish(prefix: Path, tokens: Path, dtype: np.dtype, sizes: np.ndarray, documents: np.ndarray) -> None:
    """Give a finished file of tokens its name, and its index.

    An index that stood there goes first, so that at no moment an index stands beside tokens it does not speak of.
    """
    sync(tokens)
    index = index_file(prefix)
    with replacing(index) as temporary:
        with temporary.open("wb") as file:
            write_index(file, dtype, lambda: _chunks(sizes), lambda: _chunks(documents))
        index.unlink(missing_ok=True)
        tokens.replace(prefix.with_name(f"{prefix.name}.bin"))


def file_dtype(vocab_size: int | None) -> np.dtype:
    """Choose the smallest type of the format that holds every id, as GPT-NeoX does: uint16, else int32."""
    return np.dtype("<u2" if vocab_size is not None and vocab_size <= 2**16 else "<i4")


def _chunks(values: np.ndarray, length: int = 1 << 20) -> list[np.ndarray]:
    return [values[at : at + length] for at in range(0, len(values), length)]
