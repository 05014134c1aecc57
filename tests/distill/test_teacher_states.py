"""Hidden states in a teacher cache are those that the objective `hidden` would have seen live."""

import copy
from collections import namedtuple

import numpy as np
import pytest
import torch

from limbeck import LimbeckError
from limbeck.distill import HiddenObjective, Keeping, StageStep, TeacherCache, observe, write_teacher_cache
from limbeck.distill.alone import block_arguments
from limbeck.distill.teacher_states import STATES, describe_states, states_of
from limbeck.students import blocks
from tiny import VOCABULARY, WIDTH

SAMPLES, LENGTH, LAYERS = 7, 6, 3
ABOUT = {"teacher": "teacher/", "fingerprint": {}, "data": "text/"}
TARGETS = ("block", "mixer")


@pytest.fixture
def batch_of():
    rows = torch.randint(3, VOCABULARY, (SAMPLES, LENGTH + 1))
    mask = torch.ones(SAMPLES, LENGTH, dtype=torch.long)
    mask[1, :2] = 0

    def batch_of(indices, padded=False):
        found = {"input_ids": rows[list(indices), :-1], "labels": rows[list(indices), 1:]}
        return found | {"attention_mask": mask[list(indices)]} if padded else found

    return batch_of


@pytest.fixture
def write(tmp_path, batch_of):
    def write(teacher, target="block", stored="float32", name="cache", **options):
        keeping = Keeping(4, shard_samples=3, hidden=target, hidden_stored=stored)
        given = {"batch_of": batch_of, "samples": SAMPLES, "about": ABOUT, "batch_size": 2, "keeping": keeping}
        return write_teacher_cache(tmp_path / name, teacher, **(given | options))

    return write


def learned(step, batch):
    loss = step(batch)["loss"]
    loss.backward()
    return loss.detach(), {n: weight.grad for n, weight in step.student.named_parameters() if weight.grad is not None}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("padded", [False, True])
def test_in_float32_the_loss_is_the_live_one_to_the_bit(
    target, padded, family, make_teacher, make_student, write, batch_of
):
    teacher = make_teacher(family)
    cache = write(teacher, target, batch_of=lambda indices: batch_of(indices, padded))
    batch = batch_of([0, 1], padded)  # as they were written: products of other sizes are rounded otherwise
    states = cache.states([0, 1], batch)
    assert states[STATES].shape == (2, LAYERS + 1 if target == "block" else 2 * LAYERS, LENGTH, WIDTH)
    student = make_student(teacher, keep_attention=(1,)).train()
    expected, gradients = learned(StageStep(copy.deepcopy(student), HiddenObjective(target), teacher), batch)
    loss, found = learned(StageStep(student, HiddenObjective(target, cached=True)), batch | states)
    assert torch.equal(loss, expected)
    assert found.keys() == gradients.keys() != set()
    assert all(torch.equal(found[name], gradients[name]) for name in gradients)


