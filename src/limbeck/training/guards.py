"""Guard rails: what a stage's numbers say about its health, and when it has to stop.

A `Guard` sees the figures of every update, averaged over all processes and so the same in each, when they are fetched:
an update that was left out (told, counted, and after too many in a row the end), a loss that jumps up, and a loss that
leaves the curve its recipe expects. Counts are part of every checkpoint; the memory of recent losses is not, so a
resumed run judges jumps again from `ENOUGH` updates on.
"""

import math
import statistics
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from limbeck.errors import LimbeckError
from limbeck.files import replacing
from limbeck.training.distributed import World
from limbeck.training.store import TrainingState
from limbeck.training.update import Batch

RECENT, ENOUGH = 50, 20
DEVIATIONS, PART = 10.0, 0.3
JUDGED = ("matrix_per_layer", "hidden_per_layer", "kl", "loss")

Range = tuple[float, float]


@dataclass(frozen=True)
class Limits:
    """What a stage's numbers are held against.

    Attributes:
        max_nonfinite: After so many updates in a row that are not finite the stage stops.
        start: Least and greatest value that is expected at the first update, of the first of `JUDGED` there is.
        end: The same at the last update.
    """

    max_nonfinite: int = 10
    start: Range | None = None
    end: Range | None = None


class Guard:
    """Watches the figures of one stage.

    Args:
        stage: The stage's name.
        limits: What they are held against.
        total_steps: Updates of the stage.
        note: Takes the lines that tell what was seen.
        keep: Called with the updates done after the one that was one too many; saves its batch and says where.
        state: Where the stage stands: the counts go on from there.
    """

    def __init__(
        self,
        stage: str,
        limits: Limits | None = None,
        *,
        total_steps: int,
        note: Callable[[str], None],
        keep: Callable[[int], str],
        state: TrainingState | None = None,
    ):
        state = state or TrainingState()
        self.stage, self.limits, self.total_steps = stage, limits or Limits(), total_steps
        self.skipped, self.skipped_in_a_row = state.skipped, state.skipped_in_a_row
        self._note, self._keep = note, keep
        self._recent: deque[float] = deque(maxlen=RECENT)
        self._judged: deque[float] = deque(maxlen=RECENT)
        self._spiking = self._left = False
        self._told: set[str] = set()

    def see(self, step: int, numbers: Mapping[str, float]) -> None:
        """Take the figures of the update that made `step`, in order.

        Raises:
            LimbeckError: It is one too many in a row that is not finite. Its batch was saved.
        """
        skipped = bool(numbers.get("skipped"))
        self.skipped += skipped
        if skipped and "loss_scale" in numbers and math.isfinite(numbers["loss"]):
            return  # how float16 finds its loss scale; see `rescale` for the end of that
        if skipped:
            self._count(step, numbers)
            return
        self.skipped_in_a_row = 0
        self._tell_terms(step, numbers)
        self._spike(step, numbers["loss"])
        self._compare(step, numbers)

    def _count(self, step: int, numbers: Mapping[str, float]) -> None:
        """Tell of an update that was left out, and stop at one too many."""
        self.skipped_in_a_row += 1
        found = ", ".join(f"{name} = {value}" for name, value in numbers.items() if not math.isfinite(value))
        if self.skipped_in_a_row < self.limits.max_nonfinite:
            self._note(
                f"{self.stage} {step}: {found}: nothing was learned from this update "
                f"({self.skipped_in_a_row} in a row, {self.skipped} in all)"
            )
            return
        raise LimbeckError(
            f"stage {self.stage!r}, step {step}: {found}, "
            f"the {self.skipped_in_a_row}. update in a row that is not finite; {self._keep(step)}",
            expected=f"finite losses and gradients, or less than engine.max_nonfinite = {self.limits.max_nonfinite} "
            "updates in a row without",
            hint="look at that batch; a lower lr, a longer warmup or a smaller clip. Checkpoints are as they were",
        )

    def _tell_terms(self, step: int, numbers: Mapping[str, float]) -> None:
        """Tell, once, of a figure that is not finite though the loss and its gradient are."""
        for name in [name for name, value in numbers.items() if not math.isfinite(value)]:
            if name not in self._told:
                self._note(f"{self.stage} {step}: {name} = {numbers[name]}, while loss and gradient are finite")
                self._told.add(name)

    def _spike(self, step: int, loss: float) -> None:
        """Tell of a loss far above those before it: by many median deviations, and by a good part of the median."""
        if len(self._recent) >= ENOUGH:
            median = statistics.median(self._recent)
            deviation = statistics.median(abs(value - median) for value in self._recent)
            high = loss > median + max(DEVIATIONS * deviation, PART * abs(median))
            if high and not self._spiking:
                self._note(f"{self.stage} {step}: loss {loss:.4g} jumps above the recent median, {median:.4g}")
            self._spiking = high
        self._recent.append(loss)

    def _compare(self, step: int, numbers: Mapping[str, float]) -> None:
        """Tell, once, that the loss is not where the recipe expects it.

        The first and the last update are held against their own ranges, the median of recent ones against both
        together: how a loss falls from one to the other, a recipe does not say.
        """
        name = next(name for name in JUDGED if name in numbers)
        if not math.isfinite(numbers[name]):
            return
        self._judged.append(numbers[name])
        start, end = self.limits.start, self.limits.end
        value, where = numbers[name], ""
        if step == 1 and start:
            (low, high), where = start, "the first update"
        elif step == self.total_steps and end:
            (low, high), where = end, "the last update"
        else:
            value, where = statistics.median(self._judged), "recent updates"
            low = min(start[0], end[0]) if start and end else end[0] if end else -math.inf
            high = max(start[1], end[1]) if start and end else start[1] if start else math.inf
        if not self._left and not low <= value <= high:
            self._left = True
            self._note(
                f"{self.stage} {step}: {name} of {where} is {value:.4g}; the recipe expects {low:.4g} to {high:.4g}"
            )


def keep_batch(folder: Path, stage: str, step: int, batch: Sequence[Batch], world: World) -> str:
    """Save the micro-batches of all processes in one file for inspection, and say where it lies.

    Args:
        folder: Where the file goes, by rank 0.
        stage: The stage's name.
        step: Updates done with it.
        batch: The micro-batches of this process.
        world: The processes; all call this at once.

    Returns:
        What became of it, for an error.
    """
    parts = [
        part
        for parts in world.gather([{key: value.cpu() for key, value in part.items()} for part in batch])
        for part in parts
    ]
    path = folder / f"nonfinite-{stage}-{step}.safetensors"

    def write() -> str:
        whole = {key: torch.cat([part[key] for part in parts]).contiguous() for key in parts[0]}
        try:
            with replacing(path) as temporary:
                save_file(whole, temporary)
        except (OSError, SafetensorError) as error:
            return f"its batch could not be saved: {error}"
        return f"its batch is in {path}"

    return world.first(write)
