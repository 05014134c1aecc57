"""Driving the stages of a run: each from its predecessor's student to its own."""

import gc
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor
from transformers import PreTrainedModel

from limbeck.data import BatchSampler, ReadAhead, Samples, collate, fitting_micro_batch, micro_batches
from limbeck.devices import environment
from limbeck.distill import WHOLE_MODEL, Guide, GuidedStep, StageStep, TeacherCache, make_objective, mixer_parameters
from limbeck.errors import LimbeckError
from limbeck.evaluation import agreement, perplexity
from limbeck.mixers import Mixer
from limbeck.progress import console, say
from limbeck.recipes.cached import cached_options, completed
from limbeck.recipes.folder import RunFolder, RunPaths
from limbeck.recipes.placement import mesh_of
from limbeck.recipes.schema import AnyStage, EngineTable, LayerwiseStage, Recipe, Stage
from limbeck.recipes.stages import cache_of
from limbeck.recipes.teachers import Teachers
from limbeck.recipes.watching import limits_of, perfect_loss, trackers_of
from limbeck.students import load_model
from limbeck.training import (
    Checkpoints,
    Companion,
    MetricsLog,
    OutOfMemory,
    StageResult,
    Trackers,
    World,
    learning_summary,
    learning_table,
    load_learned,
    make_adamw,
    parameter_groups,
    shard_step,
    train_stage,
    whole_weights,
)

PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
CONVERTED = "converted"
TOKENIZER_FILES = ("tokenizer", "special_tokens", "vocab", "merges", "added_tokens", "chat_temp")


@dataclass(frozen=True)
class RunSamples:
    """The samples of a run: what is learned from, and what is held out."""

    training: Samples
    held_out: Samples | None


