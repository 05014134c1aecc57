"""Checkpoints of a stage: written whole or not at all, verified before they are read, the last few kept.

::

    checkpoints/
      step-00000040/     00000-of-00002.safetensors  00001-of-00002.safetensors  state.json  manifest.json
      step-00000060/
      best-00000050/     the same, of the weights alone

Each process writes the parts it holds into a file of its own (see `shards`), any number of processes reads them. A
folder is written under a temporary name, brought to the disk and then renamed, so whatever stands under its final name
is whole; the manifest (sizes and sha256) catches what happens to it afterwards. A folder that is torn, or that another
stage or run wrote, is passed over with a line that says why. docs/checkpoints.md describes it for people.
"""

import dataclasses
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from limbeck.errors import LimbeckError
from limbeck.progress import say
from limbeck.training.distributed import World, process_seed
from limbeck.training.shards import SavedTensors, own_shards, write_shards
from limbeck.training.store import Store, TrainingState, read_contents, read_state, temporary
from limbeck.training.update import Companion, OutOfMemory
from limbeck.training.weights import (
    MODEL,
    OPTIMIZER,
    group_names,
    learned_tensors,
    load_learned,
    load_optimizer,
    load_tensors,
    optimizer_tensors,
    tensors_of,
)

COMPANION = "companion/"


@dataclass(frozen=True)
class _Pending:
    """A checkpoint that is being written; `files` is this process's part of the manifest, or what went wrong."""

    path: Path
    contents: dict[str, Any]
    files: Future[dict[str, Any] | str]


