"""Which layers keep attention: those with the greatest gain against evenly spaced ones (docs/evaluation.md).

The teacher is a GPT-NeoX of six layers, trained here to recall: pairs of a key and a value, a token each, then the
keys alone, in another order, each followed by its value. A student with a mixer in every layer is aligned with it
(stage `hidden`, then `logits`) and scored. Then hybrids are made anew from the teacher, with attention in the layers
that scored best and in evenly spaced ones, and distilled like the student, on as many tokens. Three seeds: of the
mixers' start and of the data.

    OMP_NUM_THREADS=1 python benchmarks/keep_attention.py

takes some minutes on one core; with the argument `every`, hybrids with each single layer are distilled too.
"""

import json
import platform
import statistics
import sys
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, GPTNeoXConfig

import limbeck
from limbeck.distill import HiddenObjective, LogitsObjective, Objective
from limbeck.evaluation import LayerScore, agreement, choose_layers, score_layers

RESULT = Path(__file__).parent / "results" / "keep_attention.json"
LAYERS, WIDTH, HEADS, KEYS, VALUES, PAIRS = 6, 64, 2, 32, 16, 24
TEACHER_STEPS, HIDDEN_STEPS, LOGITS_STEPS, BATCH = 500, 60, 60, 32
SEEDS = (0, 1, 2)
KEPT = (1, 2)


def recall_batch(generator: torch.Generator, size: int = BATCH) -> dict[str, torch.Tensor]:
    """Samples (b, 3·PAIRS - 1): pairs, then keys in another order, each with its value; these values are labels."""
    keys = torch.rand(size, KEYS, generator=generator).argsort(-1)[:, :PAIRS]  # (b, n)
    values = torch.randint(VALUES, (size, PAIRS), generator=generator)
    order = torch.rand(size, PAIRS, generator=generator).argsort(-1)
    asked = torch.stack([keys.gather(1, order), KEYS + values.gather(1, order)], -1).flatten(1)
    tokens = torch.cat([KEYS + VALUES + keys * VALUES + values, asked], -1)
    labels = tokens[:, 1:].clone()
    labels[:, :PAIRS] = -100
    labels[:, PAIRS + 1 :: 2] = -100  # which key comes next is chance
    return {"input_ids": tokens[:, :-1], "labels": labels}


@torch.no_grad()
def recalled(model: torch.nn.Module) -> float:
    """Share of the values that are recalled; chance is 1/VALUES."""
    batch = recall_batch(torch.Generator().manual_seed(123), 256)
    found = model(input_ids=batch["input_ids"], use_cache=False).logits.argmax(-1)
    asked = batch["labels"] != -100
    return (found == batch["labels"])[asked].double().mean().item()


def learn(model, teacher, objective: Objective, steps: int, lr: float, seed: int) -> None:
    chosen = objective.trainable(model)
    parameters = []
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in chosen)
        parameters += [parameter] if name in chosen else []
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / (0.1 * steps)) * (1 - 0.9 * step / steps)
    )
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        losses = objective(model, teacher, recall_batch(generator))
        losses["loss"].backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 100 == 99:
            print(f"  {objective.name} {step + 1}: {losses['loss'].item():.4f}", file=sys.stderr)


def make_teacher():
    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=KEYS + VALUES + KEYS * VALUES,
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        intermediate_size=2 * WIDTH,
        max_position_embeddings=3 * PAIRS,
        bos_token_id=None,
        eos_token_id=None,
        initializer_range=0.05,
        use_parallel_residual=False,
    )
    teacher = AutoModelForCausalLM.from_config(config).train()
    learn(teacher, None, LogitsObjective(kl_weight=0.0, ce_weight=1.0), TEACHER_STEPS, 3e-3, seed=1)
    return teacher.eval().requires_grad_(False)


def distil(teacher, kept: list[int], seed: int):
    student = limbeck.convert(teacher, keep_attention=kept, seed=seed).train()
    learn(student, teacher, HiddenObjective(), HIDDEN_STEPS, 2e-3, seed=100 + seed)
    learn(student, teacher, LogitsObjective(), LOGITS_STEPS, 1e-3, seed=200 + seed)
    return student.eval()


def evenly(count: int) -> list[int]:
    """In the middle of `count` equal parts."""
    return [int((part + 0.5) * LAYERS / count) for part in range(count)]


def measured(teacher, student) -> dict[str, float]:
    batches = [recall_batch(torch.Generator().manual_seed(77), 128)]
    return {"recall": recalled(student), "kl": agreement(student, teacher, batches).kl}


def main() -> None:
    started = time.monotonic()
    torch.set_num_threads(1)
    teacher = make_teacher()
    print(f"teacher recalls {recalled(teacher):.1%} after {time.monotonic() - started:.0f} s", file=sys.stderr)
    scoring = [recall_batch(torch.Generator().manual_seed(55 + index)) for index in range(4)]
    rows: dict[str, list[dict]] = {}
    ranked: list[list[LayerScore]] = []
    for seed in SEEDS:
        pure = distil(teacher, [], seed)
        scores = score_layers(teacher, pure, scoring)
        ranked.append(scores)
        rows.setdefault("no attention", []).append({"kept": [], **measured(teacher, pure)})
        tries = {f"auto:{count}": choose_layers(scores, count) for count in KEPT}
        tries |= {f"{count} evenly spaced": evenly(count) for count in KEPT}
        if sys.argv[1:] == ["every"]:
            tries |= {f"layer {layer}": [layer] for layer in range(LAYERS)}
        for name, kept in tries.items():
            rows.setdefault(name, []).append({"kept": kept, **measured(teacher, distil(teacher, kept, seed))})
            print(f"seed {seed}, {name}: {rows[name][-1]}", file=sys.stderr)
    result = {
        "machine": {"processor": platform.processor() or platform.machine(), "torch": torch.__version__},
        "tokens": (HIDDEN_STEPS + LOGITS_STEPS) * BATCH * (3 * PAIRS - 1),
        "chance": 1 / VALUES,
        "teacher": recalled(teacher),
        "scores": [[score.as_json() for score in scores] for scores in ranked],
        "students": rows,
        "seconds": round(time.monotonic() - started),
    }
    RESULT.write_text(json.dumps(result, indent=2) + "\n")
    print("| attention kept | layers, by seed | recalled | KL to the teacher |")
    print("|---|---|---|---|")
    for name, tries in rows.items():
        kept = "; ".join(", ".join(map(str, row["kept"])) or "–" for row in tries)
        recall, kl = (statistics.fmean(row[figure] for row in tries) for figure in ("recall", "kl"))
        print(f"| {name} | {kept} | {recall:.1%} | {kl:.3f} |")
    print(f"\nteacher {result['teacher']:.1%}, chance {1 / VALUES:.1%}; {result['seconds']} s")


if __name__ == "__main__":
    main()
