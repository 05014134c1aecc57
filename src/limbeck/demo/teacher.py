"""The demo's teacher, and the same network with its mixers put to zero; both are trained on the text itself."""

from typing import Any, Literal

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GPTNeoXConfig, PreTrainedModel

from limbeck.data import BatchSampler, TokenDataset, micro_batches
from limbeck.demo.corpus import VOCABULARY
from limbeck.demo.folder import Folder
from limbeck.distill import LogitsObjective, StageStep
from limbeck.files import replacing_folder
from limbeck.mixers import Mixer, MixerState, register_mixer
from limbeck.recipes import load_recipe
from limbeck.students import load_tokenizer, student_config
from limbeck.training import Checkpoints, MetricsLog, make_adamw, make_schedule, parameter_groups, train_stage

TEACHER_STEPS = 500
SAMPLES_PER_STEP = 8


def teacher_config() -> GPTNeoXConfig:
    """The teacher: three layers, less than half a million parameters."""
    return GPTNeoXConfig(
        vocab_size=VOCABULARY,
        hidden_size=96,
        num_hidden_layers=3,
        num_attention_heads=3,
        intermediate_size=384,
        max_position_embeddings=2048,
        bos_token_id=0,
        eos_token_id=0,
        tie_word_embeddings=False,
    )


def train_from_text(folder: Folder, name: Literal["teacher", "without-attention"], seed: int) -> None:
    """Train the teacher, or its twin without attention, on the text itself."""
    target = folder.path / name
    if target.exists():
        return
    torch.manual_seed(seed)
    config = teacher_config()
    if name == "without-attention":
        config = student_config(config, mixer="none", init="random")
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config).train()
    step = StageStep(model, LogitsObjective(kl_weight=0.0, ce_weight=1.0))
    length = load_recipe("demo").data.sequence_length
    dataset = TokenDataset(folder.tokens("training"), length)
    sampler = BatchSampler(len(dataset), SAMPLES_PER_STEP, seed=seed)
    lr = 4e-3
    groups = parameter_groups(step.named_parameters(), mixer_parameters=(), lr=lr)
    training = folder.path / "training" / name
    with MetricsLog(training / "metrics.jsonl") as metrics:
        train_stage(
            step,
            make_adamw(groups),
            stage=name,
            batches=micro_batches(dataset, sampler, SAMPLES_PER_STEP),
            schedule=make_schedule("wsd", total_steps=TEACHER_STEPS, peak=lr, warmup=0.05, decay=0.4),
            total_steps=TEACHER_STEPS,
            tokens_per_step=SAMPLES_PER_STEP * length,
            metrics=metrics,
            checkpoints=Checkpoints(training / "checkpoints", stage=name),
            checkpoint_every=100,
            seed=seed,
        )
    with replacing_folder(target) as work:
        model.save_pretrained(work)
        load_tokenizer(folder.path / "tokenizer").save_pretrained(work)


class NoMixer(Mixer):
    """A mixer put to zero: no token sees another, all that is left is the MLPs. The floor that students start from."""

    @classmethod
    def defaults_for(cls, d_model: int, num_heads: int, num_kv_heads: int, head_dim: int) -> dict[str, Any]:
        """It has no options."""
        return {}

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        *,
        seq_idx: Tensor | None = None,
        state: MixerState | None = None,
        return_state: bool = False,
    ) -> Tensor | tuple[Tensor, MixerState]:
        """(b, l, d) of zeros."""
        output = torch.zeros_like(hidden_states)
        return (output, self.init_state(len(output))) if return_state else output

    def step(
        self, hidden_states: Tensor, state: MixerState, attention_mask: Tensor | None = None
    ) -> tuple[Tensor, MixerState]:
        """(b, d) of zeros."""
        return torch.zeros_like(hidden_states), state

    def init_state(
        self, batch_size: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> MixerState:
        """There is nothing to remember."""
        empty = torch.zeros(batch_size, 0, device=device, dtype=dtype)
        return MixerState(empty, empty)

    def reset_parameters(self, init: Literal["identity", "random"] = "identity") -> None:
        """There is nothing to initialise."""


register_mixer("none", NoMixer)
