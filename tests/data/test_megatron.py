"""Megatron token files: what is written is read, from shards too, and no damage goes unseen."""

import pickle
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from limbeck.data import BatchSampler, MegatronDataset, MegatronWriter, collate, describe, is_megatron, micro_batches
from limbeck.data.megatron_index import TYPES, read_index
from limbeck.errors import LimbeckError


def sequences_of(*sizes, vocab=1000):
    rng = np.random.default_rng(0)
    return [rng.integers(0, vocab, size) for size in sizes]


def write(prefix, sequences, dtype=np.uint16):
    with MegatronWriter(prefix, dtype) as writer:
        for tokens in sequences:
            writer.add(tokens)
    return prefix


def shard(prefix, size, *, named_by_count=False, keep=None):
    """Split ``prefix.bin`` as `split -b` does, and keep some of the shards."""
    whole = prefix.with_suffix(".bin")
    raw = whole.read_bytes()
    pieces = [raw[at : at + size] for at in range(0, len(raw), size)]
    behind = len(pieces) if named_by_count else len(pieces) - 1
    paths = [prefix.with_name(f"{prefix.name}-{number:05d}-of-{behind:05d}.bin") for number in range(len(pieces))]
    for number, (path, piece) in enumerate(zip(paths, pieces, strict=True)):
        if keep is None or number in keep:
            path.write_bytes(piece)
    whole.unlink()
    return paths


@pytest.fixture
def prefix(tmp_path):
    return tmp_path / "document"


# --- the format -------------------------------------------------------------------------------------------------------


def test_the_bytes_are_the_formats(prefix):
    with MegatronWriter(prefix, np.uint16) as writer:
        writer.add([1, 2, 3], end_document=False)
        writer.add([4])
        writer.add([5, 6])
    assert prefix.with_suffix(".bin").read_bytes() == np.array([1, 2, 3, 4, 5, 6], "<u2").tobytes()
    assert prefix.with_suffix(".idx").read_bytes() == b"".join(
        (
            b"MMIDIDX\x00\x00",
            (1).to_bytes(8, "little"),
            bytes([8]),
            (3).to_bytes(8, "little"),
            (3).to_bytes(8, "little"),
            np.array([3, 1, 2], "<i4").tobytes(),
            np.array([0, 6, 8], "<i8").tobytes(),
            np.array([0, 2, 3], "<i8").tobytes(),
        )
    )


@pytest.mark.parametrize("code", TYPES)
def test_every_type_reads_back(prefix, code):
    tokens = np.arange(65) % 100
    write(prefix, [tokens, tokens[::-1]], TYPES[code])
    assert prefix.with_suffix(".idx").read_bytes()[17] == code
    dataset = MegatronDataset(prefix)
    assert (len(dataset), dataset.sequence_length, dataset.packed) == (2, 64, False)
    assert np.array_equal(dataset[0], tokens)
    assert np.array_equal(dataset[1], tokens[::-1])
    assert dataset[0].dtype.kind in "iu"


def test_an_index_without_marked_documents_is_read(prefix):
    write(prefix, sequences_of(9, 9))
    raw = bytearray(prefix.with_suffix(".idx").read_bytes())
    raw[26] = 1  # the count of marks
    prefix.with_suffix(".idx").write_bytes(raw[:-16])
    assert len(MegatronDataset(prefix, 8)) == 2
    assert describe(prefix)["documents"] == 0


@settings(deadline=None, max_examples=60)
@given(sizes=st.lists(st.integers(0, 40), min_size=1, max_size=12), length=st.integers(1, 30), data=st.data())
def test_what_is_written_is_read(tmp_path_factory, sizes, length, data):
    prefix = tmp_path_factory.mktemp("tokens") / "document"
    sequences = sequences_of(*sizes)
    stream = np.concatenate(sequences)
    if not len(stream):
        with pytest.raises(LimbeckError, match="no tokens to write"):
            write(prefix, sequences)
        return
    write(prefix, sequences)
    if data.draw(st.booleans(), label="sharded"):
        shard(prefix, data.draw(st.integers(1, 2 * len(stream)), label="bytes"))
    if len(stream) < length + 1:
        with pytest.raises(LimbeckError, match="fewer than one sample"):
            MegatronDataset(prefix, length, packed=True)
        return
    dataset = MegatronDataset(prefix, length, packed=True)
    assert len(dataset) == dataset.available == (len(stream) - 1) // length
    for index, sample in enumerate(dataset[i] for i in range(len(dataset))):
        assert np.array_equal(sample, stream[index * length : index * length + length + 1])


