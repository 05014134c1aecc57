"""How a student's mixers start: from the attention they replace, as near to the identity as can be, or at random."""

from collections.abc import Iterable
from typing import Literal, cast, get_args

import torch
from torch import nn
from transformers import PretrainedConfig

from limbeck.errors import LimbeckError, unknown
from limbeck.mixers import Mixer, get_mixer
from limbeck.students.families import family_of

Init = Literal["attention", "identity", "random"]
"""How mixers start: ``"attention"`` from the teacher's q, k, v and o; ``"identity"`` with open gate and identity
convolution, nothing copied; ``"random"`` as the mixer usually starts."""


def check_init(init: str, mixer: str) -> Init:
    """Check that there is a start of this name, and that the mixer has it.

    Args:
        init: One of `Init`.
        mixer: A registered mixer's name.

    Raises:
        LimbeckError: When it is otherwise.
    """
    if init not in get_args(Init):
        raise unknown("init", init, get_args(Init))
    if init == "attention" and get_mixer(mixer).load_attention is Mixer.load_attention:
        raise LimbeckError(
            f"the mixer {mixer!r} cannot start from attention: queries, keys and values have no place in it",
            expected='init "random" or "identity"',
            hint='--init random on the command line, init = "random" in a recipe\'s [student]',
        )
    return cast("Init", init)


@torch.no_grad()
def reset_mixer(mixer: Mixer, init: str) -> None:
    """Initialise a mixer, except what a checkpoint has already filled.

    ``"attention"`` needs the teacher at hand, which only `limbeck.convert` has; here it starts as ``"identity"`` does.

    Args:
        mixer: Changed in place. Tensors that transformers marked as loaded stay as they are.
        init: One of `Init`.
    """
    tensors = [*mixer.parameters(), *mixer.buffers()]
    if any(tensor.is_meta for tensor in tensors):
        return
    loaded = [(tensor, tensor.clone()) for tensor in tensors if getattr(tensor, "_is_hf_initialized", False)]
    if len(loaded) == len(tensors):
        return
    mixer.reset_parameters("random" if init == "random" else "identity")
    for tensor, value in loaded:
        tensor.copy_(value)


@torch.no_grad()
def start_mixers(
    layers: Iterable[tuple[int, Mixer, nn.Module]], teacher_config: PretrainedConfig, init: Init, seed: int
) -> list[str]:
    """Start mixers anew, layer by layer.

    Args:
        layers: The layer's index, its mixer, which changes in place, and the teacher's attention of that layer (only
            ``"attention"`` looks at its weights). The next is asked for when the one before has been started.
        teacher_config: Of the teacher.
        init: How the mixers start.
        seed: Of the random numbers; the global generator is left as it was.

    Returns:
        Notes on what could not be carried over from attention, each with the layers it holds for.
    """
    family = family_of(teacher_config)
    notes: dict[str, list[int]] = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for index, mixer, attention in layers:
            if init != "attention":
                mixer.reset_parameters(init)
                continue
            found = mixer.load_attention(family.attention_weights(attention, teacher_config))
            for note in (*found, *family.not_carried(teacher_config)):
                notes.setdefault(note, []).append(index)
    return [f"{note} (layers {', '.join(map(str, layers))})" for note, layers in notes.items()]
