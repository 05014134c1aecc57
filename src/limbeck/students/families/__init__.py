"""Where attention sits in each family of Hugging Face causal language models, and what its projections are.

A family is one entry of `table.py`. Everything else in Limbeck reaches into a model through it.
"""

from limbeck.students.families.family import AttentionShape, Family, LogitForm, attention_shape
from limbeck.students.families.projections import fused_projections, separate_projections
from limbeck.students.families.reach import (
    STUDENT_PREFIX,
    attention_of,
    backbone,
    blocks,
    family_of,
    mixer_of,
    mixers,
    plain_head,
    swapped_layers,
)
from limbeck.students.families.table import FAMILIES

__all__ = [
    "FAMILIES",
    "STUDENT_PREFIX",
    "AttentionShape",
    "Family",
    "LogitForm",
    "attention_of",
    "attention_shape",
    "backbone",
    "blocks",
    "family_of",
    "fused_projections",
    "mixer_of",
    "mixers",
    "plain_head",
    "separate_projections",
    "swapped_layers",
]
