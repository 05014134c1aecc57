"""What a frozen teacher of Phi-1.5's size costs a GPU: at home there, in the host's memory, compiled, or on disk.

    python benchmarks/teacher_cost.py        # a minute; writes benchmarks/results/teacher_cost.json

An update of four samples of 2048 tokens, in bfloat16, with random weights. "offloaded" is ``engine.offload_teacher``,
"compiled" ``engine.compile_teacher``, "cached" a cache of `write_teacher_cache`: the 64 likeliest tokens (logits), or
hidden states of all blocks (hidden), read ahead out of the page cache.
"""

import gc
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from limbeck.data import BatchSampler, ReadAhead, TokenDataset, collate, micro_batches
from limbeck.distill import HiddenObjective, Keeping, LogitsObjective, StageStep, write_teacher_cache
from limbeck.recipes.driver import optimizer_of
from limbeck.training import World, compile_layers, offload_layers
from limbeck.training.parallel import Replicas
from limbeck.training.update import accumulate, apply
from plan import DEVICE, LENGTH, recipe_of, step_of

RESULT = Path(__file__).with_name("results") / "teacher_cost.json"
TEACHER, SAMPLES, UPDATES, WARM_UP = "microsoft/phi-1_5", 4, 4, 2
WAYS = ("at home", "offloaded", "compiled", "cached")


def cached(
    step: StageStep, objective: str, samples: TokenDataset, folder: str
) -> tuple[StageStep, Any, dict[str, Any]]:
    """The step without its teacher, what completes its batches, and what the cache costs."""
    hidden = objective == "hidden"
    keeping = Keeping(64, hidden="block" if hidden else None)
    begin = time.perf_counter()
    cache = write_teacher_cache(
        folder,
        step.teacher,
        lambda numbers: {"input_ids": collate(samples, numbers)["input_ids"].to(DEVICE)},
        samples=len(samples),
        about={"teacher": TEACHER, "fingerprint": {}, "data": "random tokens"},
        keeping=keeping,
        batch_size=SAMPLES,
    )
    size = sum(about["bytes"] for about in cache.manifest["files"].values())
    tokens = len(samples) * LENGTH
    about = {"bytes_per_token": size / tokens, "tokens_per_second_to_make": tokens / (time.perf_counter() - begin)}
    objective_ = HiddenObjective(cached=True) if hidden else LogitsObjective(cached_vocabulary=cache.vocabulary)
    read = cache.states if hidden else cache.rows
    return StageStep(step.student, objective_, None), lambda _, indices, batch: read(indices, batch), about


def measure(objective: str, way: str, folder: str) -> dict[str, Any]:
    """Median tokens per second, memory, and the losses."""
    torch.manual_seed(0)
    recipe = recipe_of("mohawk-phi-mamba", objective, TEACHER, SAMPLES)
    step, complete, about = step_of(recipe, objective, TEACHER), None, {}
    tokens = np.random.default_rng(0).integers(0, 50000, SAMPLES * UPDATES * LENGTH + 1)
    samples = TokenDataset(tokens, LENGTH)
    if way == "offloaded":
        step.teacher.cpu()
        offload_layers(step.teacher, DEVICE)
    elif way == "compiled":
        compile_layers(step.teacher)
    elif way == "cached":
        step, complete, about = cached(step, objective, samples, folder)
    optimizer = optimizer_of(step, recipe.stages[objective])
    module = Replicas(step, World.alone(DEVICE))
    module.prepare()
    read = micro_batches(samples, BatchSampler(len(samples), SAMPLES, seed=0), SAMPLES, complete=complete)
    batches = ReadAhead(read, WARM_UP + UPDATES, pinned=True)
    losses, seconds = [], []
    gc.collect()
    for number in range(WARM_UP + UPDATES):
        if number == WARM_UP:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
        start = time.perf_counter()
        figures = accumulate(module, batches(number), DEVICE, torch.bfloat16)
        apply(optimizer, 1e-4, 1.0)
        losses.append(figures["loss"].item())
        seconds.append(time.perf_counter() - start)
    return about | {
        "tokens_per_second": SAMPLES * LENGTH / statistics.median(seconds[WARM_UP:]),
        "peak_memory_gb": torch.cuda.max_memory_allocated() / 1e9,
        "losses": losses,
    }


def main() -> None:
    """Measure every way of every objective."""
    found: dict[str, Any] = {"card": torch.cuda.get_device_name(), "torch": torch.__version__, "samples": SAMPLES}
    for objective in ("hidden", "logits"):
        for way in WAYS:
            with tempfile.TemporaryDirectory() as folder:
                row = measure(objective, way, f"{folder}/cache")
            gc.collect()
            torch.cuda.empty_cache()
            print(objective, way, json.dumps(row), flush=True)
            found.setdefault(objective, {})[way] = row
            RESULT.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
