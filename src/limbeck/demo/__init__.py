"""The demo: train a small teacher on the standard library's source, distil it, compare, in minutes on two cores.

Everything lies under one folder, and a demo that was interrupted goes on where it was::

    runs/demo/
      corpus/               training.jsonl, held-out.jsonl: the standard library, split by file
      teacher/              a GPT-NeoX with its tokenizer; training/ holds its checkpoints and metrics
      without-attention/    the same network with its mixers put to zero, trained on as many tokens
      seed-0/mohawk/        a run of the three stages; seed-0/logits-only/ spends the same tokens on the last alone
      results.json          every figure of the table
      evaluation/           the first student's matrices beside the teacher's, for the report
      report.html           the same as a page, with the curves (with the extra `report`)
      log.txt               what the working processes had to say
"""

import json
import os
import time
from pathlib import Path
from typing import Literal

from transformers.utils.logging import disable_progress_bar

from limbeck.demo.compare import DemoResult, compare
from limbeck.demo.corpus import train_tokenizer, write_corpus
from limbeck.demo.folder import Folder
from limbeck.demo.teacher import TEACHER_STEPS, NoMixer, teacher_config, train_from_text
from limbeck.demo.workers import Workers
from limbeck.errors import LimbeckError
from limbeck.evaluation import inspect_folder
from limbeck.files import write_text
from limbeck.progress import say
from limbeck.recipes import Recipe, distill, load_recipe
from limbeck.recipes.folder import RunFolder
from limbeck.report import can_report, write_report

__all__ = ["DemoResult", "NoMixer", "demo", "teacher_config", "train_tokenizer"]

Way = Literal["mohawk", "logits-only"]


def demo(output: str | Path = "runs/demo", *, seed: int = 0, seeds: int = 3, workers: int | None = None) -> DemoResult:
    """Run the demo, or what is left of it.

    Args:
        output: Its folder; one that holds another demo is refused.
        seed: Of the corpus split, the teacher and the first student; the other students' follow it.
        seeds: How many students each way of distilling makes.
        workers: Processes to train in, by default one a core, at most two. It changes no figure.
    """
    started = time.monotonic()
    disable_progress_bar()  # transformers' own, for loading and saving: models this small need none
    if seeds < 1:
        raise LimbeckError(f"{seeds} seeds", expected="1 or more")
    recipe = load_recipe("demo")
    identity = {"demo": recipe.model_dump(mode="json"), "seed": seed, "teacher_steps": TEACHER_STEPS}
    run = RunFolder(output, identity)  # ours as long as we hold it
    folder = Folder(run.path)
    write_corpus(folder, seed)
    with Workers(workers or min(2, os.cpu_count() or 1), folder.path / "log.txt") as pool:
        pool.run(
            "training the teacher, and the same network without attention",
            [(train_from_text, folder, "teacher", seed), (train_from_text, folder, "without-attention", seed)],
            total=2 * TEACHER_STEPS,
            done=lambda: folder.updates("training/*/metrics.jsonl"),
        )
        ways: list[Way] = ["mohawk", "logits-only"]
        updates = sum(sum(s.steps for s in way_of(recipe, way, 0).stages.values()) for way in ways)
        pool.run(
            f"distilling {2 * seeds} students",
            [(distill_student, folder, way, recipe, seed + i) for i in range(seeds) for way in ways],
            total=seeds * updates,
            done=lambda: folder.updates("seed-*/*/metrics.jsonl"),
        )
        say("evaluating on the held-out files")
        result = compare(folder, recipe, [seed + i for i in range(seeds)], pool, started)
    write_text(folder.path / "results.json", json.dumps(result.as_json(), indent=1))
    _inspect(folder, seed)
    if can_report():
        say(f"report in {write_report(folder.path)[0]}")
    else:
        say("no report.html: pip install 'limbeck[report]', then limbeck report " + str(folder.path))
    return result


def _inspect(folder: Folder, seed: int) -> None:
    """Lay the first student's matrices beside the teacher's, for the report."""
    student, held_out = folder.run("mohawk", seed) / "student", folder.path / "corpus" / "held-out.jsonl"
    found = inspect_folder(student, folder.teacher, data=held_out, max_tokens=96, device="cpu")
    (folder.path / "evaluation").mkdir(exist_ok=True)
    write_text(folder.path / "evaluation" / "inspect.json", json.dumps(found.as_json()))


def way_of(recipe: Recipe, way: Way, seed: int) -> Recipe:
    """The demo's recipe with a seed, whole or with all its tokens on the last stage."""
    values = recipe.model_dump()
    values["data"]["seed"] = values["student"]["seed"] = seed
    if way == "logits-only":
        last = values["stages"]["logits"]
        values |= {"name": "demo-logits-only", "stages": {"logits": {**last, "tokens": recipe.tokens}}}
    return Recipe.model_validate(values)


def distill_student(folder: Folder, way: Way, recipe: Recipe, seed: int) -> None:
    """Make one student, or go on where it was interrupted."""
    distill(
        way_of(recipe, way, seed),
        output=folder.run(way, seed),
        teacher=folder.teacher,
        data=folder.path / "corpus" / "training.npy",
        device="cpu",
    )
