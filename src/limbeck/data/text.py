"""Text files into documents, documents into tokens.

A document is one ``.txt``, ``.md`` or ``.py`` file, or the ``"text"`` of one line of a ``.jsonl`` file. Bytes are taken
as they are: UTF-8, line ends unchanged.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from limbeck.data.packing import write_tokens
from limbeck.errors import LimbeckError

SUFFIXES = (".jsonl", ".md", ".py", ".txt")
BATCH_CHARACTERS = 4_000_000


class Document(str):
    """A text that knows where it came from, so that a later error can say so.

    Attributes:
        source: The file, and for JSONL the line, as ``path:line``.
    """

    __slots__ = ("source",)
    source: str

    def __new__(cls, text: str, source: str) -> "Document":
        """Make a document of a text and its source."""
        document = super().__new__(cls, text)
        document.source = source
        return document


def text_files(paths: str | Path | Iterable[str | Path]) -> list[Path]:
    """List the files that `read_documents` would read, in its order.

    Args:
        paths: Files and folders; a folder stands for the files with a known suffix in it, at any depth, sorted by path.

    Raises:
        LimbeckError: A path is not there, a file has another suffix, or a folder has no file with a known one.
    """
    expected = f"a file ({', '.join(SUFFIXES)}) or a folder of such files"
    files: list[Path] = []
    for path in [paths] if isinstance(paths, str | Path) else paths:
        path = Path(path)
        if path.is_dir():
            found = sorted(file for file in path.rglob("*") if file.suffix in SUFFIXES and file.is_file())
            if not found:
                raise LimbeckError(f"no text in folder {path}", expected=expected)
            files += found
        elif not path.is_file():
            raise LimbeckError(f"no file or folder {path}", expected=expected)
        elif path.suffix not in SUFFIXES:
            raise LimbeckError(f"{path} is no kind of text that Limbeck reads", expected=expected)
        else:
            files.append(path)
    return files


def read_documents(paths: str | Path | Iterable[str | Path]) -> Iterator[Document]:
    """Read the documents of files and folders one by one; empty ones are left out.

    Args:
        paths: See `text_files`.

    Raises:
        LimbeckError: A path is not there; a file is no UTF-8; a line of JSONL has no text; or there is no text at all.
    """
    files = text_files(paths)
    empty = True
    for file in files:
        for document in _read_jsonl(file) if file.suffix == ".jsonl" else read_text(file):
            if document:
                empty = False
                yield document
    if empty:
        raise LimbeckError(
            f"no text in {', '.join(map(str, files[:3]))}{' …' if len(files) > 3 else ''}",
            expected="at least one document that is not empty",
        )


def token_dtype(vocab_size: int) -> type[np.uint16] | type[np.uint32]:
    """Choose the smallest type that holds every id of a vocabulary."""
    return np.uint16 if vocab_size <= 2**16 else np.uint32


def tokenize_to_file(
    path: str | Path,
    tokenizer: Any,
    documents: Iterable[str],
    eos_token_id: int | None,
    *,
    vocab_size: int | None = None,
) -> np.ndarray:
    """Encode documents straight into a ``.npy`` file, however many; see `encode_batches`.

    Args:
        path: The file, which appears whole or not at all.
        tokenizer: See `encode_batches`, as for what follows.
        documents: The texts.
        eos_token_id: The separator.
        vocab_size: Size of the model's vocabulary.

    Returns:
        Tokens (t,), uint16 or uint32, memory-mapped from the file.
    """
    return write_tokens(path, encode_batches(tokenizer, documents, eos_token_id, vocab_size=vocab_size))


def encode_documents(
    tokenizer: Any, documents: Iterable[str], eos_token_id: int | None, *, vocab_size: int | None = None
) -> np.ndarray:
    """Encode documents into one array of tokens; see `encode_batches`.

    Returns:
        Tokens (t,), uint16 or uint32.
    """
    chunks = list(encode_batches(tokenizer, documents, eos_token_id, vocab_size=vocab_size))
    if not chunks:
        raise LimbeckError("no documents to encode", expected="at least one document that is not empty")
    return np.concatenate(chunks)


def encode_batches(
    tokenizer: Any, documents: Iterable[str], eos_token_id: int | None, *, vocab_size: int | None = None
) -> Iterator[np.ndarray]:
    """Encode documents in batches, as a stream that `write_tokens` can put on disk.

    No special token is added but the separator. Truncation and padding that the tokenizer may ask for are left out.

    Args:
        tokenizer: A `tokenizers.Tokenizer`, or a tokenizer of transformers that has one.
        documents: The texts; empty ones give nothing.
        eos_token_id: Written after every document; None leaves documents unseparated.
        vocab_size: Size of the model's vocabulary; left out, the tokenizer's own.

    Yields:
        Tokens (t,) of some whole documents, uint16 or uint32 by the size of the vocabulary.

    Raises:
        LimbeckError: A token is beyond the vocabulary, or the tokenizer is none of the fast library.
    """
    for tokens, _ in encode_sized(tokenizer, documents, eos_token_id, vocab_size=vocab_size):
        yield tokens


def encode_sized(
    tokenizer: Any, documents: Iterable[str], eos_token_id: int | None, *, vocab_size: int | None = None
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Encode documents as `encode_batches` does, and tell where each ends.

    Yields:
        Tokens (t,) of some whole documents, and how many each has, its separator included, (d,) int64.
    """
    encode, size = encoder(tokenizer, vocab_size)
    if eos_token_id is not None and not 0 <= eos_token_id < size:
        raise LimbeckError(f"separator {eos_token_id} is beyond the vocabulary", expected=f"an id below {size}")
    end = [] if eos_token_id is None else [eos_token_id]

    for batch in _batches(documents):
        rows = encode(batch)
        tokens = np.array([token for row in rows for token in (*row, *end)], dtype=np.uint32)
        if tokens.size and tokens.max() >= size:
            _refuse_beyond(tokenizer, batch, rows, size)
        if tokens.size:
            yield tokens.astype(token_dtype(size)), np.array([len(row) + len(end) for row in rows], dtype=np.int64)


