"""Students: Hugging Face models whose attention layers are swapped for mixers."""

from limbeck.students.arguments import padding_keyword
from limbeck.students.cache import RecurrentLayer, StudentCache, cache_bytes
from limbeck.students.convert import student_config
from limbeck.students.families import (
    FAMILIES,
    AttentionShape,
    Family,
    LogitForm,
    attention_of,
    backbone,
    blocks,
    family_of,
    mixer_of,
    mixers,
    plain_head,
    swapped_layers,
)
from limbeck.students.folders import Conversion, check_destination, convert_folder
from limbeck.students.initialise import Init
from limbeck.students.loading import check_files, load_config, load_model, load_tokenizer
from limbeck.students.modeling import StudentBackbone, StudentCausalLM, SwappedAttention, register_family
from limbeck.students.published import Import, import_checkpoint

__all__ = [
    "FAMILIES",
    "AttentionShape",
    "Conversion",
    "Family",
    "Import",
    "Init",
    "LogitForm",
    "RecurrentLayer",
    "StudentBackbone",
    "StudentCache",
    "StudentCausalLM",
    "SwappedAttention",
    "attention_of",
    "backbone",
    "blocks",
    "cache_bytes",
    "check_destination",
    "check_files",
    "convert_folder",
    "family_of",
    "import_checkpoint",
    "load_config",
    "load_model",
    "load_tokenizer",
    "mixer_of",
    "mixers",
    "padding_keyword",
    "plain_head",
    "register_family",
    "student_config",
    "swapped_layers",
]