def test_samples_come_in_any_order(make_teacher, write, batch_of):
    teacher, indices = make_teacher("gpt_neox"), [6, 0, 3, 3]
    states = write(teacher).states(indices, batch_of(indices))[STATES]
    signals = observe(teacher, batch_of(indices)["input_ids"])
    expected = [layer.block_input for layer in signals] + [signals[LAYERS - 1].block_output]
    torch.testing.assert_close(states, torch.stack(expected, dim=1), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("target", TARGETS)
def test_in_bfloat16_they_are_rounded(target, make_teacher, make_student, write, batch_of):
    teacher = make_teacher("llama")
    wide, narrow = (write(teacher, target, stored, stored) for stored in ("float32", "bfloat16"))
    batch = batch_of(range(4))
    exact, rounded = (cache.states(range(4), batch) for cache in (wide, narrow))
    assert torch.equal(rounded[STATES], exact[STATES].bfloat16())
    assert not torch.equal(rounded[STATES].float(), exact[STATES])
    step = StageStep(make_student(teacher), HiddenObjective(target, cached=True))
    losses = [step(batch | states)["loss"].item() for states in (rounded, exact)]
    assert losses[0] == pytest.approx(losses[1], rel=5e-3)
    with torch.autocast("cpu", torch.bfloat16):
        assert step(batch | rounded)["loss"].item() == pytest.approx(losses[1], rel=2e-2)
    assert narrow.folder.joinpath("shard-00000.npy").stat().st_size < 0.7 * (
        wide.folder.joinpath("shard-00000.npy").stat().st_size
    )


def test_what_blocks_are_called_with_is_known_without_running_them(make_teacher, family, tokens, left_padding):
    teacher = make_teacher(family)
    signals = observe(teacher, tokens, left_padding)
    for block in blocks(teacher):
        block.register_forward_pre_hook(lambda *_: pytest.fail("a block runs"))
    arguments = block_arguments(teacher, signals[0].block_input, left_padding)
    for layer, found in zip(signals, arguments, strict=True):
        assert found.keys() == layer.block_kwargs.keys()
        for name, expected in layer.block_kwargs.items():
            torch.testing.assert_close(found[name], expected, msg=f"{family} {name}")


# --- how it is written ------------------------------------------------------------------------------------------------


def test_a_killed_and_resumed_cache_has_the_same_bytes(make_teacher, write, batch_of):
    class Killed(BaseException):
        pass

    teacher, calls = make_teacher("gpt_neox"), []

    def dying(numbers):
        calls.append(numbers)
        if len(calls) > 5:
            raise Killed
        return batch_of(numbers)

    whole = write(teacher, name="whole")
    with pytest.raises(Killed):
        write(teacher, name="killed", batch_of=dying)
    resumed = write(teacher, name="killed")
    resumed.verify()
    names = sorted(path.name for path in whole.folder.glob("*.*"))
    assert len([name for name in names if name.startswith("shard")]) == 3
    for name in names:
        assert (resumed.folder / name).read_bytes() == (whole.folder / name).read_bytes()
    for changes in ({"target": "mixer"}, {"stored": "bfloat16"}, {"target": None}):
        with pytest.raises(LimbeckError, match="was begun with hidden = "):
            write(teacher, name="whole", **changes)


def test_its_size_is_said_and_must_fit_on_the_disk(make_teacher, write, tmp_path, monkeypatch):
    teacher, said = make_teacher("gpt_neox"), []
    row = 8 + LENGTH * (4 + 4 * (2 + 2) + 2 * (LAYERS + 1) * WIDTH)
    free = namedtuple("Usage", "free")
    monkeypatch.setattr("shutil.disk_usage", lambda _: free(SAMPLES * row - 1))
    with pytest.raises(LimbeckError, match=r"GB free at ") as refusal:
        write(teacher, stored="bfloat16", note=said.append)
    assert "7 samples" in refusal.value.expected
    assert not (tmp_path / "cache").exists()
    assert f"{row / LENGTH:,.0f} bytes a token, {row / LENGTH / 1e3:.3g} GB for a million tokens" in said[0]
    monkeypatch.setattr("shutil.disk_usage", lambda _: free(SAMPLES * row))
    cache = write(teacher, stored="bfloat16")
    assert sum(len(np.load(path)) * row for path in cache.folder.glob("*.npy")) == SAMPLES * row
    monkeypatch.setattr("shutil.disk_usage", lambda _: free(0))
    write(teacher, stored="bfloat16")  # it is there


def test_predictions_are_read_without_the_states(make_teacher, write, batch_of):
    """Which are a thousand times larger: a row is a view of the file."""
    cache = write(make_teacher("gpt_neox"))
    (row,) = cache.compare([2], batch_of([2]))
    assert np.shares_memory(row["states"], cache._shards[0])
    assert cache.rows([2], batch_of([2])).keys() == {"teacher_ids", "teacher_log_probs", "teacher_log_rest"}


# --- what is refused --------------------------------------------------------------------------------------------------


def test_what_cannot_be(make_teacher, write, batch_of):
    teacher = make_teacher("gpt_neox")
    with pytest.raises(LimbeckError, match="hidden states 'blocks'"):
        write(teacher, "blocks")
    with pytest.raises(LimbeckError, match="hidden states stored in float16"):
        write(teacher, stored="float16")
    with pytest.raises(LimbeckError, match="holds no hidden states"):
        write(teacher, None, name="predictions").states([0], batch_of([0]))
    cache = write(teacher)
    with pytest.raises(LimbeckError, match="sample 1 has other tokens"):
        cache.states([1], batch_of([2]))
    assert TeacherCache(cache.folder).manifest["hidden"] == {
        "target": "block",
        "layers": LAYERS,
        "width": WIDTH,
        "stored": "float32",
    }


def test_blocks_that_do_not_follow_one_another(make_teacher, tokens):
    teacher = make_teacher("gpt_neox")
    signals = observe(teacher, tokens).layers
    described = describe_states(teacher, "block", "float32")
    assert states_of(signals, described).shape == (2, LAYERS + 1, 12, WIDTH)
    signals[1].block_input = signals[1].block_input + 1
    with pytest.raises(LimbeckError, match="what block 0 puts out is not what enters block 1"):
        states_of(signals, described)
