"""Several sources in one: their shares, their order, and nothing but the index to remember."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from limbeck.data import MixedDataset, TokenDataset, mixed
from limbeck.data.mixture import BLOCK
from limbeck.errors import LimbeckError

WEIGHTS = st.lists(st.floats(0.01, 100), min_size=1, max_size=6)


def source(number, size):
    """Samples that say whose they are, and which."""
    tokens = np.stack([np.full(size, number), np.arange(size)], axis=1)

    class Numbered:
        def __len__(self):
            return size

        def __getitem__(self, index):
            return tokens[index]

    return Numbered()


@given(weights=WEIGHTS)
def test_every_block_has_the_shares_and_spreads_them_evenly(weights):
    dataset = MixedDataset([source(number, BLOCK) for number in range(len(weights))], weights)
    exact = np.array(weights) / sum(weights)
    owners = np.array([dataset.locate(index)[0] for index in range(BLOCK)])
    counts = Counter(owners.tolist())
    for number, share in enumerate(exact):
        assert abs(counts[number] - share * BLOCK) < 1 + len(weights)
        for part in (BLOCK // 4, BLOCK // 2):
            assert abs((owners[:part] == number).sum() - share * part) <= 2 + len(weights)


@given(weights=WEIGHTS, sizes=st.data())
def test_each_source_comes_in_its_own_order_again_and_again(weights, sizes):
    lengths = [sizes.draw(st.integers(1, 40)) for _ in weights]
    dataset = MixedDataset([source(number, size) for number, size in enumerate(lengths)], weights)
    assert len(dataset) == sum(lengths)
    seen = Counter()
    for index in range(len(dataset)):
        owner, place = dataset[index].tolist()
        assert place == seen[owner] % lengths[owner]
        assert dataset.locate(index) == (owner, place)
        seen[owner] += 1


def test_the_order_goes_on_over_blocks():
    dataset = MixedDataset([source(0, 3 * BLOCK), source(1, 3 * BLOCK)], [3, 1])
    places = {0: [], 1: []}
    for index in range(2 * BLOCK + 100):
        owner, place = dataset.locate(index)
        places[owner].append(place)
    assert all(found == list(range(len(found))) for found in places.values())
    assert len(places[0]) == pytest.approx(3 * len(places[1]), abs=4)


def test_one_source_stays_as_it_is_and_samples_can_be_fewer():
    one = source(0, 5)
    assert mixed([one], [0.3]) is one
    assert len(MixedDataset([one, one], [1, 1], max_samples=3)) == 3
    with pytest.raises(IndexError, match="sample 3 of 3"):
        MixedDataset([one, one], [1, 1], max_samples=3)[3]


def test_what_cannot_be_mixed():
    one, tokens = source(0, 5), TokenDataset(np.arange(20, dtype=np.uint16), 4)
    for sources, weights, words in (
        ([], [], "0 sources and 0 weights"),
        ([one, one], [1], "2 sources and 1 weights"),
        ([one, one], [1, 0], "numbers above 0"),
        ([one, one], [1, float("nan")], "numbers above 0"),
        ([one, tokens], [1, 1], "sources of one kind and length"),
        ([one] * (BLOCK + 1), [1] * (BLOCK + 1), "at most 4096"),
    ):
        with pytest.raises(LimbeckError, match=words):
            MixedDataset(sources, weights)
