"""What a student recalls: a two-layer teacher, students of it without attention, and students that keep one layer's.

The teacher is a small GPT-NeoX, trained here on associative recall, copying and repetition (`limbeck.evaluation`).
Students are made of it by the same two stages (hidden, logits) over the same batches: pure ones have mixers in both
layers, hybrid ones keep the attention of the second. Two seeds, of the mixers' start and of the batches.

    OMP_NUM_THREADS=1 python benchmarks/recall.py

takes some minutes on one core and prints the table of docs/evaluation.md.
"""

import json
import platform
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, GPTNeoXConfig, PreTrainedModel

import limbeck
from limbeck.distill import HiddenObjective, LogitsObjective, StageStep, mixer_parameters
from limbeck.evaluation import TOKEN_TASKS, RecallSettings, recall
from limbeck.training import make_adamw, make_schedule, parameter_groups

RESULT = Path(__file__).parent / "results" / "recall.json"
VOCABULARY, WIDTH, LENGTH = 64, 64, 64
LENGTHS, TOKENS = (
    (16, 32, 64),
    1024,
)  # of what is trained on: short questions first show what is asked; tokens of a task
TEACHER_STEPS, HIDDEN_STEPS, LOGITS_STEPS, SEEDS = 1000, 200, 400, (0, 1)
TEACHER_LR, HIDDEN_LR, LOGITS_LR = 3e-3, 3e-3, 2e-3
KEPT = {"pure": (), "hybrid": (1,)}
SETTINGS = RecallSettings(tasks=tuple(TOKEN_TASKS), lengths=(LENGTH,), count=512, batch_size=256, seed=1_000_000)


def teacher_model() -> PreTrainedModel:
    return AutoModelForCausalLM.from_config(
        GPTNeoXConfig(
            vocab_size=VOCABULARY,
            hidden_size=WIDTH,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=2 * WIDTH,
            max_position_embeddings=LENGTH,
            rotary_pct=1.0,
            bos_token_id=0,
            eos_token_id=0,
        )
    )


def batch(rng: np.random.Generator) -> dict[str, torch.Tensor]:
    """Some questions of each task, (3 · b, l - 1)."""
    length = int(rng.choice(LENGTHS))
    parts = [make(np.arange(VOCABULARY), length, TOKENS // length, rng).batch() for make in TOKEN_TASKS.values()]
    return {name: torch.cat([part[name] for part in parts]) for name in ("input_ids", "labels")}


def train(step: StageStep, steps: int, lr: float, rng: np.random.Generator, title: str) -> None:
    """So many updates, each on a fresh batch."""
    groups = parameter_groups(step.named_parameters(), mixer_parameters=mixer_parameters(step.student), lr=lr)
    optimizer = make_adamw(groups)
    schedule = make_schedule("wsd", total_steps=steps, peak=lr, warmup=0.05, decay=0.4)
    step.train()
    for index in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = schedule(index)
        losses = step(batch(rng))
        losses["loss"].backward()
        torch.nn.utils.clip_grad_norm_(step.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if index % 200 == 0 or index == steps - 1:
            print(f"{title} {index} loss {losses['loss'].item():.4f}", file=sys.stderr)


def trained_teacher() -> PreTrainedModel:
    torch.manual_seed(0)
    model = teacher_model()
    step = StageStep(model, LogitsObjective(kl_weight=0.0, ce_weight=1.0))
    train(step, TEACHER_STEPS, TEACHER_LR, np.random.default_rng(0), "teacher")
    return model.eval()


def distilled(teacher: PreTrainedModel, kept: tuple[int, ...], seed: int) -> PreTrainedModel:
    student = limbeck.convert(teacher, keep_attention=kept, seed=seed)
    rng = np.random.default_rng([1, seed])
    title = f"student that keeps {list(kept)}, seed {seed}:"
    train(StageStep(student, HiddenObjective(), teacher), HIDDEN_STEPS, HIDDEN_LR, rng, f"{title} hidden")
    train(StageStep(student, LogitsObjective(), teacher), LOGITS_STEPS, LOGITS_LR, rng, f"{title} logits")
    return student.eval()


def shares(model: PreTrainedModel) -> dict[str, float]:
    """Task → share of right answers."""
    return {r.task: r.correct / r.count for r in recall(model, settings=SETTINGS).models[0].results}


def main() -> None:
    started = time.monotonic()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    untrained = limbeck.convert(teacher_model(), init="random")
    chance = {r.task: r.chance for r in recall(untrained, settings=SETTINGS).models[0].results}
    teacher = trained_teacher()
    found = {"teacher": [shares(teacher)], "random student": [shares(untrained)]}
    print(found, file=sys.stderr)
    for name, kept in KEPT.items():
        found[name] = [shares(distilled(teacher, kept, seed)) for seed in SEEDS]
        print(name, found[name], f"{time.monotonic() - started:.0f} s", file=sys.stderr)
    tokens_per_step = len(TOKEN_TASKS) * TOKENS
    result = {
        "machine": {"processor": platform.processor() or platform.machine(), "torch": torch.__version__},
        "length": LENGTH,
        "questions": SETTINGS.count,
        "tokens": {
            "teacher": TEACHER_STEPS * tokens_per_step,
            "student": (HIDDEN_STEPS + LOGITS_STEPS) * tokens_per_step,
        },
        "seeds": SEEDS,
        "chance": chance,
        "correct": found,
        "seconds": round(time.monotonic() - started),
    }
    RESULT.write_text(json.dumps(result, indent=2) + "\n")
    print("| model | " + " | ".join(TOKEN_TASKS) + " |")
    print("|---" * (1 + len(TOKEN_TASKS)) + "|")
    for name, runs in {**found, "guessing": [chance]}.items():
        print(f"| {name} | " + " | ".join(_spread([run[task] for run in runs]) for task in TOKEN_TASKS) + " |")
    print(f"\n{result['seconds']} s")


def _spread(values: list[float]) -> str:
    mean = f"{statistics.fmean(values):.1%}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.1%} – {max(values):.1%})"


if __name__ == "__main__":
    main()
