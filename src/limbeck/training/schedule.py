"""Learning rates as pure functions of the step: warm-up–stable–decay, cosine with a floor, constant.

`step` counts the updates already done, so the first update runs at ``schedule(0)`` and the last one at
``schedule(total - 1)``. All lengths are in updates. One rule holds everywhere: the rate never goes under `floor`,
warm-up included. MOHAWK trains with `wsd` (METHODS 2), CALD with `cosine` (METHODS 3).
"""

import math
from dataclasses import dataclass

from limbeck.errors import LimbeckError, unknown

KINDS = ("wsd", "cosine", "constant")


def wsd(step: int, *, total: int, warmup: int, decay: int, peak: float, floor: float = 0.0) -> float:
    """Warm-up–stable–decay: linear from 0 to `peak`, level, then linear down so that step `total` would be 0.

    Args:
        step: Updates already done.
        total: Updates in all.
        warmup: Updates of the rise; step `warmup` is the first at `peak`.
        decay: Updates of the fall; step ``total - decay`` is the last at `peak`.
        peak: The highest rate.
        floor: The rate never goes under this.
    """
    if step < warmup:
        return max(peak * (step / warmup), floor)
    if step >= total - decay:
        return max(peak * (max(total - step, 0) / max(decay, 1)), floor)
    return peak


def cosine(step: int, *, decay_steps: int, warmup: int, peak: float, floor: float = 0.0) -> float:
    """Linear warm-up, then half a cosine from `peak` at step `warmup` to 0 at step `decay_steps`, never under `floor`.

    The length of the cosine is its own number, not the number of updates of the run (METHODS 3: 12000 for 11440).

    Args:
        step: Updates already done.
        decay_steps: The step, counted from the start of the run, at which the cosine is 0; it stays 0 afterwards.
        warmup: Updates of the rise.
        peak: The highest rate.
        floor: The rate never goes under this, in warm-up neither.
    """
    if step < warmup:
        return max(peak * (step / warmup), floor)
    progress = min((step - warmup) / max(decay_steps - warmup, 1), 1.0)
    return max(peak * (0.5 * (1.0 + math.cos(math.pi * progress))), floor)


def constant(step: int, *, warmup: int, peak: float, floor: float = 0.0) -> float:
    """Linear warm-up, then `peak` for ever."""
    return max(peak * (step / warmup), floor) if step < warmup else peak


@dataclass(frozen=True)
class Schedule:
    """A schedule with its numbers filled in; calling it with the updates already done gives the learning rate.

    Attributes:
        kind: One of `KINDS`.
        peak: The highest rate.
        total_steps: Updates of the stage.
        warmup_steps: Updates of the linear rise.
        decay_steps: ``wsd``: updates of the fall; ``cosine``: the step at which the cosine is 0; ``constant``: 0.
        floor: The rate never goes under this.
    """

    kind: str
    peak: float
    total_steps: int
    warmup_steps: int
    decay_steps: int
    floor: float = 0.0

    def __call__(self, step: int) -> float:
        """Return the learning rate of the update that follows `step` finished ones."""
        match self.kind:
            case "wsd":
                return wsd(
                    step,
                    total=self.total_steps,
                    warmup=self.warmup_steps,
                    decay=self.decay_steps,
                    peak=self.peak,
                    floor=self.floor,
                )
            case "cosine":
                return cosine(
                    step, decay_steps=self.decay_steps, warmup=self.warmup_steps, peak=self.peak, floor=self.floor
                )
            case _:
                return constant(step, warmup=self.warmup_steps, peak=self.peak, floor=self.floor)


def make_schedule(
    kind: str,
    *,
    total_steps: int,
    peak: float,
    warmup: int | float = 0,
    decay: int | float | None = None,
    floor: float = 0.0,
) -> Schedule:
    """Fill in a schedule; lengths are update counts (int) or fractions (float, rounded down).

    Args:
        kind: ``"wsd"``, ``"cosine"`` or ``"constant"``.
        total_steps: Updates of the stage.
        peak: The highest rate.
        warmup: Length of the rise. A fraction is of `total_steps`, for ``cosine`` of its decay steps (METHODS 3).
        decay: ``wsd``: length of the fall (default 0.1); ``cosine``: the step at which it is 0 (default `total_steps`).
        floor: The rate never goes under this.

    Raises:
        LimbeckError: Unknown kind, a number out of its range, or warm-up and decay that do not fit.
    """
    if kind not in KINDS:
        raise unknown("schedule", kind, KINDS)
    if total_steps < 1 or not peak > 0 or not 0 <= floor <= peak:
        raise LimbeckError(
            f"a schedule over {total_steps} updates with peak {peak} and floor {floor}",
            expected="at least one update, a peak above 0, a floor between 0 and the peak",
        )
    if kind == "wsd":
        decay_steps = _steps("decay", 0.1 if decay is None else decay, total_steps)
        warmup_steps = _steps("warmup", warmup, total_steps)
        fits = warmup_steps + decay_steps <= total_steps
    elif kind == "cosine":
        decay_steps = _steps("decay", total_steps if decay is None else decay, total_steps)
        warmup_steps = _steps("warmup", warmup, decay_steps)
        fits = warmup_steps < decay_steps
    else:
        decay_steps, warmup_steps = 0, _steps("warmup", warmup, total_steps)
        fits = True
    if not fits:
        raise LimbeckError(
            f"a {kind} schedule with {warmup_steps} updates of warm-up and {decay_steps} of decay in {total_steps}",
            expected="warm-up and decay that fit into the stage",
            hint="give them as fractions, such as warmup = 0.1 and decay = 0.1",
        )
    return Schedule(kind, peak, total_steps, warmup_steps, decay_steps, floor)


def _steps(name: str, amount: int | float, total: int) -> int:
    """Turn an update count or a fraction of `total` into an update count."""
    if amount < 0 or (isinstance(amount, float) and amount > 1):
        raise LimbeckError(
            f"{name} = {amount}",
            expected="a count of updates (a whole number) or a fraction between 0.0 and 1.0",
        )
    if isinstance(amount, int):
        return amount
    return math.floor(amount * total + 1e-9)  # 0.29 · 100 is 28.999… in binary; the user means 29
