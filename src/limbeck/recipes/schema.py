"""What a recipe may say: one pydantic model per TOML table, strict and frozen.

A recipe names a student, its data and an ordered set of stages; those are in `limbeck.recipes.stages`.
"""

import math
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from limbeck.errors import LimbeckError
from limbeck.recipes.stages import (
    SCOPES,
    STAGES,
    AnyStage,
    Guidance,
    HiddenStage,
    LayerwiseStage,
    LogitsStage,
    MatrixStage,
    Stage,
)
from limbeck.recipes.values import Amount, Count, Layers, Table, as_tuple

__all__ = [
    "STAGES",
    "AnyStage",
    "DataTable",
    "EngineTable",
    "EvaluationTable",
    "Guidance",
    "HiddenStage",
    "LayerwiseStage",
    "LogitsStage",
    "MatrixStage",
    "Recipe",
    "Stage",
    "StudentTable",
    "Table",
    "TrackingTable",
]


class StudentTable(Table):
    """``[student]``: how the student is made from its teacher; see `limbeck.convert`.

    Attributes:
        mixer: Name of a registered mixer.
        init: How the mixers start.
        keep_attention: Layers, counted from 0, that keep the teacher's attention.
        mixer_kwargs: Options of the mixer; those left out follow from the teacher's attention.
        seed: Seed of the mixers' random start.
    """

    mixer: str = "discrete-mamba2"
    init: Literal["attention", "identity", "random"] = "attention"
    keep_attention: Layers = ()
    mixer_kwargs: dict[str, Any] = Field(default={})
    seed: int = 0


class SourceTable(Table):
    """One of ``data.sources``.

    Attributes:
        path: File or folder of text, or a token file.
        weight: How much of it, in proportion to the others.
    """

    path: str
    weight: Annotated[float, Field(gt=0.0, allow_inf_nan=False)] = 1.0


class DataTable(Table):
    """``[data]``: what the student learns from.

    Attributes:
        source: File or folder of text, or a token file; the command line's ``--data`` overrules it.
        sources: Several sources instead of one, mixed by weight: ``[{path = "code/", weight = 0.3}, …]``.
        eval_source: The same with held-out text; left out, a part of every source is held out.
        sequence_length: Tokens in a sample.
        seed: Seed of the order of samples.
        shuffle: Whether every epoch has its own order; otherwise samples come in file order.
        eval_fraction: Part of the samples, the last ones, that is held out for evaluation.
        samples: Samples to learn from at most, the first ones; left out, all.
        proportion: Part of the corpus, by which a recipe with ``[[proportions]]`` chooses its sizes.
    """

    source: str | None = None
    sources: Annotated[tuple[SourceTable, ...], BeforeValidator(as_tuple)] = ()
    eval_source: str | None = None
    sequence_length: Count = 2048
    seed: Annotated[int, Field(ge=0)] = 0
    shuffle: bool = True
    eval_fraction: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.01
    samples: Count | None = None
    proportion: Annotated[float, Field(gt=0.0, le=1.0)] | None = None


class EvaluationTable(Table):
    """``[evaluation]``: the held-out evaluation during a stage.

    Attributes:
        every: Updates between two evaluations, as an amount of the stage; 0 leaves them out.
        samples: Held-out samples that each evaluation reads, at most.
        batch_size: Samples in one forward pass.
    """

    every: Amount = 0
    samples: Count = 64
    batch_size: Count = 8


class EngineTable(Table):
    """``[engine]``: how a run is driven; nothing that its result depends on, so a resumed run may have another.

    Attributes:
        parallel: Whether each of several processes holds a copy of the models (``ddp``) or a part (``fsdp``); ``auto``
            takes copies where they fit.
        shard_size: Processes that share one copy; left out, all.
        async_save: Whether training goes on while a checkpoint is written; left out, on a GPU.
        keep_last: How many of the last checkpoints are kept.
        offload_teacher: Whether a frozen teacher's layers lie in the host's memory, and each is on the GPU only while
            it computes.
        compile_teacher: Whether the MLPs and norms of a frozen teacher are compiled, which takes a while at the start.
        max_nonfinite: After so many updates in a row that are not finite the run stops.
        log_every: Updates whose figures are fetched from a GPU together.
    """

    parallel: Literal["auto", "ddp", "fsdp"] = "auto"
    shard_size: Count | None = None
    async_save: bool | None = None
    keep_last: Count = 2
    offload_teacher: bool = False
    compile_teacher: bool = False
    max_nonfinite: Count = 10
    log_every: Count = 10


class TrackingTable(Table):
    """``[tracking]``: who shows a run while it goes on, beside ``metrics.jsonl``; a resumed run may have another.

    Attributes:
        trackers: Any of ``"tensorboard"``, ``"wandb"`` and ``"trackio"``.
        project: What the run is filed under.
        run_name: What the run is called there; left out, as its folder is.
        entity: The user or team on wandb that it belongs to; left out, wandb's default.
    """

    trackers: Annotated[tuple[Literal["tensorboard", "wandb", "trackio"], ...], BeforeValidator(as_tuple)] = ()
    project: Annotated[str, Field(min_length=1)] = "limbeck"
    run_name: str | None = None
    entity: str | None = None


