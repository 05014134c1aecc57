"""Samples of fixed length, and token files that are whole or absent."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from limbeck.data import TokenDataset, load_tokens, split_samples, write_tokens
from limbeck.errors import LimbeckError


@given(length=st.integers(1, 20), extra=st.integers(0, 200))
def test_every_token_but_the_first_is_predicted_once(length, extra):
    tokens = np.arange(length + 1 + extra, dtype=np.uint16)
    dataset = TokenDataset(tokens, length)
    labels = np.concatenate([sample[1:] for sample in dataset])
    assert np.array_equal(labels, tokens[1 : 1 + len(dataset) * length])
    assert len(tokens) - 1 - len(labels) < length
    assert all(sample.shape == (length + 1,) for sample in dataset)


def test_a_sample_is_a_view_and_indices_have_ends():
    dataset = TokenDataset(np.arange(2049 + 2048, dtype=np.uint16), 2048)
    assert len(dataset) == 2
    assert np.shares_memory(dataset[1], dataset.tokens)
    assert (dataset[1][0], dataset[1][-1]) == (2048, 4096)
    for index in (2, -1):
        with pytest.raises(IndexError):
            dataset[index]


def test_the_held_out_part_is_the_end():
    dataset = TokenDataset(np.arange(101, dtype=np.uint16), 5)
    train, held_out = split_samples(dataset, 0.1)
    assert (len(train), len(held_out)) == (18, 2)
    assert np.array_equal(np.stack([*train, *held_out]), np.stack(list(dataset)))
    assert len(split_samples(dataset, 0.001)[1]) == 1
    for wrong in (0.0, 1.0, 0.99):
        with pytest.raises(LimbeckError, match="to hold out"):
            split_samples(dataset, wrong)


@pytest.mark.parametrize(
    ("tokens", "length", "message"),
    [
        (np.zeros(8, np.uint16), 8, "a text of 8 tokens is shorter than one sample"),
        (np.zeros(0, np.uint16), 8, "a text of 0 tokens"),
        (np.zeros((4, 8), np.uint16), 8, "shape"),
        (np.zeros(80), 8, "float64"),
        (np.zeros(8, np.uint16), 0, "sequence_length = 0"),
    ],
)
def test_what_holds_no_sample(tokens, length, message):
    with pytest.raises(LimbeckError, match=message):
        TokenDataset(tokens, length)


@given(st.lists(st.integers(1, 100), min_size=1, max_size=5), st.sampled_from([np.uint16, np.uint32]))
def test_a_stream_of_chunks_reads_back_as_their_sum(tmp_path_factory, sizes, dtype):
    chunks = [np.random.default_rng(size).integers(0, 2**16, size).astype(dtype) for size in sizes]
    path = tmp_path_factory.mktemp("tokens") / "tokens.npy"
    tokens = write_tokens(path, iter(chunks))
    assert tokens.dtype == dtype
    assert not tokens.flags.writeable
    assert np.array_equal(tokens, np.concatenate(chunks))
    assert np.array_equal(np.load(path), tokens)


def test_a_failure_leaves_the_file_that_was_there(tmp_path):
    path = tmp_path / "tokens.npy"
    write_tokens(path, [np.arange(3, dtype=np.uint16)])

    def chunks():
        yield np.arange(5, dtype=np.uint16)
        raise RuntimeError("the machine goes down")

    with pytest.raises(RuntimeError):
        write_tokens(path, chunks())
    assert load_tokens(path).tolist() == [0, 1, 2]
    assert list(tmp_path.iterdir()) == [path]


def test_files_that_are_no_tokens(tmp_path):
    path = tmp_path / "tokens.npy"
    with pytest.raises(LimbeckError, match="no file"):
        load_tokens(path)
    write_tokens(path, [np.arange(1000, dtype=np.uint16)])
    whole = path.read_bytes()
    for length in (0, 5, 100, 128, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(LimbeckError, match=r"tokens\.npy cannot be read"):
            load_tokens(path)
    for wrong in (np.zeros((2, 2), np.uint16), np.zeros(3), np.array([-1])):
        np.save(path, wrong)
        with pytest.raises(LimbeckError, match=r"tokens\.npy holds no tokens"):
            load_tokens(path)
    np.save(path, np.array([{}]), allow_pickle=True)
    with pytest.raises(LimbeckError, match=r"tokens\.npy cannot be read"):
        load_tokens(path)
