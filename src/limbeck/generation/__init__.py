"""Text from a model, teacher or student."""

from limbeck.generation.decoder import Decoder, decodes
from limbeck.generation.sampling import Sampling
from limbeck.generation.text import generate

__all__ = ["Decoder", "Sampling", "decodes", "generate"]
