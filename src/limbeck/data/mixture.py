"""Several sources with weights, mixed by a rule that needs no state: sample i is a pure function of i."""

from collections.abc import Sequence

import numpy as np

from limbeck.data.samples import Samples
from limbeck.errors import LimbeckError

BLOCK = 4096


class MixedDataset:
    """Samples of several sources in the proportion of their weights, evenly interleaved.

    In every block of 4096 samples each source has its share of places (rounded to whole ones, at least one), spread
    evenly over the block, and gives its samples in its own order. A source that is through begins again; an epoch is as
    long as all sources together.

    Args:
        sources: The sources, with samples of one length.
        weights: How much of each; only their proportion counts.
        max_samples: Samples to serve at most.

    Raises:
        LimbeckError: A weight is not above 0, there is not one weight to a source, or lengths of samples differ.
    """

    def __init__(self, sources: Sequence[Samples], weights: Sequence[float], *, max_samples: int | None = None):
        if not sources or len(sources) != len(weights):
            raise LimbeckError(f"{len(sources)} sources and {len(weights)} weights", expected="one weight to a source")
        if not all(np.isfinite(weight) and weight > 0 for weight in weights):
            raise LimbeckError(f"weights {list(weights)}", expected="numbers above 0")
        if len(sources) > BLOCK:
            raise LimbeckError(f"{len(sources)} sources", expected=f"at most {BLOCK}")
        shapes = [source[0].shape for source in sources]
        if len(set(shapes)) > 1:
            raise LimbeckError(f"samples of shapes {sorted(set(shapes))}", expected="sources of one kind and length")
        self.sources = list(sources)
        self.shares = _shares(weights)
        self._source_of, self._rank = _interleaved(self.shares)
        self._count = sum(map(len, sources)) if max_samples is None else min(max_samples, sum(map(len, sources)))

    def __len__(self) -> int:
        """Count the samples."""
        return self._count

    def __getitem__(self, index: int) -> np.ndarray:
        """Give sample ``index``, from the source whose turn it is."""
        source, place = self.locate(index)
        return self.sources[source][place]

    def locate(self, index: int) -> tuple[int, int]:
        """Tell which source gives sample ``index``, and which of its samples that is."""
        if not 0 <= index < self._count:
            raise IndexError(f"sample {index} of {self._count}")
        block, place = divmod(int(index), BLOCK)
        source = int(self._source_of[place])
        return source, (block * int(self.shares[source]) + int(self._rank[place])) % len(self.sources[source])


def mixed(sources: Sequence[Samples], weights: Sequence[float]) -> Samples:
    """Mix sources; see `MixedDataset`. One alone stays as it is."""
    return MixedDataset(sources, weights) if len(sources) > 1 else sources[0]


def _shares(weights: Sequence[float]) -> np.ndarray:
    """Places of each source in a block (s,): whole, at least 1, together a block; largest remainders are rounded up."""
    exact = np.asarray(weights, np.float64) / sum(weights) * BLOCK
    shares = np.maximum(np.floor(exact), 1).astype(np.int64)
    while shares.sum() != BLOCK:
        if shares.sum() < BLOCK:
            shares[np.argmax(exact - shares)] += 1
        else:
            shares[np.argmax(np.where(shares > 1, shares - exact, -np.inf))] -= 1
    return shares


def _interleaved(shares: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Order a block: the source of each place (BLOCK,), and which of its samples in the block it is (BLOCK,)."""
    sources = np.repeat(np.arange(len(shares)), shares)
    ranks = np.concatenate([np.arange(share) for share in shares])
    ideal = (ranks + 0.5) / shares[sources]  # where the sample would lie if sources came at an even pace
    order = np.lexsort((sources, ideal))
    return sources[order].astype(np.int16), ranks[order]
