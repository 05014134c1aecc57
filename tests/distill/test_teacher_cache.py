"""A teacher cache holds what the teacher predicts, is written whole or gone on with, and knows what it belongs to."""

import json

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from limbeck import LimbeckError
from limbeck.distill import (
    Keeping,
    LayerwiseObjective,
    LogitsObjective,
    StageStep,
    TeacherCache,
    kl_divergence,
    write_teacher_cache,
)
from limbeck.distill.teacher_cache import target_of, teacher_fingerprint
from tiny import VOCABULARY, tiny_teacher

SAMPLES, LENGTH = 7, 6
ABOUT = {"teacher": "teacher/", "fingerprint": {"files": {"weights": "f00d"}}, "data": "text/"}
ALL = Keeping(top_k=VOCABULARY, stored="float32", shard_samples=3)


@pytest.fixture(scope="module")
def samples():
    return torch.randint(3, VOCABULARY, (SAMPLES, LENGTH + 1), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def batch_of(samples):
    def batch_of(indices):
        rows = samples[list(indices)]
        return {"input_ids": rows[:, :-1], "labels": rows[:, 1:]}

    return batch_of


@pytest.fixture(scope="module")
def teacher():
    torch.manual_seed(0)
    return tiny_teacher("gpt_neox")


@pytest.fixture
def write(teacher, batch_of):
    def write(folder, keeping=ALL, batch_of=batch_of, teacher=teacher, about=ABOUT, **options):
        given = {"samples": SAMPLES, "batch_size": 2} | options
        return write_teacher_cache(folder, teacher, batch_of, about=about, keeping=keeping, **given)

    return write


def carried(cache, indices, batch_of):
    batch = batch_of(indices)
    return batch | cache.rows(indices, batch)


def bytes_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


# --- what it holds ----------------------------------------------------------------------------------------------------


def test_rows_are_the_teachers_predictions_in_any_order(write, teacher, batch_of, tmp_path):
    cache = write(tmp_path / "cache", Keeping(top_k=5, temperature=2.0, stored="float32", shard_samples=3))
    indices = [6, 0, 3, 3]
    top = target_of(carried(cache, indices, batch_of), cache.vocabulary)
    with torch.no_grad():
        log_probs = (teacher(batch_of(indices)["input_ids"]).logits / 2.0).log_softmax(-1)
    expected, ids = log_probs.topk(5)
    assert torch.equal(top.ids.long(), ids)
    assert_close(top.log_probs, expected, atol=1e-5, rtol=1e-5)
    assert_close(top.log_rest.exp(), 1 - expected.exp().sum(-1), atol=1e-5, rtol=1e-4)


def test_what_float16_costs_is_evened_out(write, batch_of, tmp_path):
    half = write(tmp_path / "half", Keeping(top_k=5, shard_samples=4))
    wide = write(tmp_path / "wide", Keeping(top_k=5, stored="float32", shard_samples=4))
    rows, expected = (target_of(carried(cache, range(4), batch_of), VOCABULARY) for cache in (half, wide))
    assert_close(rows.log_probs, expected.log_probs, atol=5e-3, rtol=0)
    assert not torch.equal(rows.log_probs, expected.log_probs)
    assert_close(rows.log_probs.exp().sum(-1) + rows.log_rest.exp(), torch.ones(4, LENGTH))
    assert sum(path.stat().st_size for path in half.folder.glob("*.npy")) < sum(
        path.stat().st_size for path in wide.folder.glob("*.npy")
    )


@pytest.mark.parametrize("objective", [LogitsObjective, LayerwiseObjective])
def test_an_objective_on_a_whole_cache_is_the_live_one(objective, write, teacher, make_student, batch_of, tmp_path):
    cache = write(tmp_path / "cache", Keeping(VOCABULARY, 2.0, "float32"))
    options = {"temperature": 2.0}
    options |= {"ce_weight": 0.5} if objective is LogitsObjective else {"alpha_layer": 0.0, "alpha_logits": 0.7}
    student = make_student(teacher)
    found = StageStep(student, objective(**options, cached_vocabulary=VOCABULARY))(carried(cache, range(4), batch_of))
    own = torch.autograd.grad(found["loss"], list(student.parameters()), allow_unused=True)
    live = StageStep(student, objective(**options), teacher)(batch_of(range(4)))
    theirs = torch.autograd.grad(live["loss"], list(student.parameters()), allow_unused=True)
    assert found.keys() == live.keys()
    for name in found:
        assert_close(found[name], live[name], atol=1e-5, rtol=1e-5)
    for ours, expected in zip(own, theirs, strict=True):
        assert_close(ours, expected, atol=1e-5, rtol=1e-4)


def test_the_error_of_truncation_shrinks_with_k(write, teacher, make_student, batch_of, tmp_path):
    student, batch = make_student(teacher), batch_of(range(SAMPLES))
    with torch.no_grad():
        ours, theirs = student(batch["input_ids"]).logits, teacher(batch["input_ids"]).logits
        exact = kl_divergence(ours, theirs).mean().item()
    errors = []
    for k in (1, 4, 16, VOCABULARY):
        cache = write(tmp_path / str(k), Keeping(k, stored="float32"))
        step = StageStep(student, LogitsObjective(cached_vocabulary=VOCABULARY))
        errors.append(exact - step(carried(cache, range(SAMPLES), batch_of))["kl"].item())
    assert errors[0] > errors[1] > errors[2] > abs(errors[3])
    assert abs(errors[3]) < 1e-5 * exact


def test_padding_does_not_count(write, teacher, make_student, batch_of, tmp_path):
    def padded(indices):
        mask = torch.ones(len(indices), LENGTH, dtype=torch.long)
        mask[:, 4:] = 0
        return batch_of(indices) | {"attention_mask": mask}

    cache, student = write(tmp_path / "cache", batch_of=padded), make_student(teacher)
    cached = LogitsObjective(cached_vocabulary=VOCABULARY)
    found = StageStep(student, cached)(carried(cache, range(3), padded))
    live = StageStep(student, LogitsObjective(), teacher)(padded(range(3)))
    assert_close(found["loss"], live["loss"], atol=1e-5, rtol=1e-5)
    with pytest.raises(LimbeckError, match="sample 0 has other tokens"):
        cache.rows(range(3), batch_of(range(3)))


# --- how it is written ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("batches_done", "shards_done"), [(0, 0), (1, 0), (2, 1), (3, 1), (4, 2)])
def test_a_killed_and_resumed_cache_has_the_same_bytes(batches_done, shards_done, write, batch_of, tmp_path):
    whole, read = write(tmp_path / "whole"), []

    class Killed(BaseException):
        pass

    def dying(numbers):
        read.append(numbers)
        if len(read) > 2 + batches_done:  # the first two tell the samples from others
            raise Killed
        return batch_of(numbers)

    def counted(numbers):
        read.append(numbers)
        return batch_of(numbers)

    with pytest.raises(Killed):
        write(tmp_path / "killed", batch_of=dying)
    assert len(list((tmp_path / "killed").glob("*.npy"))) == shards_done
    with pytest.raises(LimbeckError, match="an unfinished teacher cache"):
        TeacherCache(tmp_path / "killed")
    read.clear()
    (tmp_path / "killed" / f".writing-shard-0000{shards_done}.npy").write_bytes(b"what kill -9 leaves of a shard")
    write(tmp_path / "killed", batch_of=counted)
    assert bytes_of(tmp_path / "killed") == bytes_of(whole.folder)
    assert read[2].start == 3 * shards_done, "what was done is not done again"
    read.clear()
    write(tmp_path / "killed", batch_of=counted)
    assert len(read) == 2, "a finished one is only compared"


def test_a_kill_before_the_plan_is_there(write, tmp_path):
    (tmp_path / ".writing-plan.json").write_text("{")
    assert len(write(tmp_path)) == SAMPLES


def test_the_manifest_tells_what_it_is(write, tmp_path):
    manifest = write(tmp_path / "cache").manifest
    assert {name: manifest[name] for name in ABOUT} == ABOUT
    assert (manifest["samples"], manifest["sequence_length"], manifest["top_k"]) == (SAMPLES, LENGTH, VOCABULARY)
    assert (manifest["stored"], manifest["computed"]) == ("float32", "float32")
    assert sorted(manifest["files"]) == ["shard-00000.npy", "shard-00001.npy", "shard-00002.npy"]
    rows = np.load(tmp_path / "cache" / "shard-00000.npy", allow_pickle=False)
    assert rows.shape == (3,)
    assert rows["ids"].dtype == np.uint16


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"keeping": Keeping(4, stored="float32", shard_samples=3)}, "top_k = 61"),
        ({"keeping": Keeping(VOCABULARY, 2.0, "float32", 3)}, "temperature = 1.0"),
        ({"about": ABOUT | {"fingerprint": {"files": {"weights": "beef"}}}}, "fingerprint = .*f00d"),
        ({"samples": 5}, "samples = 7|last_sample"),
        ({"batch_of": lambda numbers: {"input_ids": torch.ones(len(numbers), LENGTH).long()}}, "first_sample"),
    ],
)
def test_another_cache_in_its_place_is_refused(changes, words, write, tmp_path):
    before = bytes_of(write(tmp_path / "cache").folder)
    with pytest.raises(LimbeckError, match=f"was begun with .*({words})"):
        write(tmp_path / "cache", **changes)
    assert bytes_of(tmp_path / "cache") == before


