"""What goes wrong while a stage learns: numbers that are not finite, losses that jump or leave their curve."""

import math

import pytest
import torch
from safetensors.torch import load_file
from toy_stage import ToyStep, micro_batches, optimizer_of

from limbeck import LimbeckError
from limbeck.training import Checkpoints, Limits, MetricsLog, make_schedule, read_metrics, read_state, train_stage
from limbeck.training.guards import ENOUGH, Guard


class Spoiled(ToyStep):
    """Not finite in the updates of `when`, counted from 1; there are two micro-batches an update."""

    def __init__(self, kind="loss", when=()):
        super().__init__()
        self.kind, self.when = kind, when

    def forward(self, batch):
        terms = super().forward(batch)
        if (int(self.seen) + 1) // 2 in self.when:
            match self.kind:
                case "loss":
                    terms["loss"] = terms["loss"] + float("inf")  # its gradient is finite
                case "gradient":
                    terms["loss"] = terms["loss"] + (self.mixer.weight.sum() * 0).sqrt()
                case "term":
                    terms["ce"] = terms["ce"] / 0
        return terms


def train(directory, module, *, total=8, lr=1e-2, **options):
    settings = {
        "stage": "matrix",
        "batches": micro_batches,
        "schedule": make_schedule("constant", total_steps=total, peak=lr),
        "total_steps": total,
        "tokens_per_step": 20,
        "checkpoints": Checkpoints(directory / "checkpoints", stage="matrix"),
        "checkpoint_every": 1,
    }
    with MetricsLog(directory / "metrics.jsonl") as metrics:
        return train_stage(module, optimizer_of(module), metrics=metrics, **(settings | options))


def lines_of(directory):
    return read_metrics(directory / "metrics.jsonl")


@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_an_update_that_is_not_finite_is_left_out_and_training_goes_on(kind, tmp_path, capsys):
    module, weights = Spoiled(kind, when=[3]), {}

    def batches(step):
        weights[step] = module.mixer.weight.detach().clone()
        return micro_batches(step)

    assert train(tmp_path, module, batches=batches, total=5).steps == 5
    assert torch.equal(weights[2], weights[3])  # the third update
    assert not torch.equal(weights[3], weights[4])
    assert all(weight.isfinite().all() for weight in module.parameters())
    lines = lines_of(tmp_path)
    assert [line["skipped"] for line in lines] == [0, 0, 1, 0, 0]
    assert [line["step"] for line in lines if line["loss" if kind == "loss" else "grad_norm"] is None] == [3]
    told = [line for line in capsys.readouterr().err.splitlines() if "nothing was learned" in line]
    assert len(told) == 1
    assert told[0].startswith("matrix 3: ")
    assert "(1 in a row, 1 in all)" in told[0]


def test_too_many_in_a_row_stop_the_stage_with_the_batch_saved(tmp_path):
    with pytest.raises(LimbeckError, match=r"stage 'matrix', step 6: loss = inf, .*the 3\. update in a row") as error:
        train(tmp_path, Spoiled(when=[1, 4, 5, 6]), limits=Limits(max_nonfinite=3))
    saved = tmp_path / "nonfinite-matrix-6.safetensors"
    assert str(saved) in error.value.found
    batch = load_file(saved)
    expected = micro_batches(5)
    assert batch.keys() == expected[0].keys()
    for key, found in batch.items():
        assert torch.equal(found, torch.cat([part[key] for part in expected]))
    assert [(line["step"], line["skipped"]) for line in lines_of(tmp_path)][-1] == (6, 1)
    assert (tmp_path / "checkpoints/step-00000005").is_dir()


def test_a_batch_that_cannot_be_saved_hides_nothing(tmp_path, monkeypatch):
    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr("limbeck.training.guards.save_file", full)
    with pytest.raises(LimbeckError, match=r"loss = inf.*its batch could not be saved: no space left"):
        train(tmp_path, Spoiled(when=[2]), limits=Limits(max_nonfinite=1))
    assert not list(tmp_path.glob("*nonfinite*"))


