"""The training loop of one stage.

::

    with MetricsLog(run / "metrics.jsonl") as metrics:
        result = train_stage(
            step_module, optimizer,
            stage="matrix", batches=batches, schedule=schedule, total_steps=2441, tokens_per_step=2**15,
            metrics=metrics, checkpoints=Checkpoints(folder, stage="matrix", fingerprint=run_id),
            checkpoint_every=100, evaluate=evaluate, eval_every=200, clip=1.0, device="cuda", autocast=torch.bfloat16,
        )
    if result.best_path is not None:
        load_learned(step_module, result.best_path)

Each turn does the things of "once in a while" that are due (evaluate, save, stop), then one update. A run killed at any
moment and started again with the same arguments ends, on a CPU, with the same bits. A finished stage is not to be run
again once later stages have written metrics: their lines would be cut off. Of several processes each calls it with its
own micro-batches; whatever one of them decides by itself (a signal, a lack of memory) they agree on once an update.
"""

import contextlib
import math
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType

import torch
from torch import nn

from limbeck.errors import LimbeckError
from limbeck.progress import PlainProgress, make_progress, say
from limbeck.training.checkpoint import Checkpoints
from limbeck.training.distributed import World, process_seed
from limbeck.training.guards import Guard, Limits, keep_batch
from limbeck.training.parallel import Replicas, settle
from limbeck.training.store import TrainingState
from limbeck.training.tracking import MetricsLog, Recorder
from limbeck.training.update import Batch, Companion, accumulate, agree, apply, rescale, wake

FLUSH_SECONDS = 5.0
SAME_SIGNAL_SECONDS = 5.0


@dataclass(frozen=True)
class StageResult:
    """How a stage ended.

    Attributes:
        steps: Updates done, always the total.
        tokens: Tokens seen.
        resumed_from: The step of the checkpoint this call started at, or None.
        best_step: Step of the best evaluation, or None without evaluation.
        best_loss: Its loss.
        best_path: The folder with its weights, for `load_learned`.
    """

    steps: int
    tokens: int
    resumed_from: int | None
    best_step: int | None
    best_loss: float | None
    best_path: Path | None


class TrainingInterrupted(SystemExit):
    """A signal asked to stop and the state was saved; it ends the program with code 128 + the signal's number."""

    def __init__(self, signal_number: int, step: int):
        self.signal_number, self.step = signal_number, step
        super().__init__(128 + signal_number)


