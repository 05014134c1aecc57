"""Perplexity and agreement against sums by hand, and the evaluation of a folder on a text."""

import json
import math

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from limbeck import LimbeckError, load_model, load_tokenizer
from limbeck.data import TokenDataset, collate
from limbeck.evaluation import agreement, by_position, perplexity, sliding_windows
from limbeck.evaluation.perplexity import MOST_NLL, Perplexity, evaluate_on_text, position_edges


@pytest.fixture(scope="module")
def teacher(teacher_folder):
    return load_model(teacher_folder)


@pytest.fixture
def batches():
    dataset = TokenDataset(np.random.default_rng(0).integers(0, 288, 16 * 7 + 1), 16)
    return [collate(dataset, indices) for indices in ([0, 1, 2], [3, 4, 5], [6])]


def test_perplexity_by_hand(teacher, batches):
    nll = []
    with torch.no_grad():
        for batch in batches:
            log_probs = teacher(batch["input_ids"]).logits.double().log_softmax(-1)
            nll += (-log_probs.gather(-1, batch["labels"][..., None])).flatten().tolist()
    found = perplexity(teacher, batches)
    assert found.tokens == len(nll) == 7 * 16
    assert found.nll == pytest.approx(sum(nll) / len(nll), rel=1e-6)
    assert found.perplexity == pytest.approx(math.exp(found.nll))


def test_batches_of_any_size_measure_the_same(teacher, batches):
    joined = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
    assert perplexity(teacher, [joined]).nll == pytest.approx(perplexity(teacher, batches).nll, rel=1e-6)
    twin = load_model(teacher.name_or_path)
    one, many = agreement(twin, teacher, [joined]), agreement(twin, teacher, batches)
    assert (one.top1, one.tokens) == (many.top1, many.tokens)


def test_tokens_without_a_label_are_left_out(teacher, batches):
    masked = [{**batch, "labels": batch["labels"].clone()} for batch in batches]
    for batch in masked:
        batch["labels"][:, ::2] = -100
    found = perplexity(teacher, masked)
    assert found.tokens == 7 * 8
    with torch.no_grad():
        nll = [
            -teacher(b["input_ids"]).logits.log_softmax(-1).gather(-1, b["labels"][..., None])[:, 1::2] for b in batches
        ]
    assert found.nll == pytest.approx(torch.cat([part.flatten() for part in nll]).mean().item(), rel=1e-6)


def test_a_loss_beyond_floats_is_infinite():
    assert math.isfinite(Perplexity(MOST_NLL, 1).perplexity)
    assert Perplexity(MOST_NLL + 1, 1).perplexity == math.inf
    assert math.isnan(Perplexity(math.nan, 1).perplexity)


def test_agreement_by_hand(teacher, student_folder, batches):
    student = load_model(student_folder)
    kl, same = [], []
    with torch.no_grad():
        for batch in batches:
            ours, theirs = (m(batch["input_ids"]).logits.double() for m in (student, teacher))
            kl.append((theirs.softmax(-1) * (theirs.log_softmax(-1) - ours.log_softmax(-1))).sum(-1).flatten())
            same.append((ours.argmax(-1) == theirs.argmax(-1)).flatten().double())
    found = agreement(student, teacher, batches)
    assert found.tokens == 7 * 16
    assert found.kl == pytest.approx(torch.cat(kl).mean().item(), rel=1e-5)
    assert found.top1 == pytest.approx(torch.cat(same).mean().item())
    assert 0 < found.top1 < 1


def test_a_model_agrees_with_itself(teacher, batches):
    found = agreement(teacher, teacher, batches)
    assert (found.kl, found.top1) == (0.0, 1.0)


