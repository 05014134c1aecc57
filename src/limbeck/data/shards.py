"""One large file as its bytes: whole, or as the shards of a plain byte split of which some may be missing."""

import bisect
import mmap
import re
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np

from limbeck.data.samples import still_whole
from limbeck.errors import LimbeckError

SHARD = re.compile(r"-(\d{5})-of-(\d{5})\.bin$")


@dataclass(frozen=True)
class Shard:
    """A part of the file: its name, where it begins and ends, and its bytes if it is here."""

    path: Path
    start: int
    stop: int
    data: np.ndarray | None


class ShardedBytes:
    """The bytes of ``prefix.bin``, memory-mapped, or of ``prefix-00000-of-00020.bin`` and its siblings.

    The number behind "of" may be the last shard's (the Pythia corpus: 21 shards, of-00020) or how many there are. Where
    shards are missing, the places of the others follow from the size that all but the last have in common.

    Args:
        prefix: Path of the file without its ending.
        total: Bytes of the whole file.

    Attributes:
        shards: All shards in order, missing ones too.
        end_is_known: Whether the end of the file is here beyond doubt, which proves `total`.

    Raises:
        LimbeckError: There is no file, or the sizes of those that are there do not fit together.
    """

    def __init__(self, prefix: str | Path, total: int):
        prefix = Path(prefix)
        whole = prefix.with_name(f"{prefix.name}.bin")
        if whole.is_file():
            size = whole.stat().st_size
            if size != total:
                raise LimbeckError(
                    f"{whole} has {size} bytes, {'fewer' if size < total else 'more'} than its .idx says",
                    expected=f"{total} bytes",
                    hint="the file is truncated or belongs to another .idx",
                )
            self.shards, self.end_is_known = [Shard(whole, 0, total, _mapped(whole))], True
        else:
            self.shards, self.end_is_known = _found_shards(prefix, total)
        self._starts = [shard.start for shard in self.shards]

    @property
    def missing(self) -> list[Path]:
        """The shards that are not here."""
        return [shard.path for shard in self.shards if shard.data is None]

    @property
    def leading(self) -> int:
        """Bytes from the start to the first missing shard."""
        return next((shard.start for shard in self.shards if shard.data is None), self.shards[-1].stop)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Give the bytes from `start` to `stop`: a view of one map, or the join of several.

        Raises:
            LimbeckError: A shard that holds some of them is missing, or was lost since.
        """
        place = bisect.bisect_right(self._starts, start) - 1
        shard = self.shards[place]
        if stop <= shard.stop and shard.data is not None:
            still_whole(shard.path, shard.stop - shard.start)
            return shard.data[start - shard.start : stop - shard.start]
        pieces = []
        for shard in self.shards[place:]:
            if shard.start >= stop:
                break
            if shard.data is None:
                raise LimbeckError(
                    f"bytes {start} to {stop} need a shard that is missing: {shard.path}",
                    expected=f"the shard that holds bytes {shard.start} to {shard.stop}",
                    hint="fetch it, or ask for fewer samples (data.max_samples)",
                )
            still_whole(shard.path, shard.stop - shard.start)
            pieces.append(shard.data[max(start - shard.start, 0) : stop - shard.start])
        return np.concatenate(pieces)


def shard_files(prefix: str | Path) -> list[Path]:
    """List the files that hold the bytes of a prefix and are here: ``prefix.bin``, else its shards in order."""
    prefix = Path(prefix)
    whole = prefix.with_name(f"{prefix.name}.bin")
    if whole.is_file():
        return [whole]
    if not prefix.parent.is_dir():
        return []
    names = (file for file in prefix.parent.iterdir() if file.name.startswith(prefix.name))
    return sorted(file for file in names if SHARD.fullmatch(file.name[len(prefix.name) :]))


def _found_shards(prefix: Path, total: int) -> tuple[list[Shard], bool]:
    """Lay out the shards of a file of `total` bytes by those that are here; tell whether its end is surely here."""
    files = shard_files(prefix)
    if not files:
        raise LimbeckError(
            f"neither {prefix}.bin nor a shard such as {prefix.name}-00000-of-00020.bin is there",
            expected=f"the {total} bytes of tokens that {prefix.name}.idx speaks of",
        )
    numbers = [SHARD.search(file.name) for file in files]
    present = {int(found[1]): file.stat().st_size for found, file in zip(numbers, files, strict=True) if found}
    behind_of = {int(found[2]) for found in numbers if found}
    if len(behind_of) > 1:
        raise LimbeckError(f"{files[0].parent} holds shards of {sorted(behind_of)}", expected="one split of the file")
    (named,) = behind_of
    (alone, *more) = present
    if not more and max(1, named - 1) <= alone and present[alone] != total:
        raise LimbeckError(
            f"of the shards of {prefix} only {files[0].name} is here, which may be the last",
            expected="a shard before it: the size of those before the last tells where each begins",
            hint=f"fetch {prefix.name}-00000-of-{named:05d}.bin too",
        )
    sizes = _shard_sizes(present, named, total)
    if sizes is None:
        shown = ", ".join(f"{number:05d}: {size}" for number, size in list(present.items())[:4])
        shown += " …" if len(present) > 4 else ""
        raise LimbeckError(
            f"the shards of {prefix} have sizes ({shown}) that do not make up the file",
            expected=f"equal shards, only the last one of another size, {total} bytes together",
            hint="a shard is truncated, or they belong to another .idx",
        )
    ends = list(accumulate(sizes))
    paths = [prefix.with_name(f"{prefix.name}-{number:05d}-of-{named:05d}.bin") for number in range(len(sizes))]
    shards = [
        Shard(path, end - size, end, _mapped(path) if number in present else None)
        for number, (path, size, end) in enumerate(zip(paths, sizes, ends, strict=True))
    ]
    # Equal shards up to number N - 1 of "of N" may be all of N, or lack the last of N + 1.
    surely_last = max(present) == named or len(set(present.values())) > 1
    return shards, shards[-1].data is not None and surely_last


def _shard_sizes(present: dict[int, int], named: int, total: int) -> list[int] | None:
    """Sizes of all shards, or None where those present cannot be a split of `total` bytes.

    Shards before the last have one size, so that where they begin does not depend on `total`, which only the last
    shard can confirm.
    """
    possible = [last for last in (named, named - 1) if last >= max(present)]  # "of" names the last one, or the count
    for last in possible:
        if len(present) == last + 1 and sum(present.values()) == total:
            return [present[number] for number in range(last + 1)]
    for last in possible:
        others = {size for number, size in present.items() if number < last}
        if len(present) == last + 1 or len(others) != 1:
            continue
        (size,) = others
        rest = total - size * last
        # Some splits put the remainder into the last shard.
        if rest == present[last] if last in present else 0 < rest <= size + last:
            return [size] * last + [rest]
    return None


def _mapped(path: Path) -> np.ndarray:
    """Map a file: its bytes, read-only."""
    with path.open("rb") as file:
        if not path.stat().st_size:
            raise LimbeckError(f"{path} is empty", expected="tokens")
        return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