class Driver:
    """Runs the stages of one run, one after the other; as a context it ends what shows them.

    Args:
        run: The run's folder; rank 0 alone may write in it.
        recipe: As it runs.
        teacher: Where the recipe's teacher is; it is loaded when a stage first needs it.
        samples: What is read.
        world: The processes, and where this one trains.
    """

    def __init__(self, run: RunPaths, recipe: Recipe, teacher: str, samples: RunSamples, world: World):
        self.run, self.recipe, self.samples, self.world, self.device = run, recipe, samples, world, world.device
        half = "bfloat16" if self.device.type == "cuda" else "float32"
        self.autocast = PRECISIONS[half if recipe.precision == "auto" else recipe.precision]
        self.mesh = mesh_of(recipe, teacher, run.stage(0, CONVERTED) / "student", self.autocast, world)
        self.teachers = Teachers(teacher, self.autocast, self.device, self.mesh, recipe.engine)
        self._trackers: Trackers | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Let the trackers send what is left."""
        if self._trackers:
            self._trackers.close()

    def run_stage(self, index: int, name: str, predecessor: str) -> None:
        """Train one stage from its predecessor's student and leave its own.

        Where an update does not fit in memory, the stage is built anew with half the micro-batch, and goes on from its
        last checkpoint.
        """
        stage = self.recipe.stages[name]
        start = self.world.first(lambda: str(self.run.verified(index - 1, predecessor)))
        samples = stage.samples_per_step(self.recipe.data.sequence_length)
        micro_batch = fitting_micro_batch(samples, stage.micro_batch, self.world.size)
        if micro_batch < stage.micro_batch:
            say(f"{name}: micro-batches of {micro_batch} samples, to deal {samples} out to {self.world.size} processes")
        while not self._trained(index, name, Path(start), micro_batch):
            gc.collect()  # a step module and its hooks refer to each other in circles
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            smaller = fitting_micro_batch(samples, micro_batch // 2, self.world.size) if micro_batch > 1 else 0
            if not smaller:
                raise LimbeckError(
                    f"stage {name}: out of memory with one sample in a micro-batch",
                    expected=f"memory for {self.recipe.data.sequence_length} tokens, the model and its optimiser",
                    hint='engine.offload_teacher = true, engine.parallel = "fsdp" over more GPUs, or a smaller '
                    "data.sequence_length",
                )
            say(f"{name}: out of memory with micro-batches of {micro_batch} samples; going on with {smaller}")
            micro_batch = smaller

    def _trained(self, index: int, name: str, start: Path, micro_batch: int) -> bool:
        """Train a stage and leave its student; False where memory did not suffice."""
        stage = self.recipe.stages[name]
        student = load_model(start, dtype=torch.float32, device=None if self.mesh else self.device).train()
        step, companion = self._step(stage, student)
        if self.mesh is not None:
            shard_step(step, self.mesh)
        optimizer = optimizer_of(step, stage)
        learns = learning_summary(step, optimizer.param_groups)
        title = f"stage {name} ({stage.objective}): {stage.steps} updates of {stage.tokens_per_step:,} tokens"
        console().print(learning_table(learns, title=title))
        every = stage.interval_of(self.recipe.evaluation.every) if self.samples.held_out else 0
        sampler = self._sampler(name)
        interval = stage.checkpoint_interval(sampler.dataset_size, self.recipe.data.sequence_length)
        share = {"rank": self.world.rank, "size": self.world.size}
        if self.world.main and self._trackers is None:  # a finished run opens none
            self._trackers = trackers_of(self.run, self.recipe)
        log = MetricsLog(self.run.metrics, self._trackers) if self.world.main else nullcontext()
        read = micro_batches(self.samples.training, sampler, micro_batch, **share, complete=completed(stage))
        ahead = ReadAhead(read, stage.steps, pinned=self.device.type == "cuda")
        with log as metrics, ahead as batches, _tf32(self.recipe.tf32):
            try:
                result = train_stage(
                    step,
                    optimizer,
                    stage=name,
                    batches=batches,
                    schedule=stage.learning_rate,
                    total_steps=stage.steps,
                    tokens_per_step=stage.tokens_per_step,
                    metrics=metrics,
                    checkpoints=checkpoints_of(self.run, index, name, stage, self.recipe.engine, self.world),
                    checkpoint_every=interval or None,
                    evaluate=lambda: self._evaluate(stage, step),
                    eval_every=every or None,
                    clip=stage.clip or None,
                    autocast=self.autocast,
                    device=self.device,
                    seed=self.recipe.data.seed,
                    enter=step.enter if isinstance(step, GuidedStep) else None,
                    companion=companion,
                    log_every=self.recipe.engine.log_every,
                    world=self.world,
                    limits=limits_of(stage, self.recipe.engine),
                    perfect=lambda batch: perfect_loss(stage, step, batch, self.autocast, self.world),
                )
            except OutOfMemory:
                return False
        facts = {"learns": [asdict(row) for row in learns], "environment": environment(self.device)}
        facts |= {"processes": self.world.size}
        self._leave(index, name, start, step, result, facts)
        return True

    def _step(self, stage: AnyStage, student: PreTrainedModel) -> tuple[StageStep, Companion | None]:
        """What the stage trains, and what learns beside it."""
        folder, options = cache_of(stage), stage.objective_options()
        if folder is not None:
            self.teachers.release()
            options |= cached_options(stage, TeacherCache(folder).manifest)
        objective = make_objective(stage.objective, **options)
        if not isinstance(stage, LayerwiseStage):
            teacher = self.teachers.of(stage) if objective.needs_teacher else None
            return StageStep(student, objective, teacher, stage.trainable), None
        guide, companion = self.teachers.guide(stage) if folder is None else (Guide(), None)
        return GuidedStep(student, objective, guide, stage.trainable), companion

    def _sampler(self, name: str) -> BatchSampler:
        """Which samples each update of a stage reads: it goes on behind those of the stages before it."""
        data, before = self.recipe.data, 0
        for earlier, stage in self.recipe.stages.items():
            if earlier == name:
                break
            before += stage.steps * stage.samples_per_step(data.sequence_length)
        count = len(self.samples.training)
        return BatchSampler(
            count if data.samples is None else min(count, data.samples),
            self.recipe.stages[name].samples_per_step(data.sequence_length),
            seed=data.seed,
            shuffle=data.shuffle,
            offset=before,
        )

    def _evaluate(self, stage: AnyStage, step: StageStep) -> Mapping[str, float]:
        """Held-out loss and perplexity, and the distance from the teacher that is followed, if one is there."""
        batches = held_out_batches(self.samples.held_out, self.recipe)
        if isinstance(step, GuidedStep):
            teacher = step.guide.teacher
        else:  # a cache spares the teacher altogether, and holds nothing of what is held out
            teacher = self.teachers.of(stage) if cache_of(stage) is None else None
        with torch.autocast(self.device.type, dtype=self.autocast, enabled=self.autocast is not None):
            found = perplexity(step.student, batches)
            figures = {"loss": found.nll, "perplexity": found.perplexity}
            if teacher is not None:
                close = agreement(step.student, teacher, batches)
                figures |= {"kl": close.kl, "top1": close.top1}
        return figures

    def _leave(
        self, index: int, name: str, start: Path, step: StageStep, result: StageResult, facts: dict[str, Any]
    ) -> None:
        """Publish the stage's student: the best weights where the held-out loss speaks of the whole, else the last."""
        best = step.objective.scope >= WHOLE_MODEL and result.best_path is not None
        if best:
            load_learned(step, result.best_path)  # type: ignore[arg-type]
        facts = {"steps": result.steps, "tokens": result.tokens, "weights_of_step": result.steps, **facts}
        if best:
            facts |= {"weights_of_step": result.best_step, "held_out_loss": result.best_loss}

        weights = whole_weights(step.student) if self.mesh is not None else None

        def write(folder: Path) -> None:
            step.student.save_pretrained(folder, state_dict=weights)
            for file in start.iterdir():
                if file.name.startswith(TOKENIZER_FILES):
                    shutil.copy2(file, folder)

        def publish() -> None:
            assert isinstance(self.run, RunFolder)
            self.run.publish(index, name, write, **facts)

        self.world.first(publish)


