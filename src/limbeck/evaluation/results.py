"""Scores of models on tasks: kept on disk once measured, and shown as one table with the mean last."""

import csv
import hashlib
import io
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from limbeck.errors import LimbeckError, unknown
from limbeck.files import write_text

FORMATS = ("text", "markdown", "csv", "json")
PIECES, PIECE_BYTES = 32, 1 << 16  # what a fingerprint reads of a large file


@dataclass(frozen=True)
class Score:
    """One model's score on one task.

    Attributes:
        task: The task's name.
        metric: Which of its figures this is, such as ``"acc"``.
        value: The figure.
        stderr: Its standard error; None where the harness gives none.
        samples: How many documents it is the figure of; None where the harness does not say.
        higher_is_better: Whether more is better; only such scores enter means and recoveries.
    """

    task: str
    metric: str
    value: float
    stderr: float | None = None
    samples: int | None = None
    higher_is_better: bool = True


@dataclass(frozen=True)
class ModelScores:
    """What one model scored.

    Attributes:
        name: As it was given.
        role: ``"teacher"``, or ``"student"`` where there is a teacher, else ``"model"``.
        scores: By task; tasks that were not measured are not in it.
    """

    name: str
    role: str
    scores: Mapping[str, Score]


@dataclass(frozen=True)
class TaskResults:
    """Scores of all models on all tasks.

    Attributes:
        tasks: Their names, in the order of the columns.
        models: The rows; the teacher, if there is one, comes first.
    """

    tasks: tuple[str, ...]
    models: tuple[ModelScores, ...]

    @property
    def teacher(self) -> ModelScores | None:
        """The teacher's row."""
        return next((model for model in self.models if model.role == "teacher"), None)

    def metric(self, task: str) -> str:
        """What a column's figures are; empty where no model was measured."""
        return next((model.scores[task].metric for model in self.models if task in model.scores), "")

    def mean(self, model: ModelScores) -> float | None:
        """Mean over the tasks where more is better; None where a score is missing, or there is no such task."""
        if any(task not in model.scores for task in self.tasks):
            return None
        values = [score.value for score in model.scores.values() if score.higher_is_better]
        return sum(values) / len(values) if values else None

    def recovery(self, model: ModelScores) -> dict[str, float | None] | None:
        """The model's score over the teacher's, by task; None where there is no teacher, or the model is the teacher.

        A single one is None where a score is missing, where less is better, and where the teacher's is zero.
        """
        teacher = self.teacher
        if teacher is None or model is teacher:
            return None
        found: dict[str, float | None] = {}
        for task in self.tasks:
            ours, theirs = model.scores.get(task), teacher.scores.get(task)
            found[task] = None
            if ours is not None and theirs is not None and ours.higher_is_better and theirs.value != 0:
                found[task] = ours.value / theirs.value
        return found

    def mean_recovery(self, model: ModelScores) -> float | None:
        """The model's mean over the teacher's mean."""
        teacher = self.teacher
        if teacher is None or model is teacher:
            return None
        ours, theirs = self.mean(model), self.mean(teacher)
        return ours / theirs if ours is not None and theirs else None

    def as_json(self) -> dict[str, Any]:
        """Plain dicts and lists: ``tasks``; ``models`` with ``scores``, ``mean``, ``recovery``, ``mean_recovery``."""
        models = [
            {
                "name": model.name,
                "role": model.role,
                "scores": {
                    task: {
                        "value": score.value,
                        "stderr": score.stderr,
                        "metric": score.metric,
                        "samples": score.samples,
                    }
                    for task, score in model.scores.items()
                },
                "mean": self.mean(model),
                "recovery": self.recovery(model),
                "mean_recovery": self.mean_recovery(model),
            }
            for model in self.models
        ]
        return {"tasks": [{"name": task, "metric": self.metric(task)} for task in self.tasks], "models": models}


# --- the table --------------------------------------------------------------------------------------------------------


