"""Inspections against matrices and decays by hand."""

import json
import math

import pytest
import torch

import limbeck
from limbeck import LimbeckError
from limbeck.distill import observe
from limbeck.evaluation import inspect_folder, inspect_matrices
from limbeck.evaluation.inspect import decay_length, pooled
from tiny import VOCABULARY, tiny_teacher


@pytest.fixture
def tokens():
    return torch.randint(3, VOCABULARY, (1, 12))


@pytest.mark.parametrize("inputs", ["student", "teacher"])
def test_matrices_and_distances_by_hand(tokens, inputs):
    teacher = tiny_teacher("llama")
    student = limbeck.convert(teacher, keep_attention=[1], init="random").train()
    found = inspect_matrices(student, teacher, tokens, inputs=inputs)
    assert student.training
    student.eval()
    ours, theirs = observe(student, tokens), observe(teacher, tokens)
    assert [layer.layer for layer in found.layers] == [0, 1, 2]
    for layer in found.layers:
        assert (layer.mixer is None) == (layer.layer == 1)
        assert not layer.note
        signals = ours[layer.layer]
        if inputs == "teacher":
            signals.mixer_input = theirs[layer.layer].mixer_input
            signals.query, signals.key = (signals.query, signals.key) if layer.mixer else (
                theirs[layer.layer].query, theirs[layer.layer].key
            )  # fmt: skip
        mixed, attention = signals.matrix()[0], theirs[layer.layer].matrix()[0]
        assert len(layer.heads) == 4
        for head in layer.heads:
            torch.testing.assert_close(head.teacher, attention[head.head])
            torch.testing.assert_close(head.student, mixed[head.head])
            expected = (mixed - attention)[head.head].norm().item()
            assert head.distance == pytest.approx(expected, rel=1e-5, abs=1e-6)
            assert (head.decay_length is None) == (layer.mixer is None)


def test_the_plain_form(tokens):
    teacher = tiny_teacher("gpt_neox")
    found = inspect_matrices(limbeck.convert(teacher), teacher, tokens, layers=[2], tokens=list("abcdefghijkl"))
    plain = json.loads(json.dumps(found.as_json(), allow_nan=False))
    assert list(plain) == ["tokens", "inputs", "layers"]
    assert plain["tokens"] == list("abcdefghijkl")
    (layer,) = plain["layers"]
    assert (layer["layer"], layer["mixer"], layer["note"]) == (2, "DiscreteMamba2", "")
    assert list(layer["heads"][0]) == ["head", "distance", "decay_length", "teacher", "student"]
    assert len(layer["heads"][3]["student"]) == len(layer["heads"][3]["student"][0]) == 12


def test_mixers_without_a_matrix_say_so(tokens):
    teacher = tiny_teacher("gpt_neox")
    found = inspect_matrices(limbeck.convert(teacher, mixer="mamba", init="random"), teacher, tokens)
    for layer in found.layers:
        assert layer.note == "Mamba has no mixing matrix per head: no distance"
        for head in layer.heads:
            assert (head.distance, head.decay_length, head.student) == (None, None, None)
            assert head.teacher.shape == (12, 12)


def test_other_numbers_of_heads_say_so(tokens):
    teacher = tiny_teacher("gpt_neox")
    student = limbeck.convert(teacher, mixer="mamba2", init="random", mixer_kwargs={"headdim": 8})
    layer = inspect_matrices(student, teacher, tokens).layers[0]
    assert layer.note == "8 heads of the mixer against 4 of attention: no distance"
    assert [head.teacher is None for head in layer.heads] == [False] * 4 + [True] * 4
    assert all(head.distance is None and head.decay_length and head.student is not None for head in layer.heads)


def test_decay_lengths_by_hand():
    half = torch.full((50,), -math.log(2))
    assert decay_length(half) == pytest.approx(1 / math.log(2))
    assert decay_length(torch.full((50,), -0.01)) == pytest.approx(100)  # longer than the text
    assert decay_length(torch.full((50,), -4.0)) == pytest.approx(0.25)
    assert decay_length(torch.zeros(50)) is None
    assert decay_length(torch.full((5,), -math.inf)) == pytest.approx(1 / 60)
    # every tenth token forgets all: from a token's start until that token, between 0 and 9 tokens and a bit
    resets = torch.zeros(100)
    resets[9::10] = -60.0
    assert decay_length(resets) == pytest.approx(4.5 + 1 / 60, abs=0.51)


@pytest.mark.parametrize("length", [1, 64, 65, 130, 200])
def test_pooling_keeps_the_sums_of_rows(length):
    matrix = torch.rand(length, length).tril()
    matrix /= matrix.sum(-1, keepdim=True)
    small = pooled(matrix)
    assert len(small) == small.shape[1] <= 64
    torch.testing.assert_close(small.sum(-1), torch.ones(len(small)))
    assert torch.equal(small, small.tril())
    if length <= 64:
        assert small is matrix


def test_folders_on_a_text(teacher_folder, text_file, tmp_path):
    limbeck.convert_folder(teacher_folder, tmp_path / "student")
    found = inspect_folder(tmp_path / "student", teacher_folder, text="the old word for a still", device="cpu")
    assert "".join(found.tokens) == "the old word for a still"
    long = inspect_folder(tmp_path / "student", teacher_folder, data=text_file, max_tokens=70, device="cpu")
    assert len(long.tokens) == 70
    assert long.layers[0].heads[0].teacher.shape == (35, 35)


def test_what_an_inspection_refuses(teacher_folder, text_file, tokens):
    def refused(**options):
        with pytest.raises(LimbeckError) as error:
            inspect_folder(teacher_folder, teacher_folder, device="cpu", **options)
        return str(error.value)

    assert "neither a text nor data" in refused()
    assert "both a text and data" in refused(text="a", data=text_file)
    assert "the text is empty" in refused(text="")
    assert "max_tokens = 0" in refused(text="a", max_tokens=0)
    assert "layer 7" in refused(text="a", layers=[7])
    assert "unknown inputs 'mine'" in refused(text="a", inputs="mine")
    with pytest.raises(LimbeckError, match=r"one text: \(1, length\)"):
        inspect_matrices(tiny_teacher("llama"), tiny_teacher("llama"), tokens.expand(2, -1))
    with pytest.raises(LimbeckError, match="of 2 layers and a teacher of 3"):
        inspect_matrices(tiny_teacher("llama", layers=2), tiny_teacher("llama"), tokens)
