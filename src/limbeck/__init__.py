"""Limbeck distils a pretrained Transformer into a linear-time state-space model, whole or hybrid.

Importing it makes students known to `AutoConfig`, `AutoModel` and `AutoModelForCausalLM`.
"""

from limbeck._version import __version__
from limbeck.distill import observe, run_layer
from limbeck.errors import LimbeckError
from limbeck.generation import generate
from limbeck.mixers import register_mixer
from limbeck.ops import causal_conv, matrix_distance, selective_scan, ssd
from limbeck.recipes import distill, load_recipe
from limbeck.students import convert_folder, import_checkpoint, load_model, load_tokenizer, student_config
from limbeck.students.convert import convert

__all__ = [
    "LimbeckError",
    "__version__",
    "causal_conv",
    "convert",
    "convert_folder",
    "distill",
    "generate",
    "import_checkpoint",
    "load_model",
    "load_recipe",
    "load_tokenizer",
    "matrix_distance",
    "observe",
    "register_mixer",
    "run_layer",
    "selective_scan",
    "ssd",
    "student_config",
]
