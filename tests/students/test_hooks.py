"""What Limbeck rests on in transformers beyond its public interface: each hook, and what breaks without it.

When a new transformers fails here, read the message first: it names the file of ours that has to follow.
"""

import inspect
import sys

import pytest
import torch
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    DynamicCache,
    GenerationMixin,
    PreTrainedModel,
    cache_utils,
    conversion_mapping,
    initialization,
    masking_utils,
    modeling_utils,
)
from transformers.generation import GenerationMode
from transformers.models.auto import modeling_auto
from transformers.utils import output_capturing

from limbeck.students import FAMILIES, attention_of, blocks
from limbeck.students.families.family import CACHE as NAME_OF_CACHE
from tiny import tiny_teacher

MODELING, CACHE, FAMILY, OBSERVE = (
    "see students/modeling.py",
    "see students/cache.py",
    "see students/families/family.py",
    "see distill/observe.py",
)


def parameters(function):
    return inspect.signature(function).parameters


@pytest.mark.parametrize(
    ("owner", "name", "follow"),
    [
        (PreTrainedModel, "_init_weights", f"mixers are not initialised: {MODELING}"),
        (PreTrainedModel, "_initialize_weights", f"mixers count as initialised: {MODELING}"),
        (PreTrainedModel, "_can_set_attn_implementation", f"students cannot change their attention: {MODELING}"),
        (PreTrainedModel, "_from_config", f"students are built by it: {MODELING} and students/convert.py"),
        (PreTrainedModel, "_keep_in_fp32_modules_strict", f"D and A_log become bfloat16: {MODELING}"),
        (PreTrainedModel, "post_init", f"mixers are built after it, so it runs again: {MODELING}"),
        (PreTrainedModel, "base_model_prefix", "see students/families/reach.py"),
        (GenerationMixin, "_prepare_cache_for_generation", f"generate makes a cache without states: {MODELING}"),
        (GenerationMixin, "init_continuous_batching", f"continuous batching is not refused: {MODELING}"),
        (GenerationMode, "ASSISTED_GENERATION", f"assisted decoding is not refused: {MODELING}"),
        (initialization, "no_init_weights", f"weights are made twice: {MODELING}"),
        (conversion_mapping, "get_checkpoint_conversion_mapping", f"GPT-NeoX's head stays random: {MODELING}"),
        (conversion_mapping, "register_checkpoint_conversion_mapping", f"GPT-NeoX's head stays random: {MODELING}"),
        (output_capturing, "_CAN_RECORD_REGISTRY", f"hidden states of students are not recorded: {MODELING}"),
        (cache_utils, "CacheLayerMixin", f"recurrent layers derive from it: {CACHE}"),
        (cache_utils, "DynamicLayer", f"StudentCache.reset empties it: {CACHE}"),
        (modeling_auto, "MODEL_MAPPING", f"it names a family's backbone: {FAMILY}"),
        (modeling_auto, "MODEL_FOR_CAUSAL_LM_MAPPING", f"it names a family's language model: {FAMILY}"),
        (modeling_utils, "ALL_ATTENTION_FUNCTIONS", f"observed attention goes on to the model's own: {OBSERVE}"),
        (masking_utils, "ALL_MASK_ATTENTION_FUNCTIONS", f"observed attention takes the model's own mask: {OBSERVE}"),
        (AttentionInterface, "register", OBSERVE),
        (AttentionInterface, "get_interface", OBSERVE),
        (AttentionMaskInterface, "register", OBSERVE),
    ],
    ids=lambda value: getattr(value, "__name__", None) if not isinstance(value, str) else None,
)
def test_it_is_where_it_was(owner, name, follow):
    assert hasattr(owner, name), f"{owner.__name__}.{name} is gone: {follow}"


def test_arguments_that_are_named_or_counted():
    assert "is_custom_code" in parameters(PreTrainedModel._initialize_weights), MODELING
    assert list(parameters(GenerationMixin._prepare_cache_for_generation))[1:4] == [
        "generation_config",
        "model_kwargs",
        "generation_mode",
    ], f"students put their cache into model_kwargs: {MODELING}"
    assert "config" in parameters(DynamicCache.__init__), CACHE
    assert NAME_OF_CACHE in parameters(GenerationMixin.prepare_inputs_for_generation), FAMILY
    assert "overwrite" in parameters(conversion_mapping.register_checkpoint_conversion_mapping), MODELING


def test_a_cache_asks_of_its_layers_what_ours_answer():
    """A method that transformers adds to layers and that a recurrent layer lacks would fail in the middle of a run."""
    known = {
        "batch_repeat_interleave",
        "batch_select_indices",
        "crop",
        "get_mask_sizes",
        "get_max_cache_shape",
        "get_max_length",
        "get_seq_length",
        "lazy_initialization",
        "offload",
        "prefetch",
        "reorder_cache",
        "reset",
        "update",
    }
    asked = {name for name in vars(cache_utils.CacheLayerMixin) if not name.startswith("_")}
    methods = {name for name in asked if callable(getattr(cache_utils.CacheLayerMixin, name))}
    assert methods <= known, f"cache layers have something new, {methods - known}: {CACHE}"


@pytest.fixture(params=FAMILIES)
def teacher(request):
    return tiny_teacher(request.param)


def test_attention_is_called_as_families_say(teacher):
    """Each family: the cache comes under its keyword, our keywords pass or are carried, a pair is returned."""
    family, called = FAMILIES[teacher.config.model_type], {}

    def remember(_module, _args, kwargs, output):
        called.update(kwargs, output=output)

    attention = attention_of(blocks(teacher)[0])
    attention.register_forward_hook(remember, with_kwargs=True)
    teacher(torch.ones(1, 3, dtype=torch.long), use_cache=True, limbeck_of_ours=1)
    where = f"{type(attention).__name__} is called in another way: see students/families/table.py"
    for model in (family.backbone_class, family.causal_lm_class):
        assert NAME_OF_CACHE in parameters(model.forward), f"{model.__name__} calls its cache otherwise: {FAMILY}"
    assert isinstance(called[family.cache_keyword], DynamicCache), where
    assert isinstance(called["output"], tuple), where
    assert len(called["output"]) == 2, where
    assert "limbeck_of_ours" in called or family.carrier in called, f"the padding mask does not arrive: {where}"
    assert family.carrier is None or "limbeck_of_ours" not in called, f"a carrier is needed no more: {where}"


def test_attention_is_observed_as_families_do_it(teacher):
    """Each family's attention looks its implementation up by name and has an eager one in its own module."""
    attention = attention_of(blocks(teacher)[0])
    source = inspect.getsource(type(attention).forward)
    assert "ALL_ATTENTION_FUNCTIONS" in source, OBSERVE
    assert "_attn_implementation" in source, OBSERVE
    assert hasattr(sys.modules[type(attention).__module__], "eager_attention_forward"), OBSERVE
    assert attention.config is teacher.config, f"the name of the implementation is changed in one place: {OBSERVE}"
    assert isinstance(attention.scaling, float | int), "see students/families/projections.py"


def test_the_name_of_the_implementation_is_kept_in_one_private_field():
    config = tiny_teacher("llama").config
    config._attn_implementation_internal = "eager"
    assert config._attn_implementation == "eager", OBSERVE
    assert AutoModelForCausalLM.from_config(config).config._attn_implementation == "eager", OBSERVE
