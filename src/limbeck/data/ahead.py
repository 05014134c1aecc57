"""The batches of the next update, made while this one is learned from."""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Self

from torch import Tensor

Batches = Callable[[int], Sequence[Mapping[str, Tensor]]]


class ReadAhead:
    """Batches by the number of their update, each made by a thread of its own while the one before it is in use.

    What is read stays the function of the number that it was; an error comes when its batch is asked for. A context
    manager: at its end the thread is gone.

    Args:
        batches: Update index → its micro-batches. It is called by one thread only.
        updates: How many updates there are; nothing is read beyond them.
        pinned: Whether to lay the tensors in pinned memory, from which a GPU copies them without holding up the host.
    """

    def __init__(self, batches: Batches, updates: int, pinned: bool = False):
        self.batches, self.updates, self.pinned = batches, updates, pinned
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches")
        self._next: tuple[int, Future[list[dict[str, Tensor]]]] | None = None

    def __call__(self, update: int) -> list[dict[str, Tensor]]:
        """Give an update's micro-batches, and begin with those of the next."""
        found = self._begun(update)
        self._next = (update + 1, self._begun(update + 1)) if update + 1 < self.updates else None
        try:
            return found.result()
        finally:
            del found  # an error would hold this frame, which holds the error

    def _begun(self, update: int) -> Future[list[dict[str, Tensor]]]:
        if self._next is not None and self._next[0] == update:
            return self._next[1]
        return self._thread.submit(self._make, update)

    def _make(self, update: int) -> list[dict[str, Tensor]]:
        made = self.batches(update)
        return [{key: x.pin_memory() if self.pinned else x for key, x in batch.items()} for batch in made]

    def __enter__(self) -> Self:
        """Give itself."""
        return self

    def __exit__(self, *_: Any) -> None:
        """End the thread, after what it is reading."""
        self._thread.shutdown(cancel_futures=True)
