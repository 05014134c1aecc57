"""Which samples make up which update: a pure function of the seed and the step, so that resuming takes one integer."""

from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor

from limbeck.data.samples import CONTEXT, LEARNED, Samples
from limbeck.errors import LimbeckError

NO_LABEL = -100


class BatchSampler:
    """The samples of every update, without end: epoch follows epoch, and a batch may span two of them.

    Args:
        dataset_size: Samples in the dataset.
        batch_size: Samples in an update.
        seed: With the number of the epoch, it fixes the epoch's order.
        shuffle: Whether each epoch has its own order; otherwise samples come in the order of the file.
        offset: Samples to leave out at the start, such as those that an earlier stage has read.
    """

    def __init__(self, dataset_size: int, batch_size: int, *, seed: int, shuffle: bool = True, offset: int = 0):
        for name, value, least in (
            ("dataset_size", dataset_size, 1),
            ("batch_size", batch_size, 1),
            ("offset", offset, 0),
        ):
            if value < least:
                raise LimbeckError(f"{name} = {value}", expected=f"at least {least}")
        self.dataset_size, self.batch_size, self.offset = dataset_size, batch_size, offset
        self.seed, self.shuffle = seed, shuffle
        self._orders: dict[int, np.ndarray] = {}

    def __getitem__(self, step: int) -> np.ndarray:
        """Give the samples of update ``step``: indices (batch_size,), int64."""
        if step < 0:
            raise IndexError(f"update {step}")
        first = self.offset + step * self.batch_size
        epochs, places = np.divmod(np.arange(first, first + self.batch_size), self.dataset_size)
        if not self.shuffle:
            return places
        needed = {int(epoch): self._order(int(epoch)) for epoch in np.unique(epochs)}
        self._orders = needed  # the next update reads the same epoch, so its order is kept
        return np.array(
            [needed[int(epoch)][place] for epoch, place in zip(epochs, places, strict=True)], dtype=np.int64
        )

    def _order(self, epoch: int) -> np.ndarray:
        """Give the order of an epoch: a permutation (dataset_size,)."""
        if epoch in self._orders:
            return self._orders[epoch]
        order = np.arange(self.dataset_size, dtype=np.uint32 if self.dataset_size <= 2**32 else np.uint64)
        np.random.default_rng((self.seed, epoch)).shuffle(order)
        return order


def collate(dataset: Samples, indices: Iterable[int]) -> dict[str, Tensor]:
    """Stack samples into a batch whose labels are the inputs, one token on.

    Args:
        dataset: Gives tokens (l + 1,) for an index, or tokens and their roles (2, l + 1) as `TaskDataset` does.
        indices: The samples of the batch.

    Returns:
        input_ids (b,l) and labels (b,l), int64; ``labels[:, t]`` is the token that follows ``input_ids[:, t]``. Where
        tokens have roles, those that are not to be learned have label -100, and attention_mask (b,l) is 0 at padding.
    """
    samples = torch.from_numpy(np.stack([dataset[int(index)] for index in indices]).astype(np.int64))
    if samples.ndim == 2:  # (b, l+1)
        return {"input_ids": samples[:, :-1].contiguous(), "labels": samples[:, 1:].contiguous()}
    tokens, roles = samples.unbind(1)  # (b, l+1) each
    return {
        "input_ids": tokens[:, :-1].contiguous(),
        "labels": tokens.masked_fill(roles != LEARNED, NO_LABEL)[:, 1:].contiguous(),
        "attention_mask": (roles[:, :-1] >= CONTEXT).long(),
    }


def micro_batches(
    dataset: Samples,
    sampler: BatchSampler,
    micro_batch: int,
    *,
    rank: int = 0,
    size: int = 1,
    complete: Callable[[int, np.ndarray, dict[str, Tensor]], dict[str, Tensor]] | None = None,
) -> Callable[[int], list[dict[str, Tensor]]]:
    """Bind a dataset and a sampler into what the training loop asks for.

    Args:
        dataset: The samples.
        sampler: Says which samples make up an update.
        micro_batch: Samples in one forward pass; it divides the samples of a process, see `fitting_micro_batch`.
        rank: Which of several processes this is.
        size: How many there are; each takes an equal, contiguous share of an update's micro-batches.
        complete: What else belongs in a micro-batch: called with the update's number, the samples, and what `collate`
            made of them.

    Returns:
        A function from an update's number to this process's micro-batches, each as `collate` makes it.

    Raises:
        LimbeckError: The samples of an update cannot be dealt out so.
    """
    share = share_of(sampler.batch_size, size)
    if share % micro_batch:
        raise LimbeckError(
            f"{share} samples of an update in micro-batches of {micro_batch}", expected="a micro_batch that divides it"
        )

    def whole(step: int, indices: np.ndarray) -> dict[str, Tensor]:
        batch = collate(dataset, indices)
        return batch if complete is None else batch | complete(step, indices, batch)

    def dealt(step: int) -> list[dict[str, Tensor]]:
        own = sampler[step][rank * share : (rank + 1) * share]
        return [whole(step, indices) for indices in own.reshape(-1, micro_batch)]

    return dealt


def share_of(batch_size: int, size: int) -> int:
    """Samples of an update that each of `size` processes takes.

    Raises:
        LimbeckError: They do not come out even.
    """
    if batch_size % size:
        raise LimbeckError(
            f"an update of {batch_size} samples for {size} processes",
            expected=f"a multiple of {size} samples, so that all have equal work",
            hint="another number of processes, or other tokens_per_step",
        )
    return batch_size // size


def fitting_micro_batch(batch_size: int, micro_batch: int, size: int) -> int:
    """The greatest micro-batch, `micro_batch` at most, of which a process's share of an update is a multiple."""
    share = share_of(batch_size, size)
    return next(count for count in range(min(micro_batch, share), 0, -1) if share % count == 0)
