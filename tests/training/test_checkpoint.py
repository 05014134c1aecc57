import json

import pytest
import torch
from toy_stage import ToyStep, micro_batches, optimizer_of

from limbeck.errors import LimbeckError
from limbeck.training import Checkpoints, TrainingState, load_learned, shards
from limbeck.training.checkpoint import learned_tensors

WEIGHTS = "00000-of-00001.safetensors"


def trained(steps=2):
    module = ToyStep()
    optimizer = optimizer_of(module)
    for step in range(steps):
        module(micro_batches(step)[0])["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    return module, optimizer


def checkpoints_in(directory, said=None, **options):
    say = (lambda line: None) if said is None else said.append
    return Checkpoints(directory, **({"stage": "matrix", "fingerprint": "run", "say": say} | options))


def test_everything_comes_back(tmp_path):
    module, optimizer = trained()
    checkpoints = checkpoints_in(tmp_path)
    state = TrainingState(step=2, tokens=40, metrics_bytes=7, best_step=1, best_loss=0.1 + 0.2)
    checkpoints.save(state, module, optimizer)
    drawn = torch.rand(3)

    other = ToyStep()
    fresh = optimizer_of(other)
    torch.manual_seed(99)
    assert checkpoints.restore(other, fresh) == state
    assert torch.equal(torch.rand(3), drawn)
    assert other.seen == 2
    for ours, theirs in zip(module.parameters(), other.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    for before, after in zip(optimizer.state.values(), fresh.state.values(), strict=True):
        assert all(torch.equal(before[key], after[key]) for key in ("step", "exp_avg", "exp_avg_sq"))


def test_only_what_learns_and_persistent_buffers_are_held():
    assert sorted(learned_tensors(ToyStep())) == [
        "embedding.weight",
        "mixer.bias",
        "mixer.weight",
        "norm.bias",
        "norm.weight",
        "seen",
    ]


def test_nothing_to_restore_touches_nothing(tmp_path):
    module, optimizer = trained()
    before = learned_tensors(module)["mixer.weight"].clone()
    assert checkpoints_in(tmp_path / "none").restore(module, optimizer) is None
    assert torch.equal(module.mixer.weight, before)


def test_the_last_are_kept_and_the_best_they_speak_of(tmp_path):
    module, optimizer = trained(1)
    checkpoints = checkpoints_in(tmp_path)
    for step, best in ((10, 5), (20, 15), (30, 15), (40, 35)):
        state = TrainingState(step=step, best_step=best, best_loss=1.0)
        checkpoints.save_best(state, module)
        checkpoints.save(state, module, optimizer)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "best-00000015",
        "best-00000035",
        "step-00000030",
        "step-00000040",
    ]


def test_a_failed_save_leaves_the_previous_checkpoint_and_no_rubbish(tmp_path, monkeypatch):
    module, optimizer = trained(1)
    checkpoints = checkpoints_in(tmp_path)
    checkpoints.save(TrainingState(step=1), module, optimizer)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shards, "save_file", full)
    with pytest.raises(LimbeckError, match=r"step-00000002 could not be written: .*No space left"):
        checkpoints.save(TrainingState(step=2), module, optimizer)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda path: (path / WEIGHTS).write_bytes(b"x"), "safetensors has 1 bytes where"),
        (lambda path: (path / "state.json").write_text('{"step": 3}'), "state.json"),
        (lambda path: (path / WEIGHTS).unlink(), "safetensors is missing"),
        (lambda path: (path / "manifest.json").unlink(), "manifest.json is missing"),
        (lambda path: (path / "manifest.json").write_text("{"), "cannot be followed"),
        (lambda path: (path / "manifest.json").write_text("[]"), "cannot be followed"),
        (lambda path: (path / "manifest.json").write_text('{"format": "other"}'), "its format is 'other'"),
    ],
)
def test_torn_checkpoints_are_passed_over_with_a_line(damage, words, tmp_path):
    module, optimizer = trained(1)
    said = []
    checkpoints_in(tmp_path).save(TrainingState(step=1), module, optimizer)
    newer = checkpoints_in(tmp_path).save(TrainingState(step=2), module, optimizer)
    damage(newer)
    state = checkpoints_in(tmp_path, said).restore(module, optimizer)
    assert state is not None
    assert state.step == 1
    assert len(said) == 1
    assert words in said[0]
    assert str(newer) in said[0]


def test_an_older_torn_checkpoint_does_not_stop_a_save(tmp_path):
    module, optimizer = trained(1)
    checkpoints = checkpoints_in(tmp_path)
    older = checkpoints.save(TrainingState(step=1), module, optimizer)
    (older / "state.json").unlink()
    checkpoints.save(TrainingState(step=2), module, optimizer)
    checkpoints.save(TrainingState(step=3), module, optimizer)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000002", "step-00000003"]


@pytest.mark.parametrize(
    ("other", "words"), [({"stage": "hidden"}, "stage 'hidden', not 'matrix'"), ({"fingerprint": "x"}, "another run")]
)
def test_foreign_checkpoints_are_passed_over_and_left_alone(other, words, tmp_path):
    module, optimizer = trained(1)
    foreign = checkpoints_in(tmp_path, **other).save(TrainingState(step=9), module, optimizer)
    said = []
    checkpoints = checkpoints_in(tmp_path, said)
    assert checkpoints.restore(module, optimizer) is None
    assert words in said[0]
    for step in (1, 2, 3):
        checkpoints.save(TrainingState(step=step), module, optimizer)
    assert foreign.is_dir()
    assert (checkpoints.latest() or foreign).name == "step-00000003"


def test_a_checkpoint_that_does_not_fit_is_an_error(tmp_path):
    module, optimizer = trained(1)
    checkpoints = checkpoints_in(tmp_path)
    path = checkpoints.save(TrainingState(step=1), module, optimizer)
    other = ToyStep()
    other.norm.requires_grad_(False)
    with pytest.raises(LimbeckError, match=r"does not fit the model: norm\.bias, norm\.weight"):
        load_learned(other, path)
    other = ToyStep(dtype=torch.float64)
    with pytest.raises(LimbeckError, match=r"does not fit the model: embedding\.weight"):
        load_learned(other, path)
    with pytest.raises(LimbeckError, match="learns other parameters"):
        checkpoints.restore(module, torch.optim.AdamW(module.mixer.parameters()))


def test_the_manifest_names_every_file(tmp_path):
    module, optimizer = trained(1)
    path = checkpoints_in(tmp_path).save(TrainingState(step=1), module, optimizer)
    manifest = json.loads((path / "manifest.json").read_text())
    assert {file.name for file in path.iterdir()} == {*manifest["files"], "manifest.json"}
    assert (manifest["stage"], manifest["fingerprint"]) == ("matrix", "run")