def optimizer_of(step: StageStep, stage: Stage) -> torch.optim.AdamW:
    """The optimiser of a stage, over everything in it that learns."""
    exempt = {
        f"student.{name}.{parameter}"
        for name, mixer in step.student.named_modules()
        if isinstance(mixer, Mixer)
        for parameter in mixer.no_weight_decay
    }
    groups = parameter_groups(
        step.named_parameters(),
        mixer_parameters={f"student.{parameter}" for parameter in mixer_parameters(step.student)},
        lr=stage.lr,
        mixer_lr=stage.mixer_lr,
        weight_decay=stage.weight_decay,
        mixer_weight_decay=stage.mixer_weight_decay,
        no_decay=stage.no_decay,
        exempt=exempt if stage.no_decay is None else (),
        freeze_steps=stage.steps_of(stage.freeze_steps),
    )
    return make_adamw(groups, betas=stage.betas)


def checkpoints_of(
    run: RunPaths, index: int, name: str, stage: AnyStage, engine: EngineTable, world: World
) -> Checkpoints:
    """The checkpoints of a stage: the last ones, those that are kept, and the one at its switch."""
    kept = stage.interval_of(stage.keep_every)

    def keep_for_good(step: int) -> bool:
        return step == stage.switch_step or (kept > 0 and step % kept == 0)

    return Checkpoints(
        run.stage(index, name) / "checkpoints",
        stage=name,
        fingerprint=run.run_id,
        keep=engine.keep_last,
        keep_for_good=keep_for_good,
        asynchronous=world.device.type == "cuda" if engine.async_save is None else engine.async_save,
        world=world,
    )


def held_out_batches(dataset: Samples | None, recipe: Recipe) -> list[dict[str, Tensor]]:
    """The batches a recipe's evaluations read."""
    assert dataset is not None
    count, size = min(recipe.evaluation.samples, len(dataset)), recipe.evaluation.batch_size
    return [collate(dataset, range(start, min(start + size, count))) for start in range(0, count, size)]


@contextmanager
def _tf32(allowed: bool) -> Iterator[None]:
    """While open, a GPU may round the factors of float32 matrix products, if that is allowed."""
    if not allowed or not torch.cuda.is_available():
        yield
        return
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
