"""The shapes of models, without their weights and, for the recipes' own teachers, without network."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from limbeck.errors import LimbeckError
from limbeck.recipes.schema import Recipe
from limbeck.students import load_config, student_config
from limbeck.students.activations import fuse_activations

PYTHIA = {"model_type": "gpt_neox", "vocab_size": 50304, "rotary_pct": 0.25, "max_position_embeddings": 2048}
SHAPES: dict[str, dict[str, Any]] = {
    "microsoft/phi-1_5": {
        "model_type": "phi",
        "vocab_size": 51200,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 24,
        "num_attention_heads": 32,
        "partial_rotary_factor": 0.5,
        "max_position_embeddings": 2048,
    },
    "EleutherAI/pythia-160m": PYTHIA
    | {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
    "EleutherAI/pythia-410m": PYTHIA
    | {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16},
    "EleutherAI/pythia-1b": PYTHIA
    | {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 8},
    "meta-llama/Llama-3.2-1B": {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": True,
    },
}
"""What the configurations of the recipes' teachers, and of Pythia's other sizes, say of shapes; by hub id."""


def config_of(teacher: str | Path) -> PretrainedConfig:
    """A teacher's configuration: from its folder, the hub's cache on this machine, or `SHAPES`; never over a network.

    Raises:
        LimbeckError: It is in none of these.
    """
    if Path(teacher).is_dir():
        return load_config(teacher)
    try:
        return AutoConfig.from_pretrained(teacher, local_files_only=True)
    except (OSError, ValueError) as error:
        if str(teacher) not in SHAPES:
            raise LimbeckError(
                f"the shape of {str(teacher)!r} is not known without network",
                expected=f"a folder, a model in the hub's cache, or one of {', '.join(SHAPES)}",
                hint="--teacher with a folder that holds its config.json",
            ) from error
    return AutoConfig.for_model(**SHAPES[str(teacher)])


def teacher_of_shape(config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """A teacher without data, as a run would load it."""
    return _built(config, dtype)


def student_of_shape(config: PretrainedConfig, recipe: Recipe) -> PreTrainedModel:
    """The student without data that a recipe would make of a teacher, in float32 and in train mode."""
    table = recipe.student
    made = student_config(config, table.mixer, table.keep_attention, table.init, table.mixer_kwargs)
    return _built(made, torch.float32).train()


def _built(config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    fuse_activations(model)
    return model