class Recipe(Table):
    """A whole recipe.

    Attributes:
        name: Its name, as a user types it.
        description: One line for the list of recipes.
        teacher: Folder or Hub id of the teacher; the command line's ``--teacher`` overrules it.
        precision: Number format of the forward pass, while weights stay float32; ``auto`` is bfloat16 on a GPU and
            float32 on a CPU. With ``float16`` the loss is scaled, and updates that overflow are left out.
        tf32: Whether a GPU may round the factors of float32 matrix products to 10 bits, which is faster.
        student: See `StudentTable`.
        data: See `DataTable`.
        evaluation: See `EvaluationTable`.
        engine: See `EngineTable`.
        tracking: See `TrackingTable`.
        stages: The stages by name, in the order in which they run.
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    description: str = ""
    teacher: str | None = None
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    tf32: bool = False
    student: StudentTable = StudentTable()
    data: DataTable = DataTable()
    evaluation: EvaluationTable = EvaluationTable()
    engine: EngineTable = EngineTable()
    tracking: TrackingTable = TrackingTable()
    stages: Annotated[
        dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")], AnyStage], Field(min_length=1)
    ]

    @property
    def tokens(self) -> int:
        """Tokens of all stages together."""
        return sum(stage.tokens for stage in self.stages.values())

    def scaled_to(self, tokens: int) -> "Recipe":
        """Give the stages ``tokens`` tokens together, in the same proportion; amounts of updates follow.

        Args:
            tokens: Tokens of all stages together.

        Raises:
            LimbeckError: A stage would be left without a single update.
        """
        least = max(math.ceil(stage.tokens_per_step * self.tokens / stage.tokens) for stage in self.stages.values())
        if tokens < least:
            raise LimbeckError(
                f"{tokens} tokens leave a stage of recipe {self.name!r} without a single update",
                expected=f"at least {least} tokens",
                hint="lower tokens_per_step of its stages, or ask for more tokens",
            )
        values = self.model_dump()
        if self.data.samples is not None:  # the number of epochs stays
            values["data"]["samples"] = max(1, self.data.samples * tokens // self.tokens)
        for name, stage in self.stages.items():
            table = values["stages"][name]
            table["tokens"] = stage.tokens * tokens // self.tokens
            new_steps = table["tokens"] // stage.tokens_per_step
            if table["expect"]:
                table["expect"]["end"] = None  # another number of updates ends elsewhere
            if table.get("guidance_until_tokens"):
                table["guidance_until_tokens"] = table["guidance_until_tokens"] * tokens // self.tokens
            for key in stage.amounts:
                amount = table[key]
                if isinstance(amount, int) and amount:
                    table[key] = max(1, amount * new_steps // stage.steps)
        return Recipe.model_validate(values)

    @model_validator(mode="after")
    def _stages_follow_each_other(self) -> Self:
        stages = list(self.stages.items())
        for (before, first), (after, second) in zip(stages, stages[1:], strict=False):
            if SCOPES[second.objective] < SCOPES[first.objective]:
                raise LimbeckError(
                    f"stages.{after} ({second.objective}) comes after stages.{before} ({first.objective})",
                    expected="a scope that never shrinks: matrix → hidden → logits or layerwise",
                    hint="swap the two tables: stages run in the order in which the file names them",
                )
        return self

    @model_validator(mode="after")
    def _learning_teachers_stay_as_they_are(self) -> Self:
        keys = [key for key in ("offload_teacher", "compile_teacher") if getattr(self.engine, key)]
        for name, stage in self.stages.items():
            if keys and isinstance(stage, LayerwiseStage) and stage.guidance == "trajectory":
                raise LimbeckError(
                    f'engine.{keys[0]} with stages.{name}.guidance = "trajectory"',
                    expected="a frozen teacher: one that learns has a backward pass too, and dropout",
                    hint=f"engine.{keys[0]} = false",
                )
        return self

    @model_validator(mode="after")
    def _batches_are_whole(self) -> Self:
        length = self.data.sequence_length
        for name, stage in self.stages.items():
            if stage.tokens_per_step % (length * stage.micro_batch):
                raise LimbeckError(
                    f"stages.{name}.tokens_per_step = {stage.tokens_per_step} is no whole number of micro-batches "
                    f"of {stage.micro_batch} samples × {length} tokens",
                    expected="tokens_per_step as a multiple of micro_batch × data.sequence_length "
                    f"= {stage.micro_batch * length}",
                    hint=f"--set stages.{name}.tokens_per_step=… or --set stages.{name}.micro_batch=…",
                )
        return self
