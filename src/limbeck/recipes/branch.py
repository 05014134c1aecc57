"""Branching a run: a new run goes on where a checkpoint of another one stands, under changed losses.

Weights, optimiser, schedule and data position are that checkpoint's; the students of the stages before it and the
metrics up to it come along, so that the new folder holds a whole run. It is what the document of CALD does by copying
folders.
"""

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from limbeck.errors import LimbeckError
from limbeck.files import replacing_folder, write_text
from limbeck.progress import say
from limbeck.recipes.folder import RUN_FILE, STAGE_FILE, RunFolder, RunPaths, differences
from limbeck.recipes.schema import Recipe
from limbeck.training import Checkpoints, read_state

FREE = {"name", "description", "teacher", "evaluation", "engine", "tracking", "tf32"}
FREE_IN_STAGE = {
    *("objective", "target", "kl_weight", "ce_weight", "alpha_ce", "alpha_layer", "alpha_logits", "temperature"),
    *("norm", "distance", "skip_last", "position", "mask", "guidance", "guidance_until", "guidance_until_tokens"),
    "expect",
    *(
        "teacher",
        "teacher_cache",
        "teacher_lr",
        "teacher_update_every",
        "waypoints",
        "checkpoint_every",
        "keep_every",
        "micro_batch",
    ),
}


@dataclass(frozen=True)
class Origin:
    """A checkpoint of another run.

    Attributes:
        run: That run.
        index: Its stage's place.
        stage: Its stage's name.
        step: Updates done.
        path: The checkpoint's folder.
    """

    run: RunPaths
    index: int
    stage: str
    step: int
    path: Path

    @property
    def identity(self) -> dict[str, Any]:
        """What tells it from other origins."""
        return {"run": self.run.run_id, "stage": self.stage, "step": self.step}


def find_origin(text: str) -> Origin:
    """Find the checkpoint that ``RUN@STEP``, or ``RUN@STAGE:STEP``, speaks of.

    Args:
        text: The run's folder, and the update whose checkpoint was kept.

    Raises:
        LimbeckError: There is no such run, stage or checkpoint, or it was damaged.
    """
    found = re.fullmatch(r"(?P<run>.+)@(?:(?P<stage>[\w-]+):)?(?P<step>\d+)", text)
    if not found:
        raise LimbeckError(f"--from {text}", expected="RUN@STEP or RUN@STAGE:STEP", hint="--from runs/mine@4576")
    folder, step = Path(found["run"]), int(found["step"])
    if not (folder / RUN_FILE).is_file():
        raise LimbeckError(f"{folder} holds no run", expected="the folder of a run", hint="its --output")
    run = RunPaths(folder, json.loads((folder / RUN_FILE).read_text()))
    names = list(run.identity["recipe"]["stages"])
    paths = {
        name: run.stage(index, name) / "checkpoints" / f"step-{step:08d}" for index, name in enumerate(names, start=1)
    }
    having = [name for name in names if found["stage"] in (None, name) and paths[name].is_dir()]
    if len(having) != 1:
        there = [
            f"{name}:{int(path.name.rpartition('-')[2])}"
            for name in names
            for path in sorted(paths[name].parent.glob("step-*"))
        ]
        raise LimbeckError(
            f"{len(having) or 'no'} checkpoint{'s' * (len(having) != 1)} of step {step} in {folder}",
            expected=f"one of {', '.join(there) or 'none, it has no checkpoint'}",
            hint="keep_every keeps more than the last two",
        )
    name = having[0]
    problem = Checkpoints(paths[name].parent, stage=name, fingerprint=run.run_id).problem(paths[name])
    if problem:
        raise LimbeckError(f"the checkpoint {paths[name]} cannot be used: {problem}", expected="it as it was written")
    return Origin(run, names.index(name) + 1, name, step, paths[name])


def check_branch(origin: Origin, recipe: Recipe, identity: dict[str, Any]) -> None:
    """Refuse a recipe that differs from the origin's in more than its losses, or other data.

    Raises:
        LimbeckError: It does; the message names what differs.
    """

    def kept(recipe: dict[str, Any], rest: dict[str, Any]) -> dict[str, Any]:
        stages = dict(list(recipe["stages"].items())[: origin.index])
        if origin.stage in stages:
            stage = stages[origin.stage]
            stages[origin.stage] = {key: value for key, value in stage.items() if key not in FREE_IN_STAGE}
        recipe = {key: value for key, value in recipe.items() if key not in FREE}
        return {"recipe": {**recipe, "stages": stages}, **{key: rest[key] for key in ("data", "tokenizer")}}

    before, now = origin.run.identity, json.loads(json.dumps(identity))
    found = kept(before["recipe"], before), kept(json.loads(recipe.model_dump_json()), now)
    if found[0] != found[1]:
        raise LimbeckError(
            f"a branch of {origin.run.path} in which {'; '.join(differences(*found))}",
            expected="a recipe with the same student, data, stages before, optimiser and schedule",
            hint="what may differ: losses, guidance, evaluation, checkpoints",
        )


def branch(origin: Origin, run: RunFolder) -> None:
    """Put into a new run what the origin had when that checkpoint was written; what is there already stays."""
    names = ["converted", *origin.run.identity["recipe"]["stages"]][: origin.index]
    for index, name in enumerate(names):
        if not run.finished(index, name):
            source = origin.run.verified(index, name)
            run.publish(index, name, lambda folder, source=source: _copy(source, folder), branched_from=origin.identity)
    checkpoints = run.stage(origin.index, origin.stage) / "checkpoints"
    if checkpoints.exists() or run.finished(origin.index, origin.stage):
        return
    say(f"branching from {origin.run.path}, stage {origin.stage}, step {origin.step}")
    state = read_state(origin.path)
    write_text(run.metrics, origin.run.metrics.read_bytes()[: state.metrics_bytes].decode())
    best = Checkpoints(origin.path.parent, stage=origin.stage).best_path(state)
    with replacing_folder(checkpoints) as folder:
        for path in (origin.path, best):
            if path is not None:
                shutil.copytree(path, folder / path.name)
                manifest = folder / path.name / "manifest.json"
                content = json.loads(manifest.read_text())
                manifest.write_text(json.dumps(content | {"fingerprint": run.run_id}, indent=1))


def _copy(source: Path, folder: Path) -> None:
    for file in source.iterdir():
        if file.name != STAGE_FILE:
            shutil.copy2(file, folder)