class Checkpoints:
    """The checkpoints of one stage of one run. Of several processes, all call the same methods in the same order.

    Args:
        directory: Where they lie, on a file system that all processes share; made on the first save.
        stage: The stage's name; a checkpoint of another stage is passed over.
        fingerprint: What tells this run from others (recipe, teacher, data); one of another run is passed over.
        world: The processes that train together; by default this one alone.
        keep: How many to keep.
        keep_for_good: Steps, by their number, whose checkpoints are written and kept beside those.
        asynchronous: Whether a save only copies to the host's memory, and the file is written while training goes on.
        say: Takes the lines that tell what was passed over.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        stage: str,
        fingerprint: str = "",
        world: World | None = None,
        keep: int = 2,
        keep_for_good: Callable[[int], bool] = lambda step: False,
        asynchronous: bool = False,
        say: Callable[[str], None] = say,
    ):
        self.directory, self.world, self.asynchronous = Path(directory), world or World.alone(), asynchronous
        self.keep_for_good, self._say = keep_for_good, say
        self._store = Store(self.directory, stage, fingerprint, keep, keep_for_good)
        self._pending: _Pending | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Commit what is still being written; not where another process may be in the middle of something else."""
        if error is None or self.world.size == 1 or isinstance(error, OutOfMemory):
            self.commit()

    # --- writing ------------------------------------------------------------------------------------------------------

    def save(
        self,
        state: TrainingState,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        companion: Companion | None = None,
        scaler: torch.amp.GradScaler | None = None,
    ) -> Path:
        """Write the checkpoint of `state`, then remove those that are no longer wanted.

        With `asynchronous` it is there only after `commit`.

        Returns:
            The new folder.

        Raises:
            LimbeckError: It could not be written, as on a full disk. Those before are as they were.
        """
        tensors = _named(MODEL, learned_tensors(module)) | optimizer_tensors(module, optimizer, OPTIMIZER)
        contents: dict[str, Any] = {"optimizer": group_names(module, optimizer), "companion": None, "scaler": None}
        if companion and companion.module and companion.optimizer:
            tensors |= _named(COMPANION + MODEL, tensors_of(companion.module))
            tensors |= optimizer_tensors(companion.module, companion.optimizer, COMPANION + OPTIMIZER)
            contents["companion"] = group_names(companion.module, companion.optimizer)
        if scaler:
            contents["scaler"] = scaler.state_dict()
        path = self.directory / f"step-{state.step:08d}"
        self._write(path, state, tensors, contents)
        return path

    def save_best(self, state: TrainingState, module: nn.Module) -> Path:
        """Write the weights alone, as the best so far; `state.best_step` is their step.

        The previous best stays until no kept checkpoint speaks of it.
        """
        path = self.best_path(state)
        assert path is not None
        self._write(path, state, _named(MODEL, learned_tensors(module)), {})
        return path

    def running(self) -> bool:
        """Whether this process is still writing in the background."""
        return self._pending is not None and not self._pending.files.done()

    def commit(self) -> None:
        """Wait until all processes have written what was saved last, and give it its name; nothing to do is no error.

        Raises:
            LimbeckError: One of them could not write; then all raise it.
        """
        pending, self._pending = self._pending, None
        if pending is None:
            return
        written = self.world.gather(pending.files.result())
        self.world.first(lambda: self._store.publish(pending.path, pending.contents, written))

    def commit_if_written(self) -> None:
        """Commit what was saved last, once all processes have written it; to be called after every update."""
        if self._pending is not None and not self.world.agree([self.running()])[0]:
            self.commit()

    def _write(self, path: Path, state: TrainingState, tensors: dict[str, Tensor], contents: dict[str, Any]) -> None:
        """Begin to write a checkpoint; unless asynchronous, end it too."""
        self.commit()
        contents = {"state": dataclasses.asdict(state), "processes": self.world.size, **contents}
        self.world.first(lambda: self._store.begin(path))
        shards = own_shards(tensors, self.world, copy=self.asynchronous)
        shards |= own_shards(_random_state(self.world), World.alone(), copy=False)

        def write() -> dict[str, Any] | str:
            try:
                return write_shards(temporary(path), shards, self.world.rank, self.world.size)
            except (OSError, SafetensorError) as error:  # safetensors has its own for what the disk says
                return str(error)

        writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending = _Pending(path, contents, writer.submit(write))
        writer.shutdown(wait=False)
        if not self.asynchronous:
            self.commit()

    # --- reading ------------------------------------------------------------------------------------------------------

    def best_path(self, state: TrainingState) -> Path | None:
        """Return the folder of the best weights that `state` speaks of."""
        return self._store.best_path(state)

    def latest(self) -> Path | None:
        """Return the newest checkpoint that is whole and ours; say why newer ones were passed over."""
        for name in self.world.share([path.name for path in reversed(self._store.found("step"))]):
            path = self.directory / name
            problem = self.problem(path)
            if not problem:
                return path
            self._say(f"passing over checkpoint {path}: {problem}")
            self._store.passed_over.add(path)
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

        It may have been written by another number of processes, and with parameters that were sharded otherwise. A
        process that there was not then seeds its generators from their seed and the step.

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
        self.commit()
        path = self.latest()
        if path is None:
            return None
        state, contents = read_state(path), read_contents(path)
        prepare(state.step)
        saved = SavedTensors(path)
        load_learned(module, path)
        load_optimizer(saved, module, optimizer, OPTIMIZER, contents["optimizer"])
        if companion and companion.module and companion.optimizer:
            if contents["companion"] is None:
                raise LimbeckError(
                    f"the checkpoint {path} has no {companion.name} that learns alongside",
                    expected="a checkpoint of a run in which the same models learned",
                    hint="start without it, or from a checkpoint that has one",
                )
            load_tensors(saved, tensors_of(companion.module), COMPANION + MODEL)
            load_optimizer(saved, companion.module, companion.optimizer, COMPANION + OPTIMIZER, contents["companion"])
        if scaler and contents["scaler"]:
            scaler.load_state_dict(contents["scaler"])
        _set_random_state(saved, self.world, state.step)
        self.world.first(self._store.clean_up)
        return state

    def problem(self, path: Path) -> str:
        """Say what is wrong with a checkpoint of this stage and run; empty when nothing is.

        The files are dealt out to the processes, each of which reads its share of the bytes.
        """
        shares = self.world.gather(self._store.problem(path, self.world.rank, self.world.size))
        return next(filter(None, shares), "")


def _named(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def _random_state(world: World) -> dict[str, Tensor]:
    """The states of this process's random generators, under its rank."""
    states = {f"rng/{world.rank}/cpu": torch.get_rng_state()}
    if world.device.type == "cuda":
        states[f"rng/{world.rank}/cuda"] = torch.cuda.get_rng_state(world.device)
    return states


def _set_random_state(saved: SavedTensors, world: World, step: int) -> None:
    states = {name: state for name, state in _random_state(world).items() if name in saved.specs}
    if not states:
        torch.manual_seed(process_seed(torch.initial_seed(), step))
        return
    saved.read(states)
    for name, state in states.items():
        if name.endswith("cuda"):
            torch.cuda.set_rng_state(state, world.device)
        else:
            torch.set_rng_state(state)
