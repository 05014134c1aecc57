"""How near the demo's updates are to the time that their matrix products alone would take, on one CPU thread.

    python benchmarks/demo_floor.py                    # a minute; writes benchmarks/results/demo_floor.json
    python benchmarks/demo_floor.py --of runs/demo     # with the wall time of a demo that ran there, uninterrupted

Models, sizes, batches and optimisers are the demo's own. An update is timed by itself; then torch's profiler says what
its kernels take, what profiling adds included. For every shape that a product has, a plain float32 matrix product of
that shape is timed alone, with its factors in the cache: what all products together would take at that speed is the
floor. Attention's products count by half, as far as its mask lets them be computed. "other kernels" is what the rest of
torch's kernels take (norms, activations, softmax, sums, copies, AdamW), "between kernels" what is in none: Python,
autograd, torch's dispatch. Students cannot begin before their teacher ends: "updates in order" is the teacher's time
and half of the students', which two workers share.
"""

import argparse
import inspect
import json
import math
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM

import limbeck
from limbeck.demo import demo, way_of
from limbeck.demo.teacher import SAMPLES_PER_STEP, TEACHER_STEPS, teacher_config
from limbeck.distill import LogitsObjective, StageStep, make_objective
from limbeck.recipes import load_recipe
from limbeck.recipes.driver import optimizer_of
from limbeck.students import student_config
from limbeck.training import World, make_adamw, parameter_groups
from limbeck.training.parallel import Replicas
from limbeck.training.update import accumulate, apply

RESULTS = Path(__file__).parent / "results"
CPU = torch.device("cpu")
RECIPE = load_recipe("demo")
LENGTH = RECIPE.data.sequence_length
VOCABULARY = teacher_config().vocab_size
ATTENTION = "aten::_scaled_dot_product_flash_attention_for_cpu"
FACTORS = {"mm": slice(2), "bmm": slice(2), "addmm": slice(1, 3), "baddbmm": slice(1, 3)}
TURNS, UPDATES = 8, 5

Update = Callable[[], object]
Product = tuple[int, int, int, int]
"""Of (b, m, k) with (b, k, n)."""
Kernels = dict[tuple[str, str], tuple[Any, float]]
"""By kernel and shapes, torch's event and the shortest time that it took in one update."""


# --- the demo's updates -----------------------------------------------------------------------------------------------


def from_text(config: Any) -> Update:
    """An update of the demo's teacher, or of its twin without attention: see `limbeck.demo.teacher`."""
    model = AutoModelForCausalLM.from_config(config).train()
    step = StageStep(model, LogitsObjective(kl_weight=0.0, ce_weight=1.0))
    groups = parameter_groups(step.named_parameters(), mixer_parameters=(), lr=4e-3)
    return update(step, make_adamw(groups), SAMPLES_PER_STEP, SAMPLES_PER_STEP)


def of_stage(name: str, teacher: Any) -> Update:
    """An update of one stage of the demo's recipe."""
    stage: Any = RECIPE.stages[name]
    student = limbeck.convert(teacher, mixer=RECIPE.student.mixer, init=RECIPE.student.init).train()
    step = StageStep(student, make_objective(stage.objective, **stage.objective_options()), teacher, stage.trainable)
    return update(step, optimizer_of(step, stage), stage.samples_per_step(LENGTH), stage.micro_batch)


def update(step: StageStep, optimizer: torch.optim.Optimizer, samples: int, micro_batch: int) -> Update:
    """One update on random tokens at a learning rate that leaves the weights where they are."""
    replicas = Replicas(step, World.alone(CPU))
    ids = torch.randint(VOCABULARY, (samples, LENGTH + 1))
    batches = [{"input_ids": part[:, :-1], "labels": part[:, 1:]} for part in ids.split(micro_batch)]

    def run() -> None:
        accumulate(replicas, batches, CPU, None)
        apply(optimizer, 1e-9, 1.0)

    return run


def updates_of_demo() -> dict[str, int]:
    """How many updates of each kind the demo makes by default."""
    seeds = inspect.signature(demo).parameters["seeds"].default
    counts = {"teacher": TEACHER_STEPS, "without attention": TEACHER_STEPS}
    for way in ("mohawk", "logits-only"):
        for name, stage in way_of(RECIPE, way, 0).stages.items():
            counts[name] = counts.get(name, 0) + seeds * stage.steps
    return counts


# --- their products ---------------------------------------------------------------------------------------------------


def products_of(name: str, shapes: list[list[int]]) -> list[tuple[Product, float]]:
    """The matrix products of a kernel by its inputs' shapes, and how much of each is computed; none for others."""
    if name.startswith(ATTENTION):
        b, h, l, p = shapes[1 if name.endswith("backward") else 0]
        scores, values = (b * h, l, p, l), (b * h, l, l, p)
        backward = [scores, scores, values, values, values]  # the scores again, and dP; dV, dQ and dK
        return [(product, 0.5) for product in (backward if name.endswith("backward") else [scores, values])]
    factors = FACTORS.get(name.removeprefix("aten::").rstrip("_"))
    if factors is None:
        return []
    first, second = shapes[factors]
    return [((first[0] if len(first) == 3 else 1, *first[-2:], second[-1]), 1.0)]


def alone(product: Product) -> float:
    """Seconds that a product takes alone."""
    b, m, k, n = product
    one, other, out = torch.randn(b, m, k), torch.randn(b, k, n), torch.empty(b, m, n)
    if b == 1:
        one, other, out = one[0], other[0], out[0]
    call = torch.mm if b == 1 else torch.bmm
    return fastest(lambda: call(one, other, out=out), max(3, min(1000, round(5e8 / math.prod(product)))))


