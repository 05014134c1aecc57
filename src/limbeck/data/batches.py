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
    dataset: Samples, sampler: BatchSampler, micro_batch: int
) -> Callable[[int], list[dict[str, Tensor]]]:
    """Bind a dataset and a sampler into what the training loop asks for.

    Args:
        dataset: The samples.
        sampler: Says which samples make up an update.
        micro_batch: Samples in one forward pass; it divides the sampler's batch size.

    Returns:
        A function from an update's number to its micro-batches, each as `collate` makes it.
    """
    if sampler.batch_size % micro_batch:
        raise LimbeckError(
            f"an update of {sampler.batch_size} samples in micro-batches of {micro_batch}",
            expected="a micro_batch that divides it",
        )
    return lambda step: [collate(dataset, indices) for indices in sampler[step].reshape(-1, micro_batch)]