def test_modes_and_gradients_are_left_alone(teacher_folder, student_folder, batches):
    config = load_model(teacher_folder).config
    config.attention_dropout = config.hidden_dropout = 0.5
    teacher = AutoModelForCausalLM.from_pretrained(teacher_folder, config=config)
    student = load_model(student_folder).train()
    expected = perplexity(teacher.eval(), batches)
    assert perplexity(teacher.train(), batches) == expected  # dropout is off while it is measured
    agreement(student, teacher, batches)
    assert teacher.training
    assert student.training
    assert all(parameter.grad is None for parameter in student.parameters())
    with pytest.raises(KeyError):
        perplexity(teacher, [{}])
    assert teacher.training


def test_a_folder_on_a_text(student_folder, teacher_folder, teacher, text_file):
    options = {"sequence_length": 32, "device": "cpu"}
    figures = evaluate_on_text(student_folder, text_file, teacher=teacher_folder, **options)
    assert list(figures) == ["model", "tokens", "nll", "perplexity", "teacher_perplexity", "kl", "top1"]
    assert figures["tokens"] % 32 == 0
    alone = evaluate_on_text(teacher_folder, text_file, batch_size=3, **options)
    assert alone["perplexity"] == pytest.approx(figures["teacher_perplexity"], rel=1e-5)
    assert "kl" not in alone
    few = evaluate_on_text(teacher_folder, text_file, samples=2, dtype="float64", **options)
    assert few["tokens"] == 64


def test_what_an_evaluation_refuses(student_folder, teacher_folder, text_file, tmp_path):
    with pytest.raises(LimbeckError, match="is shorter than one sample"):
        evaluate_on_text(teacher_folder, text_file, sequence_length=10**6)
    with pytest.raises(LimbeckError, match="samples = 0"):
        evaluate_on_text(teacher_folder, text_file, samples=0)
    with pytest.raises(LimbeckError, match="batch_size = 0"):
        evaluate_on_text(teacher_folder, text_file, batch_size=0)
    with pytest.raises(LimbeckError, match="unknown dtype 'float8'"):
        evaluate_on_text(teacher_folder, text_file, dtype="float8")
    config = load_model(teacher_folder).config
    config.vocab_size = 300
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(LimbeckError, match="the student's vocabulary has 288 tokens"):
        evaluate_on_text(student_folder, text_file, teacher=tmp_path)


def test_windows_predict_every_token_once(teacher):
    tokens = np.random.default_rng(1).integers(0, 288, 75)
    for length, stride, batch_size in ((16, 5, 3), (16, 16, 8), (16, 1, 8), (74, 10, 2), (100, 30, 8)):
        predicted, contexts = [], []
        for batch in sliding_windows(tokens, length, stride, batch_size):
            assert len(batch["labels"]) <= batch_size
            kept = batch["labels"] != -100
            predicted += batch["labels"][kept].tolist()
            contexts += kept.nonzero()[:, 1].tolist()
        assert predicted == tokens[1:].tolist()
        assert min(contexts[length:], default=length) >= min(length, 74) - stride  # beyond the first window


def test_sliding_perplexity_by_hand(teacher):
    """The plainest form: every token from its own window."""
    tokens = np.random.default_rng(2).integers(0, 288, 40)
    nll = []
    with torch.no_grad():
        for t in range(1, 40):
            window = torch.from_numpy(tokens[max(0, t - 8) : t])[None]
            nll.append(-teacher(window).logits[0, -1].double().log_softmax(-1)[tokens[t]].item())
    found = perplexity(teacher, sliding_windows(tokens, 8, 1, 4))
    assert (found.tokens, found.nll) == (39, pytest.approx(sum(nll) / 39, rel=1e-6))


def test_windows_refuse(teacher):
    for stride in (0, 9):
        with pytest.raises(LimbeckError, match=f"stride = {stride}"):
            next(sliding_windows(np.arange(20), 8, stride))
    with pytest.raises(LimbeckError, match="a text of 1 tokens has none to predict"):
        next(sliding_windows(np.arange(1), 8, 4))


