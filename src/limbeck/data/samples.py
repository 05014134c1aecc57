"""What every source of samples is: something with a length, whose items are the tokens of one sample."""

from pathlib import Path
from typing import Protocol

import numpy as np

from limbeck.errors import LimbeckError

REPAIR = "put it back; the same command then goes on from the last checkpoint"

PADDING, CONTEXT, LEARNED = 0, 1, 2
"""What a token of a sample with roles is there for."""


class Samples(Protocol):
    """Anything with a length whose items are tokens (l + 1,), or tokens and their roles (2, l + 1); see `collate`."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> np.ndarray: ...


def still_whole(path: Path, size: int) -> None:
    """Make sure that a mapped file has not shrunk: what reads behind the end of one is killed by the system.

    Raises:
        LimbeckError: It has, or it is gone.
    """
    try:
        found = path.stat().st_size
    except OSError as error:
        raise LimbeckError(f"{path} is gone: {error.strerror}", "the file as it was opened", REPAIR) from None
    if found < size:
        raise LimbeckError(f"{path} shrank from {size} bytes to {found}", "the file as it was opened", REPAIR)


class Part:
    """A run of another source's samples.

    Args:
        samples: The source.
        start: The first sample of the part.
        stop: The one after its last.
    """

    def __init__(self, samples: Samples, start: int, stop: int):
        assert 0 <= start < stop <= len(samples)
        self.samples, self.start, self.stop = samples, start, stop

    def __len__(self) -> int:
        """Count the samples."""
        return self.stop - self.start

    def __getitem__(self, index: int) -> np.ndarray:
        """Give sample ``index`` of the part."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        return self.samples[self.start + index]


def split_samples(samples: Samples, held_out_fraction: float) -> tuple[Samples, Samples]:
    """Hold out the last samples.

    Args:
        samples: Any source.
        held_out_fraction: Part of the samples to hold out, at least one.

    Returns:
        The samples to train on, and those held out.

    Raises:
        LimbeckError: One of the two parts would be empty.
    """
    count = len(samples)
    held_out = max(1, round(count * held_out_fraction))
    if not 0.0 < held_out_fraction < 1.0 or held_out >= count:
        raise LimbeckError(
            f"{held_out_fraction} of {count} samples to hold out",
            expected="at least one sample to train on and one to hold out",
            hint="more text, or a smaller data.sequence_length",
        )
    return Part(samples, 0, count - held_out), Part(samples, count - held_out, count)
