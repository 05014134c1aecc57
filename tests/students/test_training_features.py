"""What people do to a model they fine-tune: adapters, compilation, bfloat16, device maps."""

import warnings

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import limbeck
from limbeck.mixers import mixer_names
from limbeck.students import FAMILIES, mixers, swapped_layers
from tiny import shaken, tiny_teacher

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # peft's own, on import
    from peft import LoraConfig, PeftModel, get_peft_model

# torch.compile makes an instance of every autograd function, which torch itself warns of.
pytestmark = pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be instantiated")
CLOSE = {"rtol": 1e-4, "atol": 1e-5}
# peft asks a model for a property that transformers is about to rename.
of_peft = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def student_of(family, keep_attention=(1,), dtype=torch.float32, **options):
    student = limbeck.convert(
        tiny_teacher(family, dtype=dtype), keep_attention=keep_attention, init="random", **options
    )
    for mixer in mixers(student).values():
        shaken(mixer)
    return student


def left_padded(tokens):
    mask = torch.ones_like(tokens)
    mask[0, :5] = 0
    return mask


# --- LoRA -----------------------------------------------------------------------------------------------------------


def linear_names(student):
    """The linear layers inside mixers, by the last part of their names."""
    modules = (module for mixer in mixers(student).values() for module in mixer.named_modules())
    return sorted({name for name, module in modules if isinstance(module, nn.Linear)})


def adapted(student, names):
    return get_peft_model(student, LoraConfig(r=4, target_modules=names, init_lora_weights=False)).eval()


@of_peft
@pytest.mark.parametrize("family", ["gpt_neox", "llama", "stablelm"])
@pytest.mark.parametrize("mixer", ["discrete-mamba2", "mamba", "mamba2"])
def test_adapters_in_mixers_are_applied(family, mixer, tokens, tmp_path):
    student = student_of(family, mixer=mixer)
    names = linear_names(student)
    assert {"in_proj", "out_proj"} <= set(names)
    before = student(tokens).logits
    for name in names:  # each by itself changes the output, in a forward pass and in cached steps
        tuned = adapted(student, [name])
        assert not torch.allclose(tuned(tokens).logits, before, **CLOSE), name
        cache = tuned(tokens[:, :-1], use_cache=True).past_key_values
        step = tuned(tokens[:, -1:], past_key_values=cache).logits
        torch.testing.assert_close(step, tuned(tokens).logits[:, -1:], **CLOSE)
        student = tuned.unload()
    torch.testing.assert_close(student(tokens).logits, before)

    tuned = adapted(student, names).train()
    tuned(input_ids=tokens, labels=tokens).loss.backward()
    learning = {name: parameter for name, parameter in tuned.named_parameters() if parameter.requires_grad}
    assert len(learning) == 2 * 2 * len(names)  # two matrices, two layers
    assert all(parameter.grad is not None and parameter.grad.ne(0).any() for parameter in learning.values())
    assert all(parameter.grad is None for name, parameter in tuned.named_parameters() if name not in learning)

    after = tuned.eval()(tokens).logits
    tuned.save_pretrained(tmp_path / "adapter")
    merged = tuned.merge_and_unload()
    torch.testing.assert_close(merged(tokens).logits, after, **CLOSE)
    merged.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(again(tokens).logits, after, **CLOSE)


@of_peft
@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer")
def test_an_adapter_where_none_can_be_is_an_error():
    """The convolution has one filter a channel: no low rank fits it, and peft says so."""
    with pytest.raises(ValueError, match="CausalConv1d with groups"):
        adapted(student_of("llama"), ["conv1d"])


@of_peft
def test_an_adapter_is_saved_and_loaded(tokens, tmp_path):
    student = student_of("gpt_neox")
    student.save_pretrained(tmp_path / "student")
    tuned = adapted(student, ["in_proj", "out_proj"])
    tuned.save_pretrained(tmp_path / "adapter")
    fresh = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    untuned = fresh(tokens).logits
    loaded = PeftModel.from_pretrained(fresh, tmp_path / "adapter").eval()
    assert torch.equal(loaded(tokens).logits, tuned(tokens).logits)
    with loaded.disable_adapter():
        assert torch.equal(loaded(tokens).logits, untuned)


@of_peft
@pytest.mark.parametrize("reentrant", [False, True])
def test_adapters_learn_the_same_with_gradient_checkpointing(tokens, reentrant):
    tuned = adapted(student_of("llama"), ["in_proj", "out_proj"]).train()

    def gradients():
        tuned.zero_grad()
        tuned(input_ids=tokens, attention_mask=left_padded(tokens), labels=tokens).loss.backward()
        return {name: p.grad.clone() for name, p in tuned.named_parameters() if p.requires_grad}

    plain = gradients()
    model = tuned.get_base_model()
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    assert model.model.layers[0].gradient_checkpointing
    again = gradients()
    for name, gradient in plain.items():
        assert gradient.ne(0).any(), name
        torch.testing.assert_close(again[name], gradient, **CLOSE)


# --- bfloat16 -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("mixer", ["discrete-mamba2", "mamba", "mamba2"])
def test_bfloat16_trains(mixer, autocast, tokens):
    """Weights in bfloat16, or float32 weights under autocast: what a mixer needs in float32 is so in its forward."""
    student = student_of("llama", mixer=mixer, dtype=torch.float32 if autocast else torch.bfloat16).train()
    wide = type(mixers(student)[0]).float32_parameters
    assert wide
    seen = set()
    for module in mixers(student).values():
        module.register_forward_pre_hook(
            lambda module, _: seen.update(module.get_parameter(name).dtype for name in wide)
        )
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output = student(tokens, attention_mask=left_padded(tokens), labels=tokens)
    output.loss.backward()
    assert seen == {torch.float32}
    assert output.logits.dtype == torch.bfloat16
    for name, parameter in student.named_parameters():
        assert parameter.grad is not None
        assert parameter.grad.isfinite().all(), name
    for module in mixers(student).values():
        for name in wide:
            assert module.get_parameter(name).grad.dtype == torch.float32


