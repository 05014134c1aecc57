"""The student classes: for each family a configuration, a backbone and a causal language model.

A student is a subclass of its teacher's own class, with mixers at the swapped layers. Parameter names stay the
teacher's, so a teacher's checkpoint fills all but the mixers, and everything transformers can do with the teacher
(sharding, device maps, gradient checkpointing, tied weights, generation) it can do with the student.
"""

import inspect
import re
from collections.abc import Callable
from functools import partial, wraps
from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.generation import GenerationMode
from transformers.initialization import no_init_weights

from limbeck.errors import LimbeckError
from limbeck.mixers import Mixer, get_mixer
from limbeck.students.activations import fuse_activations
from limbeck.students.arguments import PADDING, carry, with_mixer_arguments
from limbeck.students.cache import FixedRecurrentLayer, RecurrentLayer, StudentCache, check_cache
from limbeck.students.families import FAMILIES, STUDENT_PREFIX, Family, family_of
from limbeck.students.families.family import CACHE
from limbeck.students.initialise import reset_mixer
from limbeck.students.loading import check_loaded


class SwappedAttention(nn.Module):
    """Stands where attention stood, is called as attention was, and holds the mixer.

    Args:
        config: The student's configuration.
        layer_idx: Which layer this is.
    """

    def __init__(self, config: Any, layer_idx: int):
        super().__init__()
        self.layer_idx = layer_idx
        family = family_of(config)
        self.cache_keyword, self.carrier = family.cache_keyword, family.carrier
        self.mixer = get_mixer(config.mixer)(config.hidden_size, **config.mixer_kwargs)

    def forward(
        self, hidden_states: Tensor, *_: Any, seq_idx: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, None]:
        """Mix, and carry the state in the cache if there is one.

        Args:
            hidden_states: (b, l, d).
            seq_idx: (b, l), document ids of packed samples.
            kwargs: Whatever the family's block hands to its attention; the cache and the padding mask are taken.

        Returns:
            The output, (b, l, d), and None where attention would return its weights.
        """
        if self.carrier is not None and isinstance(carried := kwargs[self.carrier], dict):
            kwargs, seq_idx = kwargs | carried, carried.get("seq_idx")
        mask, cache = kwargs.get(PADDING), kwargs.get(self.cache_keyword)
        if cache is None:
            return self.mixer(hidden_states, mask, seq_idx=seq_idx), None
        layer = cache.layers[self.layer_idx]
        assert isinstance(layer, RecurrentLayer)
        if isinstance(layer, FixedRecurrentLayer):
            assert layer.state is not None
            return self.mixer.step_in_place(hidden_states[:, 0], layer.state)[:, None], None
        output, state = self.mixer(hidden_states, mask, state=layer.state, return_state=True)
        layer.advance(state, hidden_states.shape[1])
        return output, None


class StudentModel(PreTrainedModel):
    """What backbones and causal language models of students share: how weights start and how loading is checked."""

    teacher_class: ClassVar[type[PreTrainedModel]]

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        # Found out from the source of a class's module: the teacher's is the one to read.
        return cls.teacher_class._can_set_attn_implementation()

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False) -> None:
        # For classes outside transformers a module without parameters of its own would count as initialised.
        super()._initialize_weights(module, is_custom_code and not isinstance(module, Mixer))

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, Mixer):
            reset_mixer(module, self.config.mixer_init)
        else:
            super()._init_weights(module)

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """Load as transformers does, then make sure that nothing is missing.

        A student's checkpoint must fit exactly. A teacher's checkpoint with a student's configuration must leave
        nothing new but mixers, and nothing unused but the attention they replace.

        Raises:
            LimbeckError: When it is otherwise; transformers alone would only warn.
        """
        loaded: Any = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        model, info = loaded
        check_loaded(model, info)
        return (model, info) if output_loading_info else model


class StudentBackbone(StudentModel):
    """A teacher's backbone with mixers at `config.swapped_layers`."""

    def __init__(self, config: Any):
        with no_init_weights():  # once is enough, and after the swap
            super().__init__(config)
        family = family_of(config)
        for index in config.swapped_layers:
            block = getattr(self, family.blocks)[index]
            setattr(block, family.attention, SwappedAttention(config, index))
            if family.carrier is not None:
                block.register_forward_pre_hook(partial(carry, family.carrier), with_kwargs=True)
        fuse_activations(self)
        float32 = get_mixer(config.mixer).float32_parameters  # as regular expressions, searched in the full names
        strict = {rf"\.mixer\.{re.escape(name)}$" for name in float32}
        self._keep_in_fp32_modules_strict = {*(self._keep_in_fp32_modules_strict or ()), *strict}
        self.post_init()


