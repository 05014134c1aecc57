"""The models that are measured: what names, patterns and runs' folders stand for."""

import copy
import glob
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from limbeck.errors import LimbeckError
from limbeck.evaluation.results import fingerprint
from limbeck.progress import say
from limbeck.students import check_files, load_model, load_tokenizer
from limbeck.students.sources import carried_files, checkpoint_folder


def find_models(given: str | Path | PreTrainedModel | Sequence[str | Path | PreTrainedModel]) -> list[Any]:
    """List the models that names, patterns and runs' folders stand for.

    Args:
        given: See `evaluate_tasks`. A run's folder stands for its finished student. What a pattern meets that is no
            model is passed over with a note.

    Raises:
        LimbeckError: A pattern meets no model, or a run has no student yet.
    """
    found: list[Any] = []
    sources: Sequence[Any] = [given] if isinstance(given, str | Path | PreTrainedModel) else given
    for one in sources:
        if isinstance(one, PreTrainedModel):
            found.append(one)
        elif Path(one).exists() or not glob.has_magic(str(one)):
            found.append(_model_in(one))
        else:
            met = [Path(path) for path in sorted(glob.glob(str(one), recursive=True)) if Path(path).is_dir()]
            inside = [folder for folder in met if _is_model(folder) or _is_model(folder / "student")]
            for folder in met:
                if folder not in inside:
                    say(f"{folder} holds no model and is passed over")
            if not inside:
                raise LimbeckError(f"no model matches {str(one)!r}", expected="folders of models or of finished runs")
            found += map(_model_in, inside)
    return list(dict.fromkeys(found))


def _is_model(folder: Path) -> bool:
    return (folder / "config.json").is_file()


def _model_in(source: str | Path) -> str:
    folder = Path(source)
    if folder.is_dir() and not _is_model(folder) and (folder / "run.json").is_file():
        if not _is_model(folder / "student"):
            raise LimbeckError(
                f"{folder} is a run without a student yet", expected="a finished run, or a stage's student"
            )
        return str(folder / "student")
    return str(source)


class Subject:
    """A model that is measured: loaded when it first runs, let go when all of its tasks are done."""

    def __init__(self, source: Any, role: str, tokenizer: Any, device: Any, dtype: Any):
        self.source, self.role = source, role
        self._device, self._dtype = device, dtype
        self._model: Any = source if isinstance(source, PreTrainedModel) else None
        self._given_tokenizer, self._tokenizer = tokenizer, None
        self.name = (source.name_or_path or type(source).__name__) if self._model is not None else str(source)
        self.identity = None if self._model is not None else self._identity()

    @property
    def model(self) -> PreTrainedModel:
        """The model, on its device."""
        if self._model is None:
            self._model = load_model(self.source, dtype=self._dtype, device=self._device)
        return self._model

    @property
    def tokenizer(self) -> Any:
        """The one that was given, or the model's own; a copy, since the harness may set its padding."""
        if self._tokenizer is None:
            given = self._given_tokenizer
            if given is None or isinstance(given, str | Path):
                self._tokenizer = load_tokenizer(given or (self.name if self._model is not None else self.source))
            else:
                self._tokenizer = copy.deepcopy(given)
        return self._tokenizer

    def release(self) -> None:
        """Let go of the weights."""
        self._model = None

    def _identity(self) -> dict[str, Any] | None:
        """What a score depends on that is the model's; None for a tokenizer in memory, which has no files."""
        given = self._given_tokenizer
        if given is not None and not isinstance(given, str | Path):
            return None
        folder = checkpoint_folder(self.source)
        reader = folder if given is None else checkpoint_folder(given)
        return {
            "model": fingerprint([folder / "config.json", *check_files(folder)]),
            "tokenizer": fingerprint(reader / file for file in carried_files(reader)),
        }