def train_stage(
    step_module: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    stage: str,
    batches: Callable[[int], Sequence[Batch]],
    schedule: Callable[[int], float],
    total_steps: int,
    tokens_per_step: int,
    metrics: MetricsLog | None,
    checkpoints: Checkpoints,
    checkpoint_every: int | None = None,
    evaluate: Callable[[], Mapping[str, float]] | None = None,
    eval_every: int | None = None,
    clip: float | None = 1.0,
    autocast: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    log_every: int = 10,
    seed: int = 0,
    progress: PlainProgress | None = None,
    enter: Callable[[int], None] | None = None,
    companion: Companion | None = None,
    world: World | None = None,
    limits: Limits | None = None,
    perfect: Callable[[Sequence[Batch]], float | None] | None = None,
) -> StageResult:
    """Train `step_module` for `total_steps` updates, resuming from the newest checkpoint if there is one.

    Args:
        step_module: forward(batch) gives a dict with the scalar ``"loss"`` and named terms (scalars, detached, but for
            a companion's loss). Modes (train, eval) are left as the caller set them.
        optimizer: Over the parameters that learn; its groups may hold ``lr_scale`` and ``learns_from`` (see
            `parameter_groups`).
        stage: The stage's name, for metrics, display and errors.
        batches: Update index from 0 → its micro-batches, of equal size, a pure function of the index. The gradient is
            the mean over them.
        schedule: Update index from 0 → learning rate, such as a `Schedule`; a group's is this times its ``lr_scale``.
        total_steps: Updates in all.
        tokens_per_step: Tokens of one update, for counting.
        metrics: The run's log; lines behind the checkpoint resumed from are cut off. None on all processes but rank 0.
        checkpoints: Where the state is kept. One is written at the end in any case.
        checkpoint_every: Updates between two checkpoints; None: only at the end and on a signal.
        evaluate: Gives figures of the present weights on held-out data, with ``"loss"``, lower is better; the weights
            of the best are kept. Randomness it uses and modes it sets do not reach the training.
        eval_every: Updates between two evaluations; there is one before the first update and one after the last too.
        clip: Largest global norm of the gradient; None: not clipped.
        autocast: dtype of the computation, ``torch.bfloat16`` or ``torch.float16``; None: that of the weights. In
            float16 the loss is scaled, and an update whose gradient overflows is left out.
        device: Where `step_module` lies; batches are brought there.
        log_every: Updates whose figures are fetched from an accelerator together, and so the delay with which one
            that is not finite is noticed. Every update gets its line all the same.
        seed: Of torch's generators at the start of the stage; a resumed stage goes on where its generators stood.
        progress: The display; made here when None.
        enter: Called with the updates done whenever that number is new, before weights are loaded, evaluated, saved
            or updated; what it makes of the step module must depend on that number alone.
        companion: What learns beside the step module, until its time is over.
        world: The processes that train together; by default this one alone. A `step_module` that is not sharded is
            wrapped in DDP where there are several.
        limits: What the figures are held against; see `guards`.
        perfect: Gives the loss that a perfect student would have on the first update's micro-batches, None where
            nobody knows it; with it, a stage's lines begin with one of the two losses that its own lie between.

    Raises:
        LimbeckError: Too many updates in a row whose loss or gradient is not finite, with the last one's batch saved
            beside the metrics; a checkpoint that does not fit; another autocast dtype.
        TrainingInterrupted: After SIGINT or SIGTERM, with the state saved. A second signal acts at once.
        OutOfMemory: An update did not fit in memory. What was built for the stage is of no more use; built anew with
            smaller micro-batches, it goes on from the last checkpoint.
    """
    device, world = torch.device(device), world or World.alone(device)
    if autocast not in (None, torch.bfloat16, torch.float16):
        raise LimbeckError(f"autocast to {autocast}", expected="torch.bfloat16, torch.float16 or None", hint="bfloat16")
    scaler = torch.amp.GradScaler(device.type) if autocast == torch.float16 else None

    def prepare(step: int) -> None:
        wake(optimizer, step)
        if companion:
            companion.enter(step)
            if companion.module:
                settle(companion.module)  # an update without it has left it gathered
        if enter:
            enter(step)

    replicas = Replicas(step_module, world)
    kept = (step_module, optimizer, companion, scaler)
    state, resumed = _start(kept, prepare, stage, checkpoints, metrics, seed, world)
    progress = progress or make_progress(stage, total_steps)
    folder = metrics.path.parent if metrics else checkpoints.directory

    def keep(step: int) -> str:
        return keep_batch(folder, stage, step, batches(step - 1), world)

    guard = Guard(stage, limits, total_steps=total_steps, note=progress.note, keep=keep, state=state)
    recorder = Recorder(stage, metrics, tokens_per_step, progress, world, guard)

    def flushed() -> TrainingState:
        recorder.flush()
        return replace(state, skipped=guard.skipped, skipped_in_a_row=guard.skipped_in_a_row)

    with progress, checkpoints, _stop_signals(world) as stop:
        progress.begin(state.step)
        stopping = agree(world, stop)
        while True:
            last = state.step >= total_steps
            fresh = state.step != resumed  # else this step was evaluated and saved before the interruption
            if not last:  # the end is evaluated with what the last update had
                prepare(state.step)

            # once in a while: evaluate the weights on held-out data
            if evaluate and eval_every and fresh and (state.step % eval_every == 0 or last):
                state = _evaluation(step_module, evaluate, flushed(), recorder, checkpoints, world)
                stopping = agree(world, stop)

            # once in a while: save, at the end and on a signal too
            due = state.step > 0 and (
                (checkpoint_every and state.step % checkpoint_every == 0) or checkpoints.keep_for_good(state.step)
            )
            if fresh and (due or last or stopping):
                state = replace(flushed(), metrics_bytes=world.share(metrics.sync() if metrics else 0))
                if companion and companion.module:
                    settle(companion.module)
                checkpoints.save(state, *kept)
                recorder.restart_clock()
            if stopping:
                checkpoints.commit()
                progress.note(f"{stage}: stopped and saved at step {state.step}; run it again to go on")
                raise TrainingInterrupted(stopping, state.step)
            if last:
                break

            # one update
            replicas.prepare()
            lr = schedule(state.step)
            figures, lacking = {}, False
            try:
                if perfect and state.step == 0:
                    recorder.perfect(perfect(batches(0)))
                figures = accumulate(replicas, batches(state.step), device, autocast, scaler)
                if state.step == (resumed or 0):
                    _tell_unreached(step_module, progress)
                figures |= apply(optimizer, lr, clip, scaler)
                if companion:
                    figures |= companion.update(state.step, scaler, world)
            except torch.OutOfMemoryError:
                lacking = True
            stopping = agree(world, stop, lacking, state.step)
            checkpoints.commit_if_written()
            if scaler:
                figures |= rescale(scaler, stage, state.step)

            state = replace(state, step=state.step + 1, tokens=state.tokens + tokens_per_step)
            recorder.record(state.step, state.tokens, lr, figures)
            late = world.size == 1 and recorder.waited() > FLUSH_SECONDS  # clocks of several processes differ
            if device.type == "cpu" or state.step % log_every == 0 or late:
                recorder.flush()
    best_path = checkpoints.best_path(state)
    return StageResult(state.step, state.tokens, resumed, state.best_step, state.best_loss, best_path)