class StudentCausalLM(StudentModel, GenerationMixin):
    """A teacher's causal language model over the student's backbone."""

    backbone_class: ClassVar[type[StudentBackbone]]

    def __init__(self, config: Any):
        with no_init_weights():
            super().__init__(config)
        setattr(self, self.base_model_prefix, None)  # let go of the teacher's backbone before the student's is built
        setattr(self, self.base_model_prefix, self.backbone_class(config))
        self.post_init()

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict, generation_mode: Any, *args: Any, **kwargs: Any
    ) -> Any:
        if not self.config.swapped_layers:
            stock: Any = super()
            return stock._prepare_cache_for_generation(
                generation_config, model_kwargs, generation_mode, *args, **kwargs
            )
        if generation_mode == GenerationMode.ASSISTED_GENERATION or getattr(generation_config, "is_assistant", False):
            raise LimbeckError(
                "assisted decoding with a student",
                expected="greedy search, sampling or beam search: a recurrent state cannot take back rejected tokens",
                hint="leave out assistant_model and prompt_lookup_num_tokens",
            )
        if generation_config.cache_implementation not in (None, "dynamic", "dynamic_full"):
            raise LimbeckError(
                f"cache_implementation={generation_config.cache_implementation!r} with a student",
                expected="the student's own cache, which static, quantised and offloaded caches cannot replace",
                hint="leave cache_implementation out",
            )
        if (cache := model_kwargs.get(CACHE)) is not None:
            check_cache(cache)
        elif generation_config.use_cache is not False:
            model_kwargs[CACHE] = StudentCache(self.config)
        return None

    def init_continuous_batching(self, *_args: Any, **_kwargs: Any) -> NoReturn:
        """Paged caches have no room for recurrent states: always an error."""
        raise LimbeckError(
            "continuous batching with a student",
            expected="generate(), which batches prompts of different lengths by padding on the left",
        )


# --- one configuration, backbone and language model per family ------------------------------------------------------


def _student_forward(teacher_class: type[PreTrainedModel]) -> Callable[..., Any]:
    """The teacher's forward with the student's cache, and with what the mixers need among the keyword arguments."""
    names = list(inspect.signature(teacher_class.forward).parameters)[1:]

    @wraps(teacher_class.forward)
    def forward(self: StudentBackbone, *args: Any, **kwargs: Any) -> Any:
        arguments = dict(zip(names, args, strict=False)) | kwargs
        if self.config.swapped_layers or arguments.get("seq_idx") is not None:
            arguments = with_mixer_arguments(self, arguments)
        return teacher_class.forward(self, **arguments)

    return forward


def _check_layers(config: Any) -> None:
    layers = config.swapped_layers
    if sorted(set(layers)) != list(layers) or not set(layers) <= set(range(config.num_hidden_layers)):
        raise LimbeckError(
            f"swapped_layers {layers} in a student's configuration",
            expected=f"layers from 0 to {config.num_hidden_layers - 1}, each once, in order",
        )


def _config_class(family: Family) -> type[PretrainedConfig]:
    """The teacher's configuration and four fields: mixer, mixer_kwargs, swapped_layers, mixer_init."""
    teacher = family.config_class

    def post_init(self: Any, **kwargs: Any) -> None:
        self.mixer_kwargs = dict(self.mixer_kwargs or {})
        self.swapped_layers = list(self.swapped_layers or ())
        teacher.__post_init__(self, **kwargs)
        _check_layers(self)

    return type(
        f"Limbeck{teacher.__name__}",
        (teacher,),
        {
            "__module__": __name__,
            "__doc__": f"Configuration of a student of a {teacher.__name__.removesuffix('Config')} teacher.",
            "__annotations__": {
                "mixer": str,
                "mixer_kwargs": dict | None,
                "swapped_layers": list | None,
                "mixer_init": str,
            },
            "__post_init__": post_init,
            "model_type": STUDENT_PREFIX + family.name,
            "mixer": "discrete-mamba2",
            "mixer_kwargs": None,
            "swapped_layers": None,
            "mixer_init": "identity",
        },
    )


def _model_class(base: type, teacher: type[PreTrainedModel], config: type[PretrainedConfig], **body: Any) -> type:
    return type(
        f"Limbeck{teacher.__name__}",
        (base, teacher),
        {
            "__module__": __name__,
            "__doc__": f"{teacher.__name__} with mixers where `config.swapped_layers` says.",
            "__annotations__": {"config": config},
            "config_class": config,
            "teacher_class": teacher,
            **body,
        },
    )


def register_family(family: Family) -> None:
    """Make a family known: its student classes are made, as globals of this module, and the Auto classes learn of them.

    Args:
        family: Where its attention sits. Its `model_type` must be one that transformers knows.
    """
    FAMILIES[family.name] = family
    config = _config_class(family)
    teacher_backbone, teacher_lm = family.backbone_class, family.causal_lm_class
    model = _model_class(StudentBackbone, teacher_backbone, config, forward=_student_forward(teacher_backbone))
    causal_lm = _model_class(StudentCausalLM, teacher_lm, config, backbone_class=model)
    for cls in (config, model, causal_lm):
        globals()[cls.__name__] = cls  # pickle and deepcopy find classes by module and name
    AutoConfig.register(config.model_type, config, exist_ok=True)
    AutoModel.register(config, model, exist_ok=True)
    AutoModelForCausalLM.register(config, causal_lm, exist_ok=True)
    # Renamings of checkpoint keys are looked up by class name or model type: without them heads would stay random.
    for teacher_name, student_name in (
        (family.name, config.model_type),
        (teacher_backbone.__name__, model.__name__),
        (teacher_lm.__name__, causal_lm.__name__),
    ):
        if (conversions := get_checkpoint_conversion_mapping(teacher_name)) is not None:
            register_checkpoint_conversion_mapping(student_name, conversions, overwrite=True)


def student_class(family: Family) -> type[StudentCausalLM]:
    """The causal language model class of a family's students."""
    return globals()[f"Limbeck{family.causal_lm_class.__name__}"]


def student_config_class(family: Family) -> type[PretrainedConfig]:
    """The configuration class of a family's students."""
    return globals()[f"Limbeck{family.config_class.__name__}"]


for _family in tuple(FAMILIES.values()):
    register_family(_family)
