"""Trackers: the lines of metrics.jsonl, shown by TensorBoard, Weights & Biases or Trackio while a run goes on.

::

    check_trackers(["wandb"])                                   # before anything is done: are they installed?
    with open_trackers(["wandb"], run / "trackers.json", offsets={"matrix": 0, "logits": 2441}) as trackers:
        trackers.take([{"stage": "matrix", "step": 1, "loss": 3.0}])    # shown as matrix/loss at step 1

Training never waits for a tracker and never fails with one: each has a thread of its own, in which it is opened too.
One that raises, or does not keep up, is told of once and left out; metrics.jsonl has everything.
"""

import importlib
import json
import math
import queue
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any, Protocol, Self

from limbeck.errors import LimbeckError, unknown
from limbeck.files import write_text
from limbeck.progress import say

WAITING = 10_000  # lines that a tracker may lag behind
CLOSING_SECONDS = 60.0
LEFT_OUT = ("stage", "step", "time")


@dataclass(frozen=True)
class TrackedRun:
    """What a tracker is told of the run.

    Attributes:
        folder: The run's folder.
        run_id: Stays the same when the run is resumed.
        name: What people read.
        project: What it is filed under.
        entity: Whose it is, for wandb.
        config: The recipe, plain values.
    """

    folder: Path
    run_id: str
    name: str
    project: str = "limbeck"
    entity: str | None = None
    config: Mapping[str, Any] | None = None


class Tracker(Protocol):
    """One tracker, as it is used here."""

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        """Take numbers; `step` never falls, but for a resume that does some updates again."""

    def close(self) -> None:
        """Send what is left."""


class TensorBoard:
    """Event files in the run's folder, under ``tensorboard/``."""

    def __init__(self, module: ModuleType, run: TrackedRun):
        self._writer = module.SummaryWriter(log_dir=str(run.folder / "tensorboard"))

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        """See `Tracker`."""
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """See `Tracker`."""
        self._writer.close()


class Wandb:
    """Weights & Biases, offline too (``WANDB_MODE=offline``)."""

    def __init__(self, module: ModuleType, run: TrackedRun):
        self._run = module.init(
            project=run.project,
            entity=run.entity,
            name=run.name,
            id=run.run_id,
            resume="allow",
            dir=str(run.folder),
            config=dict(run.config or {}),
        )

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        """See `Tracker`."""
        self._run.log(dict(numbers), step=step)

    def close(self) -> None:
        """See `Tracker`."""
        self._run.finish()


class Trackio:
    """Trackio, which keeps its runs by name: it carries the id, so that two runs of one name stay apart."""

    def __init__(self, module: ModuleType, run: TrackedRun):
        self._run = module.init(
            project=run.project, name=f"{run.name}-{run.run_id}", resume="allow", config=dict(run.config or {})
        )

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        """See `Tracker`."""
        self._run.log(dict(numbers), step=step)

    def close(self) -> None:
        """See `Tracker`."""
        self._run.finish()


TRACKERS: dict[str, tuple[str, Callable[[ModuleType, TrackedRun], Tracker]]] = {
    "tensorboard": ("torch.utils.tensorboard", TensorBoard),
    "wandb": ("wandb", Wandb),
    "trackio": ("trackio", Trackio),
}
"""By name: the module each needs, and how it is opened."""


class Trackers:
    """Several trackers, each in a thread of its own.

    Args:
        names: Of `TRACKERS`.
        run: What they are told of the run.
        offsets: Updates of the stages before each, by its name: steps go on growing from stage to stage.
        note: Takes the line that tells of one that was left out.
    """

    def __init__(
        self,
        names: Sequence[str],
        run: TrackedRun,
        offsets: Mapping[str, int],
        note: Callable[[str], None] = say,
    ):
        self.offsets = offsets
        self._threads = [_Thread(name, run, note) for name in names]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Let each send what is left, for a while."""
        self.close()

    def take(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Hand on lines of metrics.jsonl; what is not a finite number is left out."""
        for line in lines:
            stage, step = line["stage"], self.offsets.get(line["stage"], 0) + line["step"]
            numbers: dict[str, float] = {
                f"{stage}/{name}": value
                for name, value in line.items()
                if name not in LEFT_OUT and isinstance(value, int | float) and math.isfinite(value)
            }
            for thread in self._threads:
                thread.put(numbers, step)

    def close(self, seconds: float = CLOSING_SECONDS) -> None:
        """End all; one that is not done in time is left behind."""
        for thread in self._threads:
            thread.end()
        until = time.monotonic() + seconds
        for thread in self._threads:
            thread.wait_for(until - time.monotonic())


