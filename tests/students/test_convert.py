"""Conversion: everything but the mixers is the teacher's, the teacher stays as it is, nothing is half written."""

import logging

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, GenerationConfig

import limbeck
from limbeck import LimbeckError, convert, student_config
from limbeck.students import attention_of, blocks, mixers
from limbeck.students.activations import fuse_activations


def state_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_zero_layers_swapped_is_the_teacher(make_teacher, family, tokens):
    teacher = make_teacher(family)
    student = convert(teacher, keep_attention=range(3))
    fuse_activations(teacher)
    assert torch.equal(student(tokens).logits, teacher(tokens).logits)


@pytest.mark.parametrize("init", ["attention", "identity", "random"])
def test_all_but_the_mixers_is_the_teachers(make_teacher, family, keep, init):
    teacher = make_teacher(family)
    before, configuration = state_of(teacher), teacher.config.to_dict()
    student = convert(teacher, keep_attention=keep, init=init)
    for name, tensor in student.state_dict().items():
        if ".mixer." not in name:
            assert torch.equal(tensor, before[name]), name
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.zero_()
    assert teacher.config.to_dict() == configuration
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())
    assert not mixers(teacher)


def test_mode_dtype_and_settings_carry_over(make_teacher, family):
    teacher = make_teacher(family, dtype=torch.bfloat16).train()
    teacher.generation_config = GenerationConfig(eos_token_id=[1, 5], top_p=0.5, do_sample=True)
    teacher.set_attn_implementation("eager")
    student = convert(teacher, keep_attention=[0])
    assert student.training
    assert student.dtype == torch.bfloat16
    assert student.generation_config.eos_token_id == [1, 5]
    assert student.generation_config is not teacher.generation_config
    assert student.config._attn_implementation == "eager"
    assert {parameter.dtype for name, parameter in student.named_parameters() if not name.endswith("mixer.D")} == {
        torch.bfloat16
    }


def test_tied_embeddings_stay_tied(make_teacher, family, tokens, tmp_path):
    teacher = make_teacher(family, tie_word_embeddings=True)
    student = convert(teacher, keep_attention=[1])
    student.save_pretrained(tmp_path / "student")
    teacher.save_pretrained(tmp_path / "teacher")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    fresh = AutoModelForCausalLM.from_pretrained(tmp_path / "teacher", config=student.config)
    for model in (student, again, fresh):
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert model.get_input_embeddings().weight is not teacher.get_input_embeddings().weight
    assert torch.equal(again(tokens).logits, student(tokens).logits)


def test_the_seed_decides_and_the_global_state_stays(make_teacher):
    teacher = make_teacher("llama")
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first, same, other = (convert(teacher, init="identity", seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.rand(3), expected)
    weight = "model.layers.0.self_attn.mixer.in_proj.weight"
    assert torch.equal(first.state_dict()[weight], same.state_dict()[weight])
    assert not torch.equal(first.state_dict()[weight], other.state_dict()[weight])


def test_a_start_from_attention_is_linear_attention(make_teacher, family):
    """With no decay the untrained mixer is attention without softmax, rotary embedding and output bias."""
    teacher = make_teacher(family)
    student = convert(teacher)
    weights_of = limbeck.students.family_of(teacher.config).attention_weights
    weights = weights_of(attention_of(blocks(teacher)[1]), teacher.config)
    mixer = mixers(student)[1]
    u = torch.randn(2, 5, 32)

    def heads(weight, bias):
        return torch.nn.functional.linear(u, weight, bias).unflatten(-1, (4, 8)).transpose(1, 2)

    q, k, v = (
        heads(weights.query, weights.query_bias),
        heads(*weights.per_head("key")),
        heads(*weights.per_head("value")),
    )
    steps = torch.arange(5.0)
    decay = torch.exp2(-(steps[:, None] - steps)).tril()  # half at every step
    mixed = (q @ k.mT * weights.scale * decay) @ v
    expected = mixed.transpose(1, 2).flatten(-2) @ weights.output.mT
    torch.testing.assert_close(mixer(u), expected, rtol=1e-4, atol=1e-4)


def test_what_is_lost_is_said(make_teacher, caplog):
    with caplog.at_level(logging.WARNING, logger="limbeck"):
        convert(make_teacher("phi", qk_layernorm=True), keep_attention=[1])
    assert "output bias is lost" in caplog.text
    assert "layer norms of queries and keys are lost (layers 0, 2)" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="limbeck"):
        convert(make_teacher("llama"))
    assert caplog.text == ""


