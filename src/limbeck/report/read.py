"""Reading what a run, or a demo, left in its folder: plain values, and nothing for what is not there."""

import json
import os
import tomllib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from limbeck.errors import LimbeckError

EVALUATIONS = ("text", "recall", "inspect", "bench")


@dataclass(frozen=True)
class StageFigures:
    """What a run's folder says of one stage.

    Attributes:
        name: The stage's name.
        settings: Its table in the recipe.
        updates: Lines of metrics.jsonl that are updates.
        evaluations: Lines that are held-out evaluations.
        seal: Its `stage.json`; empty until the stage has ended.
    """

    name: str
    settings: dict[str, Any]
    updates: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    seal: dict[str, Any]

    @property
    def figure(self) -> str:
        """The field of an update that the stage is judged by."""
        found = self.updates[0] if self.updates else {}
        return next((name for name in ("matrix_per_layer", "hidden_per_layer", "kl") if name in found), "loss")


@dataclass(frozen=True)
class RunFigures:
    """What a run's folder says.

    Attributes:
        path: The folder.
        identity: Its `run.json`.
        recipe_text: Its `recipe.toml`.
        recipe: The same, read.
        stages: Its stages, in order.
        conversion: The `conversion.json` of the student it began with; empty where there is none.
        evaluation: What lies in `evaluation/`, by name.
    """

    path: Path
    identity: dict[str, Any]
    recipe_text: str
    recipe: dict[str, Any]
    stages: list[StageFigures]
    conversion: dict[str, Any]
    evaluation: dict[str, dict[str, Any]]

    @property
    def environment(self) -> dict[str, str]:
        """Where the last stage that has ended was computed; empty where the run did not record it."""
        return next((s.seal["environment"] for s in reversed(self.stages) if "environment" in s.seal), {})


@dataclass(frozen=True)
class DemoFigures:
    """What a demo's folder says.

    Attributes:
        path: The folder.
        results: Its `results.json`.
        runs: Its first student's run, and what it is called.
    """

    path: Path
    results: dict[str, Any]
    runs: dict[str, RunFigures] = field(default_factory=dict)


def read_folder(folder: str | os.PathLike[str]) -> RunFigures | DemoFigures:
    """Read a run's folder, or a demo's.

    Raises:
        LimbeckError: There is neither, or a file in it cannot be read.
    """
    path = Path(folder)
    results = path / "results.json"
    if results.is_file():
        runs = sorted(run.parent for run in path.glob("seed-*/mohawk/run.json"))[:1]
        found = {str(run.relative_to(path)): read_run(run) for run in runs}
        own = _evaluations(path)  # of a demo's first student
        return DemoFigures(
            path, _json(results), {name: replace(run, evaluation=run.evaluation | own) for name, run in found.items()}
        )
    return read_run(path)


def read_run(path: Path) -> RunFigures:
    """Read a run's folder, finished or not.

    Raises:
        LimbeckError: It holds no run, or a file in it cannot be read.
    """
    text = path / "recipe.toml"
    if not text.is_file():
        raise LimbeckError(
            f"{path} holds no run: recipe.toml is not there",
            expected="the folder that `limbeck distill` was given as --output, or a finished demo's",
            hint="limbeck report runs/mine",
        )
    recipe_text = text.read_text(encoding="utf-8")
    try:
        recipe = tomllib.loads(recipe_text)
    except tomllib.TOMLDecodeError as error:
        raise LimbeckError(f"{text} is no TOML: {error}", expected="the recipe as `limbeck distill` wrote it") from None
    lines = _lines(path / "metrics.jsonl")
    stages = []
    for index, (name, settings) in enumerate(recipe.get("stages", {}).items(), start=1):
        mine = [line for line in lines if line.get("stage") == name]
        stages.append(
            StageFigures(
                name,
                settings,
                updates=[line for line in mine if "loss" in line],
                evaluations=[line for line in mine if "eval_loss" in line],
                seal=_json(path / "stages" / f"{index}-{name}" / "student" / "stage.json"),
            )
        )
    return RunFigures(
        path,
        identity=_json(path / "run.json"),
        recipe_text=recipe_text,
        recipe=recipe,
        stages=stages,
        conversion=_json(path / "stages/0-converted/student/conversion.json"),
        evaluation=_evaluations(path),
    )


def _evaluations(path: Path) -> dict[str, dict[str, Any]]:
    """What lies in a folder's `evaluation/`, by name."""
    return {name: found for name in EVALUATIONS if (found := _json(path / "evaluation" / f"{name}.json"))}


def _json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty where there is no such file."""
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise LimbeckError(f"{path} is no JSON: {error}", expected="the file as Limbeck wrote it") from None
    if not isinstance(found, dict):
        raise LimbeckError(f"{path} holds a {type(found).__name__}", expected="one JSON object")
    return found


def _lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines; a last line that a crash tore is left out."""
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
