"""What `limbeck plan` predicts beside what a GPU does: memory and tokens per second of an update of every objective.

    python benchmarks/plan.py                   # everything; writes results/plan.json
    python benchmarks/plan.py H200 logits       # what the table says of that card, and these objectives

Models have random weights and are made on the device. An update is what a run does: teacher, student, backward, clip,
AdamW; float32 weights, bfloat16 autocast, one micro-batch. ``efficiency`` is what belongs into `limbeck.plan.CARDS`.
"""

import gc
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from timing import copy_bandwidth, matmul_rate
from transformers import AutoModelForCausalLM

from limbeck.distill import GuidedStep, StageStep, TargetGuide, make_objective
from limbeck.plan import CARDS, estimate
from limbeck.plan.shapes import config_of
from limbeck.recipes import load_recipe
from limbeck.recipes.driver import optimizer_of
from limbeck.recipes.schema import LayerwiseStage, Recipe
from limbeck.students import student_config
from limbeck.students.activations import fuse_activations
from limbeck.training import World
from limbeck.training.parallel import Replicas
from limbeck.training.update import accumulate, apply

RESULTS = Path(__file__).with_name("results") / "plan.json"
DEVICE = torch.device("cuda")
LENGTH, WARM_UP, TIMED = 2048, 2, 4
SIZES = {  # teacher and samples of an update; the first and third set the table, the second and fourth check it
    "mohawk-phi-mamba": [
        ("microsoft/phi-1_5", 4),
        ("microsoft/phi-1_5", 8),
        ("EleutherAI/pythia-410m", 4),
        ("EleutherAI/pythia-160m", 8),
    ],
    "cald-target-guided": [
        ("EleutherAI/pythia-1b", 8),
        ("EleutherAI/pythia-1b", 4),
        ("EleutherAI/pythia-410m", 4),
        ("EleutherAI/pythia-160m", 8),
    ],
}


def recipe_of(name: str, objective: str, teacher: str, samples: int) -> Recipe:
    """A recipe with the stage of one objective, whose updates are one micro-batch."""
    stage = f"stages.{objective}"
    settings = [
        f"data.sequence_length={LENGTH}",
        f"{stage}.tokens_per_step={samples * LENGTH}",
        f"{stage}.micro_batch={samples}",
        f"{stage}.steps=100",
    ]
    if name.startswith("cald"):
        width = config_of(teacher).hidden_size  # type: ignore[attr-defined]
        settings += [f"{stage}.decay=100", "precision=bfloat16"]
        settings += [] if teacher.endswith("1b") else [f"mixer.d_inner={2 * width}", f"mixer.dt_rank={width // 16}"]
    recipe = load_recipe(name, settings)
    return recipe.model_copy(update={"stages": {objective: recipe.stages[objective]}})


def step_of(recipe: Recipe, objective: str, teacher: str) -> StageStep:
    """The stage's step module with random weights, as `limbeck.recipes.driver` makes it."""
    config, table, stage = config_of(teacher), recipe.student, recipe.stages[objective]
    made = student_config(config, table.mixer, table.keep_attention, table.init, table.mixer_kwargs)
    with DEVICE:
        student = AutoModelForCausalLM.from_config(made, dtype=torch.float32).train()
        followed = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    fuse_activations(followed)
    goal = make_objective(objective, **stage.objective_options())
    if not isinstance(stage, LayerwiseStage):
        return StageStep(student, goal, followed, stage.trainable)
    step = GuidedStep(student, goal, TargetGuide(lambda: followed, 1), stage.trainable)
    step.enter(0)
    return step


def measure(recipe: Recipe, objective: str, teacher: str) -> dict[str, float]:
    """Median tokens per second of updates, and the most memory that they hold."""
    torch.manual_seed(0)
    stage = recipe.stages[objective]
    step = step_of(recipe, objective, teacher)
    optimizer = optimizer_of(step, stage)
    module = Replicas(step, World.alone(DEVICE))
    module.prepare()
    tokens = torch.randint(0, 50000, (stage.micro_batch, LENGTH + 1))
    batch = {"input_ids": tokens[:, :-1].contiguous(), "labels": tokens[:, 1:].contiguous()}
    seconds: list[float] = []
    for number in range(WARM_UP + TIMED):
        if number == WARM_UP:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        accumulate(module, [batch], DEVICE, torch.bfloat16)
        apply(optimizer, stage.lr, stage.clip)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return {
        "tokens_per_second": stage.micro_batch * LENGTH / statistics.median(seconds[WARM_UP:]),
        "memory": torch.cuda.max_memory_allocated(),
    }


def compared(card: str, name: str, objective: str, teacher: str, samples: int) -> dict[str, Any]:
    """One configuration, predicted and measured."""
    recipe = recipe_of(name, objective, teacher, samples)
    planned = estimate(recipe, teacher=teacher, gpu=card)["stages"][objective]
    row: dict[str, Any] = {"objective": objective, "teacher": teacher, "samples": samples}
    row |= {"planned": {key: planned[key] for key in ("tokens_per_second", "memory", "flops_per_token", "launches")}}
    try:
        found = measure(recipe, objective, teacher)
    except torch.OutOfMemoryError as error:
        return row | {"measured": f"out of memory: {error}"[:200]}
    used = CARDS[card].efficiency_at(objective, planned["flops_per_token"] * samples * LENGTH)
    return row | {
        "measured": found,
        "memory_error": planned["memory"]["total"] / found["memory"] - 1,
        "speed_error": planned["tokens_per_second"] / found["tokens_per_second"] - 1,
        "micro_batch_flops": planned["flops_per_token"] * samples * LENGTH,
        "efficiency": used * found["tokens_per_second"] / planned["tokens_per_second"],
    }


def main(arguments: list[str]) -> None:
    """Compare, and keep every row as soon as it is there."""
    card = next((name for name in arguments if name in CARDS), next(iter(CARDS)))
    objectives = [name for name in arguments if name not in CARDS] or ["logits", "layerwise", "hidden", "matrix"]
    rows: list[dict[str, Any]] = []
    facts: dict[str, Any] = {"card": torch.cuda.get_device_name(), "planned_for": card, "torch": torch.__version__}
    facts |= {"memory": torch.cuda.get_device_properties(DEVICE).total_memory}
    facts |= {"copy_bytes_per_second": copy_bandwidth(), "bf16_matmul_per_second": matmul_rate()}
    print(json.dumps(facts), flush=True)
    for place in range(4):
        for objective in objectives:
            name = "cald-target-guided" if objective == "layerwise" else "mohawk-phi-mamba"
            gc.collect()
            torch.cuda.empty_cache()
            row = compared(card, name, objective, *SIZES[name][place])
            rows.append(row | {"sets_the_table": place % 2 == 0})
            print(json.dumps(rows[-1]), flush=True)
            RESULTS.write_text(json.dumps(facts | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
