"""Checkpoints of a stage: written whole or not at all, verified before they are read, the last few kept.

::

    checkpoints/
      step-00000040/     weights.safetensors  optimizer.pt  rng.pt  state.json  manifest.json
      step-00000060/
      best-00000050/     weights.safetensors  state.json  manifest.json

`weights.safetensors` holds what learns and the persistent buffers, under the step module's own names. Beside it lie
`companion.safetensors` and `companion.pt` while a second model learns alongside, and `scaler.pt` in float16. A folder
is written under a temporary name, brought to the disk and then renamed, so whatever stands under its final name is
whole; the manifest (sizes and sha256) catches what happens to it afterwards. A folder that is torn, or that another
stage or run wrote, is passed over with a line that says why.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from limbeck.progress import say
from limbeck.training.update import Companion
from limbeck.training.weights import learned_tensors, load_learned, load_optimizer, load_tensors, tensors_of

FORMAT = "limbeck-checkpoint-1"


@dataclass(frozen=True)
class TrainingState:
    """Where a stage stands: everything of a checkpoint that is not a tensor.

    Attributes:
        step: Updates done.
        tokens: Tokens seen.
        metrics_bytes: Length of metrics.jsonl at that moment.
        best_step: Step of the best evaluation so far.
        best_loss: Its loss.
    """

    step: int = 0
    tokens: int = 0
    metrics_bytes: int = 0
    best_step: int | None = None
    best_loss: float | None = None


class Checkpoints:
    """The checkpoints of one stage of one run.

    Args:
        directory: Where they lie; made on the first save.
        stage: The stage's name; a checkpoint of another stage is passed over.
        fingerprint: What tells this run from others (recipe, teacher, data); one of another run is passed over.
        keep: How many to keep.
        keep_for_good: Steps, by their number, whose checkpoints are written and kept beside those.
        say: Takes the lines that tell what was passed over.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        stage: str,
        fingerprint: str = "",
        keep: int = 2,
        keep_for_good: Callable[[int], bool] = lambda step: False,
        say: Callable[[str], None] = say,
    ):
        assert keep >= 1, keep
        self.directory, self.stage, self.fingerprint, self.keep = Path(directory), stage, fingerprint, keep
        self.keep_for_good = keep_for_good
        self._say = say
        self._passed_over: set[Path] = set()

    def save(
        self,
        state: TrainingState,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        companion: Companion | None = None,
        scaler: torch.amp.GradScaler | None = None,
    ) -> Path:
        """Write the checkpoint of `state`, then remove those that are no longer wanted.

        Returns:
            The new folder.
        """
        path = self.directory / f"step-{state.step:08d}"
        with self._folder(path, state) as folder:
            save_file(learned_tensors(module), folder / "weights.safetensors")
            torch.save(optimizer.state_dict(), folder / "optimizer.pt")
            torch.save(_random_state(), folder / "rng.pt")
            if companion and companion.module and companion.optimizer:
                save_file(tensors_of(companion.module), folder / "companion.safetensors")
                torch.save(companion.optimizer.state_dict(), folder / "companion.pt")
            if scaler:
                torch.save(scaler.state_dict(), folder / "scaler.pt")
        self._passed_over.discard(path)
        self._prune()
        return path

    def save_best(self, state: TrainingState, module: nn.Module) -> Path:
        """Write the weights alone, as the best so far; `state.best_step` is their step.

        The previous best stays until no kept checkpoint speaks of it.
        """
        path = self.best_path(state)
        assert path is not None
        with self._folder(path, state) as folder:
            save_file(learned_tensors(module), folder / "weights.safetensors")
        return path

    def best_path(self, state: TrainingState) -> Path | None:
        """Return the folder of the best weights that `state` speaks of."""
        return None if state.best_step is None else self.directory / f"best-{state.best_step:08d}"

    def latest(self) -> Path | None:
        """Return the newest checkpoint that is whole and ours; say why newer ones were passed over."""
        for path in sorted(self._found("step"), reverse=True):
            problem = self.problem(path)
            if not problem:
                return path
            self._say(f"passing over checkpoint {path}: {problem}")
            self._passed_over.add(path)
        return None

    def restore(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        companion: Companion | None = None,
        scaler: torch.amp.GradScaler | None = None,
        *,
        prepare: Callable[[int], None] = lambda step: None,
    ) -> TrainingState | None:
        """Load the newest good checkpoint into what was saved, and into torch's random generators.

        Args:
            module: The step module.
            optimizer: Its optimiser.
            companion: What learns alongside, if anything does.
            scaler: Of the loss, in float16.
            prepare: Called with the checkpoint's step before anything is loaded.

        Returns:
            Where it stands, or None when there is none (then nothing was touched).

        Raises:
            LimbeckError: The checkpoint is whole and of this run, but does not fit the module or the optimiser.
        """
        path = self.latest()
        if path is None:
            return None
        state = read_state(path)
        prepare(state.step)
        load_learned(module, path)
        load_optimizer(path / "optimizer.pt", optimizer)
        if companion and companion.module and companion.optimizer:
            load_tensors(path, "companion.safetensors", companion.module, tensors_of(companion.module))
            load_optimizer(path / "companion.pt", companion.optimizer)
        if scaler and (path / "scaler.pt").is_file():
            scaler.load_state_dict(torch.load(path / "scaler.pt", map_location="cpu", weights_only=True))
        _set_random_state(torch.load(path / "rng.pt", map_location="cpu", weights_only=True))
        self._remove_leftovers()  # of a save that was cut off, also between its new name and the end of its clean-up
        self._prune()
        return state

    def _found(self, kind: str) -> list[Path]:
        if not self.directory.is_dir():
            return []
        return [path for path in self.directory.iterdir() if re.fullmatch(rf"{kind}-\d{{8,}}", path.name)]

    def problem(self, path: Path) -> str:
        """Say what is wrong with a checkpoint of this stage and run; empty when nothing is."""
        try:
            manifest = json.loads((path / "manifest.json").read_bytes())
            if manifest["format"] != FORMAT:
                return f"its format is {manifest['format']!r}, not {FORMAT!r}"
            for name, expected in manifest["files"].items():
                size = (path / name).stat().st_size
                if size != expected["size"]:
                    return f"{name} has {size} bytes where {expected['size']} were written"
                if _sha256(path / name) != expected["sha256"]:
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
    def _folder(self, path: Path, state: TrainingState) -> Iterator[Path]:
        """Yield a temporary folder that becomes `path`, with state and manifest, when the block ends well."""
        self.directory.mkdir(parents=True, exist_ok=True)
        self._remove_leftovers()
        folder = self.directory / f".writing-{path.name}"
        folder.mkdir()
        try:
            yield folder
            (folder / "state.json").write_text(json.dumps(dataclasses.asdict(state)))
            files = {
                file.name: {"size": file.stat().st_size, "sha256": _sha256(file)} for file in sorted(folder.iterdir())
            }
            manifest = {"format": FORMAT, "stage": self.stage, "fingerprint": self.fingerprint, "files": files}
            (folder / "manifest.json").write_text(json.dumps(manifest, indent=1))
            for file in folder.iterdir():
                _sync(file)
            _sync(folder)
            if path.exists():  # one that was passed over, or a best that is written again after a resume
                path.rename(self.directory / f".old-{path.name}")
            folder.rename(path)
            _sync(self.directory)
        finally:
            self._remove_leftovers()

    def _remove_leftovers(self) -> None:
        for pattern in (".writing-*", ".old-*"):
            for path in self.directory.glob(pattern):
                shutil.rmtree(path)

    def _prune(self) -> None:
        """Keep our newest checkpoints, those for good, and the best weights they speak of; leave others' alone."""
        ours = sorted(path for path in self._found("step") if path not in self._passed_over)
        kept = ours[-self.keep :] + [path for path in ours if self.keep_for_good(int(path.name.rpartition("-")[2]))]
        wanted: set[Path | None] = set()
        for path in kept:
            with contextlib.suppress(OSError, ValueError, TypeError):  # an older one may be torn: it was not needed yet
                wanted.add(self.best_path(read_state(path)))
        for path in [*ours, *self._found("best")]:
            if path not in kept and path not in wanted:
                shutil.rmtree(path)


def _random_state() -> dict[str, Any]:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def _set_random_state(saved: dict[str, Any]) -> None:
    torch.set_rng_state(saved["cpu"])
    if saved["cuda"] and len(saved["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(saved["cuda"])


def read_state(path: Path) -> TrainingState:
    """Return where a checkpoint stands."""
    return TrainingState(**json.loads((path / "state.json").read_bytes()))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    """Bring a file or a folder's list of names to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
