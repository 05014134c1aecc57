"""Sequence mixers: what stands where attention stood. Pure torch, no knowledge of any model around them."""

from limbeck.mixers.base import AttentionWeights, MatrixFactors, Mixer, MixerState
from limbeck.mixers.discrete_mamba2 import DiscreteMamba2
from limbeck.mixers.mamba import Mamba
from limbeck.mixers.mamba2 import Mamba2
from limbeck.mixers.registry import get_mixer, mixer_names, register_mixer

register_mixer("discrete-mamba2", DiscreteMamba2)
register_mixer("mamba", Mamba)
register_mixer("mamba2", Mamba2)

__all__ = [
    "AttentionWeights",
    "DiscreteMamba2",
    "Mamba",
    "Mamba2",
    "MatrixFactors",
    "Mixer",
    "MixerState",
    "get_mixer",
    "mixer_names",
    "register_mixer",
]
