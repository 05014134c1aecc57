"""Text of any kind into a Megatron token file, in parallel processes, restartable at any moment.

The corpus is cut into pieces that do not depend on the number of workers. A worker encodes a piece into
``prefix.parts/NNNNNN.bin`` and then ``NNNNNN.npy`` (the sizes of its documents), each of which appears whole. The parts
are joined in order: a part's tokens are written at their place in the one file, brought to the disk, and then removed,
so that the tokens take their space once. What is there after a kill is therefore always either done or done again, and
the bytes are those of a run without one. ``prefix.json`` says what the file was made of.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context, parent_process
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from limbeck.data.corpus import Corpus, Piece
from limbeck.data.megatron import index_file, megatron_files, megatron_prefix
from limbeck.data.megatron_index import LONGEST
from limbeck.data.megatron_writer import file_dtype, publish
from limbeck.data.text import encode_sized, fast_tokenizer
from limbeck.errors import LimbeckError
from limbeck.files import replacing, sync, write_text

Report = Callable[[int, int], None]


def prepare(
    corpus: Corpus,
    tokenizer: Any,
    output: str | Path,
    *,
    eos_token_id: int | None,
    workers: int = 1,
    report: Report = lambda done, tokens: None,
) -> Path:
    """Encode a corpus into ``output.idx`` and ``output.bin``, one sequence to a document, or go on with it.

    Args:
        corpus: What to encode.
        tokenizer: See `limbeck.data.encode_batches`.
        output: Prefix of the files.
        eos_token_id: Written after every document; None leaves documents as they are.
        workers: Processes that encode; the bytes do not depend on it.
        report: Called now and then with the work done, in the unit of `Corpus.work`, and the tokens so far.

    Returns:
        The prefix.

    Raises:
        LimbeckError: A source cannot be read, another corpus lies there, another process is at work, or there is no
            text at all.
    """
    if workers < 1:
        raise LimbeckError(f"workers = {workers}", expected="1 or more")
    prefix = megatron_prefix(output)
    prefix.parent.mkdir(parents=True, exist_ok=True)
    backend = fast_tokenizer(tokenizer)
    vocab_size = backend.get_vocab_size()
    identity = json.loads(
        json.dumps(
            {**corpus.identity(), "tokenizer": _digest(backend), "eos_token_id": eos_token_id, "vocab_size": vocab_size}
        )
    )
    lock = FileLock(prefix.with_name(f".{prefix.name}.lock"), blocking=False)
    try:
        lock.acquire()
    except Timeout:
        raise LimbeckError(f"another process is preparing {prefix}", expected="one at a time") from None
    with lock:
        try:
            _prepare(corpus, backend, prefix, identity, workers, report)
        finally:  # while it is held: whoever waits for it looks whether it still has a name
            Path(lock.lock_file).unlink(missing_ok=True)
    return prefix


def _prepare(
    corpus: Corpus, backend: Any, prefix: Path, identity: dict[str, Any], workers: int, report: Report
) -> None:
    """Do what is missing, alone at this prefix."""
    parts = _Parts(prefix, file_dtype(identity["vocab_size"]), identity)
    if not parts.finished:
        encode = _Encoder(backend.to_str(), identity["eos_token_id"], parts.path, str(parts.dtype))
        with _clearing_mistakes(parts):
            _fill(parts, corpus.pieces(), encode, workers, report)
            parts.finish()


@contextmanager
def _clearing_mistakes(parts: "_Parts") -> Iterator[None]:
    """While open, a mistake in the sources leaves nothing behind of what was begun just now; a lost worker does not."""
    try:
        yield
    except LimbeckError:
        if parts.begun_here:
            shutil.rmtree(parts.path, ignore_errors=True)
        raise
    except BrokenProcessPool:
        raise LimbeckError(
            "a worker ended before its piece was done",
            hint="the same command goes on from there; with fewer --workers if memory ran out",
        ) from None


class _Parts:
    """The folder of parts beside a token file that is being made."""

    def __init__(self, prefix: Path, dtype: np.dtype, identity: dict[str, Any]):
        self.prefix, self.dtype, self.identity = prefix, dtype, identity
        self.path = prefix.with_name(f"{prefix.name}.parts")
        self.joined = self.path / "joined.bin"
        self.tokens_file = prefix.with_name(f"{prefix.name}.bin")
        self.record = prefix.with_name(f"{prefix.name}.json")
        self.sizes: list[Path] = []
        self.tokens = 0
        self.finished, self.begun_here = self._is_finished(), False
        if self.finished:
            shutil.rmtree(self.path, ignore_errors=True)
            return
        plan = self.path / "plan.json"
        if plan.is_file():
            _same(json.loads(plan.read_text()), identity, self.path)
            if not self.joined.is_file():  # killed while the files got their names
                self.tokens_file.rename(self.joined)
        else:
            shutil.rmtree(self.path, ignore_errors=True)
            self.path.mkdir()
            self.begun_here = True
            self.joined.touch()
            write_text(plan, json.dumps(identity, indent=1))

    def _is_finished(self) -> bool:
        """Tell whether this very corpus lies there; refuse another."""
        if self.record.is_file():
            _same(json.loads(self.record.read_text()), self.identity, self.prefix)
            return index_file(self.prefix).is_file() and self.tokens_file.is_file()
        there = [file for file in megatron_files(self.prefix) if file.is_file()]
        if there and not (self.path / "plan.json").is_file():
            raise LimbeckError(f"{there[0]} exists", expected="a new name", hint="another --output, or remove it")
        return False

    def names(self, number: int) -> tuple[Path, Path]:
        """Give the files of a part: tokens, and sizes of its documents."""
        return self.path / f"{number:06d}.bin", self.path / f"{number:06d}.npy"

    def is_encoded(self, number: int) -> bool:
        """Tell whether a part has been encoded."""
        return self.names(number)[1].is_file()

    def join(self, number: int) -> None:
        """Bring the next part into the one file; it may be there already."""
        tokens, sizes = self.names(number)
        count = int(np.load(sizes).sum())
        if tokens.is_file():
            with self.joined.open("r+b") as joined, tokens.open("rb") as part:
                joined.seek(self.tokens * self.dtype.itemsize)
                shutil.copyfileobj(part, joined, 1 << 22)
                joined.truncate()
            sync(self.joined)
            tokens.unlink()
        self.tokens += count
        self.sizes.append(sizes)

    def finish(self) -> None:
        """Name the files, say what they were made of, and clear away the parts."""
        if not self.tokens:
            shutil.rmtree(self.path)
            raise LimbeckError("no text in the sources", expected="at least one document that is not empty")
        sizes = np.concatenate([np.load(path) for path in self.sizes]).astype(np.int32)
        publish(self.prefix, self.joined, self.dtype, sizes, np.arange(len(sizes) + 1))
        write_text(self.record, json.dumps(self.identity, indent=1))
        shutil.rmtree(self.path)


class _Encoder:
    """Encodes a piece into the files of a part; travels to a worker as text."""

    def __init__(self, tokenizer: str, eos_token_id: int | None, folder: Path, dtype: str):
        self.tokenizer, self.eos_token_id, self.folder, self.dtype = tokenizer, eos_token_id, folder, dtype
        self._backend: Any = None

    def __call__(self, number: int, piece: Piece) -> None:
        """Write a part: its tokens first, then the sizes, which say that it is there."""
        if self._backend is None:
            from tokenizers import Tokenizer

            self._backend = Tokenizer.from_str(self.tokenizer)
        all_sizes = [np.zeros(0, np.int64)]
        with replacing(self.folder / f"{number:06d}.bin") as temporary, temporary.open("wb") as file:
            for tokens, sizes in encode_sized(self._backend, piece.documents(), self.eos_token_id):
                if sizes.max() > LONGEST:
                    raise LimbeckError(f"a document of {sizes.max()} tokens", expected=f"at most {LONGEST}")
                file.write(tokens.astype(self.dtype).tobytes())
                all_sizes.append(sizes)
        with replacing(self.folder / f"{number:06d}.npy") as temporary:
            np.save(temporary, np.concatenate(all_sizes))


def _fill(parts: _Parts, pieces: Iterator[Piece], encode: _Encoder, workers: int, report: Report) -> None:
    """Encode what is missing and join everything, in order; a few pieces more than workers are on their way."""
    waiting: list[tuple[int, int, Future[None] | None]] = []
    done = 0

    def join_first() -> None:
        nonlocal done
        number, work, future = waiting.pop(0)
        if future is not None:
            future.result()
        parts.join(number)
        done += work
        report(done, parts.tokens)

    with _Workers(encode, workers) as pool:
        for number, piece in enumerate(pieces):
            future = None if parts.is_encoded(number) else pool.submit(number, piece)
            waiting.append((number, piece.stop - piece.start, future))
            while len(waiting) > 2 * workers or (waiting and workers == 1):
                join_first()
        while waiting:
            join_first()


class _Workers:
    """Processes that encode; with one worker, this process itself. They start with the first piece and end with us."""

    def __init__(self, encode: _Encoder, workers: int):
        self._encode, self._workers = encode, workers
        self._pool: ProcessPoolExecutor | None = None

    def submit(self, number: int, piece: Piece) -> Future[None] | None:
        """Encode a piece: at once, or in a process."""
        if self._workers == 1:
            return self._encode(number, piece)
        if self._pool is None:
            context = get_context("spawn")  # threads of tokenizers and torch do not survive a fork
            self._pool = ProcessPoolExecutor(self._workers, context, _begin_worker, (self._encode,))
        return self._pool.submit(_encode_in_worker, number, piece)

    def __enter__(self) -> "_Workers":
        return self

    def __exit__(self, *error: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)


_ENCODE: list[_Encoder] = []


def _begin_worker(encode: _Encoder) -> None:
    """Set a worker up: one thread each, since there are several of them, and no life beyond the parent's."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _ENCODE.append(encode)
    Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _encode_in_worker(number: int, piece: Piece) -> None:
    _ENCODE[0](number, piece)


def _digest(backend: Any) -> str:
    return hashlib.sha256(backend.to_str().encode()).hexdigest()


def _same(found: dict[str, Any], wanted: dict[str, Any], where: Path) -> None:
    """Refuse to go on with what was begun with something else."""
    different = [key for key in wanted if found.get(key) != wanted[key]]
    if different:
        raise LimbeckError(
            f"{where} was made with other {', '.join(different)}",
            expected="the sources, options and tokenizer it was begun with",
            hint="give those again, another --output, or remove it",
        )
