"""A run's folder: who owns it, and which weights each stage left behind.

::

    runs/phi/
      run.json             what this run is: recipe, teacher, data; another run is refused
      recipe.toml          the recipe as it runs, defaults and overrides filled in
      metrics.jsonl        every update and evaluation of every stage
      data/                the tokens that are read
      stages/0-converted/  the student before the first stage
      stages/1-matrix/     checkpoints/, and student/ once the stage has ended
      …
      student/             the last stage's student: an ordinary Hugging Face folder

A stage starts only from the folder its predecessor wrote: `stage.json` beside the weights names the run, the stage and
the sha256 of every weight file, and all three are verified.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from limbeck.errors import LimbeckError
from limbeck.files import replacing_folder, sha256, write_text
from limbeck.progress import say

RUN_FILE = "run.json"
STAGE_FILE = "stage.json"
LOCK_FILE = ".lock"
RUN_ID = "begun_as"


class RunPaths:
    """Where everything of a run lies, to read it.

    Args:
        path: The run's folder.
        identity: What makes the run this one: plain JSON.
    """

    def __init__(self, path: str | os.PathLike[str], identity: dict[str, Any]):
        self.path = Path(path)
        self.identity = json.loads(json.dumps(identity))  # as it will be read back
        self.run_id = id_of(self.identity)

    @property
    def metrics(self) -> Path:
        """Where the figures of all stages go."""
        return self.path / "metrics.jsonl"

    @property
    def student(self) -> Path:
        """Where the finished student lies."""
        return self.path / "student"

    def stage(self, index: int, name: str) -> Path:
        """The folder of a stage; stage 0 is the conversion."""
        return self.path / "stages" / f"{index}-{name}"

    def finished(self, index: int, name: str) -> bool:
        """Whether a stage has ended and left its student."""
        return (self.stage(index, name) / "student" / STAGE_FILE).is_file()

    def verified(self, index: int, name: str) -> Path:
        """The student a stage left, after checking that it is what that stage wrote.

        Raises:
            LimbeckError: It is missing, of another run or stage, or its weights were changed since.
        """
        folder = self.stage(index, name) / "student"
        hint = f"remove {self.path} and start anew, or put the folder back as it was"
        if not self.finished(index, name):
            raise LimbeckError(f"{folder} is not there", expected=f"the student that stage {name!r} left", hint=hint)
        seal = json.loads((folder / STAGE_FILE).read_text())
        if (seal["run"], seal["stage"], seal["index"]) != (self.run_id, name, index):
            raise LimbeckError(
                f"{folder} was written by stage {seal['stage']!r} of another run or place",
                expected=f"weights that stage {name!r} of this run wrote",
                hint=hint,
            )
        found = digests(folder)
        if found != seal["weights"]:
            changed = sorted(f for f in found.keys() | seal["weights"] if found.get(f) != seal["weights"].get(f))
            raise LimbeckError(
                f"{', '.join(changed)} in {folder} is not what stage {name!r} wrote",
                expected="the weights of the predecessor, untouched",
                hint=hint,
            )
        return folder


class RunFolder(RunPaths):
    """The folder of one run, held by one process at a time.

    The lock is the operating system's: it ends with this object or its process, however that ends.

    Args:
        path: The folder; made when it is not there.
        identity: What makes this run this one: plain JSON, compared as a whole when the folder exists.
        accept_changes: Go on under another identity, if what the run has done by now does not depend on what changed.

    Raises:
        LimbeckError: The folder belongs to another run, holds other things, or another process is working in it.
    """

    def __init__(self, path: str | os.PathLike[str], identity: dict[str, Any], *, accept_changes: bool = False):
        super().__init__(path, identity)
        self._begun_here, self._accepts = False, accept_changes
        self._check()
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(self.path / LOCK_FILE, blocking=False)
        try:
            self._lock.acquire()
        except Timeout:
            raise LimbeckError(
                f"another process is working in {self.path}",
                expected="one process to a run",
                hint="wait for it or stop it, or give another --output",
            ) from None
        self._check()  # it may have been claimed before we had the lock
        if not (self.path / RUN_FILE).is_file():
            write_text(self.path / RUN_FILE, json.dumps(self.identity, indent=1))
            self._begun_here = True
        elif (found := json.loads((self.path / RUN_FILE).read_text())) != self._as_written(found):
            for line in differences(without_id(found), self.identity):
                say(f"changed: {line}")
            write_text(self.path / RUN_FILE, json.dumps(self._as_written(found), indent=1))

    def _check(self) -> None:
        """Refuse a folder that is not this run's to write in."""
        owner = self.path / RUN_FILE
        if owner.is_file():
            found = json.loads(owner.read_text())
            self.run_id = id_of(found)
            changes = differences(without_id(found), self.identity)
            done = differences(self._done(found), self._done(self.identity))
            if done or (changes and not self._accepts):
                raise LimbeckError(
                    f"{self.path} holds another run:" + "".join(f"\n  {line}" for line in done or changes),
                    expected="what it was begun with" + (", in all that it has done by now" if done else ""),
                    hint="another --output" + ("" if done else ", or --accept-changes to go on under the new recipe"),
                )
            return
        if self.path.exists() and not (self.path.is_dir() and all(map(_unfinished, self.path.iterdir()))):
            raise LimbeckError(
                f"{self.path} exists and holds no run", expected="a new folder", hint="give another --output"
            )

    def _done(self, identity: dict[str, Any]) -> dict[str, Any]:
        """What of an identity the folder's content rests on: the start, and the stages that have ended."""
        if "recipe" not in identity:  # a demo's folder: all of it
            return identity
        recipe = identity["recipe"]
        stages = {
            name: stage
            for index, (name, stage) in enumerate(recipe["stages"].items(), start=1)
            if self.finished(index, name)
        }
        start = {key: identity.get(key) for key in ("teacher", "student", "tokenizer", "data", "held_out", "from")}
        return start | {"recipe": {"student": recipe["student"], "stages": stages}}

    def _as_written(self, found: dict[str, Any]) -> dict[str, Any]:
        """The identity as run.json keeps it: with the id that the seals of an earlier one speak of."""
        return self.identity if found == self.identity else {**self.identity, RUN_ID: id_of(found)}

    @contextmanager
    def preparing(self) -> Iterator[None]:
        """While open, a mistake in what was given leaves nothing behind of a run that was begun just now."""
        try:
            yield
        except LimbeckError:
            if self._begun_here:
                shutil.rmtree(self.path)
            raise

    def publish(self, index: int, name: str, write: Callable[[Path], None], **facts: Any) -> Path:
        """Let `write` fill a new folder with a stage's student, seal it, and put it in its place at once.

        Args:
            index: Of the stage.
            name: Of the stage.
            write: Called with a temporary folder.
            facts: Kept in stage.json beside the seal.

        Returns:
            The folder of the student.
        """
        final = self.stage(index, name) / "student"
        with replacing_folder(final) as folder:
            write(folder)
            seal = {"run": self.run_id, "stage": name, "index": index, "weights": digests(folder), **facts}
            (folder / STAGE_FILE).write_text(json.dumps(seal, indent=1))
        return final

    def deliver(self, index: int, name: str) -> None:
        """Put a stage's student in the run's `student` folder, unless it is there already."""
        source = self.verified(index, name)
        if (self.student / STAGE_FILE).is_file() and digests(self.student) == digests(source):
            return
        with replacing_folder(self.student) as folder:
            for file in source.iterdir():
                shutil.copy2(file, folder)


def id_of(identity: dict[str, Any]) -> str:
    """The id of a run: the digest of the identity that it was begun with."""
    return identity.get(RUN_ID) or hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def without_id(identity: dict[str, Any]) -> dict[str, Any]:
    """An identity as it is given."""
    return {key: value for key, value in identity.items() if key != RUN_ID}


def digests(folder: Path) -> dict[str, str]:
    """The sha256 of every weight file in a folder."""
    return {file.name: sha256(file) for file in sorted(folder.glob("*.safetensors"))}


def _unfinished(path: Path) -> bool:
    """Whether this is what a process left that was killed before it had said what run it is."""
    return path.name.startswith(".writing-") or path.name == LOCK_FILE


def differences(found: Any, given: Any, path: str = "") -> list[str]:
    """Name the values in which two JSON documents differ."""
    if isinstance(found, dict) and isinstance(given, dict):
        keys = [*found, *(key for key in given if key not in found)]
        return [
            line
            for key in keys
            if found.get(key) != given.get(key)
            for line in differences(found.get(key), given.get(key), f"{path}.{key}" if path else key)
        ]
    return [f"{path} was {found!r}, now {given!r}"]