def test_positions_add_up_to_the_whole(teacher, student_folder):
    dataset = TokenDataset(np.random.default_rng(0).integers(0, 288, 70 * 3 + 1), 70)
    batches = [collate(dataset, indices) for indices in ([0, 1], [2])]
    batches[1]["labels"] = batches[1]["labels"].clone()
    batches[1]["labels"][:, :16] = -100
    student = load_model(student_folder)
    parts = by_position(student, batches, teacher)
    assert [(part.start, part.end) for part in parts] == [(0, 16), (16, 32), (32, 64), (64, 70)]
    lengths = [part.end - part.start for part in parts]
    close = agreement(student, teacher, batches)
    assert sum(p.kl * n for p, n in zip(parts, lengths, strict=True)) / 70 == pytest.approx(close.kl, rel=1e-5)
    assert sum(p.top1 * n for p, n in zip(parts, lengths, strict=True)) / 70 == pytest.approx(close.top1)
    labelled = [2 * 16, *(3 * n for n in lengths[1:])]
    total = sum(p.nll * n for p, n in zip(parts, labelled, strict=True)) / sum(labelled)
    assert total == pytest.approx(perplexity(student, batches).nll, rel=1e-5)
    alone = by_position(student, batches)
    assert [part.kl for part in alone] == [None] * 4
    assert alone[0].nll == pytest.approx(parts[0].nll)
    assert by_position(student, []) == []
    assert position_edges(16) == [0, 16]
    assert position_edges(5) == [0, 5]


@pytest.mark.slow
def test_details_and_strides_of_a_text(student_folder, teacher_folder, text_file, tmp_path):
    options = {"sequence_length": 32, "device": "cpu"}
    plain = evaluate_on_text(student_folder, text_file, **options)
    whole = evaluate_on_text(student_folder, text_file, teacher=teacher_folder, stride=8, details=True, **options)
    tokens = load_tokenizer(teacher_folder)(text_file.read_text())["input_ids"]
    assert whole["tokens"] == len(tokens)  # all but the first, and the separator
    bits = whole["nll"] / math.log(2) * (len(tokens) + 1) / text_file.stat().st_size
    assert whole["bits_per_byte"] == pytest.approx(bits)
    assert [part["to"] for part in whole["by_position"]] == [16, 32]
    assert set(whole["by_position"][0]) == {"from", "to", "nll", "kl", "top1"}
    assert whole.keys() - plain.keys() == {"teacher_perplexity", "kl", "top1", "bits_per_byte", "by_position"}
    few = evaluate_on_text(student_folder, text_file, samples=2, stride=32, **options)
    assert few["tokens"] == 64
    assert few["nll"] == pytest.approx(evaluate_on_text(student_folder, text_file, samples=2, **options)["nll"])
    np.save(tmp_path / "tokens.npy", np.array(tokens, dtype=np.uint16))
    assert evaluate_on_text(student_folder, tmp_path / "tokens.npy", details=True, **options)["bits_per_byte"] is None
    tasks = tmp_path / "tasks.jsonl"
    tasks.write_text(json.dumps({"prompt": "the old", "completion": " word"}) + "\n")
    with pytest.raises(LimbeckError, match="a stride over samples"):
        evaluate_on_text(student_folder, tasks, stride=8, **options)


def test_an_empty_text_and_a_teacher_that_reads_other_tokens(student_folder, teacher_folder, text_file, tmp_path):
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(LimbeckError, match=r"no text in .*empty\.txt"):
        evaluate_on_text(student_folder, tmp_path / "empty.txt")
    load_model(teacher_folder).save_pretrained(tmp_path / "other")
    options = {"teacher": tmp_path / "other", "samples": 1, "sequence_length": 32}
    assert evaluate_on_text(student_folder, text_file, **options)["kl"] > 0  # no tokenizer of its own
    load_tokenizer(teacher_folder).save_pretrained(tmp_path / "other")
    path = tmp_path / "other" / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["merges"] = content["model"]["merges"][:2]
    path.write_text(json.dumps(content))
    with pytest.raises(LimbeckError, match=r"the tokenizers of .* differ: one makes \d+ tokens"):
        evaluate_on_text(student_folder, text_file, **options)
