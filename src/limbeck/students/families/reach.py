"""Reaching into a model, teacher and student alike: its family, its blocks, their attention or their mixers."""

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from limbeck.errors import LimbeckError
from limbeck.mixers import Mixer
from limbeck.students.families.family import Family, LogitForm
from limbeck.students.families.table import FAMILIES

STUDENT_PREFIX = "limbeck_"
"""A student's `model_type` is its teacher's with this in front."""


def family_of(config: PretrainedConfig) -> Family:
    """Find the family of a teacher's or a student's configuration.

    Args:
        config: The configuration of a model.

    Raises:
        LimbeckError: When Limbeck does not know the family; the message lists those it knows.
    """
    name = config.model_type.removeprefix(STUDENT_PREFIX)
    if name not in FAMILIES:
        raise LimbeckError(
            f"unknown family {name!r}",
            expected=f"one of {', '.join(sorted(FAMILIES))}",
            hint="docs/add-a-family.md, which shows how one entry adds a family",
        )
    return FAMILIES[name]


def backbone(model: PreTrainedModel) -> PreTrainedModel:
    """The model below the language-modelling head, or the model itself where it has none."""
    return getattr(model, model.base_model_prefix, model)


def blocks(model: PreTrainedModel) -> nn.ModuleList:
    """The list of blocks, each with its attention (or mixer) and its MLP."""
    return getattr(backbone(model), family_of(model.config).blocks)


def plain_head(model: PreTrainedModel) -> tuple[nn.Linear, LogitForm] | None:
    """The language-modelling head, where it is one matrix product, and what becomes of its output.

    Returns:
        None where the head is something else (quantised, with an adapter, replaced), or the family is unknown or does
        not say.
    """
    family = FAMILIES.get(model.config.model_type.removeprefix(STUDENT_PREFIX))
    form = None if family is None else family.logits(model.config)
    head = model.get_output_embeddings()
    if form is None or not isinstance(head, nn.Linear):
        return None
    replaced = type(head).forward is not nn.Linear.forward or "forward" in vars(head)
    return None if replaced else (head, form)


def attention_of(block: nn.Module) -> nn.Module:
    """The attention module of a block; in a swapped block, the module that stands in its place.

    Raises:
        LimbeckError: When the block belongs to no known family.
    """
    for name in sorted({family.attention for family in FAMILIES.values()}):
        if isinstance(found := getattr(block, name, None), nn.Module):
            return found
    raise LimbeckError(
        f"{type(block).__name__} has no attention that Limbeck knows",
        expected=f"a block of one of the families {', '.join(sorted(FAMILIES))}",
    )


def mixer_of(block: nn.Module) -> Mixer | None:
    """The mixer of a swapped block, or None where attention still stands."""
    mixer = getattr(attention_of(block), "mixer", None)
    return mixer if isinstance(mixer, Mixer) else None


def mixers(model: PreTrainedModel) -> dict[int, Mixer]:
    """The mixers of a student, by layer; empty for a teacher."""
    found = {index: mixer_of(block) for index, block in enumerate(blocks(model))}
    return {index: mixer for index, mixer in found.items() if mixer is not None}


def swapped_layers(model: PreTrainedModel) -> tuple[int, ...]:
    """The layers whose attention a mixer replaces; empty for a teacher."""
    return tuple(mixers(model))