# --- samples ----------------------------------------------------------------------------------------------------------


def test_sequences_of_a_sample_each_are_the_samples(prefix):
    sequences = sequences_of(*[2049] * 5)
    dataset = MegatronDataset(write(prefix, sequences))
    assert (len(dataset), dataset.sequence_length, dataset.packed) == (5, 2048, False)
    assert all(np.array_equal(dataset[i], sequences[i]) for i in range(5))
    half = MegatronDataset(prefix, 1024)
    assert (len(half), half.packed) == (10, False)
    assert np.array_equal(half[3], sequences[1][1024:])


def test_a_shorter_last_sequence_is_no_sample_of_shards(prefix):
    sequences = sequences_of(9, 9, 9, 4)
    shard(write(prefix, sequences), 40, keep={0})
    dataset = MegatronDataset(prefix, 8)
    assert (len(dataset), dataset.available, dataset.packed) == (3, 2, False)


def test_a_sample_is_a_view_that_cannot_be_written(prefix):
    dataset = MegatronDataset(write(prefix, sequences_of(9, 9)), 8)
    assert np.shares_memory(dataset[1], dataset.files.shards[0].data)
    assert not dataset[1].flags.writeable
    for index in (-1, 2):
        with pytest.raises(IndexError):
            dataset[index]


def test_limits_and_choices(prefix):
    write(prefix, sequences_of(9, 9, 9))
    assert len(MegatronDataset(prefix, 8, max_samples=2)) == 2
    assert len(MegatronDataset(prefix, 8, packed=True)) == 3
    assert len(MegatronDataset(prefix, 5)) == 5
    with pytest.raises(LimbeckError, match="stores sequences of 9 tokens"):
        MegatronDataset(prefix, 5, packed=False)
    for wrong in ({"sequence_length": 0}, {"max_samples": 0}):
        with pytest.raises(LimbeckError, match="= 0"):
            MegatronDataset(prefix, **wrong)


def test_batches_are_made_as_of_any_source(prefix):
    sequences = sequences_of(*[9] * 7)
    dataset = MegatronDataset(write(prefix, sequences), 8)
    batches = micro_batches(dataset, BatchSampler(7, 4, seed=0, shuffle=False), 2)
    assert np.array_equal(batches(1)[1]["labels"][0], sequences[6][1:])  # samples 4, 5 | 6, 0
    assert np.array_equal(batches(1)[1]["input_ids"][1], sequences[0][:-1])
    assert collate(dataset, [0])["input_ids"].shape == (1, 8)


def test_it_travels_between_processes(prefix):
    dataset = MegatronDataset(write(prefix, sequences_of(9, 9)), 8, vocab_size=1000)
    again = pickle.loads(pickle.dumps(dataset))  # noqa: S301
    assert np.array_equal(again[1], dataset[1])
    assert again.vocab_size == 1000


def test_memory_does_not_grow_with_the_file(prefix):
    with MegatronWriter(prefix, np.uint16) as writer:
        for _ in range(2000):
            writer.add(np.zeros(2049, np.uint16))
    tracemalloc.start()
    dataset = MegatronDataset(prefix, vocab_size=1000)
    for index in range(len(dataset)):
        dataset[index]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000  # the file has 8.2 MB