def test_the_count_goes_on_across_a_resume(tmp_path):
    """Two before the interruption and one behind it are three in a row; one that was well ends the row."""
    train(tmp_path, Spoiled(when=[1, 3, 4]), total=4, limits=Limits(max_nonfinite=3))
    state = read_state(tmp_path / "checkpoints/step-00000004")
    assert (state.skipped, state.skipped_in_a_row) == (3, 2)
    with pytest.raises(LimbeckError, match=r"the 3\. update in a row"):
        train(tmp_path, Spoiled(when=[5]), total=6, limits=Limits(max_nonfinite=3))
    train(tmp_path, Spoiled(when=[6]), total=6, limits=Limits(max_nonfinite=3))
    state = read_state(tmp_path / "checkpoints/step-00000006")
    assert (state.skipped, state.skipped_in_a_row) == (4, 1)


def test_a_resumed_run_with_holes_equals_an_uninterrupted_one(tmp_path):
    whole, first, second = (Spoiled(when=[2, 5]) for _ in range(3))
    train(tmp_path / "whole", whole)
    train(tmp_path / "parts", first, total=5)
    train(tmp_path / "parts", second)
    for one, other in zip(whole.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_term_that_is_not_finite_is_told_once(tmp_path, capsys):
    train(tmp_path, Spoiled("term", when=[2, 3]), total=4)
    assert [line["skipped"] for line in lines_of(tmp_path)] == [0, 0, 0, 0]
    assert [line["ce"] is None for line in lines_of(tmp_path)] == [False, True, True, False]
    assert capsys.readouterr().err.count("ce = inf, while loss and gradient are finite") == 1


def test_no_learning_from_a_loss_scale_that_is_being_found(tmp_path):
    """An overflow of float16 under a finite loss counts, and is neither told nor the end."""
    guard = guard_of(notes := [], Limits(max_nonfinite=1))
    guard.see(1, {"loss": 1.0, "skipped": 1.0, "loss_scale": 65536.0})
    assert (guard.skipped, guard.skipped_in_a_row, notes) == (1, 0, [])
    with pytest.raises(LimbeckError, match="loss = nan"):
        guard.see(2, {"loss": math.nan, "skipped": 1.0, "loss_scale": 65536.0})


# --- losses that are finite and not as they should be ---------------------------------------------------------------


def guard_of(notes, limits=None, total_steps=1000):
    return Guard("matrix", limits, total_steps=total_steps, note=notes.append, keep=lambda step: f"kept {step}")


def test_a_loss_that_jumps_is_told_once_a_jump():
    guard = guard_of(notes := [])
    noise = torch.rand(200, generator=torch.Generator().manual_seed(3)).tolist()
    for step in range(1, 201):
        guard.see(step, {"loss": 3.0 - step / 100 + 0.3 * noise[step - 1] + 5 * (step in (100, 101, 150))})
    assert [note.split(":")[0] for note in notes] == ["matrix 100", "matrix 150"]


def test_too_few_losses_say_nothing_of_a_jump():
    guard = guard_of(notes := [])
    for step in range(1, ENOUGH + 1):
        guard.see(step, {"loss": 1.0 if step < ENOUGH else 100.0})
    assert notes == []


@pytest.mark.parametrize(
    ("losses", "told"),
    [
        ([5.0, 3.0, 1.0, 0.5], ""),
        ([9.0, 3.0, 1.0, 0.5], "matrix 1: kl of the first update is 9; the recipe expects 4 to 6"),
        ([5.0, 3.0, 2.0, 1.5], "matrix 4: kl of the last update is 1.5; the recipe expects 0.4 to 1"),
        ([5.0, 9.0, 9.0, 0.5], "matrix 2: kl of recent updates is 7; the recipe expects 0.4 to 6"),
    ],
)
def test_a_loss_that_leaves_its_curve_is_told_once(losses, told):
    guard = guard_of(notes := [], Limits(start=(4.0, 6.0), end=(0.4, 1.0)), total_steps=4)
    for step, loss in enumerate(losses, start=1):
        guard.see(step, {"loss": 100.0, "kl": loss})
    assert notes == ([told] if told else [])