def test_mixer_options(make_teacher):
    student = convert(make_teacher("llama"), mixer_kwargs={"d_state": 24, "d_conv": 2})
    assert mixers(student)[0].d_state == 24
    assert student.config.mixer_kwargs == {
        "d_inner": 32,
        "d_state": 24,
        "n_qk_heads": 4,
        "n_v_heads": 4,
        "d_conv": 2,
    }


def test_heads_wider_than_their_share(make_teacher, tokens):
    student = convert(make_teacher("llama", head_dim=12))
    assert mixers(student)[0].d_inner == 48
    assert student(tokens).logits.isfinite().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mixer": "discrete-mamba"}, r"unknown mixer 'discrete-mamba'[\s\S]*did you mean 'discrete-mamba2'"),
        ({"mixer_kwargs": {"d_sate": 4}}, r"'d_sate'[\s\S]*did you mean 'd_state'"),
        ({"mixer_kwargs": {"n_v_heads": 5}}, "n_v_heads"),
        ({"keep_attention": [3]}, r"keep_attention \[3\][\s\S]*0 to 2"),
        ({"keep_attention": [-1]}, "counted from 0"),
        ({"init": "atention"}, r"unknown init 'atention'[\s\S]*did you mean 'attention'"),
    ],
)
def test_wrong_options_are_refused(make_teacher, options, message):
    with pytest.raises(LimbeckError, match=message):
        convert(make_teacher("gpt_neox"), **options)


def test_wrong_models_are_refused(make_teacher):
    teacher = make_teacher("gpt_neox")
    with pytest.raises(LimbeckError, match="student already"):
        convert(convert(teacher))
    with pytest.raises(LimbeckError, match="cannot convert a GPTNeoXModel"):
        convert(teacher.gpt_neox)
    teacher.is_quantized = True
    with pytest.raises(LimbeckError, match="quantised"):
        convert(teacher)


# --- folders ----------------------------------------------------------------------------------------------------------


def test_a_teachers_folder_with_a_students_configuration(make_teacher, family, keep, tmp_path):
    teacher = make_teacher(family)
    teacher.save_pretrained(tmp_path)
    config = student_config(teacher.config, keep_attention=keep, init="random")
    student, info = AutoModelForCausalLM.from_pretrained(tmp_path, config=config, output_loading_info=True)
    swapped = [i for i in range(3) if i not in keep]
    assert set(info["missing_keys"]) == {name for name in student.state_dict() if ".mixer." in name}
    assert {int(name.split(".")[2]) for name in info["unexpected_keys"]} == set(swapped)
    for name, tensor in student.state_dict().items():
        if ".mixer." not in name:
            assert torch.equal(tensor, teacher.state_dict()[name]), name
    assert all(tensor.isfinite().all() for tensor in student.state_dict().values())
    assert all(mixer.D.eq(1).all() for mixer in mixers(student).values())
    body = AutoModel.from_pretrained(tmp_path, config=config)
    assert len(blocks(body)) == 3


def test_a_folder_is_converted_in_memory_too(make_teacher, tmp_path, tokens):
    make_teacher("gpt_neox").save_pretrained(tmp_path)
    expected = convert(AutoModelForCausalLM.from_pretrained(tmp_path), keep_attention=[1], seed=3)
    assert torch.equal(convert(tmp_path, keep_attention=[1], seed=3)(tokens).logits, expected(tokens).logits)
