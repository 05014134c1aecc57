"""What comes with the batches of a stage that reads a teacher cache, without the cache's data."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from limbeck.distill import Keeping, TeacherCache
from limbeck.distill.teacher_cache import KEYS, MANIFEST
from limbeck.distill.teacher_states import STATES, states_shape
from limbeck.recipes.cached import check_states
from limbeck.recipes.schema import AnyStage, HiddenStage
from limbeck.recipes.stages import cache_of


def cache_is_there(stage: AnyStage) -> bool:
    """Whether the cache that a stage reads is finished."""
    folder = cache_of(stage)
    return folder is not None and (Path(folder) / MANIFEST).is_file()


def manifest_of(stage: AnyStage, teacher: PretrainedConfig) -> dict[str, Any]:
    """What a stage's cache says of itself or, where it is not made yet, would say if it were made as by default.

    Raises:
        LimbeckError: It lacks the hidden states that the stage reads.
    """
    if cache_is_there(stage):
        cache = TeacherCache(str(cache_of(stage)))
        if isinstance(stage, HiddenStage):
            check_states(cache, stage.objective, stage)
        return cache.manifest
    usual, config = Keeping(), teacher
    states = {"layers": config.num_hidden_layers, "width": config.hidden_size, "stored": usual.hidden_stored}
    target = {"target": stage.target} if isinstance(stage, HiddenStage) else {}
    return {"top_k": usual.top_k, "vocabulary": config.vocab_size, "hidden": states | target}


def cached_signals(stage: AnyStage, manifest: dict[str, Any], micro_batch: int, length: int) -> dict[str, Tensor]:
    """What the cache adds to a micro-batch, without data where no tensor has any."""
    if isinstance(stage, HiddenStage):
        count, _, width = states_shape(manifest["hidden"], length)
        stored = getattr(torch, manifest["hidden"]["stored"])
        return {STATES: torch.empty(micro_batch, count, length, width, dtype=stored)}
    shape = micro_batch, length, manifest["top_k"]
    ids = torch.zeros(shape, dtype=torch.int32)
    return dict(zip(KEYS, (ids, torch.zeros(shape), torch.zeros(shape[:2])), strict=True))