@pytest.mark.parametrize(
    ("keeping", "words"),
    [
        (Keeping(0), "top_k = 0"),
        (Keeping(VOCABULARY + 1), f"expected: 1 … {VOCABULARY}"),
        (Keeping(4, 0.0), "temperature = 0.0"),
        (Keeping(4, stored="int8"), "stored in int8"),
    ],
)
def test_options_that_cannot_be(keeping, words, write, tmp_path):
    with pytest.raises(LimbeckError, match=words):
        write(tmp_path / "cache", keeping)
    assert not (tmp_path / "cache").exists()


def test_a_folder_of_something_else_is_refused(write, tmp_path):
    (tmp_path / "thesis.txt").write_text("x")
    with pytest.raises(LimbeckError, match=r"holds thesis.txt"):
        write(tmp_path)
    with pytest.raises(LimbeckError, match="is no teacher cache"):
        TeacherCache(tmp_path)


def test_damage_is_found(write, batch_of, tmp_path):
    folder = write(tmp_path / "cache").folder
    shard = folder / "shard-00001.npy"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(LimbeckError, match=r"shard-00001.npy has sha256"):
        TeacherCache(folder).verify()
    shard.write_bytes(whole[:-8])
    with pytest.raises(LimbeckError, match=rf"shard-00001.npy has {len(whole) - 8} bytes"):
        TeacherCache(folder)
    shard.unlink()
    with pytest.raises(LimbeckError, match=r"shard-00001.npy is missing"):
        TeacherCache(folder)
    shard.write_bytes(whole)
    TeacherCache(folder).verify()
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"format": "other"}))
    with pytest.raises(LimbeckError, match="of format 'other'"):
        TeacherCache(folder)


