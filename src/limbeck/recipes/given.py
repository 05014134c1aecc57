"""What a run is given: checked before anything is done, and told apart from what another run was given."""

from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from limbeck.data import source_files
from limbeck.distill import OBJECTIVES, WHOLE_MODEL, check_vocabularies
from limbeck.errors import LimbeckError
from limbeck.recipes.schema import Recipe, SourceTable
from limbeck.students import check_files, family_of, load_config, student_config
from limbeck.students.families import STUDENT_PREFIX

FREE = ("description", "evaluation", "engine", "tracking")
"""Parts of a recipe that a run may resume without, or with others."""


def needed(value: str | Path | None, what: str, hint: str) -> str:
    """What the command or the recipe names, as text."""
    if value is None:
        raise LimbeckError(f"no {what}: neither the recipe nor the command names one", hint=hint)
    return normal(value)


def given_sources(data: str | Path | None, recipe: Recipe) -> list[SourceTable]:
    """What a run learns from: what the command names, else the recipe's one source, else its several."""
    if data is None and recipe.data.sources:
        if recipe.data.source is not None:
            raise LimbeckError("data.source together with data.sources", expected="one of the two")
        return [source.model_copy(update={"path": normal(source.path)}) for source in recipe.data.sources]
    return [SourceTable(path=needed(data or recipe.data.source, "data", "--data with text or a token file"))]


def normal(source: str | Path) -> str:
    """One spelling for a folder: no slash at its end."""
    return str(Path(source))


def check_conversion(teacher: PretrainedConfig, recipe: Recipe) -> None:
    """Refuse a family, a mixer or an option that cannot be, before any text is read."""
    options = recipe.student
    student_config(teacher, options.mixer, options.keep_attention, options.init, options.mixer_kwargs)


def check_student(student: str | Path, teacher: PretrainedConfig, recipe: Recipe) -> None:
    """Refuse a start that is no student, or that this teacher cannot teach layer by layer."""
    config = load_config(student)
    if not Path(student).is_dir() or not config.model_type.startswith(STUDENT_PREFIX):
        raise LimbeckError(
            f"{student} is a {config.model_type} model",
            expected="a folder with a student",
            hint="`limbeck convert` makes one; or leave --student out, and the recipe does it",
        )
    check_vocabularies(config, teacher)
    if all(OBJECTIVES[stage.objective].scope >= WHOLE_MODEL for stage in recipe.stages.values()):
        return

    def layers(of: Any) -> tuple[str, int, int]:
        return family_of(of).name, of.num_hidden_layers, of.hidden_size

    found, expected = layers(config), layers(teacher)
    if found != expected:
        raise LimbeckError(
            "the student is of family {}, with {} layers of width {}".format(*found),
            expected="its teacher's: {}, {} layers of width {}".format(*expected),
            hint="convert the student from this teacher, or leave out all stages but those on the logits",
        )


def identity_of(
    recipe: Recipe,
    teacher: str,
    student: str | Path | None,
    tokenizer: str | Path | None,
    sources: list[SourceTable],
    further_teachers: list[dict[str, Any]],
) -> dict[str, Any]:
    """What tells a run from others: all that its result depends on; how it is driven and watched may change."""
    return {
        "recipe": recipe.model_dump(
            mode="json", exclude={"stages": {"__all__": {"expect"}}, **dict.fromkeys(FREE, True)}
        ),
        "teacher": checkpoint_identity(teacher),
        "student": None if student is None else checkpoint_identity(student),
        "tokenizer": normal(tokenizer or teacher),
        "data": [text_identity(source.path) for source in sources]
        if len(sources) > 1
        else text_identity(sources[0].path),
        **({"further_teachers": further_teachers} if further_teachers else {}),
        "held_out": None if recipe.data.eval_source is None else text_identity(recipe.data.eval_source),
    }


def checkpoint_identity(source: str | Path) -> dict[str, Any]:
    """What tells a checkpoint from another: its name, and for a folder the sizes of its weight files."""
    if not Path(source).is_dir():
        return {"source": normal(source)}
    files = check_files(Path(source))
    return {"source": normal(source), "files": {file.name: file.stat().st_size for file in files}}


def text_identity(source: str) -> dict[str, Any]:
    """What tells a source from another: its name, and how many files and bytes it has."""
    files = source_files(source)
    return {"source": source, "files": len(files), "bytes": sum(file.stat().st_size for file in files)}
