"""Reaching into models, and the projections of an attention layer in one layout."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, BertConfig, Gemma3TextConfig, GPT2Config, OlmoConfig

import limbeck
from limbeck import LimbeckError
from limbeck.students import (
    FAMILIES,
    Family,
    attention_of,
    backbone,
    blocks,
    family_of,
    mixer_of,
    mixers,
    register_family,
    swapped_layers,
)
from limbeck.students.families import separate_projections


def linear(hidden_states, weight, bias):
    return nn.functional.linear(hidden_states, weight, bias)


def attend(hidden_states, weights):
    """Causal attention without rotary embedding, from the projections alone."""
    h, p = weights.num_heads, weights.head_dim
    (key, key_bias), (value, value_bias) = weights.per_head("key"), weights.per_head("value")
    q = linear(hidden_states, weights.query, weights.query_bias).unflatten(-1, (h, p)).transpose(1, 2)
    k = linear(hidden_states, key, key_bias).unflatten(-1, (h, p)).transpose(1, 2)
    v = linear(hidden_states, value, value_bias).unflatten(-1, (h, p)).transpose(1, 2)
    scores = q @ k.mT * weights.scale  # (b, h, l, l)
    scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -torch.inf)
    mixed = (scores.softmax(-1) @ v).transpose(1, 2).flatten(-2)
    return linear(mixed, weights.output, weights.output_bias)


WITHOUT_BIAS = {"gpt_neox": {"attention_bias": False}, "stablelm": {"use_qkv_bias": False}}
WITH_BIAS = {name: {"attention_bias": True} for name in ("gemma2", "gemma3_text", "granite", "llama", "olmo2")}


@pytest.mark.parametrize(
    ("family", "options"),
    [*((name, {}) for name in FAMILIES), *WITH_BIAS.items(), *WITHOUT_BIAS.items()],
    ids=str,
)
def test_attention_weights_are_the_attention(make_teacher, family, options):
    """Without what no mixer can start from: norms of queries and keys, soft cap, rotation."""
    teacher = make_teacher(family, **options)
    attention = attention_of(blocks(teacher)[1])
    for name, _ in list(attention.named_children()):
        if "norm" in name:
            setattr(attention, name, nn.Identity())
    attention.attn_logit_softcapping = None
    weights = family_of(teacher.config).attention_weights(attention, teacher.config)
    hidden_states = torch.randn(2, 7, 32)
    width = getattr(attention, "rotary_ndims", weights.head_dim)
    no_rotation = (torch.ones(1, 7, width), torch.zeros(1, 7, width))
    mask = torch.full((1, 1, 7, 7), -torch.inf).triu(1)
    expected, _ = attention(hidden_states, position_embeddings=no_rotation, attention_mask=mask)
    torch.testing.assert_close(attend(hidden_states, weights), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "options", "lost"),
    [
        ("gemma2", {}, "soft cap"),
        ("gemma2", {"attn_logit_softcapping": None}, None),
        ("gemma3_text", {}, "norms of queries"),
        ("olmo2", {}, "norms of queries"),
        ("qwen3", {}, "norms of queries"),
        ("phi", {"qk_layernorm": True}, "layer norms of queries"),
        ("stablelm", {}, "layer norms of queries"),
        ("stablelm", {"qk_layernorm": False}, None),
        ("mistral", {}, None),
    ],
)
def test_what_no_mixer_can_start_from_is_noted(make_teacher, caplog, family, options, lost):
    limbeck.convert(make_teacher(family, **options), keep_attention=[1])
    if lost is None:
        assert "soft cap" not in caplog.text
        assert "norms" not in caplog.text
    else:
        assert f"the {lost}" in caplog.text
        assert "(layers 0, 2)" in caplog.text


@pytest.mark.parametrize(
    ("config", "field"),
    [(GPT2Config, "add_cross_attention"), (Gemma3TextConfig, "use_bidirectional_attention")],
)
def test_what_is_no_causal_decoder_is_refused(config, field):
    with pytest.raises(LimbeckError, match=f"{field} is set"):
        limbeck.student_config(config(**{field: True}))


def test_a_head_wider_than_its_share(make_teacher):
    teacher = make_teacher("llama", head_dim=12)
    weights = family_of(teacher.config).attention_weights(attention_of(blocks(teacher)[0]), teacher.config)
    assert weights.query.shape == (48, 32)
    assert weights.output.shape == (32, 48)


@pytest.mark.parametrize("family", FAMILIES)
def test_reaching_into_teachers_and_students(make_teacher, make_student, family):
    teacher, student = make_teacher(family), make_student(family, (1,))
    assert len(blocks(teacher)) == len(blocks(student)) == 3
    assert backbone(backbone(teacher)) is backbone(teacher)
    assert mixers(teacher) == {}
    assert swapped_layers(teacher) == ()
    assert swapped_layers(student) == (0, 2)
    assert mixer_of(blocks(student)[1]) is None
    assert mixer_of(blocks(student)[2]) is mixers(student)[2]
    assert attention_of(blocks(student)[2]).mixer is mixers(student)[2]
    assert type(attention_of(blocks(student)[1])) is type(attention_of(blocks(teacher)[1]))
    assert family_of(student.config) is family_of(teacher.config)


def test_an_unknown_family_lists_the_known_and_points_to_the_guide():
    with pytest.raises(
        LimbeckError, match=r"unknown family 'bert'\n.*gemma2, .* llama, .*\ntry: docs/add-a-family\.md"
    ):
        family_of(BertConfig())


def test_a_family_of_ones_own(tmp_path):
    config = OlmoConfig(
        vocab_size=17,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=8,
    )
    teacher = AutoModelForCausalLM.from_config(config)
    register_family(Family(OlmoConfig, separate_projections))
    try:
        student = limbeck.convert(teacher, keep_attention=[0]).eval()
        student.save_pretrained(tmp_path)
        again = AutoModelForCausalLM.from_pretrained(tmp_path)
        tokens = torch.arange(6)[None]
        assert torch.equal(again(tokens).logits, student(tokens).logits)
    finally:
        del FAMILIES["olmo"]


def test_a_foreign_block_is_refused():
    with pytest.raises(LimbeckError, match="Linear has no attention"):
        attention_of(nn.Linear(1, 1))


def test_the_documents_list_every_family():
    page = (Path(__file__).parents[2] / "docs" / "students.md").read_text(encoding="utf-8")
    table = page.split("| | teachers |")[1].split("\n\n")[0]
    assert re.findall(r"^\| `(\w+)` \|", table, re.M) == sorted(FAMILIES)
