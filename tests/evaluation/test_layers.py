"""Scores of layers against students in which the layer was never swapped; nothing is left changed."""

import copy

import pytest
import torch

import limbeck
from limbeck import LimbeckError
from limbeck.distill import kl_divergence
from limbeck.evaluation import LayerScore, auto_count, choose_layers, score_folder, score_layers
from limbeck.evaluation.layers import restored_attention
from limbeck.students import attention_of, blocks, mixers, swapped_layers
from tiny import VOCABULARY, shaken, tiny_teacher


def make_student(teacher, keep=()):
    student = limbeck.convert(teacher, keep_attention=keep, init="random")
    for mixer in mixers(student).values():
        shaken(mixer)
    return student


def make_twin(student, teacher, layer):
    """The student in which `layer` kept its attention, made by conversion."""
    twin = limbeck.convert(teacher, keep_attention={layer, *set(range(3)) - set(swapped_layers(student))})
    weights = {k: v for k, v in student.state_dict().items() if k in twin.state_dict()}
    missing, unexpected = twin.load_state_dict(weights, strict=False)
    assert not unexpected
    assert len(missing) < len(weights)
    return twin


@pytest.fixture
def batch():
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[0, :4] = 0
    return {"input_ids": torch.randint(3, VOCABULARY, (2, 12)), "attention_mask": mask}


@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("implementations", [("eager", "sdpa"), ("sdpa", "eager"), ("sdpa", "sdpa")], ids="-".join)
@pytest.mark.parametrize("keep", [(), (0,)], ids=["all-swapped", "hybrid"])
@pytest.mark.parametrize("family", ["gpt_neox", "gemma3_text", "stablelm", "llama"])
def test_a_restored_layer_is_one_that_was_never_swapped(family, keep, implementations, padded, batch):
    teacher = tiny_teacher(family, attn_implementation=implementations[0])
    student = make_student(teacher, keep)
    student.set_attn_implementation(implementations[1])
    inputs = batch if padded else {"input_ids": batch["input_ids"]}
    real = inputs.get("attention_mask", torch.ones(2, 12)).bool()
    for layer in swapped_layers(student):
        twin = make_twin(student, teacher, layer)
        with torch.no_grad(), restored_attention(teacher, student, layer):
            found = student(**inputs, use_cache=False).logits[real]
        torch.testing.assert_close(found, twin(**inputs, use_cache=False).logits[real], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["gpt_neox", "stablelm"])
def test_scores_by_hand(family, batch):
    teacher = tiny_teacher(family)
    student = make_student(teacher)
    batches = [batch, {"input_ids": torch.randint(3, VOCABULARY, (3, 7))}]
    counts = [batch["attention_mask"].bool(), torch.ones(3, 7, dtype=torch.bool)]

    @torch.no_grad()
    def kl(model):
        sums = [
            kl_divergence(model(**b, use_cache=False).logits, teacher(**b, use_cache=False).logits)[c].double().sum()
            for b, c in zip(batches, counts, strict=True)
        ]
        return (sum(sums) / sum(c.sum() for c in counts)).item()

    before = kl(student)
    expected = {layer: kl(make_twin(student, teacher, layer)) for layer in range(3)}
    scores = score_layers(teacher, student, batches)
    assert [score.gain for score in scores] == sorted((score.gain for score in scores), reverse=True)
    for score in scores:
        assert score.kl == pytest.approx(expected[score.layer], rel=1e-4)
        assert score.gain == pytest.approx(before - expected[score.layer], rel=1e-3, abs=1e-5)


def test_the_one_layer_that_is_broken_has_all_the_gain(batch):
    teacher = tiny_teacher("gpt_neox")
    student = make_student(teacher, keep=(0, 2))
    (score,) = score_layers(teacher, student, [batch])
    assert score.layer == 1
    assert score.kl == pytest.approx(0.0, abs=1e-5)  # with it restored the student is the teacher
    assert score.gain > 0.01


def test_models_are_left_as_they_were(batch):
    teacher, student = tiny_teacher("stablelm").train(), make_student(tiny_teacher("stablelm"))
    student.set_attn_implementation("eager")
    before = copy.deepcopy(student.state_dict())
    standing = [attention_of(block) for block in blocks(student)]
    hooks = [dict(block._forward_pre_hooks) for block in blocks(student)]
    with torch.no_grad():
        logits = student(**batch).logits

    def same():
        assert [attention_of(block) for block in blocks(student)] == standing
        assert [dict(block._forward_pre_hooks) for block in blocks(student)] == hooks
        assert student.config.swapped_layers == [0, 1, 2]
        assert student.config._attn_implementation == "eager"
        assert teacher.training
        assert not student.training

    score_layers(teacher, student, [batch])
    same()
    with pytest.raises(IndexError):  # a token beyond the vocabulary, in the midst of it
        score_layers(teacher, student, [{"input_ids": torch.full((1, 3), VOCABULARY)}])
    same()
    with pytest.raises(RuntimeError, match="stop"), restored_attention(teacher, student, 1):
        raise RuntimeError("stop")
    same()
    assert all(torch.equal(before[name], value) for name, value in student.state_dict().items())
    with torch.no_grad():
        torch.testing.assert_close(student(**batch).logits, logits, rtol=0, atol=0)


def test_layers_are_chosen_by_gain():
    scores = [LayerScore(2, 0.5, 1.0), LayerScore(0, 0.1, 1.4), LayerScore(1, 0.5, 1.0), LayerScore(3, -0.2, 1.7)]
    assert choose_layers(scores, 1) == [1]  # of equals the lower
    assert choose_layers(scores, 3) == [0, 1, 2]
    for count in (0, 5):
        with pytest.raises(LimbeckError, match=r"1 to 4"):
            choose_layers(scores, count)


def test_auto_is_read():
    assert auto_count("auto:4") == 4
    assert auto_count("4,10") is None
    assert auto_count("") is None
    for wrong in ("auto", "auto:", "auto:0", "auto:-1", "auto:two"):
        with pytest.raises(LimbeckError, match="auto:4"):
            auto_count(wrong)


def test_what_scoring_refuses(batch):
    teacher = tiny_teacher("llama")
    student = make_student(teacher)
    with pytest.raises(LimbeckError, match="has attention in every layer"):
        score_layers(teacher, teacher, [batch])
    with pytest.raises(LimbeckError, match="the teacher is a student itself"):
        score_layers(student, student, [batch])
    with pytest.raises(LimbeckError, match="no tokens"):
        score_layers(teacher, student, [])
    with pytest.raises(LimbeckError, match="num_hidden_layers"):
        score_layers(tiny_teacher("llama", layers=2), student, [batch])
    with pytest.raises(LimbeckError, match="teacher with"):
        score_layers(tiny_teacher("mistral"), student, [batch])
    with pytest.raises(LimbeckError, match="one dtype on one device"):
        score_layers(tiny_teacher("llama", dtype=torch.float64), student, [batch])


def test_folders_on_a_text(teacher_folder, text_file, tmp_path):
    limbeck.convert_folder(teacher_folder, tmp_path / "student")
    options = {"sequence_length": 32, "samples": 6, "batch_size": 4, "device": "cpu"}
    scores = score_folder(teacher_folder, tmp_path / "student", text_file, **options)
    assert {score.layer for score in scores} == {0, 1}
    fresh = score_folder(teacher_folder, None, text_file, **options)
    assert [score.gain for score in fresh] == pytest.approx([score.gain for score in scores], rel=1e-4)
    with pytest.raises(LimbeckError, match="samples = 0"):
        score_folder(teacher_folder, None, text_file, samples=0)
