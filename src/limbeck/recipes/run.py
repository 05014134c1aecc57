"""Running a recipe: from a teacher and text to a finished student, stage by stage, resumable at any moment."""

import shutil
from dataclasses import dataclass
from pathlib import Path

from limbeck.data import Samples, mixed, open_samples, split_samples
from limbeck.errors import LimbeckError
from limbeck.files import write_text
from limbeck.progress import say
from limbeck.recipes.branch import branch, check_branch, find_origin
from limbeck.recipes.cached import cache_identities, check_caches
from limbeck.recipes.driver import CONVERTED, Driver, RunSamples
from limbeck.recipes.folder import RunFolder, RunPaths
from limbeck.recipes.given import check_conversion, check_student, given_sources, identity_of, needed
from limbeck.recipes.schema import Recipe, SourceTable
from limbeck.recipes.teachers import check_further_teachers, smallest_vocabulary
from limbeck.recipes.write import to_toml
from limbeck.students import convert_folder, load_config, load_tokenizer
from limbeck.training import World, check_trackers


@dataclass(frozen=True)
class RunResult:
    """What a run left.

    Attributes:
        output: The run's folder.
        student: The finished student: an ordinary Hugging Face folder.
        stages: The student after each stage, by the stage's name; "converted" is the one before the first.
    """

    output: Path
    student: Path
    stages: dict[str, Path]


def distill(
    recipe: Recipe,
    *,
    output: str | Path,
    teacher: str | Path | None = None,
    student: str | Path | None = None,
    tokenizer: str | Path | None = None,
    data: str | Path | None = None,
    tokens: int | None = None,
    device: str | None = None,
    origin: str | None = None,
    accept_changes: bool = False,
    world: World | None = None,
) -> RunResult:
    """Run a recipe to its end, or go on where an earlier call was interrupted.

    Args:
        recipe: From `load_recipe`.
        output: The run's folder; see `limbeck.recipes.folder`.
        teacher: Folder or hub id; over the recipe's.
        student: A folder that `convert` wrote, to start from; left out, the recipe's ``[student]`` is converted.
        tokenizer: Folder or hub id; by default the teacher's.
        data: File or folder of text, or a .npy file of tokens; over the recipe's.
        tokens: Tokens of all stages together; the stages keep their proportions.
        device: Where to train; by default a GPU if there is one.
        origin: ``RUN@STEP``, a checkpoint of another run to go on from under changed losses; see
            `limbeck.recipes.branch`.
        accept_changes: Go on under a changed recipe, where the stages that have ended do not depend on the change.
        world: The processes that run it together, each by this call; by default those that torchrun started.

    Returns:
        Where everything lies.

    Raises:
        LimbeckError: Something is missing or does not fit; the output belongs to another run; a predecessor's weights
            are not what it wrote; a loss is not finite.
    """
    if world is None:
        with World.join(device) as world:
            options = {"teacher": teacher, "student": student, "tokenizer": tokenizer, "data": data, "tokens": tokens}
            return distill(recipe, output=output, **options, origin=origin, accept_changes=accept_changes, world=world)
    world.first(lambda: check_trackers(recipe.tracking.trackers))
    teacher = needed(teacher or recipe.teacher, "teacher", "--teacher with a folder or a hub id")
    sources = given_sources(data, recipe)
    recipe = recipe if tokens is None else recipe.scaled_to(tokens)
    teacher_config = load_config(teacher)
    if origin is not None and student is not None:
        raise LimbeckError("--student together with --from", expected="one start: a branch has its student already")
    if student is not None:
        check_student(student, teacher_config, recipe)
    else:
        check_conversion(teacher_config, recipe)
    identity = identity_of(recipe, teacher, student, tokenizer, sources, check_further_teachers(recipe, teacher_config))
    if caches := cache_identities(recipe):
        identity["teacher_caches"] = caches
    start = None if origin is None else find_origin(origin)
    if start is not None:
        check_branch(start, recipe, identity)
        identity["from"] = start.identity
    paths = RunPaths(output, identity)
    world.same("recipe, teacher or data", paths.run_id)

    vocabulary = smallest_vocabulary(recipe, teacher_config)
    claimed: list[RunFolder] = []

    def prepare() -> str:
        run = RunFolder(output, identity, accept_changes=accept_changes)
        with run.preparing():
            write_text(run.path / "recipe.toml", to_toml(recipe))
            read = _samples(run, recipe, tokenizer or teacher, sources, vocabulary)
            check_caches(recipe, teacher, read.training, len(sources))
            if start is not None:
                branch(start, run)
            if not run.finished(0, CONVERTED):
                say(f"converting {student or teacher}")
                run.publish(0, CONVERTED, lambda folder: _first_student(recipe, teacher, student, tokenizer, folder))
        claimed.append(run)
        return run.run_id

    paths.run_id = world.first(prepare)
    run = claimed[0] if claimed else paths
    samples = _samples(run, recipe, tokenizer or teacher, sources, vocabulary)
    driver = Driver(run, recipe, teacher, samples, world)
    names = [CONVERTED, *recipe.stages]
    with driver:
        for index, name in enumerate(recipe.stages, start=1):
            if not world.share(run.finished(index, name)):
                driver.run_stage(index, name, predecessor=names[index - 1])
    world.first(lambda: claimed[0].deliver(len(recipe.stages), names[-1]))
    folders = {name: run.stage(index, name) / "student" for index, name in enumerate(names)}
    return RunResult(run.path, run.student, folders)


def _first_student(
    recipe: Recipe, teacher: str, student: str | Path | None, tokenizer: str | Path | None, folder: Path
) -> None:
    """Fill a folder with the student before the first stage: the user's own, or converted from the teacher."""
    if student is not None:
        shutil.copytree(student, folder, dirs_exist_ok=True)
    else:
        options = recipe.student
        conversion = convert_folder(
            teacher, folder, options.mixer, options.keep_attention, options.init, options.mixer_kwargs, options.seed
        )
        say(conversion.summary())
    if tokenizer is not None:
        load_tokenizer(tokenizer).save_pretrained(folder)


def _samples(
    run: RunPaths, recipe: Recipe, tokenizer_source: str | Path, sources: list[SourceTable], vocab_size: int
) -> RunSamples:
    """Open the run's samples, making files of tokens at the first call."""
    data = recipe.data

    def opened(name: str, path: str, least: int | None = None) -> Samples:
        return open_samples(
            path,
            data.sequence_length,
            vocab_size=vocab_size,
            tokenizer=lambda: load_tokenizer(tokenizer_source),
            cache=run.path / "data" / f"{name}.npy",
            least=least,
            note=say,
        )

    one = len(sources) == 1
    training = [
        opened("training" if one else f"training-{place}", source.path, data.samples if one else None)
        for place, source in enumerate(sources, start=1)
    ]
    weights = [source.weight for source in sources]
    if data.eval_source is not None:
        return RunSamples(mixed(training, weights), opened("held-out", data.eval_source))
    if data.eval_fraction:  # every source keeps some back, so that none is learned from and held out at once
        learned, held_out = zip(*(split_samples(samples, data.eval_fraction) for samples in training), strict=True)
        return RunSamples(mixed(learned, weights), mixed(held_out, weights))
    return RunSamples(mixed(training, weights), None)