class _Thread(threading.Thread):
    """Opens one tracker, feeds it, and closes it."""

    def __init__(self, name: str, run: TrackedRun, note: Callable[[str], None]):
        super().__init__(name=f"tracker-{name}", daemon=True)  # one that hangs must not keep the program from ending
        self.tracker, self._run, self._note = name, run, note
        self._lines: queue.Queue[tuple[dict[str, float], int] | None] = queue.Queue(WAITING)
        self._out = False
        self.start()

    def run(self) -> None:
        module, make = TRACKERS[self.tracker]
        try:
            tracker = make(importlib.import_module(module), self._run)
            while (item := self._lines.get()) is not None:
                tracker.log(*item)
            tracker.close()
        except Exception as error:  # noqa: BLE001 - somebody else's code and network: no failure there may end a run
            self._leave_out(f"{type(error).__name__}: {error}")

    def put(self, numbers: dict[str, float], step: int) -> None:
        if self._out:
            return
        self._put((numbers, step))

    def end(self) -> None:
        if not self._out:
            self._put(None)

    def wait_for(self, seconds: float) -> None:
        if not self._out:
            self.join(max(0.0, seconds))
            if self.is_alive():
                self._leave_out("it does not come to an end")

    def _put(self, item: tuple[dict[str, float], int] | None) -> None:
        try:
            self._lines.put_nowait(item)
        except queue.Full:
            self._leave_out(f"it is {self._lines.maxsize} lines behind")

    def _leave_out(self, why: str) -> None:
        if self._out:
            return
        self._out = True
        self._note(f"tracker {self.tracker} is left out from now on: {why}. metrics.jsonl has all")


def check_trackers(names: Sequence[str]) -> None:
    """Refuse a tracker that is unknown or not installed, before anything is done.

    Raises:
        LimbeckError: With the command that installs it.
    """
    for name in names:
        if name not in TRACKERS:
            raise unknown("tracker", name, TRACKERS)
        try:
            importlib.import_module(TRACKERS[name][0])
        except ImportError as error:
            raise LimbeckError(
                f"tracker {name!r} cannot be imported: {error}",
                expected=f"the package {name}",
                hint=f"pip install {name}, or 'limbeck[track]' for all of them; or leave it out of tracking.trackers",
            ) from None


def open_trackers(
    names: Sequence[str],
    record: Path,
    *,
    offsets: Mapping[str, int],
    project: str = "limbeck",
    run_name: str | None = None,
    entity: str | None = None,
    config: Mapping[str, Any] | None = None,
    note: Callable[[str], None] = say,
) -> Trackers:
    """Begin to track a run, or go on in the trackers' run that an earlier call began.

    Args:
        names: Of `TRACKERS`; none is allowed.
        record: The file, in the run's folder, that keeps the trackers' id and name of the run.
        offsets: See `Trackers`.
        project: What the run is filed under.
        run_name: What people read; by default the name of the folder. A resumed run keeps the one it began with.
        entity: Whose it is, for wandb.
        config: The recipe, plain values.
        note: See `Trackers`.
    """
    if not names:
        return Trackers((), TrackedRun(record.parent, "", ""), offsets, note)
    if not record.is_file():
        begun = {"id": uuid.uuid4().hex[:8], "name": run_name or record.parent.resolve().name}
        write_text(record, json.dumps(begun, indent=1))
    begun = json.loads(record.read_text(encoding="utf-8"))
    run = TrackedRun(record.parent, begun["id"], begun["name"], project, entity, config)
    return Trackers(names, run, offsets, note)
