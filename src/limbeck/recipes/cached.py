"""Teacher caches of a recipe: how one is made, which a stage reads, and what it must have been made from."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from limbeck.data import Samples, collate, open_samples
from limbeck.devices import choose_device, choose_dtype
from limbeck.distill import Keeping, TeacherCache, teacher_fingerprint, write_teacher_cache
from limbeck.distill.teacher_cache import AGAIN, MANIFEST
from limbeck.distill.teacher_cache_writer import LIKELIEST
from limbeck.errors import LimbeckError
from limbeck.files import sha256
from limbeck.progress import make_progress, say
from limbeck.recipes.schema import AnyStage, HiddenStage, Recipe
from limbeck.recipes.stages import cache_of
from limbeck.students import load_config, load_model, load_tokenizer


def cache_teacher(
    folder: str | Path,
    teacher: str | Path,
    data: str | Path,
    *,
    sequence_length: int,
    tokenizer: str | Path | None = None,
    samples: int | None = None,
    keeping: Keeping = LIKELIEST,
    batch_size: int = 8,
    device: str | None = None,
    dtype: str | None = None,
) -> TeacherCache:
    """Run a teacher over the samples of a source and keep what it predicts; see `write_teacher_cache`.

    Args:
        folder: The cache's.
        teacher: Folder or hub id.
        data: A token file, or text; what the recipe's ``data.source`` is.
        sequence_length: The recipe's.
        tokenizer: Folder or hub id; by default the teacher's. Token files need none.
        samples: The first ones only; by default all.
        keeping: What is kept.
        batch_size: Samples in a forward pass.
        device: Where to run; by default a GPU if there is one.
        dtype: What the teacher computes in; by default bfloat16 on a GPU, else float32, as a run's is.

    Raises:
        LimbeckError: Something is not there or does not fit.
    """
    if batch_size < 1 or (samples is not None and samples < 1):
        raise LimbeckError(f"batch_size = {batch_size}, samples = {samples}", expected="1 or more")
    place = choose_device(device)
    number_format = choose_dtype(dtype) or (torch.bfloat16 if place.type == "cuda" else torch.float32)
    dataset = open_samples(
        data,
        sequence_length,
        vocab_size=load_config(teacher).vocab_size,
        tokenizer=lambda: load_tokenizer(tokenizer or teacher),
        least=samples,
        note=say,
    )
    count = len(dataset) if samples is None else min(samples, len(dataset))
    about = {"teacher": str(teacher), "fingerprint": teacher_fingerprint(teacher), "data": str(data)}
    model = load_model(teacher, dtype=number_format, device=place).eval()
    with make_progress("preparing", total=count) as progress:
        return write_teacher_cache(
            folder,
            model,
            lambda numbers: collate(dataset, numbers),
            samples=count,
            about=about,
            keeping=keeping,
            batch_size=batch_size,
            report=lambda done: progress.update(done, {}),
            note=say,
        )


def cache_identities(recipe: Recipe) -> dict[str, str]:
    """The hash of each cache's manifest, by the stage that reads it: what tells it from others."""
    caches = {name: cache_of(stage) for name, stage in recipe.stages.items()}
    return {
        name: sha256(TeacherCache(folder).folder / MANIFEST) for name, folder in caches.items() if folder is not None
    }


def cached_options(stage: AnyStage, manifest: dict[str, Any]) -> dict[str, Any]:
    """What the objective of a stage that reads a cache is made with, beside the stage's own options."""
    return {"cached": True} if isinstance(stage, HiddenStage) else {"cached_vocabulary": manifest["vocabulary"]}


def completed(stage: AnyStage) -> Callable[[int, np.ndarray, dict[str, Tensor]], dict[str, Tensor]] | None:
    """What a stage's teacher cache adds to its micro-batches, in the updates that are guided; None without a cache."""
    if (folder := cache_of(stage)) is None:
        return None
    cache = TeacherCache(folder)
    read = cache.states if isinstance(stage, HiddenStage) else cache.rows
    return lambda step, indices, batch: read(indices, batch) if step < stage.guided_steps else {}


def check_caches(recipe: Recipe, teacher: str, training: Samples, sources: int) -> None:
    """Refuse caches of another teacher, length, temperature or text than the stages that read them have, or of less.

    Of the text the first and the last sample are compared here, and every other one when it is read.

    Args:
        recipe: Of the run.
        teacher: Its teacher.
        training: What it learns from.
        sources: From how many sources that is mixed.

    Raises:
        LimbeckError: One does not fit.
    """
    fingerprints: dict[str, dict[str, Any]] = {}
    for name, stage in recipe.stages.items():
        folder = cache_of(stage)
        if folder is None:
            continue
        if sources > 1:
            raise LimbeckError(
                f"stages.{name}.teacher_cache with {sources} data.sources",
                expected="one source, whose samples the cache holds in their order",
                hint="join them into one token file, or leave teacher_cache out",
            )
        cache, source = TeacherCache(folder), stage.teacher or teacher
        if source not in fingerprints:
            fingerprints[source] = teacher_fingerprint(source)
        needed = len(training) if recipe.data.samples is None else min(len(training), recipe.data.samples)
        _same(cache, name, "teacher", cache.manifest["fingerprint"], fingerprints[source], source)
        _same(cache, name, "sequence_length", cache.manifest["sequence_length"], recipe.data.sequence_length)
        if isinstance(stage, HiddenStage):
            check_states(cache, name, stage)
        else:
            temperature = getattr(stage, "temperature", 1.0)
            if not math.isclose(cache.manifest["temperature"], temperature):
                _same(cache, name, "temperature", cache.manifest["temperature"], temperature)
        if len(cache) < needed:
            _same(cache, name, "samples", len(cache), needed)
        for index in {0, needed - 1}:
            cache.compare([index], collate(training, [index]))


def check_states(cache: TeacherCache, name: str, stage: HiddenStage) -> None:
    """Refuse a cache without the hidden states that a stage, of that name, reads.

    Raises:
        LimbeckError: It has none, or others.
    """
    _same(cache, name, "--hidden-states", (cache.manifest.get("hidden") or {}).get("target"), stage.target)


def _same(cache: TeacherCache, stage: str, what: str, found: Any, expected: Any, shown: str | None = None) -> None:
    if found != expected:
        found = cache.manifest["teacher"] if shown else found
        raise LimbeckError(
            f"stages.{stage}.teacher_cache = {str(cache.folder)!r} was made with {what} {found}",
            expected=f"{what} {shown or expected}" + (", whose weights are others" if shown else ", as in the recipe"),
            hint=AGAIN,
        )
