"""What the demo measures on the held-out files, and how it shows it."""

import math
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Group
from rich.table import Table
from rich.text import Text
from torch import Tensor

from limbeck.data import TokenDataset, collate
from limbeck.demo.corpus import VOCABULARY
from limbeck.demo.folder import Folder
from limbeck.demo.workers import Workers
from limbeck.evaluation import agreement, perplexity
from limbeck.generation import generate
from limbeck.recipes import Recipe
from limbeck.students import load_model, load_tokenizer

PROMPTS = ("def __init__(self, ", "    if not isinstance(", "import os\nimport ")


@dataclass(frozen=True)
class DemoResult:
    """What the demo measured on the held-out files.

    Attributes:
        output: The demo's folder.
        perplexity: By row of the table, one value a seed (one in all where there are no seeds).
        gap_closed: Share of the log-perplexity gap between the network without attention and the teacher, likewise.
        agreement: Of the final students with the teacher: top-1 match and KL, one value a seed.
        samples: Continuations by teacher and student.
        seconds: What this call took; a demo that was resumed took longer in all.
    """

    output: Path
    perplexity: dict[str, list[float]]
    gap_closed: dict[str, list[float]]
    agreement: dict[str, list[float]]
    samples: list[dict[str, str]]
    seconds: float

    def as_json(self) -> dict[str, Any]:
        """One object of plain values."""
        return {**self.__dict__, "output": str(self.output)}

    def report(self) -> Group:
        """The table, how close the students are to the teacher, and a few lines by both, for a terminal."""
        top1, kl = (_spread(self.agreement[name], form) for name, form in (("top1", ".1%"), ("kl", ".3f")))
        parts: list[Any] = [self.table(), f"student and teacher: same top token {top1}, KL {kl} nats per token", ""]
        for sample in self.samples:
            for name in ("teacher", "student"):
                parts += [Text(f"{name}:", style="bold"), Text(sample["prompt"] + sample[name]), ""]
        parts.append(f"{self.seconds:.0f} s; all of it in {self.output}")
        return Group(*parts)

    def table(self) -> Table:
        """The comparison, one row a model; with several seeds, means ± half the range."""
        table = Table(title="perplexity on held-out files", title_justify="left")
        table.add_column("model")
        for column in ("perplexity", "× teacher", "gap closed"):
            table.add_column(column, justify="right")
        teacher = self.perplexity["teacher"][0]
        for row, values in self.perplexity.items():
            closed = self.gap_closed.get(row)
            table.add_row(
                row,
                _spread(values, ".1f"),
                _spread([value / teacher for value in values], ".3f"),
                "" if closed is None else _spread(closed, ".0%"),
            )
        return table


def compare(folder: Folder, recipe: Recipe, seeds: list[int], pool: Workers, started: float) -> DemoResult:
    """Evaluate every model on the held-out files, and let teacher and student write a few lines."""
    rows = {
        "without attention": [folder.path / "without-attention"],
        "teacher": [folder.teacher],
        "student, converted": [folder.run("mohawk", s) / "stages/0-converted/student" for s in seeds],
        **{
            f"student, after {name}": [folder.run("mohawk", s) / f"stages/{i}-{name}/student" for s in seeds]
            for i, name in enumerate(recipe.stages, start=1)
        },
        "control, logits only": [folder.run("logits-only", s) / "student" for s in seeds],
    }
    models_ = [model for row in rows.values() for model in row]
    values = iter(pool.run("evaluating", [(_perplexity, folder, recipe, model) for model in models_]))
    found = {"unigram": [_unigram(folder)], **{row: [next(values) for _ in folders] for row, folders in rows.items()}}
    finals = [folder.run("mohawk", s) / "student" for s in seeds]
    close = pool.run("comparing", [(_agreement, folder, recipe, final) for final in finals])
    floor, teacher = math.log(found["without attention"][0]), math.log(found["teacher"][0])
    closed = {
        row: [(floor - math.log(value)) / (floor - teacher) for value in found[row]]
        for row in rows
        if row not in ("without attention", "teacher")
    }
    agreeing = {"top1": [top1 for top1, _ in close], "kl": [kl for _, kl in close]}
    return DemoResult(
        folder.path, found, closed, agreeing, _samples(folder.teacher, finals[0]), time.monotonic() - started
    )


def _held_out(folder: Folder, recipe: Recipe) -> list[dict[str, Tensor]]:
    dataset = TokenDataset(folder.tokens("held-out"), recipe.data.sequence_length)
    count, size = min(recipe.evaluation.samples, len(dataset)), recipe.evaluation.batch_size
    spread = np.linspace(0, len(dataset) - 1, count).astype(int)  # over all held-out files, not the first few
    return [collate(dataset, spread[start : start + size]) for start in range(0, count, size)]


def _perplexity(folder: Folder, recipe: Recipe, model: Path) -> float:
    return perplexity(load_model(model), _held_out(folder, recipe)).perplexity


def _agreement(folder: Folder, recipe: Recipe, student: Path) -> tuple[float, float]:
    found = agreement(load_model(student), load_model(folder.teacher), _held_out(folder, recipe))
    return found.top1, found.kl


def _unigram(folder: Folder) -> float:
    """Perplexity of the training text's token frequencies (add-one smoothed) on the held-out text."""
    counts = np.bincount(folder.tokens("training"), minlength=VOCABULARY) + 1.0
    return math.exp(-np.log(counts / counts.sum())[folder.tokens("held-out")].mean())


def _samples(teacher: Path, student: Path) -> list[dict[str, str]]:
    tokenizer = load_tokenizer(teacher)
    texts = {
        name: generate(load_model(model), tokenizer, PROMPTS, max_new_tokens=48, temperature=0.7, top_k=40, seed=0)
        for name, model in (("teacher", teacher), ("student", student))
    }
    return [
        {"prompt": prompt, "teacher": texts["teacher"][i], "student": texts["student"][i]}
        for i, prompt in enumerate(PROMPTS)
    ]


def _spread(values: list[float], form: str) -> str:
    """The mean, and ± half the range where there is more than one value."""
    mean = format(statistics.fmean(values), form)
    return mean if len(values) == 1 else f"{mean} ± {format((max(values) - min(values)) / 2, form)}"
