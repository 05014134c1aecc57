"""The tasks of lm-evaluation-harness: their names, the sets of the papers, the user's own."""

import difflib
import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from limbeck.errors import LimbeckError
from limbeck.evaluation.results import fingerprint

TASK_SETS: dict[str, dict[str, str]] = {
    "mohawk": {
        "lambada_openai": "acc",
        "hellaswag": "acc_norm",
        "piqa": "acc",
        "arc_easy": "acc",
        "arc_challenge": "acc_norm",
        "winogrande": "acc",
    },
    "cald": dict.fromkeys(
        ("lambada_openai", "piqa", "winogrande", "wsc273", "arc_easy", "arc_challenge", "sciq", "logiqa"), "acc"
    ),
}
"""The tasks of the papers and the metric that each is judged by, zero-shot."""

OBJECT_NOTES = ("`pretrained` model kwarg is not of type `str`", "Passed an already-initialized model through")


@dataclass(frozen=True)
class Asked:
    """A task as it was asked for; without a metric it is judged by the first that it defines where more is better."""

    task: str
    metric: str | None = None


def harness() -> Any:
    """Import lm-evaluation-harness.

    Raises:
        LimbeckError: It, or what it needs for models of transformers, is not installed.
    """
    try:
        import lm_eval
        import lm_eval.models.huggingface
        import lm_eval.tasks
    except ImportError as error:
        raise LimbeckError(
            f"tasks need lm-evaluation-harness, which cannot be imported: {error}", hint="pip install 'limbeck[eval]'"
        ) from error
    return lm_eval


class Tasks:
    """The harness's lists of tasks: the user's own, and that of all, which takes seconds to read."""

    def __init__(self, include_path: str | Path | None):
        harness()
        from lm_eval.tasks import TaskManager

        self._make = TaskManager
        self._folder = None if include_path is None else str(include_path)
        if include_path is not None and not Path(include_path).is_dir():
            raise LimbeckError(f"no folder {include_path}", expected="a folder of tasks (YAML)")
        self.manager: Any = None
        self._own: set[str] = set()
        self._own_identity: str | None = None
        if include_path is not None:
            self.manager = TaskManager(include_path=self._folder, include_defaults=False)
            self._own = set(self.manager.all_tasks)
            self._own_identity = fingerprint(file for file in Path(include_path).rglob("*") if _counts(file))

    def identity(self, task: str) -> str | None:
        """The fingerprint of the user's folder for a task in it; None for one of the harness's own."""
        return self._own_identity if task in self._own else None

    def resolve(self, names: Iterable[str]) -> list[Asked]:
        """List the tasks of names and task sets, each once.

        Raises:
            LimbeckError: A name is unknown.
        """
        wanted = [name for part in names for name in part.split(",") if name]
        if not wanted:
            raise LimbeckError("no tasks", expected=f"names of tasks, or of a set: {', '.join(TASK_SETS)}")
        if self.manager is None or not {_plain(name) for name in wanted} <= set(self.manager.all_subtasks):
            with quiet():
                self.manager = self._make(include_path=self._folder)
        known = set(self.manager.all_tasks)
        asked: dict[Asked, None] = {}
        for name in wanted:
            if name in TASK_SETS and name not in self._own:
                asked |= dict.fromkeys(Asked(task, metric) for task, metric in TASK_SETS[name].items())
                continue
            task, _, metric = (name, "", "") if name in known else name.partition(":")
            if task not in known:
                nearest = difflib.get_close_matches(task, [*known, *TASK_SETS], n=3)
                raise LimbeckError(
                    f"unknown task {task!r}",
                    expected=f"a task of lm-evaluation-harness or of --include-path, or a set: {', '.join(TASK_SETS)}",
                    hint=f"did you mean {' or '.join(map(repr, nearest))}?" if nearest else "`lm_eval ls tasks`",
                )
            asked[Asked(task, metric or None)] = None
        return list(asked)


def _plain(name: str) -> str:
    return name.partition(":")[0]


def _counts(file: Path) -> bool:
    return file.is_file() and "__pycache__" not in file.parts


@contextmanager
def quiet() -> Iterator[None]:
    """Leave out what the harness says of every model that is passed as an object, which is how Limbeck passes all."""
    logger = logging.getLogger("lm_eval.models.huggingface")

    def other(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(OBJECT_NOTES)

    logger.addFilter(other)
    try:
        yield
    finally:
        logger.removeFilter(other)
