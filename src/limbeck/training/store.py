"""The folders of checkpoints: made, published, verified and pruned by one process; `checkpoint` fills them."""

import contextlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from limbeck.errors import LimbeckError
from limbeck.files import sha256, sync

FORMAT = "limbeck-checkpoint-2"


@dataclass(frozen=True)
class TrainingState:
    """Where a stage stands: what the loop counts.

    Attributes:
        step: Updates done.
        tokens: Tokens seen.
        metrics_bytes: Length of metrics.jsonl at that moment.
        best_step: Step of the best evaluation so far.
        best_loss: Its loss.
        skipped: Updates that were left out since their gradient was not finite.
        skipped_in_a_row: How many of them were the last ones.
    """

    step: int = 0
    tokens: int = 0
    metrics_bytes: int = 0
    best_step: int | None = None
    best_loss: float | None = None
    skipped: int = 0
    skipped_in_a_row: int = 0


def read_state(path: Path) -> TrainingState:
    """Return where a checkpoint stands."""
    return TrainingState(**read_contents(path)["state"])


def read_contents(path: Path) -> dict[str, Any]:
    """Return all of a checkpoint that is not a tensor."""
    return json.loads((path / "state.json").read_bytes())


def temporary(path: Path) -> Path:
    """Where a checkpoint is written before it gets its name."""
    return path.with_name(f".writing-{path.name}")


class Store:
    """The checkpoints of one stage, as folders.

    Args:
        directory: Where they lie; made on the first save.
        stage: The stage's name.
        fingerprint: What tells this run from others.
        keep: How many to keep.
        keep_for_good: Steps, by their number, whose checkpoints are kept beside those.

    Attributes:
        passed_over: Folders that are not ours, and so are left alone.
    """

    def __init__(self, directory: Path, stage: str, fingerprint: str, keep: int, keep_for_good: Callable[[int], bool]):
        assert keep >= 1, keep
        self.directory, self.stage, self.fingerprint = directory, stage, fingerprint
        self.keep, self.keep_for_good = keep, keep_for_good
        self.passed_over: set[Path] = set()

    def found(self, kind: str) -> list[Path]:
        """Return the folders of a kind, ``step`` or ``best``, the oldest first."""
        if not self.directory.is_dir():
            return []
        return sorted(
            (path for path in self.directory.iterdir() if re.fullmatch(rf"{kind}-\d{{8,}}", path.name)), key=_step_of
        )

    def best_path(self, state: TrainingState) -> Path | None:
        """Return the folder of the best weights that `state` speaks of."""
        return None if state.best_step is None else self.directory / f"best-{state.best_step:08d}"

    def begin(self, path: Path) -> None:
        """Make the folder in which `path` is written."""
        with self._telling(path):
            self.directory.mkdir(parents=True, exist_ok=True)
            sync(self.directory.parent)
            self._remove_leftovers()
            temporary(path).mkdir()

    def publish(self, path: Path, contents: dict[str, Any], written: list[dict[str, Any] | str]) -> None:
        """Write what is not a tensor and the manifest, give the folder its name, remove what is no longer wanted.

        Args:
            path: The new folder.
            contents: What is not a tensor.
            written: Each process's part of the manifest, or in its place what went wrong.
        """
        folder = temporary(path)
        with self._telling(path):
            files: dict[str, Any] = {}
            for part in written:
                if isinstance(part, str):
                    raise OSError(part)
                files |= part
            state = folder / "state.json"
            state.write_text(json.dumps(contents))
            files[state.name] = {"size": state.stat().st_size, "sha256": sha256(state)}
            manifest = {"format": FORMAT, "stage": self.stage, "fingerprint": self.fingerprint, "files": files}
            (folder / "manifest.json").write_text(json.dumps(manifest, indent=1))
            for file in (state, folder / "manifest.json", folder):
                sync(file)
            if path.exists():  # one that was passed over, or a best that is written again after a resume
                path.rename(self.directory / f".old-{path.name}")
            folder.rename(path)
            sync(self.directory)
        self.passed_over.discard(path)
        self._remove_leftovers()
        if path.name.startswith("step"):  # a best is spoken of by no checkpoint as yet
            self._prune()

    def clean_up(self) -> None:
        """Remove what a save that was cut off has left, also between its new name and the end of its clean-up."""
        self._remove_leftovers()
        self._prune()

    def problem(self, path: Path, rank: int = 0, size: int = 1) -> str:
        """Say what is wrong with one of `size` shares of a checkpoint of this stage and run; empty: nothing."""
        try:
            manifest = json.loads((path / "manifest.json").read_bytes())
            if manifest["format"] != FORMAT:
                return f"its format is {manifest['format']!r}, not {FORMAT!r}"
            for name, expected in list(manifest["files"].items())[rank::size]:
                length = (path / name).stat().st_size
                if length != expected["size"]:
                    return f"{name} has {length} bytes where {expected['size']} were written"
                if sha256(path / name) != expected["sha256"]:
                    return f"{name} is not what was written (its sha256 differs)"
        except FileNotFoundError as error:
            return f"{Path(error.filename).name} is missing"
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            return f"its manifest cannot be followed ({type(error).__name__}: {error})"
        if manifest["stage"] != self.stage:
            return f"it belongs to stage {manifest['stage']!r}, not {self.stage!r}"
        if manifest["fingerprint"] != self.fingerprint:
            return "it belongs to another run (other recipe, teacher or data)"
        return ""

    @contextlib.contextmanager
    def _telling(self, path: Path) -> Iterator[None]:
        """Turn what the disk says into an error that tells what to do, and give back what the attempt had taken."""
        try:
            yield
        except OSError as error:
            shutil.rmtree(temporary(path), ignore_errors=True)
            before = max((_step_of(path) for path in self.found("step")), default=0)
            reason = os.strerror(error.errno) if error.errno else error
            raise LimbeckError(
                f"stage {self.stage!r}: the checkpoint {path} could not be written: {reason}",
                expected="room on the disk, and leave to write there",
                hint=f"free space there, then run again: it goes on from step {before}",
            ) from error

    def _remove_leftovers(self) -> None:
        for pattern in (".writing-*", ".old-*"):
            for path in self.directory.glob(pattern):
                shutil.rmtree(path)

    def _prune(self) -> None:
        """Keep our newest checkpoints, those for good, and the best weights they speak of; leave others' alone."""
        ours = [path for path in self.found("step") if path not in self.passed_over]
        kept = ours[-self.keep :] + [path for path in ours if self.keep_for_good(_step_of(path))]
        wanted: set[Path | None] = set()
        for path in kept:
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # an older one may be torn
                wanted.add(self.best_path(read_state(path)))
        for path in [*ours, *self.found("best")]:
            if path not in kept and path not in wanted:
                old = self.directory / f".old-{path.name}"
                path.rename(old)  # so that whatever has its final name is whole at every moment
                shutil.rmtree(old)


def _step_of(path: Path) -> int:
    return int(path.name.rpartition("-")[2])