# --- shards -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("named_by_count", [False, True])
@pytest.mark.parametrize("size", [18 * 3, 18 * 3 + 4, 18 * 3 + 5])
@pytest.mark.parametrize("keep", [{0}, {0, 1}, {1}, {1, 2}, {2, 3}, {0, 3}, {0, 1, 2, 3}])
def test_samples_in_the_shards_that_are_here_are_served(prefix, size, keep, named_by_count):
    sequences = sequences_of(*[9] * 11)
    paths = shard(write(prefix, sequences), size, named_by_count=named_by_count, keep=keep)
    assert len(paths) == 4
    dataset = MegatronDataset(prefix, 8)
    assert len(dataset) == 11
    for index, sequence in enumerate(sequences):
        needed = set(range(index * 18 // size, ((index + 1) * 18 - 1) // size + 1))
        if needed <= keep:
            assert np.array_equal(dataset[index], sequence)
            continue
        with pytest.raises(LimbeckError, match=rf"sample {index} .*missing") as refusal:
            dataset[index]
        assert paths[min(needed - keep)].name in str(refusal.value)


def test_the_first_shard_alone(prefix):
    paths = shard(write(prefix, sequences_of(*[9] * 10)), 50, keep={0})
    dataset = MegatronDataset(prefix, 8)
    assert dataset.available == 2
    dataset.require(2)
    with pytest.raises(LimbeckError, match=f"2 samples of the 3 asked for: {paths[1].name}"):
        dataset.require(3)
    facts = describe(prefix)
    assert (facts["shards"], facts["samples"], facts["samples_here"]) == (4, 10, 2)
    assert facts["missing_shards"] == [path.name for path in paths[1:]]


def test_shards_that_do_not_fit(prefix):
    paths = shard(write(prefix, sequences_of(*[9] * 11)), 54)
    raw = paths[1].read_bytes()
    paths[1].write_bytes(raw[:-2])
    with pytest.raises(LimbeckError, match="do not make up the file"):
        MegatronDataset(prefix, 8)
    paths[1].write_bytes(raw)
    prefix.with_name("document-00000-of-00009.bin").write_bytes(raw)
    with pytest.raises(LimbeckError, match="shards of"):
        MegatronDataset(prefix, 8)


@pytest.mark.parametrize("named_by_count", [False, True])
def test_the_last_shard_alone_does_not_tell_where_it_begins(prefix, named_by_count):
    paths = shard(write(prefix, sequences_of(*[9] * 11)), 54, named_by_count=named_by_count, keep={3})
    with pytest.raises(LimbeckError, match=f"only {paths[3].name} is here, which may be the last"):
        MegatronDataset(prefix, 8)


def test_a_single_sequence_needs_all_of_its_file(prefix):
    paths = shard(write(prefix, sequences_of(40)), 20, keep={0, 1})
    with pytest.raises(LimbeckError, match="speaks of one sequence"):
        MegatronDataset(prefix, 8)
    raw = b"".join(path.read_bytes() for path in paths[:2])
    for path, piece in zip(paths[2:], (raw[:20], raw[20:]), strict=True):
        path.write_bytes(piece)
    assert len(MegatronDataset(prefix, 8)) == 4


def test_a_remainder_may_lie_in_the_last_shard(prefix):
    sequences = sequences_of(*[9] * 11)  # 198 bytes as 49, 49, 49 and 51
    raw = write(prefix, sequences).with_suffix(".bin").read_bytes()
    prefix.with_suffix(".bin").unlink()
    prefix.with_name("document-00000-of-00004.bin").write_bytes(raw[:49])
    assert MegatronDataset(prefix, 8).available == 2
    prefix.with_name("document-00003-of-00004.bin").write_bytes(raw[147:])
    assert np.array_equal(MegatronDataset(prefix, 8)[10], sequences[10])


def test_uneven_shards_are_read_when_all_are_here(prefix):
    sequences = sequences_of(*[9] * 4)
    raw = write(prefix, sequences).with_suffix(".bin").read_bytes()
    prefix.with_suffix(".bin").unlink()
    for number, (start, stop) in enumerate([(0, 7), (7, 60), (60, 72)]):
        prefix.with_name(f"document-{number:05d}-of-00003.bin").write_bytes(raw[start:stop])
    dataset = MegatronDataset(prefix, 8)
    assert all(np.array_equal(dataset[i], sequences[i]) for i in range(4))


# --- damage -----------------------------------------------------------------------------------------------------------


def served(prefix, length):
    """All samples that a file gives; None for one that it refuses."""
    try:
        dataset = MegatronDataset(prefix, length)
    except LimbeckError:
        return {}
    samples = {}
    for index in range(min(len(dataset), 1000)):
        try:
            samples[index] = dataset[index].astype(np.int64).tolist()
        except LimbeckError:
            samples[index] = None
    return samples


@pytest.mark.parametrize("kept", [None, {0}, {0, 1}, {2}, {0, 1, 2}])
@pytest.mark.parametrize(
    ("sizes", "length"), [([9] * 6, 8), ([3, 0, 20, 1, 15, 9], 8), ([40], 8), ([13, 13], 3), ([7, 20, 20], None)]
)
@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_a_byte_that_flips_is_seen_or_harmless(tmp_path_factory, sizes, length, kept, data):
    prefix = tmp_path_factory.mktemp("tokens") / "document"
    dtype = data.draw(st.sampled_from([np.uint16, np.int32, np.int64, np.int16, np.uint8]), label="type")
    write(prefix, sequences_of(*sizes, vocab=250), dtype)
    if kept is not None:
        size = prefix.with_suffix(".bin").stat().st_size
        pieces = data.draw(st.integers(1, 4), label="pieces")
        shard(prefix, -(-size // pieces), named_by_count=data.draw(st.booleans(), label="count"), keep=kept)
    truth = served(prefix, length)
    raw = bytearray(prefix.with_suffix(".idx").read_bytes())
    place = data.draw(st.integers(0, len(raw) - 1), label="place")
    raw[place] ^= data.draw(st.integers(1, 255), label="flip")
    prefix.with_suffix(".idx").write_bytes(raw)
    for index, sample in served(prefix, length).items():
        assert sample is None or sample == truth.get(index), f"sample {index}"


@pytest.mark.slow
@pytest.mark.parametrize("named_by_count", [False, True])
@pytest.mark.parametrize(("sizes", "pieces"), [([20, 20], 4), ([20, 20], 2), ([40], 2)])
def test_no_flip_at_all_is_a_wrong_sample(tmp_path_factory, sizes, pieces, named_by_count):
    """Every flip of every byte that the checks of the header leave open, with every set of shards."""
    for kept in range(1, 2**pieces):
        prefix = tmp_path_factory.mktemp("tokens") / "document"
        write(prefix, sequences_of(*sizes, vocab=250))
        size = prefix.with_suffix(".bin").stat().st_size
        keep = {number for number in range(pieces) if kept >> number & 1}
        shard(prefix, -(-size // pieces), named_by_count=named_by_count, keep=keep)
        index = prefix.with_suffix(".idx")
        raw = index.read_bytes()
        for length in (3, None):
            index.write_bytes(raw)
            truth = served(prefix, length)
            for place in (17, 34 + 4 * (len(sizes) - 1), 35 + 4 * (len(sizes) - 1)):  # the type, the last size
                for flip in range(1, 256):
                    index.write_bytes(raw[:place] + bytes([raw[place] ^ flip]) + raw[place + 1 :])
                    for number, sample in served(prefix, length).items():
                        assert sample is None or sample == truth.get(number), (keep, length, place, flip, number)


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_any_bytes_are_refused_or_read(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("tokens") / "document.idx"
    head = data.draw(st.sampled_from([b"", b"MMIDIDX\0\0", b"MMIDIDX\0\0" + (1).to_bytes(8, "little") + b"\x08"]))
    path.write_bytes(head + data.draw(st.binary(max_size=80)))
    with pytest.raises(LimbeckError):
        read_index(path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda raw: b"", "is empty"),
        (lambda raw: raw[:20], "is truncated: 20 bytes"),
        (lambda raw: raw[:-1], "is truncated"),
        (lambda raw: raw + b"\0", "longer than it says"),
        (lambda raw: b"PK\x03\x04" + raw[4:], "begins with"),
        (lambda raw: raw[:9] + b"\x02" + raw[10:], "version 2"),
        (lambda raw: raw[:17] + b"\x09" + raw[18:], "type code 9"),
        (lambda raw: raw[:37] + b"\xff" + raw[38:], "sequence 0 has -"),
        (lambda raw: raw[:34] + b"\x08" + raw[35:], "sequence 1 begins at byte 18"),
        (lambda raw: raw[:-8] + b"\x01" + raw[-7:], "documents from sequence 0 to 1"),
    ],
)
def test_what_is_no_index(prefix, damage, message):
    index = write(prefix, sequences_of(9, 9, 9)).with_suffix(".idx")
    index.write_bytes(damage(index.read_bytes()))
    with pytest.raises(LimbeckError, match=message):
        MegatronDataset(prefix, 8)


def test_tokens_that_do_not_fit_the_index(prefix):
    tokens = write(prefix, sequences_of(9, 9)).with_suffix(".bin")
    raw = tokens.read_bytes()
    for changed, message in ((raw[:-2], "fewer than its .idx says"), (raw + b"\0\0", "more than its .idx says")):
        tokens.write_bytes(changed)
        with pytest.raises(LimbeckError, match=message):
            MegatronDataset(prefix, 8)
    tokens.unlink()
    with pytest.raises(LimbeckError, match="nor a shard"):
        MegatronDataset(prefix, 8)
    with pytest.raises(LimbeckError, match=r"no file .*absent\.idx"):
        MegatronDataset(prefix.with_name("absent"), 8)


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.float32])
def test_tokens_beyond_the_vocabulary(prefix, dtype):
    write(prefix, [np.arange(9), np.arange(92, 101)], dtype)
    dataset = MegatronDataset(prefix, 8, vocab_size=100)
    assert np.array_equal(dataset[0], np.arange(9))
    with pytest.raises(LimbeckError, match="sample 1 has token 100"):
        dataset[1]


def test_too_few_tokens(prefix):
    write(prefix, sequences_of(5, 3))
    with pytest.raises(LimbeckError, match="8 tokens, fewer than one sample"):
        MegatronDataset(prefix, 8)
    assert describe(prefix, 8)["samples"] == 0


# --- writing ----------------------------------------------------------------------------------------------------------


def test_a_failure_leaves_what_was_there(prefix, tmp_path):
    write(prefix, sequences_of(9))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(LimbeckError, match="do not fit"):
        write(prefix, [[1, 2], [-1]])
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    write(prefix, sequences_of(9, 9))
    assert len(MegatronDataset(prefix, 8)) == 2


@pytest.mark.parametrize(
    ("options", "tokens", "message"),
    [
        ({"dtype": np.uint16}, [70000], "do not fit uint16"),
        ({"dtype": np.uint16}, [-1], "do not fit uint16"),
        ({"dtype": np.int32}, [1.5], "do not fit int32"),
        ({"vocab_size": 10}, [10], "beyond the vocabulary"),
        ({"dtype": np.uint16}, [[1], [2]], "shape"),
        ({"dtype": np.uint16}, ["a"], "type"),
    ],
)
def test_what_cannot_be_written(prefix, options, tokens, message):
    with pytest.raises(LimbeckError, match=message), MegatronWriter(prefix, **options) as writer:
        writer.add(tokens)
    assert not list(prefix.parent.iterdir())


def test_types_follow_the_vocabulary(prefix):
    for vocab_size, dtype in ((2**16, np.uint16), (2**16 + 1, np.int32)):
        with MegatronWriter(prefix, vocab_size=vocab_size) as writer:
            writer.add([vocab_size - 1])
        assert read_index(f"{prefix}.idx").dtype == dtype
    with pytest.raises(LimbeckError, match="cannot hold complex64"):
        MegatronWriter(prefix, np.complex64)


def test_what_names_a_token_file(prefix, tmp_path):
    assert not is_megatron(prefix)
    write(prefix, sequences_of(9))
    assert all(map(is_megatron, (prefix, f"{prefix}.idx", f"{prefix}.bin")))
    assert not is_megatron(tmp_path)
    (tmp_path / "text.txt").write_text("text")
    assert not is_megatron(tmp_path / "text.txt")
