"""metrics.jsonl: one JSON object a line, for every update and every evaluation of a run, all stages in one file.

A line of an update holds ``stage, step, tokens, loss``, the named terms, ``lr, grad_norm, time, tokens_per_second``; a
line of an evaluation ``stage, step, tokens``, the figures with ``eval_`` before them, and ``time``. `step` and `tokens`
count what is done. Before its first update a stage may have a line with ``reference_untrained, reference_perfect``, its
loss on the first batch and a perfect one. `TIME_FIELDS` apart, a resumed run writes the same bytes as one never
interrupted.
"""

import json
import math
import os
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from limbeck.errors import LimbeckError
from limbeck.progress import PlainProgress
from limbeck.training.distributed import World
from limbeck.training.guards import Guard
from limbeck.training.trackers import Trackers

TIME_FIELDS = ("time", "tokens_per_second")
SHOWN_TERMS = 4  # of a line of progress; metrics.jsonl has them all


class MetricsLog:
    """Appends lines to a metrics file, and cuts off those that a resumed run will write again.

    Args:
        path: The file; it is made when missing.
        trackers: Are handed every line that is written.
    """

    def __init__(self, path: str | os.PathLike[str], trackers: Trackers | None = None):
        self.path, self._trackers = Path(path), trackers
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("ab")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the file."""
        self.close()

    def write(self, lines: list[dict[str, Any]]) -> None:
        """Append lines and hand them to the operating system; a number that is not finite is written as null."""
        text = "".join(json.dumps({key: _finite(value) for key, value in line.items()}) + "\n" for line in lines)
        self._file.write(text.encode())
        self._file.flush()
        if self._trackers:
            self._trackers.take(lines)

    def sync(self) -> int:
        """Bring all lines to the disk and return the length of the file in bytes."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return self.path.stat().st_size

    def cut(self, length: int) -> bool:
        """Drop everything behind byte `length`, the value `sync` gave.

        Returns:
            False when the file is shorter than that: lines have been lost since.
        """
        held = self.path.stat().st_size
        self._file.truncate(min(length, held))
        return held >= length

    def start_of(self, stage: str) -> int:
        """Return the byte at which the lines of `stage` start; without any, the end of the last whole line."""
        position = 0
        with self.path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if not line.endswith(b"\n"):
                    break
                try:
                    found = json.loads(line)["stage"]
                except (ValueError, KeyError, TypeError):
                    raise LimbeckError(
                        f"{self.path}, line {number}: {line[:60].decode(errors='replace')!r}",
                        expected='a JSON object with "stage", as every line of a run has',
                        hint="move the file away to start a new one",
                    ) from None
                if found == stage:
                    break
                position += len(line)
        return position

    def close(self) -> None:
        """Close the file; a closed log takes no more lines."""
        self._file.close()


class Recorder:
    """Keeps the figures of the last updates on the device; `flush` fetches, judges, writes and shows them together.

    Args:
        stage: The stage's name.
        metrics: Where lines go; None on all processes but the one that writes.
        tokens_per_step: For tokens per second.
        progress: Where the newest figures are shown.
        world: The processes whose figures are averaged, by default this one; they flush at the same steps.
        guard: Judges the figures of every update.
    """

    def __init__(
        self,
        stage: str,
        metrics: MetricsLog | None,
        tokens_per_step: int,
        progress: PlainProgress,
        world: World | None = None,
        guard: Guard | None = None,
    ):
        self.stage, self.metrics, self.tokens_per_step, self.progress = stage, metrics, tokens_per_step, progress
        self.world, self.guard = world or World.alone(), guard
        self._references: dict[str, float | None] | None = None
        self._waiting: list[tuple[dict[str, Any], dict[str, Tensor], dict[str, Any]]] = []
        self.restart_clock()

    def restart_clock(self) -> None:
        """Leave what was not training (evaluation, saving) out of the tokens per second."""
        assert not self._waiting
        self._clock = time.monotonic()

    def waited(self) -> float:
        """Seconds since the last flush."""
        return time.monotonic() - self._clock

    def perfect(self, loss: float | None) -> None:
        """Take the loss of a perfect student on the first batch; that of the untrained one is the first update's."""
        self._references = {"reference_perfect": loss}

    def record(self, step: int, tokens: int, lr: float, figures: dict[str, Tensor]) -> None:
        """Take the figures of one update, scalar tensors, without reading them."""
        head = {"stage": self.stage, "step": step, "tokens": tokens}
        self._waiting.append((head, figures, {"lr": lr, "time": time.time()}))

    def flush(self) -> None:
        """Write a line for every update taken since; stop where the guard does."""
        if not self._waiting:
            return
        waiting, self._waiting = self._waiting, []
        own = torch.stack([value.double() for _, figures, _ in waiting for value in figures.values()])
        values = iter(self.world.mean(own).tolist())
        speed = self.tokens_per_step * len(waiting) / max(self.waited(), 1e-9)
        self.restart_clock()
        lines: list[dict[str, Any]] = []
        try:
            for head, figures, tail in waiting:
                numbers = {name: next(values) for name in figures}
                if self._references is not None:
                    first = {"stage": self.stage, "step": 0, "reference_untrained": numbers["loss"]}
                    lines.append(first | self._references)
                    self._references = None
                lines.append(head | numbers | tail | {"tokens_per_second": speed})
                if self.guard:
                    self.guard.see(head["step"], numbers)
        finally:
            self._write(lines)
        newest = lines[-1]
        shown = {name: newest[name] for name in list(waiting[-1][1])[:SHOWN_TERMS]}
        self.progress.update(newest["step"], shown | {"lr": newest["lr"], "tokens/s": speed})

    def evaluation(self, step: int, tokens: int, figures: dict[str, float]) -> None:
        """Write and show the figures of an evaluation."""
        line: dict[str, Any] = {"stage": self.stage, "step": step, "tokens": tokens}
        line |= {f"eval_{name}": value for name, value in figures.items()}
        self._write([line | {"time": time.time()}])
        shown = "  ".join(f"{name} {value:.4g}" for name, value in figures.items())
        self.progress.note(f"{self.stage} {step}: held-out {shown}")

    def _write(self, lines: list[dict[str, Any]]) -> None:
        if self.metrics is not None:
            self.metrics.write(lines)


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Read a metrics file; a last line that a crash tore is left out."""
    with Path(path).open("rb") as lines:
        return [json.loads(line) for line in lines if line.endswith(b"\n")]


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
