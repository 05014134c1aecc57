"""Order of samples: every epoch holds each sample once, and a step alone says which are its own."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from limbeck.data import BatchSampler, TokenDataset, collate, micro_batches
from limbeck.errors import LimbeckError

sizes = st.integers(1, 60)


@given(size=sizes, batch=st.integers(1, 25), seed=st.integers(0, 9), shuffle=st.booleans(), offset=st.integers(0, 99))
def test_epochs_are_permutations_and_offsets_shift(size, batch, seed, shuffle, offset):
    sampler = BatchSampler(size, batch, seed=seed, shuffle=shuffle)
    steps = -(-(3 * size + offset) // batch) + 2
    stream = np.concatenate([sampler[step] for step in range(steps)])
    for epoch in range(3):
        assert sorted(stream[epoch * size : (epoch + 1) * size].tolist()) == list(range(size))
    shifted = BatchSampler(size, batch, seed=seed, shuffle=shuffle, offset=offset)
    assert np.array_equal(shifted[1], stream[offset + batch : offset + 2 * batch])


@given(size=sizes, batch=st.integers(1, 25), steps=st.permutations(range(8)))
def test_a_step_is_the_same_whatever_was_asked_before(size, batch, steps):
    asked = BatchSampler(size, batch, seed=1)
    for step in steps:
        assert np.array_equal(asked[step], BatchSampler(size, batch, seed=1)[step])


def test_seeds_and_epochs_differ_and_file_order_is_file_order():
    one, two = BatchSampler(1000, 1000, seed=1), BatchSampler(1000, 1000, seed=2)
    assert not np.array_equal(one[0], two[0])
    assert not np.array_equal(one[0], one[1])
    assert np.array_equal(BatchSampler(10, 4, seed=1, shuffle=False)[2], [8, 9, 0, 1])


def test_the_order_of_a_seed_is_fixed_for_good():
    """A resumed run on another machine must read the same samples: this order may never change."""
    assert BatchSampler(12, 12, seed=0)[0].tolist() == [9, 2, 7, 4, 5, 11, 0, 3, 6, 10, 8, 1]


def test_labels_are_the_inputs_one_token_on():
    dataset = TokenDataset(np.arange(65000, 65000 + 33, dtype=np.uint16), 8)
    batch = collate(dataset, [2, 0])
    assert batch["input_ids"].dtype == batch["labels"].dtype == torch.int64
    assert batch["input_ids"].shape == batch["labels"].shape == (2, 8)
    assert batch["input_ids"].is_contiguous()
    assert torch.equal(batch["labels"], batch["input_ids"] + 1)
    assert batch["input_ids"][:, 0].tolist() == [65016, 65000]


def test_micro_batches_together_are_the_update():
    dataset = TokenDataset(np.arange(400, dtype=np.uint16), 8)
    sampler = BatchSampler(len(dataset), 12, seed=3)
    parts = micro_batches(dataset, sampler, 4)(5)
    assert [part["input_ids"].shape for part in parts] == [(4, 8)] * 3
    whole = collate(dataset, sampler[5])
    assert torch.equal(torch.cat([part["labels"] for part in parts]), whole["labels"])
    with pytest.raises(LimbeckError, match="12 samples of an update in micro-batches of 5"):
        micro_batches(dataset, sampler, 5)


@pytest.mark.parametrize(("size", "batch", "offset"), [(0, 1, 0), (1, 0, 0), (1, 1, -1)])
def test_sizes_that_make_no_sense(size, batch, offset):
    with pytest.raises(LimbeckError, match="at least"):
        BatchSampler(size, batch, seed=0, offset=offset)
    with pytest.raises(IndexError):
        BatchSampler(1, 1, seed=0)[-1]