def show_results(results: TaskResults, form: str = "text") -> str:
    """Write results as a table: a row a model, the mean last, then a row of recoveries for each student.

    Args:
        results: The scores.
        form: ``"text"``, ``"markdown"``, ``"csv"`` or ``"json"``.

    Raises:
        LimbeckError: There is no such form.
    """
    if form not in FORMATS:
        raise unknown("format", form, FORMATS)
    if form == "json":
        return json.dumps(results.as_json(), ensure_ascii=False)
    if form == "csv":
        return _csv(results)
    head = ["model", *(f"{task} ({results.metric(task)})" for task in results.tasks), "mean"]
    rows = []
    for model in results.models:
        values = [model.scores[task].value if task in model.scores else None for task in results.tasks]
        name = f"{model.name} (teacher)" if model.role == "teacher" else model.name
        rows.append([name, *map(_figure, values), _figure(results.mean(model))])
    for model in results.models:
        if recovery := results.recovery(model):
            shares = [*recovery.values(), results.mean_recovery(model)]
            rows.append([f"{model.name}: recovery", *map(_share, shares)])
    return _markdown(head, rows) if form == "markdown" else _text(head, rows)


def _figure(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.4f}" if abs(value) < 10 else f"{value:.5g}"


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"


def _text(head: list[str], rows: list[list[str]]) -> str:
    lines = [[cell.partition(" (")[0] for cell in head], ["", *(_in_brackets(cell) for cell in head[1:])], *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in lines
    )


def _in_brackets(cell: str) -> str:
    return cell.partition(" (")[2].removesuffix(")")


def _markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _csv(results: TaskResults) -> str:
    """Write all digits; a row says whether it holds scores or recoveries."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["model", "role", "figure", *(f"{task}:{results.metric(task)}" for task in results.tasks), "mean"])
    for model in results.models:
        values = [model.scores[task].value if task in model.scores else None for task in results.tasks]
        writer.writerow([model.name, model.role, "score", *values, results.mean(model)])
        if recovery := results.recovery(model):
            writer.writerow([model.name, model.role, "recovery", *recovery.values(), results.mean_recovery(model)])
    return text.getvalue().removesuffix("\n")


# --- what was measured before -----------------------------------------------------------------------------------------


class ResultsCache:
    """A folder with one JSON file for each model and task that was measured.

    A file's name is the hash of all that the scores depend on, its identity, which also stands in it. Another process
    may use the same folder: files appear whole or not at all.

    Args:
        folder: Made with the first entry; by default what `default_cache` says.
    """

    def __init__(self, folder: str | Path | None = None):
        self.folder = default_cache() if folder is None else Path(folder)

    def path(self, identity: Mapping[str, Any]) -> Path:
        """Where the scores of this identity lie, or would."""
        return self.folder / f"{_digest(json.dumps(identity, sort_keys=True).encode())}.json"

    def get(self, identity: Mapping[str, Any]) -> Any | None:
        """The scores of this identity; None where it was not measured.

        Raises:
            LimbeckError: The file is damaged.
        """
        path = self.path(identity)
        if not path.is_file():
            return None
        try:
            return json.loads(path.read_text(encoding="utf-8"))["scores"]
        except (ValueError, KeyError, TypeError) as error:
            raise LimbeckError(
                f"{path} is damaged: {error!r}", expected="JSON with scores", hint="remove it; the task will run again"
            ) from error

    def put(self, identity: Mapping[str, Any], scores: Any) -> None:
        """Keep the scores of this identity, plain JSON."""
        self.folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"identity": identity, "scores": scores}, indent=2, ensure_ascii=False)
        write_text(self.path(identity), text + "\n")


def default_cache() -> Path:
    """``$LIMBECK_CACHE/evaluation``, by default within ``~/.cache/limbeck`` (``$XDG_CACHE_HOME``)."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("LIMBECK_CACHE") or Path(base) / "limbeck") / "evaluation"


def fingerprint(files: Iterable[Path]) -> str:
    """A hash that changes when a file does: of names, sizes, times of change, and 32 pieces of each file's bytes.

    Reading a few pieces takes no time however large the weights are; they tell files apart whose times a copy has made
    the same. Files of at most 2 MiB are read whole.

    Args:
        files: All in one folder or below it; the folder's own place does not count.
    """
    ordered = sorted(files)
    parts: list[Sequence[Any]] = []
    for file in ordered:
        status = file.stat()
        pieces = hashlib.sha256()
        with file.open("rb") as stream:
            step = max(status.st_size // PIECES, PIECE_BYTES)
            for start in range(0, status.st_size, step):
                stream.seek(start)
                pieces.update(stream.read(PIECE_BYTES))
        parts.append((file.name, status.st_size, status.st_mtime_ns, pieces.hexdigest()))
    return _digest(json.dumps(parts).encode())


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
