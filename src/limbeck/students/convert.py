"""A Transformer goes in, a student comes out: attention swapped for mixers, everything else the teacher's."""

import copy
import inspect
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from limbeck.errors import LimbeckError, unknown
from limbeck.mixers import Mixer, get_mixer
from limbeck.students.families import STUDENT_PREFIX, attention_of, blocks, family_of, mixers
from limbeck.students.initialise import Init, check_init, start_mixers
from limbeck.students.loading import check_loaded, load_config, load_model
from limbeck.students.modeling import StudentCausalLM, student_class, student_config_class

logger = logging.getLogger(__name__)


def student_config(
    teacher_config: PretrainedConfig,
    mixer: str = "discrete-mamba2",
    keep_attention: Iterable[int] = (),
    init: Init = "attention",
    mixer_kwargs: Mapping[str, Any] | None = None,
) -> Any:
    """Derive a student's configuration from its teacher's.

    ``AutoModelForCausalLM.from_config(student_config(...))`` builds a student with random weights;
    ``AutoModelForCausalLM.from_pretrained(teacher, config=student_config(...))`` takes all but the mixers from the
    teacher. Only `convert` starts mixers from attention; elsewhere ``init="attention"`` means ``"identity"``.

    Args:
        teacher_config: Of a model of a supported family.
        mixer: A registered mixer's name.
        keep_attention: Layers, from 0, that keep their attention.
        init: How mixers start.
        mixer_kwargs: Options of the mixer, over those that suit the teacher's attention.

    Raises:
        LimbeckError: For an unknown family, mixer, option or layer, or a configuration that is a student's already.
    """
    if teacher_config.model_type.startswith(STUDENT_PREFIX):
        raise LimbeckError("the model is a student already", expected="a Transformer", hint="convert its teacher")
    if getattr(teacher_config, "quantization_config", None) is not None:
        raise LimbeckError(
            "the model is quantised", expected="a model in floating point", hint="its unquantised source"
        )
    family, mixer_class = family_of(teacher_config), get_mixer(mixer)
    text_config: Any = teacher_config
    layers = range(text_config.num_hidden_layers)
    kept = set(keep_attention)
    if not kept <= set(layers):
        raise LimbeckError(
            f"keep_attention {sorted(kept)}", expected=f"layers of this model: 0 to {len(layers) - 1}, counted from 0"
        )
    fields = teacher_config.to_dict()
    for name in ("model_type", "architectures", "transformers_version", "auto_map"):
        fields.pop(name, None)
    config_class: Any = student_config_class(family)
    config = config_class(
        **fields,
        mixer=mixer,
        mixer_kwargs=_mixer_options(mixer, mixer_class, text_config, mixer_kwargs or {}),
        swapped_layers=[index for index in layers if index not in kept],
        mixer_init=check_init(init, mixer),
    )
    config._attn_implementation = teacher_config._attn_implementation
    return config


def _mixer_options(name: str, cls: type[Mixer], config: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    parameters = inspect.signature(cls).parameters
    known = [key for key in parameters if key != "d_model"]
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        for key in given:
            if key not in known:
                raise unknown(f"option of the mixer {name!r}:", key, known)
    shape = family_of(config).attention_shape(config)
    options = cls.defaults_for(config.hidden_size, **shape._asdict()) | dict(given)
    with torch.device("meta"):
        cls(config.hidden_size, **options)  # its own errors, before anything is built or read
    return options


def convert(
    model: PreTrainedModel | str | Path,
    mixer: str = "discrete-mamba2",
    keep_attention: Iterable[int] = (),
    init: Init = "attention",
    mixer_kwargs: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> StudentCausalLM:
    """Swap a model's attention for mixers.

    Args:
        model: A causal language model of a supported family, which is left as it is, or where to load one from.
        mixer: A registered mixer's name.
        keep_attention: Layers, from 0, that keep their attention.
        init: ``"attention"`` starts mixers from the teacher's projections, ``"identity"`` with open gates and
            identity convolutions, ``"random"`` as the mixer usually starts.
        mixer_kwargs: Options of the mixer, over those that suit the teacher's attention.
        seed: Of the mixers' random numbers.

    Returns:
        The student, in the model's dtype (what a mixer needs in float32 stays so), on its device, in its mode.

    Raises:
        LimbeckError: For an unknown family, mixer, option or layer, or a model that is quantised or no language model.
    """
    loaded = isinstance(model, str | Path)
    teacher_config = load_config(model) if loaded else model.config
    config = student_config(teacher_config, mixer, keep_attention, init, mixer_kwargs)  # errors before weights
    family = family_of(teacher_config)
    teacher: Any = load_model(model) if loaded else model
    if not isinstance(teacher, family.causal_lm_class) or getattr(teacher, "is_quantized", False):
        raise LimbeckError(
            f"cannot convert a {'quantised ' if getattr(teacher, 'is_quantized', False) else ''}"
            f"{type(teacher).__name__}",
            expected=f"a {family.causal_lm_class.__name__} in floating point",
        )
    weights = teacher.state_dict()
    if not loaded:
        weights = {name: tensor.detach().clone() for name, tensor in weights.items()}
    with no_init_weights():
        student = student_class(family)._from_config(config, dtype=teacher.dtype)
    missing, unexpected = student.load_state_dict(weights, strict=False, assign=True)
    check_loaded(student, {"missing_keys": missing, "unexpected_keys": unexpected})
    student.tie_weights()
    layers = ((index, mixer, attention_of(blocks(teacher)[index])) for index, mixer in mixers(student).items())
    for note in start_mixers(layers, teacher_config, init, seed):
        logger.warning(note)
    student.generation_config = copy.deepcopy(teacher.generation_config)
    student.to(device=teacher.device)  # pyright: ignore[reportArgumentType, reportCallIssue]
    student.train(teacher.training)
    return student