def encoder(tokenizer: Any, vocab_size: int | None = None) -> tuple[Callable[[list[str]], list[list[int]]], int]:
    """Give what encodes a batch of texts with nothing added, and the size of the vocabulary.

    Args:
        tokenizer: A `tokenizers.Tokenizer`, or a tokenizer of transformers that has one; it is left as it is.
        vocab_size: Size of the model's vocabulary; left out, the tokenizer's own.

    Raises:
        LimbeckError: The tokenizer is none of the fast library.
    """
    backend = fast_tokenizer(tokenizer)
    backend = type(backend).from_str(backend.to_str())  # a copy: the caller's truncation and padding stay as they are
    backend.no_truncation()
    backend.no_padding()

    def encode(texts: list[str]) -> list[list[int]]:
        encodings = backend.encode_batch_fast(list(map(str, texts)), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    return encode, backend.get_vocab_size() if vocab_size is None else vocab_size


def fast_tokenizer(tokenizer: Any) -> Any:
    """Give the `tokenizers.Tokenizer` within a tokenizer.

    Raises:
        LimbeckError: There is none.
    """
    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
    if not hasattr(backend, "encode_batch_fast"):
        raise LimbeckError(
            f"{type(tokenizer).__name__} cannot encode in batches",
            expected="a tokenizer of the `tokenizers` library, or one of transformers that is built on it",
        )
    return backend


def read_text(file: Path) -> Iterator[Document]:
    """Read a file that is one document."""
    raw = file.read_bytes()
    try:
        yield Document(raw.decode("utf-8-sig"), str(file))
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise _not_utf8(f"{file}:{line}") from None


def _read_jsonl(file: Path) -> Iterator[Document]:
    """Read a file with a JSON object in every line; blank lines are left out."""
    with file.open("rb") as lines:
        for number, raw in enumerate(lines, start=1):
            if raw.strip():
                source = f"{file}:{number}"
                yield Document(text_of_line(raw, source), source)


def text_of_line(raw: bytes, source: str, field: str = "text") -> str:
    """Take the text out of one line of JSONL.

    Raises:
        LimbeckError: The line is no JSON object with such a text; `source` says where it stands.
    """
    expected = f'one JSON object a line, such as {{"{field}": "…"}}'
    record = json_line(raw, source, expected)
    if not isinstance(record.get(field), str):
        keys = ", ".join(record) or "none"
        raise LimbeckError(f'{source} has no "{field}" that is a string; its keys: {keys}', expected=expected)
    try:
        record[field].encode()
    except UnicodeEncodeError:
        raise LimbeckError(f"{source} has half of a surrogate pair", expected="text that UTF-8 can hold") from None
    return record[field]


def json_line(raw: bytes, source: str, expected: str) -> dict[str, Any]:
    """Read one line of JSONL.

    Raises:
        LimbeckError: It is no UTF-8, or no JSON object; `source` says where it stands.
    """
    try:
        record = json.loads(raw.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise _not_utf8(source) from None
    except (json.JSONDecodeError, RecursionError) as error:
        raise LimbeckError(f"{source} is no JSON: {error}", expected=expected) from None
    if not isinstance(record, dict):
        raise LimbeckError(f"{source} holds a {type(record).__name__}, no object", expected=expected)
    return record


def _not_utf8(source: str) -> LimbeckError:
    return LimbeckError(f"{source} is no UTF-8", expected="text in UTF-8", hint="iconv -f latin1 -t utf-8")


def _batches(documents: Iterable[str]) -> Iterator[list[str]]:
    """Gather documents into batches of some millions of characters: enough for every core, little for memory."""
    batch: list[str] = []
    characters = 0
    for document in documents:
        if document:
            batch.append(document)
            characters += len(document)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _refuse_beyond(tokenizer: Any, batch: list[str], rows: list[list[int]], size: int) -> None:
    """Name the first token that a model with ``size`` tokens does not have, and the document that holds it."""
    for document, row in zip(batch, rows, strict=True):
        for token in row:
            if token >= size:
                source = getattr(document, "source", "a document")
                word = fast_tokenizer(tokenizer).id_to_token(token)
                raise LimbeckError(
                    f"{source} has token {token} ({word!r}), beyond the vocabulary",
                    expected=f"ids below {size}",
                    hint="the tokenizer that the model was trained with: --tokenizer",
                )