# --- torch.compile --------------------------------------------------------------------------------------------------


@pytest.fixture
def compiled():
    """Compile in one graph: a graph break is an error."""
    torch.compiler.reset()
    yield lambda function: torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.compiler.reset()


@pytest.mark.slow
@pytest.mark.parametrize("mixer", ["discrete-mamba2", "mamba", "mamba2"])
def test_a_mixer_is_one_graph(mixer, compiled):
    module = mixers(student_of("llama", mixer=mixer))[0]
    fast = compiled(module)
    hidden, mask = torch.randn(2, 12, 32), torch.ones(2, 12, dtype=torch.bool)
    mask[0, :5] = False
    seq_idx = torch.tensor([[0] * 5 + [1] * 7]).expand(2, -1)
    with torch.no_grad():
        state = module(hidden[:, :4], return_state=True)[1]
    calls = ({}, {"attention_mask": mask}, {"seq_idx": seq_idx}, {"state": state, "return_state": True})
    for options in calls:
        torch.testing.assert_close(fast(hidden, **options), module(hidden, **options), **CLOSE)
    step, expected = (call(hidden[:, :1], state=state, return_state=True) for call in (fast, module))
    torch.testing.assert_close(step, expected, **CLOSE)

    def gradients(call):
        module.zero_grad()
        call(hidden, attention_mask=mask).square().sum().backward()
        return [parameter.grad.clone() for parameter in module.parameters()]

    torch.testing.assert_close(gradients(fast), gradients(module), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "family", [name if name == "gpt_neox" else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]
)
def test_a_students_forward_is_one_graph(family, tokens, compiled):
    student = student_of(family)
    options = {"attention_mask": left_padded(tokens), "use_cache": False}
    with torch.no_grad():
        torch.testing.assert_close(
            compiled(student)(tokens, **options).logits, student(tokens, **options).logits, **CLOSE
        )


@pytest.mark.slow
@pytest.mark.parametrize("keep_attention", [(), (1,)])
def test_a_compiled_student_learns_the_same(keep_attention, tokens, compiled):
    student = student_of("llama", keep_attention).train()

    def gradients(call):
        student.zero_grad()
        call(tokens, labels=tokens, use_cache=False).loss.backward()
        return {name: parameter.grad.clone() for name, parameter in student.named_parameters()}

    expected, found = gradients(student), gradients(compiled(student))
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.slow
def test_a_graph_break_would_be_seen(tokens, compiled, monkeypatch):
    from limbeck.mixers import DiscreteMamba2

    readout = DiscreteMamba2._gate_and_project

    def broken(self, *args):
        torch._dynamo.graph_break()
        return readout(self, *args)

    monkeypatch.setattr(DiscreteMamba2, "_gate_and_project", broken)
    with pytest.raises(torch._dynamo.exc.Unsupported):
        compiled(student_of("llama"))(tokens, use_cache=False)


# --- device maps ----------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    def save(family):
        student_of(family).save_pretrained(tmp_path / family, max_shard_size="30KB")
        return tmp_path / family

    return save


@pytest.mark.parametrize("family", ["gpt_neox", "llama", "gpt2"])
@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}])
def test_device_maps(saved, family, device_map, tokens):
    folder = saved(family)
    plain = AutoModelForCausalLM.from_pretrained(folder)
    mapped = AutoModelForCausalLM.from_pretrained(folder, device_map=device_map)
    assert torch.equal(mapped(tokens).logits, plain(tokens).logits)
    assert swapped_layers(mapped) == (0, 2)


@pytest.mark.parametrize("family", ["gpt_neox", "llama"])
def test_layers_left_on_disk(saved, family, tokens, tmp_path):
    """One swapped layer stays on disk and comes in when it is called; its weights are not in memory."""
    folder = saved(family)
    plain = AutoModelForCausalLM.from_pretrained(folder)
    prefix = plain.base_model_prefix
    device_map = {name: "cpu" for name, _ in plain.named_children() if name != prefix}
    device_map |= {f"{prefix}.{name}": "cpu" for name, _ in getattr(plain, prefix).named_children() if name != "layers"}
    device_map |= {f"{prefix}.layers.{i}": "disk" if i == 2 else "cpu" for i in range(3)}
    split = AutoModelForCausalLM.from_pretrained(
        folder, device_map=device_map, offload_folder=tmp_path / "offload", offload_buffers=False
    )
    assert {parameter.device.type for parameter in mixers(split)[2].parameters()} == {"meta"}
    assert {parameter.device.type for parameter in mixers(split)[0].parameters()} == {"cpu"}
    with torch.no_grad():
        torch.testing.assert_close(split(tokens).logits, plain(tokens).logits)
        torch.testing.assert_close(
            split(tokens, attention_mask=left_padded(tokens)).logits,
            plain(tokens, attention_mask=left_padded(tokens)).logits,
        )
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    assert torch.equal(split.generate(tokens, **options), plain.generate(tokens, **options))


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_are_never_split_over_devices(family):
    student = student_of(family)
    assert set(student._no_split_modules) == set(tiny_teacher(family)._no_split_modules)
    assert type(student.get_submodule(f"{student.base_model_prefix}.{FAMILIES[family].blocks}.0")).__name__ in (
        student._no_split_modules
    )


def test_all_mixers_are_tested():
    assert set(mixer_names()) >= {"discrete-mamba2", "mamba", "mamba2"}
