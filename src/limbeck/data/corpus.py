"""What `prepare` reads, cut into pieces that processes can take one by one and that are always cut the same way.

A source is a file or folder of text, a ``.jsonl`` file (cut at lines), or a Hugging Face dataset: ``hub:NAME``, a
``.parquet`` file, or a folder of ``save_to_disk``.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from limbeck.data.text import SUFFIXES, Document, read_text, text_files, text_of_line
from limbeck.errors import LimbeckError

PIECE_BYTES = 16 << 20
PIECE_ROWS = 10_000
HUB = "hub:"
INSTALL = 'pip install "limbeck[hub]"'


@dataclass(frozen=True)
class Reading:
    """How sources are read.

    Attributes:
        field: Key or column that holds the text of JSONL and datasets.
        split: Split of a dataset.
        config: Configuration of a dataset on the hub.
        streaming: Whether a dataset on the hub is read as it arrives, without keeping it on disk.
    """

    field: str = "text"
    split: str = "train"
    config: str | None = None
    streaming: bool = False


@dataclass(frozen=True)
class Piece:
    """Some documents of a source, read where they are needed.

    Attributes:
        kind: "text", "jsonl", "rows" or "stream".
        paths: The files, or the dataset.
        start: First byte or row.
        stop: The byte or row after the last.
        reading: How it is read.
        texts: The documents themselves, of a stream.
    """

    kind: str
    paths: tuple[str, ...]
    start: int
    stop: int
    reading: Reading = Reading()
    texts: tuple[str, ...] = field(default=(), repr=False)

    def documents(self) -> Iterator[Document]:
        """Read the documents one by one; empty ones too."""
        if self.kind == "text":
            for path in self.paths:
                yield from read_text(Path(path))
        elif self.kind == "jsonl":
            yield from _lines(Path(self.paths[0]), self.start, self.stop, self.reading.field)
        else:
            texts = self.texts or _rows(self.paths[0], self.reading)[self.start : self.stop][self.reading.field]
            for row, text in enumerate(texts, start=self.start):
                yield Document(
                    _text_of(text, f"{self.paths[0]}, row {row}", self.reading.field), f"{self.paths[0]}:{row}"
                )


class Corpus:
    """Several sources, and the pieces they are cut into.

    Args:
        sources: Files, folders, datasets; in this order.
        reading: How they are read.

    Raises:
        LimbeckError: A source is not there or of no known kind, or `datasets` is needed and not installed.
    """

    def __init__(self, sources: Sequence[str | Path], reading: Reading):
        if not sources:
            raise LimbeckError("no source", expected="files, folders or datasets of text")
        self.sources, self.reading = [str(source) for source in sources], reading
        for source in self.sources:
            if not _is_dataset(source):
                text_files(source)

    def identity(self) -> dict[str, Any]:
        """What tells this corpus from another: names, and the sizes of files."""
        return {
            "sources": [
                {"source": source} if source.startswith(HUB) else {"source": source, "files": _sizes(source)}
                for source in self.sources
            ],
            "reading": asdict(self.reading),
        }

    def pieces(self) -> Iterator[Piece]:
        """Cut all sources, in order."""
        for source in self.sources:
            if _is_dataset(source):
                yield from _dataset_pieces(source, self.reading)
            else:
                yield from _text_pieces(text_files(source), self.reading)

    def work(self) -> int | None:
        """Tell how much there is to read, in the unit of `Piece` (bytes or rows); None if only the end will tell."""
        if self.reading.streaming and any(source.startswith(HUB) for source in self.sources):
            return None
        return sum(piece.stop - piece.start for piece in self.pieces())


def _text_pieces(files: Iterable[Path], reading: Reading) -> Iterator[Piece]:
    """Gather small files into pieces, cut files of JSONL; a text is never cut, since it is one document."""
    gathered: list[str] = []
    size = 0
    for file in files:
        length = file.stat().st_size
        if gathered and (file.suffix == ".jsonl" or size + length > PIECE_BYTES):
            yield Piece("text", tuple(gathered), 0, size)
            gathered, size = [], 0
        if file.suffix != ".jsonl":
            gathered.append(str(file))
            size += length
            continue
        for start in range(0, length, PIECE_BYTES):
            yield Piece("jsonl", (str(file),), start, min(start + PIECE_BYTES, length), reading)
    if gathered:
        yield Piece("text", tuple(gathered), 0, size)


def _lines(path: Path, start: int, stop: int, key: str) -> Iterator[Document]:
    """Read the lines of JSONL that begin in [start, stop)."""
    with path.open("rb") as file:
        if start:
            file.seek(start - 1)
            file.readline()  # up to the first line that begins at `start` or later
        at = file.tell()
        while at < stop and (raw := file.readline()):
            if raw.strip():
                try:
                    text = text_of_line(raw, f"{path}, byte {at}", key)
                except LimbeckError:
                    text = text_of_line(raw, f"{path}:{_line_number(path, at)}", key)
                yield Document(text, f"{path}, byte {at}")
            at += len(raw)


def _line_number(path: Path, at: int) -> int:
    """Count the lines before a byte: only an error needs it."""
    count = 1
    with path.open("rb") as file:
        while at > 0 and (chunk := file.read(min(at, 1 << 20))):
            count += chunk.count(b"\n")
            at -= len(chunk)
    return count


# --- Hugging Face datasets --------------------------------------------------------------------------------------------


def _is_dataset(source: str) -> bool:
    path = Path(source)
    return source.startswith(HUB) or path.suffix == ".parquet" or (path / "state.json").is_file()


def _dataset_pieces(source: str, reading: Reading) -> Iterator[Piece]:
    if not (reading.streaming and source.startswith(HUB)):
        count = len(_rows(source, reading))
        for start in range(0, count, PIECE_ROWS):
            yield Piece("rows", (source,), start, min(start + PIECE_ROWS, count), reading)
        return
    texts, start = [], 0
    for row, record in enumerate(_opened(source, reading)):
        texts.append(_text_of(record.get(reading.field), f"{source}, row {row}", reading.field))
        if len(texts) == PIECE_ROWS:
            yield Piece("stream", (source,), start, row + 1, reading, tuple(texts))
            texts, start = [], row + 1
    if texts:
        yield Piece("stream", (source,), start, start + len(texts), reading, tuple(texts))


def _rows(source: str, reading: Reading) -> Any:
    """Open a dataset with rows, and make sure of its column."""
    rows = _opened(source, reading)
    if reading.field not in rows.column_names:
        raise LimbeckError(
            f"{source} has no column {reading.field!r}; its columns: {', '.join(rows.column_names)}",
            expected="a column of text",
            hint="--field with one of them",
        )
    return rows


def _opened(source: str, reading: Reading) -> Any:
    """Open a dataset with the `datasets` library, which nothing else imports."""
    try:
        import datasets  # pyright: ignore[reportMissingImports]
        from datasets.exceptions import DatasetGenerationError  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise LimbeckError(f"{source} needs the library `datasets`", hint=INSTALL) from None
    try:
        if source.startswith(HUB):
            name = source.removeprefix(HUB)
            return datasets.load_dataset(name, reading.config, split=reading.split, streaming=reading.streaming)
        if source.endswith(".parquet"):
            return datasets.load_dataset("parquet", data_files=source, split="train")
        found = datasets.load_from_disk(source)
        return found[reading.split] if isinstance(found, datasets.DatasetDict) else found
    except (OSError, ValueError, KeyError, DatasetGenerationError) as error:
        raise LimbeckError(
            f"{source} cannot be opened: {error}", expected="a dataset", hint="see --split and --config"
        ) from None


def _text_of(value: object, place: str, key: str) -> str:
    if not isinstance(value, str):
        raise LimbeckError(f"{place}: {key!r} holds a {type(value).__name__}", expected="text", hint="--field")
    return value


def _sizes(source: str) -> list[list[Any]]:
    """List the files of a local source with their sizes and times."""
    path = Path(source)
    if not path.exists():
        raise LimbeckError(f"no file or folder {source}", expected=f"text ({', '.join(SUFFIXES)}) or a dataset")
    if not _is_dataset(source):
        files = text_files(path)
    else:
        files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    return [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files]
