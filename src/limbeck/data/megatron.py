"""Samples out of Megatron (GPT-NeoX) token files: ``prefix.idx`` with ``prefix.bin``, or its published shards.

A stored sequence that is one sample long, l + 1 tokens, is a sample: so the pre-shuffled Pythia corpus is read, whose
sequences have 2049 tokens, in file order. One that is several samples long (l divides its length - 1) is cut into them
and neighbours share a token, as in `TokenDataset`. Sequences of any other length are documents: they are read as one
stream of tokens. METHODS 4 has the format.
"""

from pathlib import Path
from typing import Any

import numpy as np

from limbeck.data.megatron_index import MegatronIndex, read_index
from limbeck.data.shards import ShardedBytes, shard_files
from limbeck.errors import LimbeckError

PILE_SAMPLES = 146_432_000
"""Samples of the pre-shuffled Pythia corpus, of which ``data.proportion`` is a part."""

DEFAULT_LENGTH = 2048
MOST_TOKENS = 2**24  # no vocabulary comes near; numbers of another type, read as tokens, are beyond it


class MegatronDataset:
    """Samples of ``sequence_length + 1`` tokens out of a Megatron token file, memory-mapped and never copied.

    Sample i is a pure function of i, so a reader resumes by its number.

    Args:
        prefix: Path of the files without ``.idx``; the endings are understood too.
        sequence_length: l, the length of a sample's input; by default that of the stored sequences if they all have
            one length, else 2048.
        vocab_size: Tokens of the vocabulary; every sample is checked against it as it is read.
        max_samples: Samples to serve at most.
        packed: True reads all sequences as one stream whatever their length, False refuses sequences that are no whole
            number of samples; by default their length decides.

    Attributes:
        index: What the ``.idx`` says.
        sequence_length: l.
        packed: Whether the sequences are read as one stream.

    Raises:
        LimbeckError: A file is missing, truncated or damaged, the two do not fit together, or they hold fewer tokens
            than one sample.
    """

    def __init__(
        self,
        prefix: str | Path,
        sequence_length: int | None = None,
        *,
        vocab_size: int | None = None,
        max_samples: int | None = None,
        packed: bool | None = None,
    ):
        for name, value in (("sequence_length", sequence_length), ("max_samples", max_samples)):
            if value is not None and value < 1:
                raise LimbeckError(f"{name} = {value}", expected="at least 1")
        self._arguments: dict[str, Any] = {
            "prefix": prefix,
            "sequence_length": sequence_length,
            "vocab_size": vocab_size,
            "max_samples": max_samples,
            "packed": packed,
        }
        self.prefix = megatron_prefix(prefix)
        self.index: MegatronIndex = read_index(index_file(self.prefix))
        self.files = ShardedBytes(self.prefix, self.index.bytes)
        if not (self.files.end_is_known or self.index.agrees_with_itself):
            raise LimbeckError(
                f"{self.index.path} speaks of one sequence, and the end of it is in no shard that is surely the last",
                expected="all of the file: nothing else confirms the type and the size of a single sequence",
                hint=f"fetch the other shards, or join them into {self.prefix.name}.bin",
            )
        self.vocab_size = MOST_TOKENS if vocab_size is None else vocab_size
        self._cut(sequence_length, packed)
        if max_samples is not None:
            self._count = min(self._count, max_samples)
        limits = np.iinfo(self.index.dtype) if self.index.dtype.kind in "iu" else None
        self._may_be_wrong = limits is None or limits.min < 0 or limits.max >= self.vocab_size

    def _cut(self, length: int | None, packed: bool | None) -> None:
        """Settle how long samples are, where they begin, and how many there are."""
        size = self.index.common_size(trust_last=self.files.end_is_known)
        length = length or (size - 1 if size is not None and size > 1 else DEFAULT_LENGTH)
        fitting = size is not None and size > 1 and (size - 1) % length == 0
        if packed is False and not fitting:
            sizes = f"of {size} tokens" if size is not None else "of several lengths"
            raise LimbeckError(
                f"{self.prefix} stores sequences {sizes}",
                expected=f"{length + 1} tokens, sequence_length + 1, or several samples in each",
                hint="packed=True reads them as one stream",
            )
        self.sequence_length, self.packed = length, packed is True or not fitting
        if self.packed:
            self._per_sequence, self._size = 0, 0
            self._count = (self.index.tokens - 1) // length
        else:
            assert size is not None
            self._per_sequence, self._size = (size - 1) // length, size
            whole = len(self.index.sizes) - (int(self.index.sizes[-1]) != size)
            self._count = whole * self._per_sequence
        if self._count < 1:
            raise LimbeckError(
                f"{self.prefix} holds {self.index.tokens} tokens, fewer than one sample",
                expected=f"at least sequence_length + 1 = {length + 1} tokens",
                hint="more text, or a smaller data.sequence_length",
            )

    def __len__(self) -> int:
        """Count the samples of the whole file, missing shards included."""
        return self._count

    def __getitem__(self, index: int) -> np.ndarray:
        """Give sample ``index``: tokens (l + 1,), read-only; a view unless it lies across two shards.

        Raises:
            IndexError: There is no such sample.
            LimbeckError: It needs a shard that is missing, or holds a token beyond the vocabulary.
        """
        if not 0 <= index < self._count:
            raise IndexError(f"sample {index} of {self._count}")
        width = self.index.dtype.itemsize
        start = self._start(int(index)) * width
        try:
            raw = self.files.read(start, start + (self.sequence_length + 1) * width)
        except LimbeckError as error:
            raise LimbeckError(f"sample {index} of {self.prefix}: {error.found}", error.expected, error.hint) from None
        tokens = raw.view(self.index.dtype)
        return self._checked(tokens, index) if self._may_be_wrong else tokens

    @property
    def available(self) -> int:
        """Samples from the first on that lie whole in the shards that are here."""
        tokens = self.files.leading // self.index.dtype.itemsize
        if self.packed:
            return min(self._count, max(0, (tokens - 1) // self.sequence_length))
        whole, rest = divmod(tokens, self._size)
        count = whole * self._per_sequence + max(0, (rest - 1) // self.sequence_length)
        return min(self._count, count)

    def require(self, samples: int) -> None:
        """Make sure that the first `samples` samples are here.

        Raises:
            LimbeckError: Some are not; it names the first shard that is missing.
        """
        if self.available < min(samples, self._count):
            raise LimbeckError(
                f"{self.prefix} has {self.available} samples of the {samples} asked for: "
                f"{self.files.missing[0].name} is missing",
                expected="the shards that hold them",
                hint=f"fetch it, or data.max_samples = {self.available}" if self.available else "fetch it",
            )

    def __getstate__(self) -> dict[str, Any]:
        """Give what opens it again: maps do not travel between processes."""
        return self._arguments

    def __setstate__(self, arguments: dict[str, Any]) -> None:
        """Open it again."""
        self.__init__(**arguments)

    def _start(self, index: int) -> int:
        """Give the place of a sample's first token in the file."""
        if self.packed:
            return index * self.sequence_length
        sequence, part = divmod(index, self._per_sequence)
        return sequence * self._size + part * self.sequence_length

    def _checked(self, tokens: np.ndarray, index: int) -> np.ndarray:
        """Refuse what no vocabulary has: ids beyond it, negative ones, fractions."""
        wrong = (tokens < 0) | (tokens >= self.vocab_size)
        if tokens.dtype.kind == "f":
            wrong |= ~(tokens == np.round(tokens))
        if wrong.any():
            place = int(np.argmax(wrong))
            raise LimbeckError(
                f"{self.prefix}: sample {index} has token {tokens[place]} at place {place}, beyond the vocabulary",
                expected=f"ids below {self.vocab_size}",
                hint="tokens made with the teacher's tokenizer, and an undamaged .idx",
            )
        return tokens if tokens.dtype.kind != "f" else tokens.astype(np.int64)


def megatron_prefix(path: str | Path) -> Path:
    """Take ``.idx`` or ``.bin`` off a path."""
    path = Path(path)
    return path.with_suffix("") if path.suffix in (".idx", ".bin") else path


def index_file(prefix: Path) -> Path:
    """Give the path of a prefix's index."""
    return prefix.with_name(f"{prefix.name}.idx")


def is_megatron(path: str | Path) -> bool:
    """Tell whether a path names a Megatron token file: it ends so, or its ``.idx`` is there."""
    path = Path(path)
    return path.suffix in (".idx", ".bin") or (not path.exists() and index_file(path).is_file())


def megatron_files(path: str | Path) -> list[Path]:
    """List the files of a token file that are here, its index first."""
    prefix = megatron_prefix(path)
    return [index_file(prefix), *shard_files(prefix)]


def describe(prefix: str | Path, sequence_length: int | None = None) -> dict[str, Any]:
    """Tell what a token file holds.

    Args:
        prefix: See `MegatronDataset`.
        sequence_length: The length at which samples are counted; by default as `MegatronDataset` chooses it.

    Returns:
        Plain values: ``dtype``, ``sequences``, ``documents``, ``tokens``, ``bytes``, ``shortest``, ``longest``,
        ``shards``, ``missing_shards``, ``sequence_length``, ``packed``, ``samples``, ``samples_here``. A file with
        fewer tokens than one sample has 0 samples.

    Raises:
        LimbeckError: The file is damaged.
    """
    prefix = megatron_prefix(prefix)
    index = read_index(index_file(prefix))
    files = ShardedBytes(prefix, index.bytes)
    length = sequence_length
    if length is None:
        size = index.common_size(trust_last=files.end_is_known)
        length = size - 1 if size is not None and size > 1 else DEFAULT_LENGTH
    enough = index.tokens > length
    samples = MegatronDataset(prefix, length) if enough else None
    return {
        "prefix": str(prefix),
        "dtype": index.dtype.name,
        "sequences": len(index.sizes),
        "documents": max(0, len(index.documents) - 1),
        "tokens": index.tokens,
        "bytes": index.bytes,
        "shortest": int(index.sizes.min()),
        "longest": int(index.sizes.max()),
        "shards": len(files.shards),
        "missing_shards": [path.name for path in files.missing],
        "sequence_length": length,
        "packed": samples is not None and samples.packed,
        "samples": len(samples) if samples is not None else 0,
        "samples_here": samples.available if samples is not None else 0,
    }
