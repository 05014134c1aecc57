"""Trackers, with stand-ins for their packages: what they are told, and that nothing they do can end a run."""

import json
import sys
import threading
import types

import pytest
from toy_stage import ToyStep, micro_batches, optimizer_of

from limbeck import LimbeckError
from limbeck.training import (
    Checkpoints,
    MetricsLog,
    check_trackers,
    make_schedule,
    open_trackers,
    read_metrics,
    train_stage,
)
from limbeck.training import trackers as module


class FakeRun:
    def __init__(self, **given):
        self.given, self.logged, self.closed = given, [], False

    def log(self, numbers, step):
        self.logged.append((step, numbers))

    def add_scalar(self, name, value, step):
        self.logged.append((step, {name: value}))

    def finish(self):
        self.closed = True

    close = finish


@pytest.fixture
def fakes(monkeypatch):
    """The runs that were opened, by tracker; `init` of each package can be replaced in `sys.modules`."""
    opened = {"tensorboard": [], "wandb": [], "trackio": []}

    def opener(name):
        def open_run(**given):
            opened[name].append(FakeRun(**given))
            return opened[name][-1]

        return open_run

    for name, attribute in (("tensorboard", "SummaryWriter"), ("wandb", "init"), ("trackio", "init")):
        fake = types.ModuleType(name)
        setattr(fake, attribute, opener(name))
        monkeypatch.setitem(sys.modules, module.TRACKERS[name][0], fake)
    return opened


def opened_in(folder, *names, notes=None, **options):
    folder.mkdir(exist_ok=True)
    note = print if notes is None else notes.append
    return open_trackers(names, folder / "trackers.json", offsets={"matrix": 0, "logits": 7}, note=note, **options)


def test_each_tracker_gets_every_number_at_a_step_that_grows(fakes, tmp_path):
    with opened_in(tmp_path / "mine", "tensorboard", "wandb", "trackio", project="p", entity="us") as trackers:
        trackers.take([{"stage": "matrix", "step": 7, "time": 1.0, "loss": 3.0, "lr": 0.1, "grad_norm": float("nan")}])
        trackers.take([{"stage": "logits", "step": 0, "reference_perfect": None, "eval_loss": 2.0}])
        trackers.take([{"stage": "logits", "step": 1, "loss": 1.0}])
    (wandb,), (trackio,), (board,) = fakes["wandb"], fakes["trackio"], fakes["tensorboard"]
    expected = [(7, {"matrix/loss": 3.0, "matrix/lr": 0.1}), (7, {"logits/eval_loss": 2.0}), (8, {"logits/loss": 1.0})]
    assert wandb.logged == trackio.logged == expected
    assert board.logged == [(step, {name: value}) for step, numbers in expected for name, value in numbers.items()]
    assert wandb.closed
    assert trackio.closed
    assert board.closed
    assert board.given == {"log_dir": str(tmp_path / "mine" / "tensorboard")}
    assert wandb.given["dir"] == str(tmp_path / "mine")
    assert (wandb.given["project"], wandb.given["entity"], wandb.given["name"]) == ("p", "us", "mine")


def test_a_resume_keeps_the_trackers_run(fakes, tmp_path):
    for _ in range(2):
        opened_in(tmp_path / "mine", "wandb", "trackio").close()
    opened_in(tmp_path / "other", "wandb", "trackio", run_name="mine").close()
    first, second, other = (run.given["id"] for run in fakes["wandb"])
    assert first == second != other
    assert {run.given["resume"] for runs in fakes.values() for run in runs} == {"allow"}
    names = [run.given["name"] for run in fakes["trackio"]]
    assert names[0] == names[1] == f"mine-{first}"
    assert names[2] == f"mine-{other}"
    assert json.loads((tmp_path / "mine" / "trackers.json").read_text()) == {"id": first, "name": "mine"}


def test_no_trackers_leave_nothing(tmp_path):
    opened_in(tmp_path / "mine").close()
    assert not list((tmp_path / "mine").iterdir())


def test_a_missing_package_is_an_error_with_its_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(LimbeckError, match="tracker 'wandb' cannot be imported") as error:
        check_trackers(["wandb"])
    assert error.value.hint.startswith("pip install wandb")
    with pytest.raises(LimbeckError, match="unknown tracker 'wandbb'"):
        check_trackers(["wandbb"])


# --- trackers that fail ---------------------------------------------------------------------------------------------


def train(directory, trackers):
    with MetricsLog(directory / "metrics.jsonl", trackers) as metrics:
        step = ToyStep()
        return train_stage(
            step,
            optimizer_of(step),
            stage="matrix",
            batches=micro_batches,
            schedule=make_schedule("constant", total_steps=4, peak=1e-2),
            total_steps=4,
            tokens_per_step=20,
            metrics=metrics,
            checkpoints=Checkpoints(directory / "checkpoints", stage="matrix"),
        )


def fail_at(fakes, monkeypatch, moment):
    """Let wandb raise when it is opened, at its second line, or at its end."""

    def fail(*_, **__):
        raise ConnectionError("the network is gone")

    if moment == "open":
        monkeypatch.setattr(sys.modules["wandb"], "init", fail)
    elif moment == "close":
        monkeypatch.setattr(FakeRun, "finish", fail)
    else:
        logged = FakeRun.log

        def log(self, numbers, step):
            if self in fakes["wandb"] and step == 2:
                fail()
            logged(self, numbers, step)

        monkeypatch.setattr(FakeRun, "log", log)


@pytest.mark.parametrize("moment", ["open", "log", "close"])
def test_a_tracker_that_raises_is_told_once_and_left_out(moment, fakes, monkeypatch, tmp_path):
    fail_at(fakes, monkeypatch, moment)
    trackers = opened_in(tmp_path, "wandb", "tensorboard", notes=(notes := []))
    with trackers:
        assert train(tmp_path, trackers).steps == 4
    expected = "tracker wandb is left out from now on: ConnectionError: the network is gone. metrics.jsonl has all"
    assert notes == [expected]
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]
    assert {step for step, _ in fakes["tensorboard"][0].logged} == {1, 2, 3, 4}  # the other one goes on


@pytest.mark.parametrize("moment", ["open", "log"])
def test_a_tracker_that_hangs_holds_nothing_up(moment, fakes, monkeypatch, tmp_path):
    released = threading.Event()
    if moment == "open":
        monkeypatch.setattr(sys.modules["wandb"], "init", lambda **_: released.wait(30))
    else:
        monkeypatch.setattr(FakeRun, "log", lambda *_, **__: released.wait(30))
    monkeypatch.setattr(module, "WAITING", 2)
    try:
        trackers = opened_in(tmp_path, "wandb", notes=(notes := []))
        assert train(tmp_path, trackers).steps == 4
        trackers.close(seconds=0.01)
    finally:
        released.set()
    assert notes == ["tracker wandb is left out from now on: it is 2 lines behind. metrics.jsonl has all"]
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 4


def test_a_tracker_that_does_not_end_is_left_behind(fakes, monkeypatch, tmp_path):
    released = threading.Event()
    monkeypatch.setattr(FakeRun, "finish", lambda _: released.wait(30))
    try:
        trackers = opened_in(tmp_path, "wandb", notes=(notes := []))
        trackers.close(seconds=0.01)
    finally:
        released.set()
    assert [note for note in notes if "does not come to an end" in note] == notes
    assert len(notes) == 1
