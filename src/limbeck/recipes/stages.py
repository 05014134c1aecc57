"""A recipe's stages: one pydantic model per objective.

Everything that a run derives from a stage, such as the number of updates or of warm-up steps, is a property here, so
that a plan and a run can never disagree. An amount such as ``warmup`` is read by its type: ``244`` is a number of
updates, ``0.1`` a part of the stage's updates.
"""

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from limbeck.errors import LimbeckError
from limbeck.recipes.values import Amount, Count, Interval, LearningRate, Momentum, Names, Rate, Table, as_tuple, whole
from limbeck.training.schedule import Schedule, make_schedule

Guidance = Literal["none", "target", "trajectory", "waypoint"]
Range = Annotated[tuple[float, float], BeforeValidator(as_tuple)]


class Expect(Table):
    """``expect``: between which values a healthy run's loss lies; a run says when it leaves them, a report draws them.

    They speak of ``matrix_per_layer``, ``hidden_per_layer``, ``kl``, or where there is none of these ``loss``.

    Attributes:
        start: Least and greatest value at the first update.
        end: Least and greatest value at the last.
    """

    start: Range | None = None
    end: Range | None = None


class Stage(Table):
    """What every stage has, whatever its objective.

    Attributes:
        tokens: Tokens that the stage may read; it ends before it would overrun them.
        tokens_per_step: Tokens of one update.
        micro_batch: Samples in one forward and backward pass; the rest of an update is accumulated.
        lr: Peak learning rate.
        mixer_lr: Peak learning rate of the mixers, where it differs from ``lr``.
        betas: The two momenta of AdamW.
        weight_decay: Weight decay of AdamW.
        mixer_weight_decay: Weight decay of the mixers, where it differs from ``weight_decay``.
        no_decay: Ends of parameter names that weight decay leaves alone, instead of the rule below.
        clip: Largest norm of the gradient; 0 leaves it as it is.
        schedule: Warm-up–stable–decay, cosine, or constant after the warm-up.
        warmup: Amount of updates over which the rate rises from 0; for ``cosine`` a part is one of ``decay``.
        decay: Amount of updates over which it falls: the last ones for ``wsd``, all of the cosine's for ``cosine``.
        min_lr: The rate never falls below this floor.
        checkpoint_every: Amount of updates between two checkpoints, or ``"epoch"``; 0 writes one at the end only.
        keep_every: Amount of updates between two checkpoints that are kept for good; 0 keeps the last two alone.
        trainable: Narrows what learns to the mixers or the swapped blocks; left out, all that the objective reaches.
        freeze_steps: Amount of updates at the start in which the mixers learn alone.
        teacher: Folder or Hub id of this stage's teacher, where it is not the recipe's.
        expect: Where a healthy run's loss lies; a run says when it leaves it: ``{start = [45, 60], end = [7, 12]}``.
    """

    tokens: Count
    tokens_per_step: Count
    micro_batch: Count = 8
    lr: LearningRate = 1e-4
    mixer_lr: LearningRate | None = None
    betas: Annotated[tuple[Momentum, Momentum], BeforeValidator(as_tuple)] = (0.9, 0.95)
    weight_decay: Rate = 0.1
    mixer_weight_decay: Rate | None = None
    no_decay: Names | None = None
    clip: Rate = 1.0
    schedule: Literal["wsd", "cosine", "constant"] = "wsd"
    warmup: Amount = 0.1
    decay: Amount | None = None
    min_lr: Rate = 0.0
    checkpoint_every: Interval = 0.1
    keep_every: Amount = 0
    trainable: Literal["mixers", "blocks", "all"] | None = None
    freeze_steps: Amount = 0
    teacher: str | None = None
    expect: Expect | None = None

    default_decay: ClassVar[Mapping[str, float]] = MappingProxyType({"wsd": 0.1, "cosine": 1.0, "constant": 0.0})
    amounts: ClassVar[tuple[str, ...]] = ("warmup", "decay", "checkpoint_every", "keep_every", "freeze_steps")

    @model_validator(mode="before")
    @classmethod
    def _updates_for_tokens(cls, values: Any) -> Any:
        """Let ``steps = 11440`` stand for so many updates' tokens."""
        if not isinstance(values, dict) or "steps" not in values:
            return values
        rest = {name: value for name, value in values.items() if name != "steps"}
        steps, each = whole(values["steps"]), whole(values.get("tokens_per_step"))
        if type(steps) is not int or steps < 1 or "tokens" in rest:
            raise LimbeckError(
                f"steps = {values['steps']!r}" + (f" beside tokens = {rest['tokens']!r}" if "tokens" in rest else ""),
                expected="a number of updates, in place of tokens",
            )
        return rest | {"tokens": steps * each if type(each) is int else steps}

    @property
    def steps(self) -> int:
        """Updates of the stage: it ends before it would overrun its tokens."""
        return self.tokens // self.tokens_per_step

    @property
    def warmup_steps(self) -> int:
        """Updates over which the learning rate rises."""
        return self.steps_of(self.warmup, self.decay_steps if self.schedule == "cosine" else None)

    @property
    def decay_steps(self) -> int:
        """Updates over which the learning rate falls."""
        return self.steps_of(self.default_decay[self.schedule] if self.decay is None else self.decay)

    @property
    def learning_rate(self) -> Schedule:
        """The learning rate as a function of the updates done."""
        return make_schedule(
            self.schedule,
            total_steps=self.steps,
            peak=self.lr,
            warmup=self.warmup_steps,
            decay=self.decay_steps,
            floor=self.min_lr,
        )

    @property
    def checkpoint_steps(self) -> int | Literal["epoch"]:
        """Updates between two checkpoints; 0 for none but the last. How many an epoch has, the data say."""
        return "epoch" if self.checkpoint_every == "epoch" else self.interval_of(self.checkpoint_every)

    @property
    def guided_steps(self) -> int:
        """Updates in which the student has a teacher."""
        return self.steps

    @property
    def switch_step(self) -> int | None:
        """Updates done when a teacher that the stage begins with is let go; None where it stays, or never was."""
        return self.guided_steps if 0 < self.guided_steps < self.steps else None

    def steps_of(self, amount: float, total: int | None = None) -> int:
        """Turn an amount into updates: an integer is one already, a float is a part of the stage, rounded down."""
        return amount if isinstance(amount, int) else math.floor(amount * (total or self.steps) + 1e-9)

    def interval_of(self, amount: float) -> int:
        """Turn the amount between two recurring things into updates: 0 is never, anything above at least 1."""
        return max(1, self.steps_of(amount)) if amount else 0

    def checkpoint_interval(self, samples: int, sequence_length: int) -> int:
        """Updates between two checkpoints, where an epoch has so many samples; 0 for none but the last."""
        if self.checkpoint_steps == "epoch":
            return max(1, samples // self.samples_per_step(sequence_length))
        return self.checkpoint_steps

    def samples_per_step(self, sequence_length: int) -> int:
        """Samples of one update."""
        return self.tokens_per_step // sequence_length

    def accumulation(self, sequence_length: int) -> int:
        """Micro-batches whose gradients are summed before an update."""
        return self.samples_per_step(sequence_length) // self.micro_batch

    def objective_options(self) -> dict[str, Any]:
        """What the stage's objective is made with."""
        return {}

    @model_validator(mode="after")
    def _hangs_together(self) -> Self:
        if self.steps == 0:
            raise LimbeckError(
                f"tokens = {self.tokens} is less than one update of tokens_per_step = {self.tokens_per_step}",
                expected="tokens for at least one update",
                hint="give the stage more tokens, or lower tokens_per_step",
            )
        if self.schedule == "wsd" and self.warmup_steps + self.decay_steps > self.steps:
            raise LimbeckError(
                f"warm-up ({self.warmup_steps}) and decay ({self.decay_steps}) overrun the {self.steps} updates",
                expected="warmup + decay of at most the whole stage",
                hint="give both as parts of the stage, such as warmup = 0.1 and decay = 0.1",
            )
        if self.schedule == "cosine" and self.warmup_steps >= self.decay_steps:
            raise LimbeckError(
                f"warm-up ({self.warmup_steps}) reaches the end of the cosine ({self.decay_steps})",
                expected="a warm-up shorter than decay",
                hint="give warmup as a part, such as 0.1",
            )
        if self.min_lr > self.lr:
            raise LimbeckError(f"min_lr = {self.min_lr} is above lr = {self.lr}", expected="min_lr of at most lr")
        return self


class MatrixStage(Stage):
    """Matrix orientation: each mixer's matrix learns the attention matrix of its layer; only mixers learn."""

    objective: Literal["matrix"]


class HiddenStage(Stage):
    """Hidden-state alignment: each block, given the teacher's input, learns its output.

    Attributes:
        target: Whether block outputs are compared, and whole blocks learn, or mixer outputs and the mixers learn.
        teacher_cache: Folder with the teacher's hidden states, of ``limbeck prepare --teacher --hidden-states``,
            instead of the teacher.
    """

    objective: Literal["hidden"]
    target: Literal["block", "mixer"] = "block"
    teacher_cache: str | None = None

    def objective_options(self) -> dict[str, Any]:
        """What the stage's objective is made with."""
        return {"target": self.target}


class LogitsStage(Stage):
    """Distillation end to end: the student's distribution over the next token learns the teacher's.

    Attributes:
        temperature: Softens both distributions.
        kl_weight: Weight of the divergence from the teacher.
        ce_weight: Weight of the cross entropy against the text itself.
        teacher_cache: Folder with the teacher's predictions, of ``limbeck prepare --teacher``, instead of the teacher.
    """

    objective: Literal["logits"]
    temperature: Annotated[float, Field(gt=0.0, allow_inf_nan=False)] = 1.0
    kl_weight: Rate = 1.0
    ce_weight: Rate = 0.0
    teacher_cache: str | None = None

    def objective_options(self) -> dict[str, Any]:
        """What the stage's objective is made with."""
        return {"temperature": self.temperature, "kl_weight": self.kl_weight, "ce_weight": self.ce_weight}

    @property
    def guided_steps(self) -> int:
        """Updates in which the student has a teacher."""
        return self.steps if self.kl_weight else 0

    @model_validator(mode="after")
    def _has_a_loss(self) -> Self:
        if self.kl_weight == self.ce_weight == 0.0:
            raise LimbeckError(
                "kl_weight and ce_weight are both 0", expected="a loss", hint="kl_weight = 1.0, the default"
            )
        if self.teacher_cache is not None and not self.kl_weight:
            raise LimbeckError("teacher_cache with kl_weight 0", expected="a loss that reads it")
        return self


class LayerwiseStage(Stage):
    """Layerwise distillation end to end (CALD): the text itself, and every layer near the teacher's.

    Attributes:
        alpha_ce: Weight of the cross entropy against the text itself.
        alpha_layer: Weight of the distance between the layers, while there is a teacher.
        alpha_logits: Weight of the divergence from the teacher's distribution, while there is a teacher.
        temperature: Softens both distributions for ``alpha_logits``.
        norm: What hidden states are put through before they are compared; ``loss_norm`` scales each layer's loss to 1.
        distance: Mean squared error, or 1 − cosine.
        skip_last: Layers at the end that are not compared.
        position: Whether block outputs are compared, or mixer outputs with attention outputs.
        mask: Which tokens count between the layers: all but padding, or those that have a label.
        guidance: Who is followed: nobody, a frozen teacher, one that is fine-tuned alongside, or its checkpoints.
        guidance_until: Amount of updates that are guided; after them the teacher is unloaded.
        guidance_until_tokens: The same, counted in tokens.
        teacher_lr: Peak learning rate of the teacher that is fine-tuned alongside.
        teacher_update_every: It is updated in every so many-th update of the student.
        waypoints: Checkpoints to walk through: a folder of them, or a list; spread evenly over the guided updates.
        teacher_cache: Folder with the target's predictions, of ``limbeck prepare --teacher``, instead of the teacher;
            for ``alpha_logits`` alone: layers are not read from it.
    """

    objective: Literal["layerwise"]
    alpha_ce: Rate = 1.0
    alpha_layer: Rate = 15.0
    alpha_logits: Rate = 0.0
    temperature: Annotated[float, Field(gt=0.0, allow_inf_nan=False)] = 2.0
    norm: Literal["layernorm", "rmsnorm", "loss_norm", "none"] = "layernorm"
    distance: Literal["mse", "cosine"] = "mse"
    skip_last: Annotated[int, Field(ge=0)] = 1
    position: Literal["block", "mixer"] = "block"
    mask: Literal["padding", "labels"] = "padding"
    guidance: Guidance = "target"
    guidance_until: Amount = 1.0
    guidance_until_tokens: Count | None = None
    teacher_lr: LearningRate | None = None
    teacher_update_every: Count = 1
    waypoints: Names | None = None
    teacher_cache: str | None = None

    amounts: ClassVar[tuple[str, ...]] = (*Stage.amounts, "guidance_until")

    @property
    def guided_steps(self) -> int:
        """Updates in which the student has a teacher."""
        if self.guidance == "none":
            return 0
        if self.guidance_until_tokens is not None:
            return min(self.guidance_until_tokens // self.tokens_per_step, self.steps)
        return min(self.steps_of(self.guidance_until), self.steps)

    def objective_options(self) -> dict[str, Any]:
        """What the stage's objective is made with."""
        keys = "alpha_ce alpha_layer alpha_logits temperature norm distance skip_last position mask"
        return {key: getattr(self, key) for key in keys.split()}

    @model_validator(mode="after")
    def _guidance_hangs_together(self) -> Self:
        def refuse(found: str, expected: str, hint: str = "") -> LimbeckError:
            return LimbeckError(found, expected, hint)

        if self.guidance_until_tokens is not None and self.guidance_until != 1.0:
            raise refuse("guidance_until and guidance_until_tokens are both given", "one of them")
        if self.guidance != "none" and not self.guided_steps:
            raise refuse(
                f"guidance = {self.guidance!r} for 0 of {self.steps} updates", "guidance of at least one update"
            )
        if self.guided_steps and self.alpha_layer == self.alpha_logits == 0.0:
            raise refuse(
                f"guidance = {self.guidance!r} with alpha_layer and alpha_logits 0",
                "a loss that reads the teacher",
                'guidance = "none" to learn from the text alone',
            )
        if self.guided_steps < self.steps and self.alpha_ce == 0.0:
            raise refuse("alpha_ce = 0 in updates without a teacher", "a loss", "alpha_ce = 1.0, the default")
        if self.guidance == "trajectory" and self.teacher_lr is None:
            raise refuse("teacher_lr is missing", 'the teacher\'s learning rate, for guidance = "trajectory"')
        if self.guidance == "trajectory" and self.teacher_update_every > self.guided_steps:
            raise refuse(
                f"teacher_update_every = {self.teacher_update_every} in {self.guided_steps} guided updates",
                "a teacher that is updated at least once",
            )
        if self.waypoints is not None and self.guidance != "waypoint":
            raise refuse(f"waypoints with guidance = {self.guidance!r}", 'guidance = "waypoint"')
        if self.teacher_cache is not None and (self.guidance != "target" or self.alpha_layer or not self.alpha_logits):
            raise refuse(
                f"teacher_cache with guidance = {self.guidance!r}, alpha_layer = {self.alpha_layer}, "
                f"alpha_logits = {self.alpha_logits}",
                'guidance = "target", alpha_layer = 0 and alpha_logits above 0: layers are not read from it',
            )
        return self


STAGES: Mapping[str, type[Stage]] = MappingProxyType(
    {"matrix": MatrixStage, "hidden": HiddenStage, "logits": LogitsStage, "layerwise": LayerwiseStage}
)
"""The model of each objective."""

SCOPES: Mapping[str, int] = MappingProxyType({"matrix": 0, "hidden": 1, "logits": 2, "layerwise": 2})
"""What each objective sees: one matrix, one layer, the whole network. Over a recipe it never shrinks."""


def cache_of(stage: Stage) -> str | None:
    """The teacher cache that a stage reads, or None."""
    return stage.teacher_cache if isinstance(stage, HiddenStage | LogitsStage | LayerwiseStage) else None


AnyStage = Annotated[MatrixStage | HiddenStage | LogitsStage | LayerwiseStage, Field(discriminator="objective")]
