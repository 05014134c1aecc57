"""A few processes that train side by side, one thread each."""

import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from transformers.utils.logging import disable_progress_bar

from limbeck.progress import make_progress

Task = tuple[Any, ...]


class Workers:
    """A few processes with one thread each: models this small gain nothing from more."""

    def __init__(self, count: int, log: Path):
        spawn = get_context("spawn")
        self._pool = ProcessPoolExecutor(count, mp_context=spawn, initializer=_be_a_worker, initargs=(log,))

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def run(self, title: str, tasks: Sequence[Task], total: int = 0, done: Callable[[], int] = lambda: 0) -> list[Any]:
        """Run tasks (a function and its arguments) side by side, showing how far they are; their results in order."""
        futures: list[Future[Any]] = [self._pool.submit(*task) for task in tasks]
        with make_progress(title, total) as progress:
            pending, shown = set(futures), done()
            progress.begin(shown)
            while pending:
                finished, pending = wait(pending, timeout=1.0, return_when=FIRST_COMPLETED)
                for future in finished:
                    future.result()  # a task that failed ends the demo here
                if (count := done()) != shown:
                    progress.update(count)
                    shown = count
        return [future.result() for future in futures]


def _be_a_worker(log: Path) -> None:
    """Set a new process up: one thread, its own messages into a log, and gone as soon as the demo is gone."""
    torch.set_num_threads(1)
    disable_progress_bar()
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
