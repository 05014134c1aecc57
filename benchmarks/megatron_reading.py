"""Samples at random out of a token file of 1 GB, beside a reader that copies through Python lists.

    python benchmarks/megatron_reading.py            # writes benchmarks/results/megatron_reading.json

The file (Pythia's form: uint16, 2049 tokens to a stored sequence) is made in the folder for temporary files, then
removed. Both readers serve the same 100,000 samples as numpy arrays, and every token of each is added up, so that it
has really been read; the sums are compared. The first reader is `MegatronDataset`, ids checked against the vocabulary.
The second seeks, unpacks its bytes into a list, checks the list, and makes an array of it. Times are of the clock, the
file in the system's cache, least of three rounds that take turns. Memory is what the process alone holds (anonymous
pages): mapped pages of the file are the system's to take back.
"""

import array
import json
import platform
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from limbeck.data import MegatronDataset, MegatronWriter

RESULT = Path(__file__).parent / "results" / "megatron_reading.json"
LENGTH, VOCABULARY, SAMPLES = 2048, 50304, 100_000
SEQUENCES = 10**9 // (2 * (LENGTH + 1)) + 1
ROUNDS = 3


def write(prefix: Path) -> None:
    """Write the file, random tokens."""
    generator = np.random.default_rng(0)
    with MegatronWriter(prefix, vocab_size=VOCABULARY) as writer:
        for _ in range(SEQUENCES):
            writer.add(generator.integers(VOCABULARY, size=LENGTH + 1, dtype=np.uint16))


def mapped(prefix: Path) -> Callable[[int], np.ndarray]:
    """Read with `MegatronDataset`."""
    samples = MegatronDataset(prefix, LENGTH, vocab_size=VOCABULARY)
    assert len(samples) == SEQUENCES
    return samples.__getitem__


def through_lists(prefix: Path) -> Callable[[int], np.ndarray]:
    """Read as a loader in plain Python does."""
    file = prefix.with_suffix(".bin").open("rb")
    size = 2 * (LENGTH + 1)

    def read(index: int) -> np.ndarray:
        file.seek(index * size)
        tokens = array.array("H", file.read(size)).tolist()
        if max(tokens) >= VOCABULARY:
            raise ValueError(f"a token beyond the vocabulary in sample {index}")
        return np.array(tokens)

    return read


def own_bytes() -> int:
    """Bytes of the process that are no mapped file."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no RssAnon in /proc/self/status")


def read_all(read: Callable[[int], np.ndarray], indices: Iterable[int]) -> int:
    """Read all samples and add up their tokens."""
    return sum(int(read(index).sum(dtype=np.int64)) for index in indices)


def main() -> None:
    indices = np.random.default_rng(1).integers(SEQUENCES, size=SAMPLES).tolist()
    with tempfile.TemporaryDirectory() as folder:
        prefix = Path(folder) / "document"
        write(prefix)
        size = prefix.with_suffix(".bin").stat().st_size
        readers = {"limbeck": mapped(prefix), "through_lists": through_lists(prefix)}
        least, sums = dict.fromkeys(readers, float("inf")), dict.fromkeys(readers, 0)
        read_all(readers["limbeck"], range(SEQUENCES))  # brings the file into the system's cache
        for _ in range(ROUNDS):
            for name, read in readers.items():
                start = time.perf_counter()
                sums[name] = read_all(read, indices)
                least[name] = min(least[name], time.perf_counter() - start)
        assert len(set(sums.values())) == 1, sums
        fresh = mapped(prefix)
        read_all(fresh, indices[:1000])
        held = [own_bytes()]
        for part in range(4):
            read_all(fresh, indices[part * SAMPLES // 4 : (part + 1) * SAMPLES // 4])
            held.append(own_bytes())
    result = {
        "machine": {"processor": platform.processor() or platform.machine(), "numpy": np.__version__},
        "file_bytes": size,
        "samples_read": SAMPLES,
        "tokens_in_a_sample": LENGTH + 1,
        "seconds": {name: round(seconds, 2) for name, seconds in least.items()},
        "times_faster": round(least["through_lists"] / least["limbeck"], 1),
        "own_bytes_after_1000_samples": held[0],
        "own_bytes_after_each_quarter_above_that": [value - held[0] for value in held[1:]],
    }
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