def test_samples_that_are_not_here_are_refused(write, batch_of, tmp_path):
    cache = write(tmp_path / "cache")
    with pytest.raises(LimbeckError, match="sample 7 is not in"):
        cache.rows([7], batch_of([0]))
    with pytest.raises(LimbeckError, match="sample 1 has other tokens than"):
        cache.rows([0, 1], batch_of([0, 2]))


def test_predictions_that_are_not_finite_are_refused(write, batch_of, make_teacher, tmp_path):
    teacher = make_teacher("gpt_neox")
    with torch.no_grad():
        teacher.get_output_embeddings().weight[3, 0] = torch.nan
    with pytest.raises(LimbeckError, match="not finite"):
        write(tmp_path / "cache", teacher=teacher)
    with torch.no_grad():
        teacher.get_input_embeddings().weight.fill_(torch.nan)
    with pytest.raises(LimbeckError, match="not finite"):
        write(tmp_path / "states", keeping=Keeping(4, hidden="block"), teacher=teacher)


def test_a_teacher_is_known_by_its_weights_wherever_it_lies(teacher, tmp_path):
    teacher.save_pretrained(tmp_path / "one")
    teacher.save_pretrained(tmp_path / "two")
    one = teacher_fingerprint(tmp_path / "one")
    assert one == teacher_fingerprint(tmp_path / "two")
    file = tmp_path / "two" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-4] + b"\0\0\0\0")
    assert one != teacher_fingerprint(tmp_path / "two")
