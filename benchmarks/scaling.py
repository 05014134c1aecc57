"""Two GPUs beside one: the same updates in one process, in two with copies (DDP) and in two with parts (FSDP2).

    torchrun --nproc-per-node 2 benchmarks/scaling.py                  # writes results/scaling.json
    torchrun --nproc-per-node 2 benchmarks/scaling.py matrix logits    # these objectives

An update is ACCUMULATED micro-batches, dealt out to the processes; weights are random and the same everywhere. "alone"
is measured on every GPU at once, without a word between them. Losses are those of the same batches, so that what
differs is the order of sums.
"""

import gc
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

from limbeck.distill import GuidedStep, StageStep
from limbeck.recipes.driver import optimizer_of
from limbeck.training import World, shard_step, shard_teacher
from limbeck.training.parallel import Replicas
from limbeck.training.update import accumulate, apply
from plan import LENGTH, recipe_of, step_of

RESULTS = Path(__file__).with_name("results") / "scaling.json"
ACCUMULATED, WARM_UP, TIMED = 4, 2, 3
CASES = {
    "matrix": ("mohawk-phi-mamba", "microsoft/phi-1_5", 16),
    "hidden": ("mohawk-phi-mamba", "microsoft/phi-1_5", 12),
    "logits": ("mohawk-phi-mamba", "microsoft/phi-1_5", 12),
    "layerwise": ("cald-target-guided", "EleutherAI/pythia-1b", 8),
}
"""Recipe, teacher and samples of a micro-batch: with few the host is the limit, and FSDP asks more of it."""


def batches(update: int, samples: int, world: World) -> list[dict[str, torch.Tensor]]:
    """A process's micro-batches of an update."""
    generator = torch.Generator().manual_seed(update)
    tokens = torch.randint(0, 50000, (ACCUMULATED, samples, LENGTH + 1), generator=generator)
    share = ACCUMULATED // world.size
    own = tokens[world.rank * share : (world.rank + 1) * share]
    return [{"input_ids": part[:, :-1].contiguous(), "labels": part[:, 1:].contiguous()} for part in own]


def spread(step: StageStep, world: World) -> None:
    """Shard student and teacher, as a run with ``engine.parallel = "fsdp"`` does."""
    mesh = world.mesh()
    teacher = step.guide.teacher if isinstance(step, GuidedStep) else step.teacher
    if teacher is not None:
        shard_teacher(teacher, mesh)
    shard_step(step, mesh)


def measure(objective: str, world: World, sharded: bool) -> dict[str, Any]:
    """Losses of the first updates, median tokens per second of all processes, and memory of one."""
    name, teacher, samples = CASES[objective]
    recipe = recipe_of(name, objective, teacher, samples)
    torch.manual_seed(0)
    step = step_of(recipe, objective, teacher)
    if sharded:
        spread(step, world)
    gc.collect()
    torch.cuda.empty_cache()
    optimizer = optimizer_of(step, recipe.stages[objective])
    module = Replicas(step, world)
    module.prepare()
    losses: list[torch.Tensor] = []
    seconds: list[float] = []
    for number in range(WARM_UP + TIMED):
        given = batches(number, samples, world)
        if number == WARM_UP:
            torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
        start = time.perf_counter()
        figures = accumulate(module, given, world.device, torch.bfloat16)
        apply(optimizer, 1e-4, 1.0)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
        losses.append(world.mean(figures["loss"]))
    return {
        "tokens_per_second": ACCUMULATED * samples * LENGTH / statistics.median(seconds[WARM_UP:]),
        "peak_memory_gb": torch.cuda.max_memory_allocated() / 1e9,
        "losses": [loss.item() for loss in losses],
    }


def main(objectives: list[str]) -> None:
    """Measure every objective in the three ways; what does not run is its result."""
    facts: dict[str, Any] = {"card": torch.cuda.get_device_name(), "torch": torch.__version__, "objectives": {}}
    with World.join("cuda") as world:
        facts["processes"] = world.size
        for objective in objectives or CASES:
            rows: dict[str, Any] = {}
            ways = {"alone": (World.alone(world.device), False), "ddp": (world, False), "fsdp": (world, True)}
            for way, (these, sharded) in ways.items():
                gc.collect()
                torch.cuda.empty_cache()
                world.agree([0])
                rows[way] = measure(objective, these, sharded)
                if way != "alone":
                    rows[way]["speed_up"] = rows[way]["tokens_per_second"] / rows["alone"]["tokens_per_second"]
                    pairs = zip(rows[way]["losses"], rows["alone"]["losses"], strict=True)
                    rows[way]["loss_difference"] = max(abs(one - other) / abs(other) for one, other in pairs)
                if world.main:
                    print(objective, way, json.dumps(rows[way]), flush=True)
                    facts["objectives"][objective] = rows
                    RESULTS.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