def _start(
    kept: tuple[nn.Module, torch.optim.Optimizer, Companion | None, torch.amp.GradScaler | None],
    prepare: Callable[[int], None],
    stage: str,
    checkpoints: Checkpoints,
    metrics: MetricsLog | None,
    seed: int,
    world: World,
) -> tuple[TrainingState, int | None]:
    """Restore the newest checkpoint, or start afresh; either way cut the metrics back to that point."""
    torch.manual_seed(process_seed(seed, world.rank))
    kept[1].zero_grad(set_to_none=True)
    state = checkpoints.restore(*kept, prepare=prepare)
    if state is None:
        if metrics:
            metrics.cut(metrics.start_of(stage))
        return TrainingState(), None
    say(f"{stage}: resuming at step {state.step}")
    if metrics and not metrics.cut(state.metrics_bytes):
        say(f"{metrics.path} is shorter than at step {state.step}: lines were lost; going on behind them")
    return state, state.step


def _tell_unreached(module: nn.Module, progress: PlainProgress) -> None:
    """Say which parameters were to learn and got no gradient: the loss does not depend on them."""
    names = [name for name, weight in module.named_parameters() if weight.requires_grad and weight.grad is None]
    if names:
        more = " …" if len(names) > 3 else ""
        progress.note(f"{len(names)} tensors that should learn get no gradient: {', '.join(names[:3])}{more}")


def _evaluation(
    module: nn.Module,
    evaluate: Callable[[], Mapping[str, float]],
    state: TrainingState,
    recorder: Recorder,
    checkpoints: Checkpoints,
    world: World,
) -> TrainingState:
    """Evaluate, write the line, keep the weights if they are the best; training feels nothing of it."""
    modes = [(part, part.training) for part in module.modules()]
    with torch.random.fork_rng([world.device] if world.device.type == "cuda" else []):
        figures = world.share(dict(evaluate()))
    settle(module)
    for part, training in modes:
        part.training = training
    recorder.evaluation(state.step, state.tokens, figures)
    if math.isfinite(figures["loss"]) and (state.best_loss is None or figures["loss"] < state.best_loss):
        state = replace(state, best_step=state.step, best_loss=figures["loss"])
        checkpoints.save_best(state, module)
    recorder.restart_clock()
    return state


@contextlib.contextmanager
def _stop_signals(world: World) -> Iterator[list[int]]:
    """Yield a list that gets the number of the first SIGINT or SIGTERM; from then on signals act as they did before.

    Of several processes each gets the first one more than once: from the terminal or the scheduler, and from torchrun.
    """
    received: list[int] = []
    before = {}
    first_at = float("inf")

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def handle(number: int, _frame: FrameType | None) -> None:
        nonlocal first_at
        if received and time.monotonic() - first_at < SAME_SIGNAL_SECONDS:
            return
        if received:
            restore()
            os.kill(os.getpid(), number)
            return
        received.append(number)
        first_at = time.monotonic()
        if world.size == 1:
            restore()
        if world.main:
            os.write(2, b"stopping after this update; once more stops at once\n")  # print is not safe in a handler

    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, handle)
    except ValueError:  # not the main thread: signals are somebody else's business
        before.clear()
    try:
        yield received
    finally:
        restore()