def fastest(run: Update, repeats: int, turns: int = 3) -> float:
    """Seconds of a call, in the fastest of several turns, since other work shares the machine."""
    times = []
    run()
    for _ in range(turns):
        begin = time.perf_counter()
        for _ in range(repeats):
            run()
        times.append((time.perf_counter() - begin) / repeats)
    return min(times)


# --- where their time goes --------------------------------------------------------------------------------------------


def add_profile(kernels: Kernels, run: Update) -> None:
    """Profile one update, and keep for each kernel and its shapes the shorter time."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as found:
        run()
    for event in found.key_averages(group_by_input_shape=True):
        if event.key.startswith("aten::"):
            key = (event.key, str(event.input_shapes))
            before = kernels[key][1] if key in kernels else math.inf
            kernels[key] = (event, min(before, event.self_cpu_time_total / 1e6))


def examined(kernels: Kernels, seconds: float, ceiling: dict[Product, float]) -> dict[str, Any]:
    """Where an update's seconds go, and its floor."""
    taken = {"matrix products": 0.0, "attention": 0.0, "other kernels": 0.0}
    operations, floor = 0.0, 0.0
    others: dict[str, float] = {}
    for event, spent in kernels.values():
        products = products_of(event.key, event.input_shapes)
        if products:
            taken["attention" if event.key.startswith(ATTENTION) else "matrix products"] += spent
            operations += event.count * sum(2 * math.prod(product) * part for product, part in products)
            floor += event.count * sum(ceiling[product] * part for product, part in products)
        else:
            taken["other kernels"] += spent
            others[event.key] = others.get(event.key, 0.0) + spent
    in_products = taken["matrix products"] + taken["attention"]
    most = sorted(others.items(), key=lambda item: -item[1])[:8]
    between = {"between kernels": seconds - sum(taken.values())}
    return {
        "update_ms": ms(seconds),
        "ms": {name: ms(spent) for name, spent in (taken | between).items()},
        "largest_other_kernels_ms": {name.removeprefix("aten::"): ms(spent) for name, spent in most},
        "gflop": round(operations / 1e9, 3),
        "products_gflop_per_second": round(operations / in_products / 1e9, 1),
        "ceiling_gflop_per_second": round(operations / floor / 1e9, 1),
        "floor_ms": ms(floor),
        "floor_over_update": round(floor / seconds, 3),
        "kernels_of_products_over_update": round(in_products / seconds, 3),
    }


def ms(seconds: float) -> float:
    return round(1e3 * seconds, 2)


def walls(folder: Path) -> dict[str, float]:
    """The wall time of a demo, and the part of it from the end of its first update to that of its last."""
    lines = [line for file in folder.glob("**/metrics.jsonl") for line in file.read_text().splitlines()]
    ends = [entry["time"] for entry in map(json.loads, lines) if "grad_norm" in entry]
    wall = json.loads((folder / "results.json").read_text())["seconds"]
    return {"demo_wall_seconds": round(wall, 1), "demo_updating_seconds": round(max(ends) - min(ends), 1)}


# --- all of it --------------------------------------------------------------------------------------------------------


def main(folder: Path | None) -> None:
    torch.set_num_threads(1)  # as the demo's workers have
    torch.manual_seed(0)
    teacher = AutoModelForCausalLM.from_config(teacher_config()).eval()
    runs = {
        "teacher": from_text(teacher_config()),
        "without attention": from_text(student_config(teacher_config(), mixer="none", init="random")),
        **{name: of_stage(name, teacher) for name in RECIPE.stages},
    }
    times: dict[str, float] = dict.fromkeys(runs, math.inf)
    kernels: dict[str, Kernels] = {name: {} for name in runs}
    for _ in range(TURNS):  # turn and turn about
        for name, run in runs.items():
            times[name] = min(times[name], fastest(run, UPDATES, 1))
            add_profile(kernels[name], run)
    events = [event for found in kernels.values() for event, _ in found.values()]
    shapes = {product for event in events for product, _ in products_of(event.key, event.input_shapes)}
    ceiling: dict[Product, float] = dict.fromkeys(shapes, math.inf)
    for _ in range(TURNS):
        for product in shapes:
            ceiling[product] = min(ceiling[product], alone(product))
    counts = updates_of_demo()
    stages: dict[str, Any] = {}
    for name in runs:
        stages[name] = {"updates": counts[name], **examined(kernels[name], times[name], ceiling)}
        print(name, json.dumps(stages[name]), flush=True)
    result: dict[str, Any] = {
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "threads": torch.get_num_threads(),
        },
        "samples": SAMPLES_PER_STEP,
        "sequence_length": LENGTH,
        "stages": stages,
        "updates_seconds": round(sum(counts[name] * times[name] for name in runs), 1),
        "floor_seconds": round(sum(counts[name] * stages[name]["floor_ms"] for name in runs) / 1e3, 1),
        "updates_in_order_seconds": round(
            counts["teacher"] * times["teacher"] + sum(counts[name] * times[name] for name in RECIPE.stages) / 2, 1
        ),
    }
    result["floor_over_updates"] = round(result["floor_seconds"] / result["updates_seconds"], 3)
    if folder is not None:
        result |= walls(folder)
    print({key: value for key, value in result.items() if key != "stages"})
    (RESULTS / "demo_floor.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--of", type=Path, metavar="FOLDER")
    main(parser.parse_args().of)
